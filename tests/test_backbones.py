"""CLIPs to start from: loaded by name or from a file, written down and built again, and recognised by their weights."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import open_clip
import pytest
import torch
import transformers
from fakes import TEXT, TINY_RELEASED, VISION, forget_open_clip
from hosts import BY_NAME
from PIL import Image
from saved_models import SENTENCES, official
from support import CONFIG, injected
from torch import Tensor, nn

import pvl_adapter as pvl
from pvl_adapter.hub.backbones import build_backbone, describe_backbone, fingerprint, load_unimedclip


@pytest.fixture(params=["native", "bert", "timm"])
def name(request, open_clip_models) -> str:
    return open_clip_models[request.param]


# --- open_clip's by name ---------------------------------------------------------------------------------------------


def test_a_model_of_open_clip_is_ready_for_adapters(name):
    backbone = pvl.load_backbone(name)
    model = pvl.MedCLIPSeg(pvl.inject_adapters(backbone.clip, CONFIG), tokenizer=backbone.tokenizer)
    images = torch.stack([backbone.preprocess(Image.new("RGB", (50, 70), (200, 30, 90)))] * 2)

    assert not any(module.training for module in backbone.clip.modules())
    assert images.shape == (2, 3, *model.image_size)
    assert model(images, SENTENCES).logits.shape == (2, *model.image_size)
    half = pvl.load_backbone(name, dtype=torch.bfloat16, device="cpu").clip
    for clip, dtype in ((backbone.clip, torch.float32), (half, torch.bfloat16)):
        assert {parameter.dtype for parameter in clip.parameters()} == {dtype}


def test_a_model_of_open_clip_in_a_local_folder(open_clip_models, words, tmp_path):
    torch.manual_seed(3)
    clip = pvl.load_backbone(open_clip_models["native"]).clip
    model = open_clip.get_model_config(open_clip_models["native"])
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")

    loaded = pvl.load_backbone(f"local-dir:{tmp_path}")

    assert fingerprint(loaded.clip) == fingerprint(clip)
    model = pvl.MedCLIPSeg(pvl.inject_adapters(loaded.clip, CONFIG), tokenizer=loaded.tokenizer)
    again = pvl.from_pretrained(model.save_pretrained(tmp_path / "saved"))
    picture = torch.rand(3, 20, 30)
    assert torch.equal(again.prepare(picture), model.prepare(picture))  # with the mean of that folder
    assert list(again.clip.visual.image_mean) == [0.1, 0.2, 0.3]


def test_with_a_tokenizer_of_ones_own_the_other_is_not_needed(words, tmp_path):
    """As on a machine without a network that has the weights only."""
    pooling = {"hf_pooler_type": "cls_pooler", "hf_proj_type": "mlp"}
    text = {"hf_model_name": str(words), "hf_tokenizer_name": "nobody/nothing", **pooling}
    with forget_open_clip():
        config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}
        (tmp_path / "pvl-test-bare.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path)

        with pytest.raises(OSError, match="couldn't connect"):
            pvl.load_backbone("pvl-test-bare")
        own = transformers.AutoTokenizer.from_pretrained(words)
        for given in (words, str(words), own):
            tokenizer = pvl.load_backbone("pvl-test-bare", tokenizer=given).tokenizer
            assert tokenizer(SENTENCES)["input_ids"] == own(SENTENCES)["input_ids"]


def as_published(clip: nn.Module) -> dict[str, Tensor]:
    """With the names of its authors, and what else their file holds."""
    tensors = {}
    for key, tensor in clip.state_dict().items():
        tensors[f"module.{key.replace('text.', 'text_encoder.', 1) if key.startswith('text.') else key}"] = tensor
    tensors["module.text_encoder.transformer.embeddings.position_ids"] = torch.arange(TINY_RELEASED.positions)[None]
    width = TINY_RELEASED.text_width
    pooler = "module.text_encoder.transformer.pooler.dense"
    tensors |= {f"{pooler}.weight": torch.zeros(width, width), f"{pooler}.bias": torch.zeros(width)}
    return tensors


def test_unimedclip_is_read_from_its_file(words, tmp_path):
    clip = pvl.remove_adapters(official(words).clip)
    torch.save({"state_dict": as_published(clip), "epoch": 3}, tmp_path / "unimed.pt")
    image, ids = torch.randn(2, 3, 32, 32), torch.tensor([[2, 5, 6, 3, 0, 0], [2, 7, 3, 0, 0, 0]])

    loaded = load_unimedclip(tmp_path / "unimed.pt", network=TINY_RELEASED)

    assert all(torch.equal(tensor, clip.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(image), clip.encode_image(image))
        assert torch.equal(loaded.encode_text(ids), clip.encode_text(ids))
    assert describe_backbone(loaded)["name"] == "UniMedCLIP"


KEY = "module.visual.proj"
DAMAGE: dict[str, tuple[Any, str]] = {
    "missing": (lambda tensors: tensors.pop(KEY), "missing: visual.proj"),
    "other_shape": (lambda tensors: tensors.update({KEY: torch.zeros(3, 2)}), r"visual\.proj has shape \(3, 2\)"),
    "nan": (lambda tensors: tensors.update({KEY: torch.full((32, 16), torch.nan)}), "visual.proj.*NaN"),
    "nothing": (lambda tensors: tensors.clear(), "expected tensors by name"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_not_unimedclips_is_refused(words, tmp_path, change, message):
    file, tensors = tmp_path / "unimed.pt", as_published(pvl.remove_adapters(official(words).clip))
    torch.save({"state_dict": tensors}, file)
    with pytest.raises(ValueError, match=r"unimed\.pt do not fit: .*shape"):
        pvl.load_backbone("UniMedCLIP", path=file)
    with pytest.raises(ValueError, match="text_layers is 100000"):
        load_unimedclip(file, network=dataclasses.replace(TINY_RELEASED, text_layers=100_000))
    change(tensors)
    torch.save({"state_dict": tensors}, file)

    with pytest.raises(ValueError, match=message):
        load_unimedclip(file, network=TINY_RELEASED)


@pytest.mark.parametrize("keep", [0, 5000, 30_000])
def test_a_truncated_file_is_refused(words, tmp_path, keep):
    """At whichever of torch's errors it ends."""
    torch.save({"state_dict": as_published(pvl.remove_adapters(official(words).clip))}, tmp_path / "unimed.pt")
    (tmp_path / "unimed.pt").write_bytes((tmp_path / "unimed.pt").read_bytes()[:keep])

    with pytest.raises(ValueError, match=r"unimed\.pt is damaged or no torch file"):
        load_unimedclip(tmp_path / "unimed.pt", network=TINY_RELEASED)


@pytest.mark.slow
def test_pubmedclip_is_read_from_its_file(tmp_path):
    """In OpenAI's names and half precision, with the numbers that OpenAI puts among the tensors."""
    torch.manual_seed(3)
    clip = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
    tensors = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    numbers = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    tensors |= {name: torch.tensor(number) for name, number in numbers.items()}
    torch.save({"state_dict": tensors, "epoch": 5}, tmp_path / "pubmed.pth")

    backbone = pvl.load_backbone("PubMedCLIP", path=tmp_path / "pubmed.pth")

    for name, tensor in backbone.clip.state_dict().items():
        assert torch.equal(tensor, tensors[name].float()), name
    assert describe_backbone(backbone.clip)["name"] == "PubMedCLIP"
    model = pvl.MedCLIPSeg(pvl.inject_adapters(backbone.clip), tokenizer=backbone.tokenizer).eval()
    picture = backbone.preprocess(Image.new("RGB", (50, 70)))[None]
    with torch.no_grad():
        expected = model(picture, ["a tumor"]).logits
        loaded = pvl.from_pretrained(model.save_pretrained(tmp_path / "saved"))
        assert torch.equal(loaded(picture, ["a tumor"]).logits, expected)


REFUSALS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "unknown": ("nothing", {}, ValueError, r"no backbone 'nothing'; known are UniMedCLIP, BiomedCLIP, PubMedCLIP"),
    "other_letters": ("unimedclip", {}, ValueError, "known are UniMedCLIP"),
    "path_of_open_clip": ("ViT-B-32", {"path": "x.pt"}, ValueError, r"as pretrained=\.\.\."),
    "pretrained_of_clip": ("CLIP", {"pretrained": "openai"}, ValueError, "one set of weights only"),
    "unknown_weights": ("ViT-B-32", {"pretrained": "none_such"}, ValueError, "no weights 'none_such'.*openai"),
    "absent_file": ("UniMedCLIP", {"path": "nowhere/x.pt"}, FileNotFoundError, r"nowhere/x\.pt"),
    "absent_folder": ("local-dir:/nowhere", {}, FileNotFoundError, "/nowhere"),
    "unimedclip_offline": ("UniMedCLIP", {}, FileNotFoundError, "cache.*with a network"),
    "no_such_file": ("ViT-B-32", {"tokenizer": "./nowhere"}, FileNotFoundError, "nowhere does not exist"),
    "clip_offline": ("CLIP", {}, OSError, r"cannot be had.*network.*pretrained=\.\.\."),
    "hub_offline": ("hf-hub:nobody/nothing", {}, OSError, "hf-hub:nobody/nothing cannot be had"),
    "weights_offline": ("ViT-B-32", {"pretrained": "laion2b_s34b_b79k"}, OSError, "ViT-B-32 cannot be had"),
    "tokenizer_offline": ("PubMedCLIP", {"tokenizer": "nobody/nothing"}, OSError, "nobody/nothing.*cache"),
}


@pytest.mark.parametrize(("name", "more", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_loaded_is_refused(name, more, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(error, match=message):
        pvl.load_backbone(name, cache_dir=tmp_path / "cache", **more)


def test_a_damaged_weights_file_of_open_clip_is_refused(open_clip_models, tmp_path):
    for content in (b"", b"\x80\x02}q\x00."):  # nothing, and a mapping without tensors
        (tmp_path / "weights.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.pt is damaged.*pvl-test-native"):
            pvl.load_backbone(open_clip_models["native"], pretrained=str(tmp_path / "weights.pt"))


# --- written down and built again ------------------------------------------------------------------------------------


def assert_built_again(clip: nn.Module) -> None:
    """From its description as config.json holds it, which stays as it is, twice in a row."""
    before = json.dumps(describe_backbone(clip))
    description, other = json.loads(before), clip
    for _ in range(2):
        other = build_backbone(json.loads(json.dumps(describe_backbone(other))))
        assert repr(other) == repr(clip)
        assert {n: t.shape for n, t in other.state_dict().items()} == {n: t.shape for n, t in clip.state_dict().items()}
        assert not any(module.training for module in other.modules())
        assert json.loads(json.dumps(describe_backbone(other))) == description
    for device in ("cpu", "meta"):  # transformers takes entries out of the nested configurations that it is given
        build_backbone(description, device=device)
        assert json.dumps(description) == before


def test_a_model_of_open_clip_is_built_again(name):
    assert_built_again(pvl.load_backbone(name).clip)


def test_a_model_of_transformers_is_built_again(host):
    if host.name.startswith("transformers"):
        assert_built_again(host.build())
        return
    with pytest.raises(ValueError, match=r"does not tell which model of open_clip it is.*load_backbone"):
        describe_backbone(host.build())


def test_what_describes_no_clip_is_refused():
    for description in ({}, {"library": "jax"}):
        with pytest.raises(ValueError, match=r"not official, open_clip or transformers"):
            build_backbone(description)
    for name in ("NoModel", "AutoModel", "logging"):
        with pytest.raises(ValueError, match=f"no model class '{name}'"):
            build_backbone({"library": "transformers", "class": name, "config": {}})


# --- recognised by their weights -------------------------------------------------------------------------------------

HOST = BY_NAME["open_clip-bert"]


def test_every_weight_matters_but_neither_bfloat16_nor_adapters(host):
    clip = host.build()
    before = fingerprint(clip)

    assert fingerprint(clip.to(torch.bfloat16)) == before
    clip = injected(host)
    assert fingerprint(clip) == before
    assert fingerprint(pvl.remove_adapters(clip)) == before
    for parameter in list(clip.parameters())[::10]:
        parameter.data.view(-1)[-1] += 0.5
        assert fingerprint(clip) != before
        parameter.data.view(-1)[-1] -= 0.5


def test_other_clips_are_told_apart():
    """Also with weights exchanged, or another activation, as open_clip's "ViT-B-16" and "ViT-B-16-quickgelu"."""
    clips = [*(host.build() for host in BY_NAME.values()), HOST.build()]
    one, other = (block.ln_1 for block in clips[-1].visual.transformer.resblocks[:2])
    one.weight.data, other.weight.data = other.weight.data, one.weight.data
    for quick in (False, True):
        torch.manual_seed(0)
        clips.append(open_clip.CustomTextCLIP(16, VISION, TEXT, quick_gelu=quick))

    assert all(torch.equal(tensor, clips[-2].state_dict()[name]) for name, tensor in clips[-1].state_dict().items())
    assert len({fingerprint(clip) for clip in clips}) == len(clips)
