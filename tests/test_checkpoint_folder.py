"""Whole models on disk: saved and loaded exactly, self-contained, checked first, and never half written."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from fakes import TINY_RELEASED, WORDS
from hosts import BY_NAME, CORE_HOSTS, Host
from open_clip.tokenizer import HFTokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import CONFIG, edit_json, full_disk, injected, kill_while, randomise, truncate, unchanged
from torch import Tensor, nn

import pvl_adapter as pvl
from pvl_adapter.towers.huggingface import HFImage

SENTENCES = ["a tumor at the left", "one polyp"]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def official_file(tmp_path_factory) -> Path:
    """A small network as the official code writes it."""
    tensors = load_file(Path(__file__).parent / "goldens" / "medclipseg_tiny.safetensors")
    network = {name.removeprefix("checkpoint."): t for name, t in tensors.items() if name.startswith("checkpoint.")}
    path = tmp_path_factory.mktemp("official") / "tiny.pth"
    torch.save({"model": network, "epoch": 3, "optimizer": {}, "scheduler": {}, "best_loss": 0.5}, path)
    return path


def official(file: Path, words: Path) -> pvl.MedCLIPSeg:
    return pvl.from_pretrained(file, network=TINY_RELEASED, tokenizer=words)


def with_head(clip: nn.Module, **settings: Any) -> pvl.MedCLIPSeg:
    """A segmenter whose every parameter matters, in eval mode."""
    model = pvl.MedCLIPSeg(clip, **settings).eval()
    randomise(model.head, seed=1)
    return model


def segmenter(host: Host, **settings: Any) -> pvl.MedCLIPSeg:
    return with_head(injected(host), **settings)


def of_open_clip(name: str, *, adapters: pvl.PVLConfig = CONFIG, **settings: Any) -> pvl.MedCLIPSeg:
    torch.manual_seed(0)
    backbone = pvl.load_backbone(name)
    pvl.inject_adapters(backbone.clip, adapters)
    randomise(backbone.clip.pvl_adapters)
    return with_head(backbone.clip, tokenizer=backbone.tokenizer, **settings)


@pytest.fixture(params=["official", "bert"])
def model(request, official_file, words, open_clip_models) -> pvl.MedCLIPSeg:
    """Models with a tokenizer: of the official code (built without values) and of open_clip."""
    return official(official_file, words) if request.param == "official" else of_open_clip(open_clip_models["bert"])


@pytest.fixture
def tiny(official_file, words) -> pvl.MedCLIPSeg:
    return official(official_file, words)


def logits(model: pvl.MedCLIPSeg, text: Any = None, *, image: Tensor | None = None) -> Tensor:
    """Of the same images and the same draws."""
    if image is None:
        image = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(1))
    image = image.to(next(model.clip.parameters()).dtype)
    with torch.no_grad():
        draws = torch.Generator().manual_seed(0)
        return model(image, SENTENCES if text is None else text, sample=True, generator=draws).logits


def assert_equal_models(got: pvl.MedCLIPSeg, expected: pvl.MedCLIPSeg, host: Host | None = None) -> None:
    """In every weight, setting, training flag, and in their logits."""
    given = {} if host is None else {"text": host.text, "image": host.image}
    assert torch.equal(logits(got, **given), logits(expected, **given))
    if host is None:
        assert got.config == expected.config
    assert not any(module.training for module in got.modules())
    one, other = got.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name
    flags = [{name: p.requires_grad for name, p in m.named_parameters()} for m in (got, expected)]
    assert flags[0] == flags[1]


def weights_file(folder: Path) -> Path:
    return folder / "model.safetensors"


def config_file(folder: Path) -> Path:
    return folder / "config.json"


def vocabulary(folder: Path) -> Path:
    (found,) = folder.glob("tokenizer-*/tokenizer.json")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def frozen_names(model: pvl.MedCLIPSeg) -> set[str]:
    return {f"clip.{name}" for name in model.clip.state_dict() if not name.startswith("pvl_adapters.")}


# --- whole -----------------------------------------------------------------------------------------------------------


def test_a_whole_model_comes_back_bit_for_bit_and_is_left_as_it_was(model, tmp_path):
    with unchanged(model):
        folder = model.save_pretrained(tmp_path / "new" / "folder")

    assert folder == tmp_path / "new" / "folder"
    assert_equal_models(pvl.MedCLIPSeg.from_pretrained(str(folder)), model)
    names = {path.name.partition("-")[0] for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer"}
    image = torch.rand(3, 20, 30)
    assert torch.equal(pvl.from_pretrained(folder).prepare(image), model.prepare(image))


@pytest.mark.parametrize("kind", ["native", "timm"])
def test_other_clips_of_open_clip_come_back_bit_for_bit(kind, open_clip_models, tmp_path, caplog):
    model = of_open_clip(open_clip_models[kind])
    caplog.clear()

    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path))

    assert "weights" not in caplog.text  # open_clip would say that there are none
    assert_equal_models(loaded, model)


def test_every_family_that_tells_what_it_is_comes_back_whole(host, tmp_path):
    model = segmenter(host)
    if not host.name.startswith("transformers"):
        with pytest.raises(ValueError, match=r"load_backbone\(\.\.\.\).*whole=False"):
            model.save_pretrained(tmp_path / "folder")
        assert not any(tmp_path.iterdir())
        return

    assert_equal_models(pvl.from_pretrained(model.save_pretrained(tmp_path)), model, host)


@pytest.mark.parametrize("told", [True, False], ids=["settings", "host"])
def test_how_images_are_normalised_travels_with_a_clip_of_transformers(told, tmp_path, monkeypatch):
    """Its own configuration does not tell, so what was known when it was saved is written down."""
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    model = segmenter(BY_NAME["transformers-clip"], config=pvl.MedCLIPSegConfig(image_mean=mean) if told else None)
    monkeypatch.setattr(HFImage, "normalization", lambda tower, clip: ((0.5, 0.5, 0.5) if told else mean, std))

    folder = model.save_pretrained(tmp_path / "folder")
    monkeypatch.setattr(HFImage, "normalization", lambda tower, clip: None)

    loaded = pvl.from_pretrained(folder)
    assert (loaded.config.image_mean, loaded.config.image_std) == (mean, std)
    if not told:
        unknown = segmenter(BY_NAME["transformers-clip"]).save_pretrained(tmp_path / "unknown")
        assert pvl.from_pretrained(unknown).config.image_mean is None


LOAD = """
import sys, torch
import pvl_adapter as pvl
from safetensors.torch import save_file
results = {}
for name in sys.argv[2:]:
    model = pvl.from_pretrained(f"{sys.argv[1]}/{name}")
    image = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        results[name] = model(image, ["a tumor at the left", "one polyp"], sample=True, generator=draws).logits
save_file(results, f"{sys.argv[1]}/results.safetensors")
"""


def test_a_folder_is_all_that_is_needed_in_another_process(tiny, open_clip_models, tmp_path):
    """Offline, with an empty cache, and without the files that the models were made from."""
    models = {"official": tiny, "bert": of_open_clip(open_clip_models["bert"])}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    root = str(Path(pvl.__file__).parent.parent)
    environment = {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": os.environ["PATH"], "PYTHONPATH": root}

    subprocess.run([sys.executable, "-c", LOAD, tmp_path, *models], env=environment, cwd=tmp_path, check=True)

    results = load_file(tmp_path / "results.safetensors")
    assert all(torch.equal(results[name], logits(model)) for name, model in models.items())


def test_files_may_be_read_by_others_as_the_umask_says(tiny, tmp_path):
    before = os.umask(0o022)
    try:
        tiny.save_pretrained(tmp_path / "folder")
        pvl.save_adapters(tiny.clip, tmp_path / "adapters")
    finally:
        os.umask(before)

    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o755}


# --- types and devices -----------------------------------------------------------------------------------------------


def test_the_frozen_clip_can_be_loaded_in_half_precision(model, tmp_path):
    model.save_pretrained(tmp_path)

    loaded = pvl.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")

    frozen, expected = frozen_names(model), model.state_dict()
    for name, tensor in loaded.state_dict().items():
        half = name in frozen and expected[name].is_floating_point()
        assert tensor.dtype == (torch.bfloat16 if half else expected[name].dtype)
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert (logits(loaded) - logits(model)).abs().max() < 0.1 * logits(model).abs().max()


@pytest.mark.parametrize("kind", ["official", "bert", "transformers"])
def test_a_model_saved_in_half_precision_comes_back_in_it(kind, official_file, words, open_clip_models, tmp_path):
    host = BY_NAME["transformers-clip"] if kind == "transformers" else None
    if host:
        model = with_head(randomised(pvl.inject_adapters(host.build().to(torch.bfloat16), CONFIG)))
    else:
        model = official(official_file, words) if kind == "official" else of_open_clip(open_clip_models["bert"])
        for name, parameter in model.clip.named_parameters():
            if not name.startswith("pvl_adapters."):
                parameter.data = parameter.data.to(torch.bfloat16)

    assert_equal_models(pvl.from_pretrained(model.save_pretrained(tmp_path)), model, host)

    wide = pvl.from_pretrained(tmp_path, dtype=torch.float32)
    assert {tensor.dtype for tensor in wide.state_dict().values() if tensor.is_floating_point()} == {torch.float32}


def randomised(clip: nn.Module) -> nn.Module:
    randomise(clip.pvl_adapters)
    return clip


@pytest.mark.parametrize(
    "device", ["meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_model_is_moved_as_a_whole(model, tmp_path, device):
    """Buffers included that no file holds."""
    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path), device=device)

    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {device}
    if device == "cuda":
        image = torch.randn(2, 3, *model.image_size)
        with torch.no_grad():
            got, expected = loaded(image.cuda(), SENTENCES).logits.cpu(), model(image, SENTENCES).logits
        torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)


# --- after loading ---------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_its_own(model, tmp_path):
    """It can be trained, copied, overwritten and saved back: neither its file nor another model of it changes."""
    before = contents(model.save_pretrained(tmp_path / "folder"))
    loaded, other = (pvl.from_pretrained(tmp_path / "folder") for _ in range(2))
    copied = copy.deepcopy(loaded)
    trained = {name for name, parameter in loaded.train().named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters()} - frozen_names(model)

    loaded(torch.randn(2, 3, *loaded.image_size), SENTENCES).logits.square().mean().backward()
    torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1).step()
    with torch.no_grad():
        for tensor in [*loaded.parameters(), *loaded.buffers()]:  # and even the frozen weights, in place
            tensor.fill_(1)

    assert contents(tmp_path / "folder") == before
    other.save_pretrained(tmp_path / "folder")
    assert config_file(tmp_path / "folder").read_bytes() == before["config.json"]
    for one in (other, copied):
        assert torch.equal(logits(one), logits(model))
    with torch.no_grad():
        other.head.mask_head[0].bias.add_(1.0)
    expected = logits(other)
    other.save_pretrained(tmp_path / "folder")
    shutil.move(tmp_path / "folder", tmp_path / "moved")
    assert torch.equal(logits(pvl.from_pretrained(tmp_path / "moved")), expected)
    shutil.rmtree(tmp_path / "moved")
    assert torch.equal(logits(other), expected)


# --- without the clip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", CORE_HOSTS, ids=str)
def test_adapters_and_head_alone_come_back_on_a_fresh_clip(host, tmp_path):
    model = segmenter(host)

    folder = model.save_pretrained(tmp_path, whole=False)
    fresh = host.build()
    loaded = pvl.from_pretrained(folder, clip=fresh)

    assert loaded.clip is fresh
    assert_equal_models(loaded, model, host)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen_names(model)}
    assert load_file(weights_file(folder)).keys() == expected.keys()
    size = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert weights_file(tmp_path).stat().st_size < size + 200 * len(expected) + 10_000
    half = pvl.from_pretrained(folder, clip=host.build().to(torch.bfloat16)).state_dict()
    assert all(torch.equal(half[name], tensor) for name, tensor in expected.items())


def test_a_clip_is_fetched_again_by_its_name_and_weights(open_clip_models, tmp_path):
    name, file = open_clip_models["native"], tmp_path / "weights.pt"
    torch.save(pvl.load_backbone(name).clip.state_dict(), file)
    backbone = pvl.load_backbone(name, pretrained=str(file))
    model = with_head(randomised(pvl.inject_adapters(backbone.clip, CONFIG)), tokenizer=backbone.tokenizer)
    host = BY_NAME["transformers-clip"]
    host.build().save_pretrained(tmp_path / "clip")
    other = with_head(
        randomised(pvl.inject_adapters(transformers.CLIPModel.from_pretrained(tmp_path / "clip").eval(), CONFIG))
    )

    assert_equal_models(pvl.from_pretrained(model.save_pretrained(tmp_path / "part", whole=False)), model)
    assert_equal_models(pvl.from_pretrained(other.save_pretrained(tmp_path / "other", whole=False)), other, host)


@pytest.mark.parametrize("kind", ["unknown", "random_weights"])
def test_a_part_that_cannot_fetch_its_clip_asks_for_it(kind, open_clip_models, tmp_path):
    unknown = kind == "unknown"
    model = segmenter(BY_NAME["open_clip-bert"]) if unknown else of_open_clip(open_clip_models["native"])

    with pytest.raises(ValueError, match=r"clip=\.\.\."):
        pvl.from_pretrained(model.save_pretrained(tmp_path, whole=False))


@pytest.mark.parametrize(
    ("saved_on", "given", "message"),
    [
        ("open_clip-bert", lambda: BY_NAME["open_clip-bert"].build(seed=1), "other weights"),
        ("open_clip-bert", lambda: BY_NAME["transformers-clip"].build(), "other weights"),
        ("transformers-clip", lambda: BY_NAME["transformers-metaclip2"].build(), "other weights"),  # of equal weights
        ("open_clip-bert", lambda: injected(BY_NAME["open_clip-bert"]), "adapters already"),
        (None, lambda: BY_NAME["open_clip-bert"].build(), "holds a whole model"),
    ],
    ids=["other_weights", "other_library", "other_class_with_its_weights", "with_adapters", "whole"],
)
def test_another_clip_is_refused_and_stays_as_it_was(saved_on, given, message, tiny, tmp_path):
    model = segmenter(BY_NAME[saved_on]) if saved_on else tiny
    folder, clip = model.save_pretrained(tmp_path, whole=not saved_on), given()

    with unchanged(clip), pytest.raises(ValueError, match=message):
        pvl.from_pretrained(folder, clip=clip)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_what_could_not_be_given_back_is_not_saved(open_clip_models, tmp_path, whole):
    """Low-rank layers of PEFT in the CLIP, which a fresh one lacks."""
    peft = pytest.importorskip("peft")
    model = of_open_clip(open_clip_models["bert"])
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model.clip)

    with pytest.raises(ValueError, match=r"PEFT.*merge|whole=True"):
        model.save_pretrained(tmp_path / "new" / "folder", whole=whole)
    assert not any(tmp_path.iterdir())


def test_weights_of_the_clip_that_were_trained_too_are_saved_whole_only(tiny, tmp_path):
    tiny.clip.visual.proj.requires_grad_(True)
    randomise(tiny.clip.visual)

    with pytest.raises(ValueError, match=r"clip\.visual\.proj.*whole"):
        tiny.save_pretrained(tmp_path / "part", whole=False)
    loaded = pvl.from_pretrained(tiny.save_pretrained(tmp_path / "whole"))

    assert torch.equal(logits(loaded), logits(tiny))
    assert "fine_tuned_from" in loaded.provenance


# --- what travels ----------------------------------------------------------------------------------------------------


def test_settings_travel(open_clip_models, tmp_path):
    adapters = pvl.PVLConfig(layers=(1,), dim=6, beta=0.7, gate_init=-0.5, mask_padding=False, tower_dropout=True)
    head = pvl.MedCLIPSegConfig(
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        num_upscale=1,
        channel_order="BGR",
        resize="opencv_bilinear",
        context_length=7,
    )
    model = of_open_clip(open_clip_models["native"], adapters=adapters, config=head)

    for whole in (True, False):
        folder = model.save_pretrained(tmp_path / str(whole), whole=whole)
        fresh = None if whole else pvl.remove_adapters(copy.deepcopy(model.clip))
        loaded = pvl.from_pretrained(folder, clip=fresh)
        assert_equal_models(loaded, model)
        again = loaded.save_pretrained(tmp_path / f"{whole}_again", whole=whole)
        assert config_file(again).read_text() == config_file(folder).read_text()


def ids_of(tokenizer: Callable[..., Any]) -> Tensor:
    """Of sentences with capitals, punctuation and more words than fit."""
    sentences = ["A  tumor, at the LEFT!", "one polyp " * 20]
    if isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        return tokenizer(sentences, padding=True, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
    return tokenizer(sentences)


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "transformers_padding_left": lambda words: transformers.AutoTokenizer.from_pretrained(words, padding_side="left"),
    "open_clip": lambda words: open_clip.SimpleTokenizer(context_length=12),
    "open_clip_canonical": lambda words: open_clip.SimpleTokenizer(context_length=9, clean="canonicalize"),
    "open_clip_hf": lambda words: HFTokenizer(str(words), context_length=12),
    "open_clip_hf_settings": lambda words: HFTokenizer(
        str(words), context_length=9, clean="canonicalize", strip_sep_token=True
    ),
}


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_tokenizer_travels(make, tiny, words, tmp_path, caplog):
    tiny.tokenizer = make(words)
    expected = ids_of(tiny.tokenizer)

    loaded = pvl.from_pretrained(tiny.save_pretrained(tmp_path / "once"))
    again = pvl.from_pretrained(loaded.save_pretrained(tmp_path / "twice"))

    assert not [record for record in caplog.records if "give" in record.getMessage()]
    for model in (loaded, again):
        assert type(model.tokenizer) is type(tiny.tokenizer)
        assert torch.equal(ids_of(model.tokenizer), expected)


def own_tokenizer(sentences: list[str]) -> Tensor:
    return torch.tensor([[2, 5 + len(sentence) % 3, 3, *[0] * 9] for sentence in sentences])


UNUSUAL: dict[str, Callable[[], Any]] = {
    "function": lambda: own_tokenizer,
    "other_words": lambda: open_clip.SimpleTokenizer(context_length=12, additional_special_tokens=["<tumor>"]),
    "shortened_sentences": lambda: open_clip.SimpleTokenizer(context_length=12, reduction_mask="simple"),
}


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_a_tokenizer_that_cannot_be_saved_must_be_given_again(make, open_clip_models, tmp_path, caplog):
    """And no other one replaces it, though the CLIP tells one."""
    model = of_open_clip(open_clip_models["native"])
    model.tokenizer = make()
    folder = model.save_pretrained(tmp_path / "once")
    assert type(model.tokenizer).__name__ in caplog.text

    silent = pvl.from_pretrained(folder)
    assert torch.equal(logits(silent, model.tokenize(SENTENCES)), logits(model))
    for other in (silent, pvl.from_pretrained(silent.save_pretrained(tmp_path / "twice"))):
        with pytest.raises(ValueError, match=rf"{type(model.tokenizer).__name__}.*tokenizer=\.\.\."):
            logits(other)
    assert torch.equal(logits(pvl.from_pretrained(folder, tokenizer=make())), logits(model))


def test_another_tokenizer_can_be_given_when_loading(tiny, words, tmp_path):
    folder = tiny.save_pretrained(tmp_path)
    vocabulary(folder).unlink()

    assert pvl.from_pretrained(folder, tokenizer=own_tokenizer).tokenizer is own_tokenizer
    assert torch.equal(logits(pvl.from_pretrained(folder, tokenizer=str(words))), logits(tiny))


def test_the_tokenizer_that_a_clip_tells_is_saved_too(open_clip_models, tmp_path, caplog):
    model = of_open_clip(open_clip_models["bert"])
    model.tokenizer = None

    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path / "told"))

    assert callable(loaded.tokenizer)
    assert torch.equal(logits(loaded), logits(model))
    silent = segmenter(BY_NAME["transformers-clip"]).save_pretrained(tmp_path / "silent")
    assert "saved without a tokenizer" in caplog.text
    assert pvl.from_pretrained(silent).tokenizer is None


def test_a_folder_of_the_first_version_loads(tiny, saved):
    def as_before(description: dict[str, Any]) -> None:
        description.update(version=1, origin=description.pop("provenance"))
        description["backbone"]["library"] = "released"
        (saved / description["tokenizer"].pop("folder")).rename(saved / "tokenizer")

    _rewrite(saved, config=as_before)

    assert_equal_models(pvl.from_pretrained(saved), tiny)
    assert pvl.from_pretrained(saved).provenance == tiny.provenance


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_gate_may_be_a_number_or_one_element(tiny, saved, shape):
    """The published gates are numbers."""
    gates = [name for name in tiny.state_dict() if name.endswith(".gate")]
    _rewrite(saved, tensors=lambda tensors: tensors.update({g: tensors[g].reshape(shape).clone() for g in gates}))

    assert_equal_models(pvl.from_pretrained(saved), tiny)


# --- provenance and the card -----------------------------------------------------------------------------------------

PUBLISHED = {"repo": "owner/name", "file": "BUSI.pth", "sha256": "0123", "checkpoint": "BUSI"}
CLAIMS = {"training_data": "BUSI's images.", "scores": {"DSC %": 85.0}}


@pytest.fixture
def published(tiny, tmp_path) -> pvl.MedCLIPSeg:
    """A model as loaded from the hub."""
    tiny.provenance = {**PUBLISHED, **CLAIMS}
    return pvl.from_pretrained(tiny.save_pretrained(tmp_path / "published"))


def train(model: pvl.MedCLIPSeg) -> None:
    with torch.no_grad():
        model.clip.pvl_adapters[0].vision_down.weight.add_(1e-4)


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Its metadata, as the hub reads them, and its text."""
    import yaml
    from huggingface_hub import ModelCard

    text = (folder / "README.md").read_text()
    assert ModelCard.load(folder / "README.md").data.library_name == "pvl-adapter"
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_provenance_travels_while_the_weights_stay(published, tmp_path):
    again = pvl.from_pretrained(published.save_pretrained(tmp_path / "again", whole=True))

    assert again.provenance == published.provenance == {**PUBLISHED, **CLAIMS}
    _, text = card_of(tmp_path / "again")
    assert "Converted from" in text
    assert all(fact in text for fact in ("owner/name", "BUSI's images.", "| DSC % | 85.0 |"))


def test_a_fine_tuned_model_claims_neither_scores_nor_data_of_the_published_one(published, tmp_path):
    train(published)

    once = pvl.from_pretrained(published.save_pretrained(tmp_path / "once"))
    train(once)
    once.provenance["note"] = "mine"
    twice = pvl.from_pretrained(once.save_pretrained(tmp_path / "twice"))

    start = {"fine_tuned_from": {name: PUBLISHED[name] for name in ("repo", "file", "sha256")}}
    assert once.provenance == {**start, "note": "mine"}
    assert twice.provenance == once.provenance
    for folder in ("once", "twice"):
        _, text = card_of(tmp_path / folder)
        assert "Fine-tuned from" in text
        assert "owner/name" in text
        assert not any(claim in text for claim in ("BUSI's images.", "85.0", "Converted"))


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_said_when_saving_wins(published, trained, tmp_path):
    if trained:
        train(published)
    said = {
        "intended_use": "Polyps: of mine.",
        "training_data": "Twenty images.",
        "scores": {"Dice": torch.tensor(81.25)},
    }

    loaded = pvl.from_pretrained(published.save_pretrained(tmp_path / "said", model_card_kwargs=said))

    head, text = card_of(tmp_path / "said")
    assert (head["pipeline_tag"], head["library_name"]) == ("image-segmentation", "pvl-adapter")
    for title, fact in (("Intended use", "Polyps: of mine."), ("Training data", "Twenty images."), ("Scores", "81.25")):
        assert fact in text.partition(f"## {title}")[2].partition("##")[0]
    assert "not a medical device" in text.lower()
    assert loaded.provenance["training_data"] == "Twenty images."
    published.save_pretrained(tmp_path / "none", model_card_kwargs={"scores": {}, "training_data": ""})
    _, text = card_of(tmp_path / "none")
    assert text.count("Not stated") == 2
    assert "85.0" not in text


def test_the_card_counts_parameters_and_tells_whole_from_part(tiny, tmp_path):
    counts = [sum(p.numel() for p in tiny.parameters() if p.requires_grad or every) for every in (False, True)]

    for whole, fact in ((True, "frozen CLIP included"), (False, "UniMedCLIP")):
        _, text = card_of(tiny.save_pretrained(tmp_path / str(whole), whole=whole))
        assert f"{counts[0]:,} of {counts[1]:,} parameters" in text
        assert fact in text
        assert "None" not in text
    with pytest.raises(TypeError, match="colour"):
        tiny.save_pretrained(tmp_path / "new" / "folder", model_card_kwargs={"colour": "red"})
    assert not (tmp_path / "new").exists()


# --- saving over, and interrupted writing ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _saved_once(official_file, words, tmp_path_factory) -> Path:
    return official(official_file, words).save_pretrained(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def saved(_saved_once, tmp_path) -> Path:
    """A folder with the small official network, whole."""
    return Path(shutil.copytree(_saved_once, tmp_path / "folder"))


@pytest.fixture
def other(tiny, tmp_path) -> pvl.MedCLIPSeg:
    """With another head and another tokenizer."""
    changed = copy.deepcopy(tiny)
    randomise(changed.head, seed=5)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join([*WORDS[:5], *WORDS[:4:-1]]))
    changed.tokenizer = transformers.BertTokenizerFast(str(tmp_path / "words" / "vocab.txt"))
    return changed


def test_a_folder_can_be_saved_over_even_while_it_is_in_use(tiny, saved, other):
    (saved / "notes.txt").write_text("mine")
    before, loaded = weights_file(saved).read_bytes(), pvl.from_pretrained(saved)

    with weights_file(saved).open("rb") as reader:
        other.save_pretrained(saved)
        assert reader.read() == before

    assert_equal_models(loaded, tiny)
    assert_equal_models(pvl.from_pretrained(saved), other)
    assert (saved / "notes.txt").read_text() == "mine"  # what is not ours stays
    assert len(list(saved.glob("tokenizer-*"))) == 1
    tiny.save_pretrained(saved, whole=False)
    clip = pvl.remove_adapters(copy.deepcopy(tiny.clip))
    assert torch.equal(logits(pvl.from_pretrained(saved, clip=clip)), logits(tiny))


def test_where_a_folder_may_be(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        tiny.save_pretrained("file")
    assert Path("file").read_text() == "mine"
    tiny.save_pretrained("folder")
    tiny.save_pretrained(".")
    for folder in ("folder", "."):
        assert torch.equal(logits(pvl.from_pretrained(folder)), logits(tiny))
    elsewhere = Path(f"/dev/shm/pvl_test_{os.getpid()}")  # of another file system
    if elsewhere.parent.is_dir():
        elsewhere.mkdir()
        try:
            Path("link").symlink_to(elsewhere)
            tiny.save_pretrained("link")
            assert torch.equal(logits(pvl.from_pretrained("link")), logits(tiny))
        finally:
            shutil.rmtree(elsewhere)


@pytest.mark.parametrize("room", [0, 1000, 20_000], ids=["no_room", "little_room", "room_for_the_tokenizer"])
def test_if_the_disk_is_full_the_old_folder_stays_and_nothing_else(tiny, saved, other, room):
    before = contents(saved.parent)

    for folder in (saved, saved.parent / "new"):
        with full_disk(room), pytest.raises(OSError, match=r"(?i)too large|written"):
            other.save_pretrained(folder)

    assert contents(saved.parent) == before
    assert not (saved.parent / "new").exists()
    assert_equal_models(pvl.from_pretrained(saved), tiny)


STEPS = ("rename", "replace", "unlink", "mkdir", "rmdir")


def save_until(number: int, model: pvl.MedCLIPSeg, folder: Path) -> bool:
    """Save in a child that is killed before its `number`th change of the file system; whether it came so far."""
    child = os.fork()
    if child == 0:
        done = 0

        def killing(native: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                done += 1
                if done > number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return native(*args, **kwargs)

            return step

        for name in STEPS:
            setattr(os, name, killing(getattr(os, name)))
        try:
            model.save_pretrained(folder)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("exists", [True, False], ids=["over", "new"])
def test_a_save_that_is_killed_at_any_step_leaves_the_old_model_or_the_new_one(tiny, saved, other, tmp_path, exists):
    seen = set()
    for number in range(100):
        folder = tmp_path / str(number) / "folder"
        folder.parent.mkdir()
        if exists:
            shutil.copytree(saved, folder)
        killed = save_until(number, other, folder)
        try:
            loaded = pvl.from_pretrained(folder)
        except FileNotFoundError:
            assert not exists
            seen.add("none")
        else:
            which = "old" if torch.equal(loaded.head.mask_head[0].weight, tiny.head.mask_head[0].weight) else "new"
            assert_equal_models(loaded, tiny if which == "old" else other)
            seen.add(which)
        if number % 5 == 0 or not killed:
            other.save_pretrained(folder)
            assert_equal_models(pvl.from_pretrained(folder), other)
            assert len(list(folder.iterdir())) == 4  # weights, configuration, card and one tokenizer
        if not killed:
            break
    assert not killed
    assert seen == {"old" if exists else "none", "new"}


def test_a_save_that_is_killed_while_writing_leaves_the_old_model(tiny, saved, other):
    for room in (1000, 20_000):
        kill_while(lambda: other.save_pretrained(saved), room=room)
        assert list(saved.glob(".*.part"))
        assert_equal_models(pvl.from_pretrained(saved), tiny)

    other.save_pretrained(saved)

    assert not list(saved.glob(".*"))
    assert_equal_models(pvl.from_pretrained(saved), other)


# --- damaged or foreign files ----------------------------------------------------------------------------------------


def _rewrite(
    folder: Path, *, tensors: Callable[[dict], object] | None = None, config: Callable[[dict], object] | None = None
) -> None:
    """Change tensors, or the configuration in both of its places."""
    with safe_open(weights_file(folder), framework="pt") as opened:
        metadata = dict(opened.metadata())
    values = load_file(weights_file(folder))
    if tensors is not None:
        tensors(values)
    (entry,) = metadata.keys() - {"format"}
    description = json.loads(metadata[entry])
    if config is not None:
        config(description)
    metadata[entry] = json.dumps(description)
    save_file(values, weights_file(folder), metadata=metadata)
    config_file(folder).write_text(json.dumps(description))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: _rewrite(folder, tensors=change)


def both(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: _rewrite(folder, config=change)


def header(content: bytes) -> Callable[[Path], object]:
    """Damages the weights by another header, of the length that they announce."""
    return lambda folder: weights_file(folder).write_bytes(len(content).to_bytes(8, "little") + content)


def config(text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: config_file(folder).write_bytes(text if isinstance(text, bytes) else text.encode())


KEY = "clip.pvl_adapters.0.vision_down.weight"
NETWORK = "backbone.network"
Damage = tuple[Callable[[Path], object], type[Exception], str]
DAMAGE: dict[str, Damage] = {
    "truncated_weights": (truncate(weights_file, 0.5), ValueError, "model.safetensors is damaged"),
    "weights_without_their_end": (truncate(weights_file, 0.999), ValueError, "model.safetensors is damaged"),
    "empty_weights": (truncate(weights_file, 0.0), ValueError, "model.safetensors is damaged"),
    "no_weights": (lambda folder: weights_file(folder).unlink(), FileNotFoundError, "model.safetensors is missing"),
    "other_file_type": (lambda folder: weights_file(folder).write_text("hello" * 100), ValueError, "damaged"),
    "garbage_header": (header(b"\xff\xfe" * 50), ValueError, "model.safetensors is damaged"),
    "header_of_a_list": (header(b"[1, 2]"), ValueError, "model.safetensors is damaged"),
    "header_of_lies": (
        header(b'{"x": {"dtype": "F32", "shape": [9999999, 9999999], "data_offsets": [0, 4]}}'), ValueError, "damaged"),
    "weights_of_others": (
        lambda folder: save_file(load_file(weights_file(folder)), weights_file(folder)), ValueError, "not saved by"),
    "deep_description": (
        lambda folder: save_file({}, weights_file(folder), metadata={"pvl_adapter.MedCLIPSeg": "[" * 100_000}),
        ValueError, "damaged"),
    "missing_key": (tensors(lambda t: t.pop(KEY)), ValueError, f"missing: {KEY}"),
    "unknown_key": (tensors(lambda t: t.update(more=torch.zeros(2))), ValueError, "unexpected: more"),
    "other_shape": (tensors(lambda t: t.update({KEY: torch.zeros(8, 5)})), ValueError, rf"{KEY}.*\(8, 5\)"),
    "other_type": (
        tensors(lambda t: t.update({KEY: torch.zeros(8, 32, dtype=torch.int64)})), ValueError, f"{KEY}.*int64"),
    "truncated_config": (truncate(config_file, 0.5), ValueError, "config.json.*damaged.*remove"),
    "empty_config": (config(""), ValueError, "config.json.*damaged"),
    "binary_config": (config(b"\xff\xfe\x00"), ValueError, "config.json.*damaged"),
    "list_config": (config("[]"), ValueError, "config.json.*another save"),
    "edited_config": (edit_json(config_file, lambda c: c["adapters"].update(beta=1.0)), ValueError, "edited.*remove"),
    "newer": (both(lambda c: c.update(version=3)), ValueError, "version 3, expected 2.*release"),
    "missing_entry": (both(lambda c: c.pop("adapters")), ValueError, "lacks.*adapters"),
    "list_for_settings": (both(lambda c: c.update(adapters=[])), ValueError, "PVLConfig"),
    "unknown_setting": (both(lambda c: c["adapters"].update(colour="red")), ValueError, "colour.*newer"),
    "wrong_setting": (both(lambda c: c["model"].update(num_upscale=-1)), ValueError, "num_upscale is -1"),
    "other_width": (both(lambda c: c["adapters"].update(dim=4)), ValueError, "shape"),
    "other_layers": (both(lambda c: c["adapters"].update(layers=[1])), ValueError, "unexpected"),
    "layers_beyond": (both(lambda c: c["adapters"].update(layers=[1, 9])), ValueError, "9"),
    "other_library": (both(lambda c: c["backbone"].update(library="jax")), ValueError, "'jax'"),
    "no_backbone": (both(lambda c: c.update(backbone={})), ValueError, "no CLIP can be built"),
    "null_backbone": (both(lambda c: c.update(backbone=None)), ValueError, "no CLIP can be built"),
    "half_a_backbone": (both(lambda c: c["backbone"].pop("network")), ValueError, "no CLIP can be built"),
    "truncated_tokenizer": (truncate(vocabulary, 0.5), ValueError, "tokenizer.json is damaged"),
    "no_tokenizer_file": (lambda folder: vocabulary(folder).unlink(), FileNotFoundError, "tokenizer.json is missing"),
    "nothing_at_all": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], FileNotFoundError, "config.json"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(saved, damage, error, message):
    damage(saved)

    with pytest.raises(error, match=message):
        pvl.from_pretrained(saved)


WITH_CLIP = ("truncated_weights", "missing_key", "unknown_key", "other_shape", "other_type", "truncated_config",
             "edited_config", "newer", "unknown_setting", "wrong_setting", "other_width", "other_layers",
             "layers_beyond", "no_tokenizer_file")  # fmt: skip


@pytest.mark.parametrize("name", WITH_CLIP)
def test_a_damaged_part_is_refused_and_the_clip_stays_as_it_was(tiny, tmp_path, name):
    damage, error, message = DAMAGE[name]
    folder = tiny.save_pretrained(tmp_path, whole=False)
    clip = pvl.remove_adapters(tiny.clip)
    damage(folder)

    with unchanged(clip), pytest.raises(error, match=message):
        pvl.from_pretrained(folder, clip=clip)


def test_what_counts_is_in_the_weights(tiny, saved, other, tmp_path):
    """Of two saves nothing is mixed; the copy of the configuration may be missing or otherwise laid out."""
    description = json.loads(config_file(saved).read_text())
    config_file(saved).write_bytes(json.dumps(description, sort_keys=True).replace(", ", ",\r\n").encode())
    assert_equal_models(pvl.from_pretrained(saved), tiny)
    config_file(saved).unlink()
    assert_equal_models(pvl.from_pretrained(saved), tiny)
    shutil.copy(config_file(other.save_pretrained(tmp_path / "other")), saved)
    with pytest.raises(ValueError, match="another save"):
        pvl.from_pretrained(saved)


def test_a_model_of_others_is_refused(tmp_path):
    BY_NAME["transformers-clip"].build().save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"model\.safetensors was not saved by"):
        pvl.from_pretrained(tmp_path)


# --- settings that would fill the memory -----------------------------------------------------------------------------

HUGE: dict[str, tuple[str, Any]] = {
    f"{path}={value}": (path, value)
    for path, values in {
        "adapters.dim": [10**6, 10**12],
        "adapters.layers": [list(range(100_000))],
        "model.num_upscale": [100_000],
        "model.context_length": [10**9],
        "backbone.network.vision_layers": [100_000],
        "backbone.network.text_layers": [100_000, 200],
        "backbone.network.vision_width": [10**6, 4096],
        "backbone.network.vocab_size": [10**9, 2000],
        "backbone.network.positions": [10**12, 5000],
        "backbone.network.text_intermediate": [10**8],
    }.items()
    for value in values
}  # fmt: skip


@contextmanager
def little_memory() -> Iterator[None]:
    """Whoever asks for more than 300 MB inside gets a MemoryError (Linux only)."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("the size of a process is read from /proc")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 300_000_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def enlarge(description: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        description = description[name]
    assert last in description
    description[last] = value


@pytest.mark.parametrize(("path", "value"), HUGE.values(), ids=[name[:40] for name in HUGE])
def test_sizes_that_do_not_fit_are_refused_before_memory_is_spent(saved, path, value):
    _rewrite(saved, config=lambda c: enlarge(c, path, value))
    shown = len(value) if isinstance(value, list) else value

    with little_memory(), pytest.raises(ValueError, match=f"{path.rpartition('.')[2]} is {shown}|shape|missing"):
        pvl.from_pretrained(saved)


OTHERS = {
    "native": ("model.text_cfg.layers", "model.embed_dim"),
    "timm": ("model.text_cfg.layers", "model.embed_dim"),
    "bert": ("text.num_hidden_layers", "model.embed_dim"),
    "transformers": ("config.text_config.num_hidden_layers", "config.projection_dim"),
}


@pytest.mark.parametrize(("kind", "paths"), OTHERS.items(), ids=OTHERS)
def test_sizes_of_other_backbones_are_refused_too(kind, paths, open_clip_models, tmp_path):
    host = BY_NAME["transformers-clip"]
    folder = (segmenter(host) if kind == "transformers" else of_open_clip(open_clip_models[kind])).save_pretrained(
        tmp_path
    )
    before = contents(folder)
    for path, value in zip(paths, (100_000, 20_000), strict=True):
        _rewrite(folder, config=lambda c, path=path, value=value: enlarge(c, f"backbone.{path}", value))
        with little_memory(), pytest.raises(ValueError, match=f"{value}"):
            pvl.from_pretrained(folder)
        weights_file(folder).write_bytes(before["model.safetensors"])
