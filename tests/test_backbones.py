"""CLIPs to start from: loaded by name or from a file, written down and built again, and recognised by their weights."""

from __future__ import annotations

import json
from typing import Any

import open_clip
import pytest
import torch
import transformers
from fakes import TINY_RELEASED, forget_open_clip
from hosts import BY_NAME
from PIL import Image
from support import CONFIG, injected, randomise
from torch import Tensor, nn

import pvl_adapter as pvl
from pvl_adapter.hub.backbones import build_backbone, describe_backbone, fingerprint, load_unimedclip

SENTENCES = ["a tumor at the left", "one polyp"]


@pytest.fixture(params=["native", "bert", "timm"])
def name(request, open_clip_models) -> str:
    return open_clip_models[request.param]


# --- open_clip's by name ---------------------------------------------------------------------------------------------


def test_a_model_of_open_clip_is_ready_for_adapters(name):
    backbone = pvl.load_backbone(name)
    clip, tokenizer, preprocess = backbone
    picture = Image.new("RGB", (50, 70), (200, 30, 90))

    assert clip is backbone.clip
    assert not any(module.training for module in clip.modules())
    pvl.inject_adapters(clip, CONFIG)
    images = torch.stack([preprocess(picture)] * 2)
    model = pvl.MedCLIPSeg(clip, tokenizer=tokenizer).eval()

    assert images.shape == (2, 3, *model.image_size)
    assert model(images, SENTENCES).logits.shape == (2, *model.image_size)
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}


def test_weights_of_a_model_of_open_clip_come_from_a_file(open_clip_models, tmp_path):
    torch.manual_seed(3)
    expected = pvl.load_backbone(open_clip_models["native"]).clip.state_dict()
    torch.save(expected, tmp_path / "weights.pt")

    loaded = pvl.load_backbone(open_clip_models["native"], pretrained=str(tmp_path / "weights.pt")).clip

    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


def test_type_and_device_of_a_backbone_can_be_chosen(open_clip_models):
    clip = pvl.load_backbone(open_clip_models["bert"], dtype=torch.bfloat16, device="cpu").clip

    assert {parameter.dtype for parameter in clip.parameters()} == {torch.bfloat16}
    assert {tensor.device.type for tensor in [*clip.parameters(), *clip.buffers()]} == {"cpu"}


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


@pytest.mark.parametrize("form", ["path", "str", "object"])
def test_another_tokenizer_can_be_given(open_clip_models, words, form):
    own = transformers.AutoTokenizer.from_pretrained(words)
    given: Any = {"path": words, "str": str(words), "object": own}[form]

    tokenizer = pvl.load_backbone(open_clip_models["native"], tokenizer=given).tokenizer

    assert tokenizer(SENTENCES)["input_ids"] == own(SENTENCES)["input_ids"]


def test_with_a_tokenizer_of_ones_own_the_other_is_not_needed(words, tmp_path):
    """As on a machine without a network that has the weights only."""
    text = {
        "hf_model_name": str(words),
        "hf_tokenizer_name": "nobody/nothing",
        "hf_pooler_type": "cls_pooler",
        "hf_proj_type": "mlp",
    }
    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 16}
    with forget_open_clip():
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
        (tmp_path / "pvl-test-bare.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path)

        with pytest.raises(OSError, match="couldn't connect"):
            pvl.load_backbone("pvl-test-bare")
        assert callable(pvl.load_backbone("pvl-test-bare", tokenizer=words).tokenizer)


# --- UniMedCLIP ------------------------------------------------------------------------------------------------------


def tiny_clip() -> nn.Module:
    """A small CLIP of UniMedCLIP's kind, with values."""
    torch.manual_seed(0)
    clip = TINY_RELEASED.build_clip().to_empty(device="cpu")
    for buffer_name, buffer in clip.named_buffers():
        buffer.copy_(torch.arange(buffer.shape[-1]) if buffer_name.endswith("position_ids") else buffer * 0)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.normal_(std=0.1)
    return clip


def as_published(clip: nn.Module) -> dict[str, Tensor]:
    """With the names of its authors, and what else their file holds."""
    tensors = {}
    for key, tensor in clip.state_dict().items():
        tensors[f"module.{key.replace('text.', 'text_encoder.', 1) if key.startswith('text.') else key}"] = tensor
    tensors["module.text_encoder.transformer.embeddings.position_ids"] = torch.arange(TINY_RELEASED.positions)[None]
    width = TINY_RELEASED.text_width
    tensors["module.text_encoder.transformer.pooler.dense.weight"] = torch.zeros(
        TINY_RELEASED.text_width, TINY_RELEASED.text_width
    )
    tensors["module.text_encoder.transformer.pooler.dense.bias"] = torch.zeros(width)
    return tensors


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", [True, False], ids=["module", "plain"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict", "bare"])
def test_unimedclip_is_read_from_its_file(tmp_path, prefix, wrapped):
    clip = tiny_clip()
    tensors = as_published(clip) if prefix else without_prefix(as_published(clip))
    torch.save({"state_dict": tensors, "epoch": 3} if wrapped else tensors, tmp_path / "unimed.pt")
    image, ids = torch.randn(2, 3, 32, 32), torch.tensor([[2, 5, 6, 3, 0, 0], [2, 7, 3, 0, 0, 0]])

    loaded = load_unimedclip(tmp_path / "unimed.pt", network=TINY_RELEASED)

    assert all(torch.equal(tensor, clip.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(image), clip.encode_image(image))
        assert torch.equal(loaded.encode_text(ids), clip.encode_text(ids))
    pvl.inject_adapters(loaded, CONFIG)
    assert describe_backbone(loaded)["name"] == "UniMedCLIP"


def test_a_segmenter_on_unimedclip_comes_back_whole_and_in_part(tmp_path, words):
    torch.save({"state_dict": as_published(tiny_clip())}, tmp_path / "unimed.pt")
    clip = pvl.inject_adapters(load_unimedclip(tmp_path / "unimed.pt", network=TINY_RELEASED), CONFIG)
    randomise(clip.pvl_adapters)
    tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    model = pvl.MedCLIPSeg(clip, tokenizer=tokenizer).eval()
    image = torch.randn(2, 3, 32, 32)

    whole = pvl.from_pretrained(model.save_pretrained(tmp_path / "whole"))
    fresh = load_unimedclip(tmp_path / "unimed.pt", network=TINY_RELEASED)
    part = pvl.from_pretrained(model.save_pretrained(tmp_path / "part", whole=False), clip=fresh)

    with torch.no_grad():
        expected = model(image, SENTENCES).logits
        assert torch.equal(whole(image, SENTENCES).logits, expected)
        assert torch.equal(part(image, SENTENCES).logits, expected)


KEY = "module.visual.proj"
DAMAGE: dict[str, tuple[Any, str]] = {
    "missing": (lambda tensors: tensors.pop(KEY), r"missing.*visual\.proj"),
    "unknown": (lambda tensors: tensors.update(more=torch.zeros(2)), "unexpected.*more"),
    "other_shape": (lambda tensors: tensors.update({KEY: torch.zeros(3, 2)}), r"visual\.proj has shape \(3, 2\)"),
    "nan": (lambda tensors: tensors.update({KEY: torch.full((32, 16), torch.nan)}), "visual.proj.*NaN"),
    "integers": (lambda tensors: tensors.update({KEY: torch.zeros(32, 16).long()}), "floating-point.*visual.proj"),
    "no_tensor": (lambda tensors: tensors.update({KEY: [1, 2]}), "visual.proj.*a list"),
    "nothing": (lambda tensors: tensors.clear(), "expected tensors by name"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_not_unimedclips_is_refused(tmp_path, change, message):
    tensors = as_published(tiny_clip())
    change(tensors)
    torch.save({"state_dict": tensors}, tmp_path / "unimed.pt")

    with pytest.raises(ValueError, match=message):
        load_unimedclip(tmp_path / "unimed.pt", network=TINY_RELEASED)


@pytest.mark.parametrize("content", [b"", b"hello" * 50, b"PK\x03\x04" + b"\x00" * 90], ids=["empty", "text", "zip"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "unimed.pt").write_bytes(content)

    with pytest.raises(ValueError, match=r"unimed\.pt is damaged or no torch file"):
        load_unimedclip(tmp_path / "unimed.pt", network=TINY_RELEASED)


def test_a_truncated_file_is_refused(tmp_path):
    torch.save({"state_dict": as_published(tiny_clip())}, tmp_path / "unimed.pt")
    content = (tmp_path / "unimed.pt").read_bytes()
    (tmp_path / "unimed.pt").write_bytes(content[: len(content) // 2])

    with pytest.raises(ValueError, match=r"unimed\.pt is damaged or no torch file"):
        load_unimedclip(tmp_path / "unimed.pt", network=TINY_RELEASED)


def test_a_file_of_another_size_is_refused_by_name_too(tmp_path):
    torch.save({"state_dict": as_published(tiny_clip())}, tmp_path / "unimed.pt")

    with pytest.raises(ValueError, match=r"unimed\.pt do not fit: .*shape"):
        pvl.load_backbone("UniMedCLIP", path=tmp_path / "unimed.pt")


# --- PubMedCLIP ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict", "bare"])
def test_pubmedclip_is_read_from_its_file(tmp_path, wrapped):
    """In OpenAI's names and half precision, with the numbers that OpenAI puts among the tensors."""
    torch.manual_seed(3)
    clip = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
    tensors = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    numbers = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    tensors |= {name: torch.tensor(number) for name, number in numbers.items()}
    torch.save({"state_dict": tensors, "epoch": 5} if wrapped else tensors, tmp_path / "pubmed.pth")

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


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "unknown": ("nothing", {}, ValueError, r"no backbone 'nothing'; known are UniMedCLIP, BiomedCLIP, PubMedCLIP"),
    "empty": ("", {}, ValueError, "no backbone ''"),
    "other_letters": ("unimedclip", {}, ValueError, "known are UniMedCLIP"),
    "path_of_open_clip": ("ViT-B-32", {"path": "x.pt"}, ValueError, r"as pretrained=\.\.\."),
    "path_of_clip": ("CLIP", {"path": "x.pt"}, ValueError, "path is for UniMedCLIP and PubMedCLIP"),
    "pretrained_of_clip": ("CLIP", {"pretrained": "openai"}, ValueError, "one set of weights only"),
    "pretrained_of_unimedclip": ("UniMedCLIP", {"pretrained": "x"}, ValueError, "one set of weights only"),
    "unknown_weights": ("ViT-B-32", {"pretrained": "none_such"}, ValueError, "no weights 'none_such'.*openai"),
    "absent_file": ("UniMedCLIP", {"path": "nowhere/x.pt"}, FileNotFoundError, r"nowhere/x\.pt"),
    "absent_folder": ("local-dir:/nowhere", {}, FileNotFoundError, "/nowhere"),
    "unimedclip_offline": ("UniMedCLIP", {}, FileNotFoundError, "not in the cache.*network"),
    "pubmedclip_offline": ("PubMedCLIP", {}, FileNotFoundError, "not in the cache.*network"),
    "clip_offline": ("CLIP", {}, OSError, r"cannot be had.*network.*pretrained=\.\.\."),
    "biomedclip_offline": ("BiomedCLIP", {}, OSError, "cannot be had.*network"),
    "hub_offline": ("hf-hub:nobody/nothing", {}, OSError, "hf-hub:nobody/nothing cannot be had"),
    "weights_offline": ("ViT-B-32", {"pretrained": "laion2b_s34b_b79k"}, OSError, "ViT-B-32 cannot be had"),
    "tokenizer_offline": ("PubMedCLIP", {"tokenizer": "nobody/nothing"}, OSError, "not in the cache"),
}


@pytest.mark.parametrize(("name", "more", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_loaded_is_refused(name, more, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(error, match=message):
        pvl.load_backbone(name, cache_dir=tmp_path / "cache", **more)


@pytest.mark.parametrize("content", [b"", b"hello" * 50, b"\x80\x02}q\x00."], ids=["empty", "text", "no_tensors"])
def test_a_damaged_weights_file_of_open_clip_is_refused(open_clip_models, tmp_path, content):
    (tmp_path / "weights.pt").write_bytes(content)

    with pytest.raises(ValueError, match=r"weights\.pt is damaged, or holds no weights of pvl-test-native"):
        pvl.load_backbone(open_clip_models["native"], pretrained=str(tmp_path / "weights.pt"))


# --- written down and built again ------------------------------------------------------------------------------------


def shapes(clip: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in clip.state_dict().items()}


def assert_built_again(clip: nn.Module) -> None:
    description = json.loads(json.dumps(describe_backbone(clip)))  # as config.json holds it
    built = build_backbone(description)
    again = build_backbone(json.loads(json.dumps(describe_backbone(built))))

    for other in (built, again):
        assert repr(other) == repr(clip)
        assert shapes(other) == shapes(clip)
        assert not any(module.training for module in other.modules())
        assert json.loads(json.dumps(describe_backbone(other))) == description


def test_a_model_of_open_clip_is_built_again(name):
    assert_built_again(pvl.load_backbone(name).clip)


def test_a_model_of_transformers_is_built_again(host):
    if not host.name.startswith("transformers"):
        with pytest.raises(ValueError, match=r"does not tell which model of open_clip it is.*load_backbone"):
            describe_backbone(host.build())
        return
    assert_built_again(host.build())


def test_unimedclip_is_built_again(tmp_path):
    torch.save({"state_dict": as_published(tiny_clip())}, tmp_path / "unimed.pt")

    assert_built_again(load_unimedclip(tmp_path / "unimed.pt", network=TINY_RELEASED))


def test_a_description_is_not_changed_by_building(name):
    description = describe_backbone(pvl.load_backbone(name).clip)
    before = json.dumps(description)

    build_backbone(description)

    assert json.dumps(description) == before


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"library": "jax"}, "of the kind 'jax', expected released, open_clip or transformers"),
        ({}, "of the kind None"),
        ({"library": "transformers", "class": "NoModel", "config": {}}, "no model class 'NoModel'.*newer"),
        ({"library": "transformers", "class": "AutoModel", "config": {}}, "no model class 'AutoModel'"),
        ({"library": "transformers", "class": "logging", "config": {}}, "no model class 'logging'"),
    ],
    ids=["library", "nothing", "class", "no_model", "module"],
)
def test_what_describes_no_clip_is_refused(description, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(description)


# --- recognised by their weights -------------------------------------------------------------------------------------

HOST = BY_NAME["open_clip-bert"]


def test_a_copy_in_bfloat16_is_the_same_clip(host):
    clip = host.build()

    before = fingerprint(clip)

    assert fingerprint(host.build()) == before
    assert fingerprint(clip.to(torch.bfloat16)) == before
    assert fingerprint(clip.float()) == before


def test_adapters_do_not_matter(host):
    before = fingerprint(host.build())

    clip = injected(host)
    assert fingerprint(clip) == before
    randomise(clip.pvl_adapters, seed=7)
    assert fingerprint(clip) == before
    assert fingerprint(pvl.remove_adapters(clip)) == before


@pytest.mark.parametrize("part", ["visual.conv1.weight", "text.proj.0.weight", "logit_scale"])
def test_every_weight_matters(part):
    clip = HOST.build()
    before = fingerprint(clip)

    with torch.no_grad():
        clip.get_parameter(part).view(-1)[-1].add_(0.5)

    assert fingerprint(clip) != before


def test_where_a_weight_belongs_matters():
    clip = HOST.build()
    before = fingerprint(clip)
    one, other = clip.visual.transformer.resblocks[0].ln_1, clip.visual.transformer.resblocks[1].ln_1

    one.weight.data, other.weight.data = other.weight.data, one.weight.data

    assert fingerprint(clip) != before


def test_other_clips_are_told_apart():
    prints = {fingerprint(host.build()) for host in BY_NAME.values()}

    assert len(prints) == len(BY_NAME)
    assert fingerprint(HOST.build(seed=1)) not in prints


def test_the_same_weights_with_another_activation_are_another_clip():
    """As OpenAI's weights under open_clip's "ViT-B-16" and "ViT-B-16-quickgelu"."""
    clips = []
    for quick in (False, True):
        torch.manual_seed(0)
        vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 16}
        text = {"context_length": 12, "vocab_size": 100, "width": 24, "heads": 3, "layers": 3}
        clips.append(open_clip.CustomTextCLIP(16, vision, text, quick_gelu=quick))

    assert all(torch.equal(tensor, clips[1].state_dict()[name]) for name, tensor in clips[0].state_dict().items())
    assert fingerprint(clips[0]) != fingerprint(clips[1])
