"""Models on disk, whole or without their CLIP: saved and loaded exactly, self-contained, with what belongs to them."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from hosts import BY_NAME, CORE_HOSTS
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file
from saved_models import (
    SENTENCES,
    assert_equal_models,
    config_file,
    contents,
    logits,
    of_open_clip,
    official,
    probability,
    vocabulary,
    weights_file,
    with_adapters,
)
from support import injected, randomise, segmenter, unchanged
from torch import Tensor, nn

import pvl_adapter as pvl
from pvl_adapter.towers.huggingface import HFImage


@pytest.fixture(params=["official", "bert"])
def model(request, words, open_clip_models) -> pvl.MedCLIPSeg:
    """Models with a tokenizer: of the official code (built without values) and of open_clip."""
    return official(words) if request.param == "official" else of_open_clip(open_clip_models[request.param])


@pytest.fixture
def tiny(words) -> pvl.MedCLIPSeg:
    return official(words)


def frozen_names(model: pvl.MedCLIPSeg) -> set[str]:
    return {f"clip.{name}" for name in model.clip.state_dict() if not name.startswith("pvl_adapters.")}


def without_tokenizer(clip: nn.Module) -> pvl.MedCLIPSeg:
    return with_adapters(pvl.Backbone(clip, None, None))


# --- whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["official", "bert", "native", "timm"], indirect=True)
def test_a_whole_model_comes_back_bit_for_bit_and_is_left_as_it_was(model, tmp_path):
    with unchanged(model):
        folder = model.save_pretrained(tmp_path / "new" / "folder")

    assert folder == tmp_path / "new" / "folder"
    assert_equal_models(pvl.MedCLIPSeg.from_pretrained(str(folder)), model)
    names = {path.name.partition("-")[0] for path in folder.iterdir()}
    assert names - {"tokenizer"} == {"README.md", "config.json", "model.safetensors"}
    image = torch.rand(3, 20, 30)
    assert torch.equal(pvl.from_pretrained(folder).prepare(image), model.prepare(image))


def test_every_family_that_tells_what_it_is_comes_back_whole(host, tmp_path):
    model = segmenter(host)
    if not host.name.startswith("transformers"):
        with pytest.raises(ValueError, match=r"load_backbone\(\.\.\.\).*whole=False"):
            model.save_pretrained(tmp_path / "folder")
        assert not any(tmp_path.iterdir())
        return

    assert_equal_models(pvl.from_pretrained(model.save_pretrained(tmp_path)), model, host)


def test_how_images_are_normalised_travels_with_a_clip_of_transformers(tmp_path, monkeypatch):
    """Its own configuration does not tell, so what was known when it was saved is written down."""
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    host = BY_NAME["transformers-clip"]
    for settings, told in ((pvl.MedCLIPSegConfig(image_mean=mean), (0.5, 0.5, 0.5)), (None, mean)):
        monkeypatch.setattr(HFImage, "normalization", lambda tower, clip, told=told: (told, std))
        folder = pvl.MedCLIPSeg(injected(host), config=settings).save_pretrained(tmp_path / str(told))
        monkeypatch.setattr(HFImage, "normalization", lambda tower, clip: None)
        loaded = pvl.from_pretrained(folder)
        assert (loaded.config.image_mean, loaded.config.image_std) == (mean, std)
    unknown = segmenter(host).save_pretrained(tmp_path / "unknown")
    assert pvl.from_pretrained(unknown).config.image_mean is None


def test_a_folder_is_all_that_is_needed_in_another_process(words, open_clip_models, tmp_path):
    """Offline, with an empty cache, and without the files that the model was made from; samples are the same there."""
    models = official(words), of_open_clip(open_clip_models["bert"])
    folders, result = [model.save_pretrained(tmp_path / str(i)) for i, model in enumerate(models)], tmp_path / "result"
    code = """if True:
        import sys, torch, pvl_adapter as pvl, saved_models as own
        models = [pvl.from_pretrained(folder) for folder in sys.argv[2:]]
        torch.save([(own.logits(model), own.probability(model)) for model in models], sys.argv[1])"""
    paths = f"{Path(pvl.__file__).parents[1]}{os.pathsep}{Path(__file__).parent}"
    environment = {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": os.environ["PATH"], "PYTHONPATH": paths}

    subprocess.run([sys.executable, "-c", code, result, *folders], env=environment, cwd=tmp_path, check=True)

    for model, (got, sampled) in zip(models, torch.load(result), strict=True):
        assert torch.equal(got, logits(model))
        torch.testing.assert_close(sampled, probability(model))


def test_files_may_be_read_by_others_as_the_umask_says(tiny, tmp_path):
    before = os.umask(0o022)
    try:
        tiny.save_pretrained(tmp_path / "folder")
        pvl.save_adapters(tiny.clip, tmp_path / "adapters")
    finally:
        os.umask(before)

    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o755}


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
def test_a_model_saved_in_half_precision_comes_back_in_it(kind, words, open_clip_models, tmp_path):
    host = BY_NAME["transformers-clip"] if kind == "transformers" else None
    if host:
        model = without_tokenizer(host.build().to(torch.bfloat16))
    else:
        model = official(words) if kind == "official" else of_open_clip(open_clip_models["bert"])
        for name, parameter in model.clip.named_parameters():
            if not name.startswith("pvl_adapters."):
                parameter.data = parameter.data.to(torch.bfloat16)

    assert_equal_models(pvl.from_pretrained(model.save_pretrained(tmp_path)), model, host)

    wide = pvl.from_pretrained(tmp_path, dtype=torch.float32)
    assert {tensor.dtype for tensor in wide.state_dict().values() if tensor.is_floating_point()} == {torch.float32}


def test_a_model_is_moved_as_a_whole(model, tmp_path):
    """Buffers included that no file holds."""
    folder = model.save_pretrained(tmp_path)
    for device in ["meta", "cuda"][: 1 + torch.cuda.is_available()]:
        loaded = pvl.from_pretrained(folder, device=device)
        assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {device}


def test_a_loaded_model_is_its_own(model, tmp_path):
    """It can be trained, copied, overwritten and saved back: neither its file nor another model of it changes."""
    folder = model.save_pretrained(tmp_path / "folder")
    before = contents(folder)
    loaded, other = pvl.from_pretrained(folder), pvl.from_pretrained(folder)
    copied = copy.deepcopy(loaded)
    trained = {name for name, parameter in loaded.train().named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters()} - frozen_names(model)

    loaded(torch.randn(2, 3, *loaded.image_size), SENTENCES).logits.square().mean().backward()
    with torch.no_grad():
        for tensor in [*loaded.parameters(), *loaded.buffers()]:  # even the frozen weights, in place
            tensor.fill_(1)

    assert contents(folder) == before
    other.save_pretrained(folder)
    assert config_file(folder).read_bytes() == before["config.json"]
    assert torch.equal(logits(copied), logits(model))
    randomise(other.head, seed=3)
    expected = logits(other)
    other.save_pretrained(folder)
    shutil.move(folder, tmp_path / "moved")
    assert torch.equal(logits(pvl.from_pretrained(tmp_path / "moved")), expected)
    shutil.rmtree(tmp_path / "moved")
    assert torch.equal(logits(other), expected)


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
    model = with_adapters(pvl.load_backbone(name, pretrained=str(file)))
    host = BY_NAME["transformers-clip"]
    host.build().save_pretrained(tmp_path / "clip")
    other = without_tokenizer(transformers.CLIPModel.from_pretrained(tmp_path / "clip").eval())

    assert_equal_models(pvl.from_pretrained(model.save_pretrained(tmp_path / "part", whole=False)), model)
    assert_equal_models(pvl.from_pretrained(other.save_pretrained(tmp_path / "other", whole=False)), other, host)


def test_a_part_that_cannot_fetch_its_clip_asks_for_it(open_clip_models, tmp_path):
    unknown, random = segmenter(BY_NAME["open_clip-bert"]), of_open_clip(open_clip_models["native"])

    for number, model in enumerate((unknown, random)):
        folder = model.save_pretrained(tmp_path / str(number), whole=False)
        with pytest.raises(ValueError, match=r"clip=\.\.\."):
            pvl.from_pretrained(folder)


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


def test_what_could_not_be_given_back_is_not_saved(open_clip_models, tmp_path):
    """Low-rank layers of PEFT in the CLIP, which a fresh one lacks."""
    peft = pytest.importorskip("peft")
    model = of_open_clip(open_clip_models["bert"])
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model.clip)

    for whole in (True, False):
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
    normalised = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6), "channel_order": "BGR"}
    head = pvl.MedCLIPSegConfig(num_upscale=1, resize="opencv_bilinear", context_length=7, **normalised)
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


HF_SETTINGS = {"context_length": 9, "clean": "canonicalize", "strip_sep_token": True}
TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "transformers_padding_left": lambda words: transformers.AutoTokenizer.from_pretrained(words, padding_side="left"),
    "open_clip_canonical": lambda words: open_clip.SimpleTokenizer(context_length=9, clean="canonicalize"),
    "open_clip_hf": lambda words: HFTokenizer(str(words), **HF_SETTINGS),
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


@pytest.mark.parametrize("kind", ["function", "other_words"])
def test_a_tokenizer_that_cannot_be_saved_must_be_given_again(kind, open_clip_models, tmp_path, caplog):
    """And no other one replaces it, though the CLIP tells one."""
    model = of_open_clip(open_clip_models["native"])
    more_words = open_clip.SimpleTokenizer(context_length=12, additional_special_tokens=["<tumor>"])
    model.tokenizer = own_tokenizer if kind == "function" else more_words
    folder = model.save_pretrained(tmp_path / "once")
    assert type(model.tokenizer).__name__ in caplog.text

    silent = pvl.from_pretrained(folder)
    assert torch.equal(logits(silent, model.tokenize(SENTENCES)), logits(model))
    for other in (silent, pvl.from_pretrained(silent.save_pretrained(tmp_path / "twice"))):
        with pytest.raises(ValueError, match=rf"{type(model.tokenizer).__name__}.*tokenizer=\.\.\."):
            logits(other)
    assert torch.equal(logits(pvl.from_pretrained(folder, tokenizer=model.tokenizer)), logits(model))


def test_another_tokenizer_can_be_given_when_loading(tiny, words, tmp_path):
    folder = tiny.save_pretrained(tmp_path)
    vocabulary(folder).unlink()

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


def test_provenance_travels_but_a_fine_tuned_model_claims_neither_scores_nor_data(published, tmp_path):
    assert published.provenance == {**PUBLISHED, **CLAIMS}
    text = card_of(tmp_path / "published")[1]
    assert all(fact in text for fact in ("Converted from", "owner/name", "BUSI's images.", "| DSC % | 85.0 |"))
    train(published)

    once = pvl.from_pretrained(published.save_pretrained(tmp_path / "once"))
    train(once)
    once.provenance["note"] = "mine"
    twice = pvl.from_pretrained(once.save_pretrained(tmp_path / "twice"))

    start = {"fine_tuned_from": {name: PUBLISHED[name] for name in ("repo", "file", "sha256")}}
    assert once.provenance == twice.provenance == {**start, "note": "mine"}
    for folder in ("once", "twice"):
        text = card_of(tmp_path / folder)[1]
        assert "Fine-tuned from" in text
        assert "owner/name" in text
        assert not any(claim in text for claim in ("BUSI's images.", "85.0", "Converted"))


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_said_when_saving_wins(published, trained, tmp_path):
    if trained:
        train(published)
    said = {"intended_use": "Polyps: of mine.", "training_data": "Twenty images.", "scores": {"Dice": 81.25}}

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


def test_the_card_counts_parameters_and_tells_whole_from_part(tiny, tmp_path):
    counts = [sum(p.numel() for p in tiny.parameters() if p.requires_grad or every) for every in (False, True)]

    for whole, fact in ((True, "frozen CLIP included"), (False, "UniMedCLIP")):
        _, text = card_of(tiny.save_pretrained(tmp_path / str(whole), whole=whole))
        assert f"{counts[0]:,} of {counts[1]:,} parameters" in text
        assert fact in text
    with pytest.raises(TypeError, match="colour"):
        tiny.save_pretrained(tmp_path / "new" / "folder", model_card_kwargs={"colour": "red"})
    assert not (tmp_path / "new").exists()
