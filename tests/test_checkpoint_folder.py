"""Whole models on disk: saved and loaded exactly, self-contained, checked first, and never half written."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
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

SENTENCES = ["a tumor at the left", "one polyp"]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def released_file(tmp_path_factory) -> Path:
    """A small network as the released code writes it."""
    tensors = load_file(Path(__file__).parent / "goldens" / "medclipseg_tiny.safetensors")
    network = {name.removeprefix("checkpoint."): t for name, t in tensors.items() if name.startswith("checkpoint.")}
    path = tmp_path_factory.mktemp("released") / "tiny.pth"
    torch.save({"model": network, "epoch": 3, "optimizer": {}, "scheduler": {}, "best_loss": 0.5}, path)
    return path


def released(file: Path, words: Path) -> pvl.MedCLIPSeg:
    return pvl.from_pretrained(file, network=TINY_RELEASED, tokenizer=words)


def randomise_adapters(clip: nn.Module) -> nn.Module:
    randomise(clip.pvl_adapters)
    return clip


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


@pytest.fixture(params=["released", "bert"])
def model(request, released_file, words, open_clip_models) -> pvl.MedCLIPSeg:
    """Models with a tokenizer that can be saved whole: of the released code (built without values) and of open_clip."""
    if request.param == "released":
        return released(released_file, words)
    return of_open_clip(open_clip_models[request.param])


@pytest.fixture
def tiny(released_file, words) -> pvl.MedCLIPSeg:
    return released(released_file, words)


def logits(model: pvl.MedCLIPSeg, text: Any = None, *, image: Tensor | None = None) -> Tensor:
    """Of the same pictures and the same draws."""
    if image is None:
        image = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(
            image.to(next(model.clip.parameters()).dtype),
            SENTENCES if text is None else text,
            sample=True,
            generator=torch.Generator().manual_seed(0),
        )
    return output.logits


def of_host(model: pvl.MedCLIPSeg, host: Host) -> Tensor:
    return logits(model, host.text, image=host.image)


def assert_equal_models(got: pvl.MedCLIPSeg, expected: pvl.MedCLIPSeg) -> None:
    """In every weight, every setting and every training flag."""
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def frozen_names(model: pvl.MedCLIPSeg) -> set[str]:
    return {f"clip.{name}" for name in model.clip.state_dict() if not name.startswith("pvl_adapters.")}


# --- whole -----------------------------------------------------------------------------------------------------------


def test_a_whole_model_comes_back_bit_for_bit(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "new" / "folder")
    loaded = pvl.from_pretrained(folder)

    assert folder == tmp_path / "new" / "folder"
    assert_equal_models(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    picture = torch.rand(3, 20, 30)
    assert torch.equal(loaded.prepare(picture), model.prepare(picture))


@pytest.mark.parametrize("kind", ["native", "timm"])
def test_other_clips_of_open_clip_come_back_bit_for_bit(kind, open_clip_models, tmp_path, caplog):
    model = of_open_clip(open_clip_models[kind])
    caplog.clear()

    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path))

    assert "weights" not in caplog.text  # open_clip would say that there are none
    assert_equal_models(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_the_class_loads_and_saves_too(tiny, tmp_path):
    tiny.save_pretrained(str(tmp_path))

    assert_equal_models(pvl.MedCLIPSeg.from_pretrained(str(tmp_path)), tiny)


def test_every_family_that_tells_what_it_is_comes_back_whole(host, tmp_path):
    model = segmenter(host)
    if not host.name.startswith("transformers"):
        with pytest.raises(ValueError, match=r"load_backbone\(\.\.\.\).*whole=False"):
            model.save_pretrained(tmp_path / "folder")
        assert not any(tmp_path.iterdir())
        return

    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path))

    assert_equal_models(loaded, model)
    assert torch.equal(of_host(loaded, host), of_host(model, host))


def test_a_folder_is_all_that_is_needed_in_another_process(tiny, open_clip_models, tmp_path):
    """Offline, with an empty cache, and without the files that the models were made from."""
    models = {"released": tiny, "bert": of_open_clip(open_clip_models["bert"])}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    script = """
import sys, torch
import pvl_adapter as pvl
from safetensors.torch import save_file
results = {}
for name in sys.argv[2:]:
    model = pvl.from_pretrained(f"{sys.argv[1]}/{name}")
    image = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(image, ["a tumor at the left", "one polyp"], sample=True,
                    generator=torch.Generator().manual_seed(0))
    results[name] = out.logits
save_file(results, f"{sys.argv[1]}/results.safetensors")
"""
    environment = {
        "HF_HOME": str(tmp_path / "empty"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(pvl.__file__).parent.parent),
    }

    subprocess.run([sys.executable, "-c", script, tmp_path, *models], env=environment, cwd=tmp_path, check=True)

    results = load_file(tmp_path / "results.safetensors")
    for name, model in models.items():
        assert torch.equal(results[name], logits(model))


def test_saving_leaves_the_model_as_it_was(model, tmp_path):
    with unchanged(model):
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "part", whole=False)


def test_a_folder_holds_weights_settings_tokenizer_and_card_and_nothing_else(model, tmp_path):
    model.save_pretrained(tmp_path)

    simple = type(model.tokenizer) is open_clip.SimpleTokenizer
    expected = {"README.md", "config.json", "model.safetensors"} | (set() if simple else {"tokenizer"})
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_files_may_be_read_by_others_as_the_umask_says(tiny, tmp_path):
    before = os.umask(0o022)
    try:
        tiny.save_pretrained(tmp_path / "folder")
    finally:
        os.umask(before)

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o755}


# --- types and devices -----------------------------------------------------------------------------------------------


def test_the_frozen_clip_can_be_loaded_in_half_precision(model, tmp_path):
    model.save_pretrained(tmp_path)

    loaded = pvl.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")

    frozen = frozen_names(model)
    for name, tensor in loaded.state_dict().items():
        expected = model.state_dict()[name]
        assert tensor.device.type == "cpu"
        assert tensor.dtype == (torch.bfloat16 if name in frozen and expected.is_floating_point() else expected.dtype)
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    scale = logits(model).abs().max()
    assert (logits(loaded) - logits(model)).abs().max() < 0.1 * scale


def test_a_model_saved_in_half_precision_comes_back_in_it(model, tmp_path):
    for name, parameter in model.clip.named_parameters():
        if not name.startswith("pvl_adapters."):
            parameter.data = parameter.data.to(torch.bfloat16)

    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path))

    assert_equal_models(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    wide = pvl.from_pretrained(tmp_path, dtype=torch.float32)
    assert {tensor.dtype for tensor in wide.state_dict().values() if tensor.is_floating_point()} == {torch.float32}


def test_a_family_of_transformers_in_half_precision_comes_back_in_it(tmp_path):
    host = BY_NAME["transformers-clip"]
    model = with_head(randomise_adapters(pvl.inject_adapters(host.build().to(torch.bfloat16), CONFIG)))

    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path))

    assert_equal_models(loaded, model)
    image = host.image.to(torch.bfloat16)
    assert torch.equal(logits(loaded, host.text, image=image), logits(model, host.text, image=image))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_is_loaded_onto_a_gpu(model, tmp_path):
    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path), device="cuda")

    tensors = [*loaded.parameters(), *loaded.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    image = torch.randn(2, 3, *model.image_size)
    with torch.no_grad():
        got, expected = loaded(image.cuda(), SENTENCES).logits.cpu(), model(image, SENTENCES).logits
    torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)


def test_a_model_is_moved_as_a_whole(model, tmp_path):
    """Buffers included that no file holds; the meta device stands for a GPU."""
    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path), device="meta")

    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {"meta"}


# --- after loading ---------------------------------------------------------------------------------------------------


def test_a_loaded_model_can_be_trained_and_its_file_stays_as_it_is(model, tmp_path):
    before = contents(model.save_pretrained(tmp_path))
    loaded = pvl.from_pretrained(tmp_path).train()
    expected = logits(pvl.from_pretrained(tmp_path))
    trained = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)

    image = torch.randn(2, 3, *loaded.image_size)
    loaded(image, SENTENCES).logits.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        for tensor in [*loaded.parameters(), *loaded.buffers()]:  # and even the frozen weights, in place
            tensor.fill_(1)

    assert contents(tmp_path) == before
    assert torch.equal(logits(pvl.from_pretrained(tmp_path)), expected)


def test_two_models_of_one_folder_share_nothing(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    one, other = pvl.from_pretrained(tmp_path), pvl.from_pretrained(tmp_path)
    expected = logits(other)

    with torch.no_grad():
        for tensor in one.parameters():
            tensor.zero_()

    assert torch.equal(logits(other), expected)


def test_the_parts_of_a_loaded_model_that_train_are_those_that_trained_before(model, tmp_path):
    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path))

    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters()} - frozen_names(model)


def test_a_loaded_model_can_be_copied_and_pickled(model, tmp_path):
    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path))
    expected = logits(model)

    copied = copy.deepcopy(loaded)
    pickled = pickle.dumps(loaded)

    assert len(pickled) < 2 * sum(len(content) for content in contents(tmp_path).values()) + 20_000_000
    with torch.no_grad():
        for tensor in loaded.parameters():
            tensor.zero_()
    assert torch.equal(logits(copied), expected)
    assert torch.equal(logits(pickle.loads(pickled)), expected)


def test_a_loaded_model_can_be_saved_back_into_its_own_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    loaded = pvl.from_pretrained(tmp_path)

    loaded.save_pretrained(tmp_path)
    assert contents(tmp_path)["config.json"] == before["config.json"]
    assert torch.equal(logits(loaded), logits(model))
    assert_equal_models(pvl.from_pretrained(tmp_path), model)

    with torch.no_grad():
        loaded.head.mask_head[0].bias.add_(1.0)
    loaded.save_pretrained(tmp_path)
    again = pvl.from_pretrained(tmp_path)

    assert_equal_models(again, loaded)
    assert torch.equal(logits(again), logits(loaded))
    assert not torch.equal(logits(again), logits(model))


def test_a_loaded_model_outlives_its_folder(model, tmp_path):
    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path / "folder"))
    shutil.rmtree(tmp_path / "folder")

    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(pvl.from_pretrained(loaded.save_pretrained(tmp_path / "again"))), logits(model))


def test_adapters_can_be_taken_out_of_a_loaded_model(model, tmp_path):
    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path))

    clip = pvl.remove_adapters(loaded.clip)

    assert all(not name.startswith("pvl_adapters") for name in clip.state_dict())


# --- without the clip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", CORE_HOSTS, ids=str)
def test_adapters_and_head_alone_come_back_on_a_fresh_clip(host, tmp_path):
    model = segmenter(host)

    folder = model.save_pretrained(tmp_path, whole=False)
    fresh = host.build()
    loaded = pvl.from_pretrained(folder, clip=fresh)

    assert loaded.clip is fresh
    assert_equal_models(loaded, model)
    assert torch.equal(of_host(loaded, host), of_host(model, host))


def test_no_frozen_weight_is_written(model, tmp_path):
    tensors = load_file(weights_file(model.save_pretrained(tmp_path, whole=False)))

    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen_names(model)}
    assert tensors.keys() == expected.keys()
    size = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert weights_file(tmp_path).stat().st_size < size + 200 * len(expected) + 10_000


def test_a_clip_that_was_loaded_whole_takes_the_part(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "part", whole=False)
    clip = pvl.remove_adapters(pvl.from_pretrained(tmp_path / "whole").clip)

    loaded = pvl.from_pretrained(tmp_path / "part", clip=clip)

    assert torch.equal(logits(loaded), logits(model))


def test_the_clip_may_be_given_in_half_precision(tmp_path):
    host = BY_NAME["open_clip-bert"]
    model = segmenter(host)
    model.save_pretrained(tmp_path, whole=False)

    loaded = pvl.from_pretrained(tmp_path, clip=host.build().to(torch.bfloat16))

    for name, tensor in loaded.state_dict().items():
        if name not in frozen_names(model):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, model.state_dict()[name])


def test_without_its_clip_a_part_says_what_is_wanted(tmp_path):
    folder = segmenter(BY_NAME["open_clip-bert"]).save_pretrained(tmp_path, whole=False)

    with pytest.raises(ValueError, match=r"adapters and head only.*clip=\.\.\."):
        pvl.from_pretrained(folder)


def test_a_part_of_a_model_with_random_weights_says_what_is_wanted(open_clip_models, tmp_path):
    folder = of_open_clip(open_clip_models["native"]).save_pretrained(tmp_path, whole=False)

    with pytest.raises(ValueError, match=r"adapters and head only.*clip=\.\.\."):
        pvl.from_pretrained(folder)


def test_a_clip_is_fetched_again_from_its_weights(open_clip_models, tmp_path):
    """By name, with the weights file that it had."""
    torch.manual_seed(3)
    torch.save(pvl.load_backbone(open_clip_models["native"]).clip.state_dict(), tmp_path / "weights.pt")
    backbone = pvl.load_backbone(open_clip_models["native"], pretrained=str(tmp_path / "weights.pt"))
    model = with_head(randomise_adapters(pvl.inject_adapters(backbone.clip, CONFIG)), tokenizer=backbone.tokenizer)

    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path / "part", whole=False))

    assert_equal_models(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_a_clip_of_transformers_is_fetched_again_from_its_folder(tmp_path):
    host = BY_NAME["transformers-clip"]
    host.build().save_pretrained(tmp_path / "clip")
    clip = transformers.CLIPModel.from_pretrained(tmp_path / "clip").eval()
    model = with_head(randomise_adapters(pvl.inject_adapters(clip, CONFIG)))

    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path / "part", whole=False))

    assert torch.equal(of_host(loaded, host), of_host(model, host))


@pytest.mark.parametrize(
    ("saved_on", "given", "message"),
    [
        ("open_clip-bert", lambda: BY_NAME["open_clip-bert"].build(seed=1), "other weights"),
        ("open_clip-bert", lambda: BY_NAME["open_clip-inlined_text"].build(), "other weights"),
        ("open_clip-bert", lambda: BY_NAME["transformers-clip"].build(), "other weights"),
        ("transformers-clip", lambda: BY_NAME["transformers-metaclip2"].build(), "other weights"),  # of equal weights
        ("open_clip-bert", lambda: injected(BY_NAME["open_clip-bert"]), "adapters already"),
    ],
    ids=["other_weights", "other_class", "other_library", "other_class_with_its_weights", "with_adapters"],
)
def test_another_clip_is_refused_and_stays_as_it_was(saved_on, given, message, tmp_path):
    folder = segmenter(BY_NAME[saved_on]).save_pretrained(tmp_path, whole=False)
    clip = given()

    with unchanged(clip), pytest.raises(ValueError, match=message):
        pvl.from_pretrained(folder, clip=clip)


def test_a_clip_is_refused_where_there_is_one_already(tiny, tmp_path):
    folder = tiny.save_pretrained(tmp_path)
    clip = BY_NAME["open_clip-bert"].build()

    with unchanged(clip), pytest.raises(ValueError, match="holds a whole model"):
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

    with pytest.raises(ValueError, match=r"clip\.visual\.proj; save the whole model"):
        tiny.save_pretrained(tmp_path / "part", whole=False)
    loaded = pvl.from_pretrained(tiny.save_pretrained(tmp_path / "whole"))

    assert torch.equal(logits(loaded), logits(tiny))


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
        assert loaded.config == head
        assert_equal_models(loaded, model)
        assert torch.equal(logits(loaded), logits(model))
        again = loaded.save_pretrained(tmp_path / f"{whole}_again", whole=whole)
        assert config_file(again).read_text() == config_file(folder).read_text()


def ids_of(tokenizer: Callable[..., Any]) -> Tensor:
    """Of sentences with capitals, punctuation and more words than fit."""
    sentences = ["A  tumor, at the LEFT!", "one polyp " * 20]
    if isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        return tokenizer(sentences, padding=True, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
    return tokenizer(sentences)


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "transformers": lambda words: transformers.AutoTokenizer.from_pretrained(words),
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
    """And no other one takes its place, though the CLIP tells one."""
    model = of_open_clip(open_clip_models["native"])
    model.tokenizer = make()
    folder = model.save_pretrained(tmp_path / "once")
    assert f"a {type(model.tokenizer).__name__} cannot be saved; give it again" in caplog.text

    silent = pvl.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"saved with a {type(model.tokenizer).__name__}.*tokenizer=\.\.\."):
        logits(silent)
    ids = model.tokenize(SENTENCES)
    assert torch.equal(logits(silent, ids), logits(model))
    with pytest.raises(ValueError, match=r"tokenizer=\.\.\."):
        logits(pvl.from_pretrained(silent.save_pretrained(tmp_path / "twice")))

    assert torch.equal(logits(pvl.from_pretrained(folder, tokenizer=make())), logits(model))


def test_another_tokenizer_can_be_given_when_loading(tiny, words, tmp_path):
    folder = tiny.save_pretrained(tmp_path)

    by_object = pvl.from_pretrained(folder, tokenizer=own_tokenizer)
    by_folder = pvl.from_pretrained(folder, tokenizer=str(words))

    assert by_object.tokenizer is own_tokenizer
    assert torch.equal(logits(by_folder), logits(tiny))


def test_the_tokenizer_that_a_clip_tells_is_saved_too(open_clip_models, tmp_path):
    model = of_open_clip(open_clip_models["bert"])
    model.tokenizer = None
    expected = logits(copy.deepcopy(model))

    folder = model.save_pretrained(tmp_path)

    assert (folder / "tokenizer").is_dir()
    assert torch.equal(logits(pvl.from_pretrained(folder)), expected)


def test_without_any_tokenizer_a_model_is_saved_with_a_warning(tmp_path, caplog):
    host = BY_NAME["transformers-clip"]

    folder = segmenter(host).save_pretrained(tmp_path)

    assert "saved without a tokenizer" in caplog.text
    assert pvl.from_pretrained(folder).tokenizer is None


def test_the_origin_travels(tiny, released_file, tmp_path):
    assert tiny.provenance["file"] == released_file.name
    assert len(tiny.provenance["sha256"]) == 64
    tiny.provenance["training_data"] = "Sixty pictures."

    loaded = pvl.from_pretrained(tiny.save_pretrained(tmp_path / "once"))
    again = pvl.from_pretrained(loaded.save_pretrained(tmp_path / "twice"))

    assert loaded.provenance == tiny.provenance
    assert again.provenance == tiny.provenance
    assert loaded.provenance["sha256"] in (tmp_path / "once" / "README.md").read_text()
    assert "Sixty pictures." in (tmp_path / "twice" / "README.md").read_text()


# --- the card --------------------------------------------------------------------------------------------------------


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Its metadata, as the hub reads them, and its text."""
    import yaml

    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_the_model_is_for(tiny, tmp_path):
    folder = tiny.save_pretrained(
        tmp_path,
        model_card_kwargs={
            "intended_use": "Finding polyps: in pictures of mine.",
            "training_data": "Twenty pictures of mine.",
            "scores": {"DSC % on my test pictures": 81.25},
        },
    )

    head, text = card_of(folder)

    assert head["library_name"] == "pvl-adapter"
    assert head["pipeline_tag"] == "image-segmentation"
    assert "medical-imaging" in head["tags"]
    assert "Finding polyps: in pictures of mine." in text.partition("## Intended use")[2]
    assert "Twenty pictures of mine." in text.partition("## Training data")[2]
    assert "| DSC % on my test pictures | 81.25 |" in text.partition("## Scores")[2]
    assert "not a medical device" in text.lower()
    assert "pvl.from_pretrained(" in text


def test_the_card_says_what_is_not_known(tiny, tmp_path):
    _, text = card_of(tiny.save_pretrained(tmp_path))

    assert text.count("Not stated by whoever saved this model.") == 2
    assert "not a medical device" in text.lower()
    assert "None" not in text


def test_the_card_knows_what_the_loader_knows(tiny, tmp_path):
    tiny.provenance.update(repo="owner/name", training_data="Skin.", scores={"DSC %": 92.12})

    _, text = card_of(tiny.save_pretrained(tmp_path))

    assert "owner/name" in text
    assert "Skin." in text.partition("## Training data")[2]
    assert "| DSC % | 92.12 |" in text


def test_the_card_counts_parameters_and_tells_whole_from_part(tiny, tmp_path):
    total = sum(parameter.numel() for parameter in tiny.parameters())
    trained = sum(parameter.numel() for parameter in tiny.parameters() if parameter.requires_grad)

    _, whole = card_of(tiny.save_pretrained(tmp_path / "whole"))
    _, part = card_of(tiny.save_pretrained(tmp_path / "part", whole=False))

    for text in (whole, part):
        assert f"{trained:,} of {total:,} parameters" in text
    assert "frozen CLIP included" in whole
    assert "UniMedCLIP" in part


def test_the_hub_reads_the_card(tiny, tmp_path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(tiny.save_pretrained(tmp_path) / "README.md")

    assert card.data.library_name == "pvl-adapter"


def test_an_unknown_entry_of_the_card_is_refused_and_nothing_is_left(tiny, tmp_path):
    with pytest.raises(TypeError, match="colour"):
        tiny.save_pretrained(tmp_path / "new" / "folder", model_card_kwargs={"colour": "red"})

    assert not any(tmp_path.iterdir())


# --- saving over, and interrupted writing ----------------------------------------------------------------------------


def changed(model: pvl.MedCLIPSeg) -> pvl.MedCLIPSeg:
    other = copy.deepcopy(model)
    randomise(other.head, seed=5)
    return other


@pytest.fixture(scope="module")
def _saved_once(released_file, words, tmp_path_factory) -> Path:
    return released(released_file, words).save_pretrained(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def saved(_saved_once, tmp_path) -> Path:
    """A folder with the small released network, whole."""
    return Path(shutil.copytree(_saved_once, tmp_path / "folder"))


def test_a_folder_can_be_saved_over(tiny, saved, words):
    (saved / "notes.txt").write_text("mine")
    other = changed(tiny)
    other.tokenizer = open_clip.SimpleTokenizer(context_length=12)

    other.save_pretrained(saved)

    assert_equal_models(pvl.from_pretrained(saved), other)
    assert type(pvl.from_pretrained(saved).tokenizer) is open_clip.SimpleTokenizer
    assert (saved / "notes.txt").read_text() == "mine"  # what is not ours stays


def test_nothing_of_an_earlier_tokenizer_is_left(tiny, saved, words, tmp_path):
    """Else transformers might read a file that the new one does not have."""
    (saved / "tokenizer" / "added_tokens.json").write_text('{"polyp": 3}')

    tiny.save_pretrained(saved)

    fresh = tiny.save_pretrained(tmp_path / "fresh")
    assert contents(saved).keys() == contents(fresh).keys()
    assert torch.equal(logits(pvl.from_pretrained(saved)), logits(tiny))


def test_whole_and_part_can_take_each_others_place(tiny, saved):
    tiny.save_pretrained(saved, whole=False)
    clip = pvl.remove_adapters(copy.deepcopy(tiny.clip))
    assert torch.equal(logits(pvl.from_pretrained(saved, clip=clip)), logits(tiny))

    tiny.save_pretrained(saved)
    assert torch.equal(logits(pvl.from_pretrained(saved)), logits(tiny))


def test_a_file_is_no_folder_to_save_into(tiny, tmp_path):
    (tmp_path / "file").write_text("mine")

    with pytest.raises(FileExistsError, match="is a file"):
        tiny.save_pretrained(tmp_path / "file")

    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_may_be_on_another_file_system(tiny, tmp_path):
    """As a volume of a container is, whose surroundings cannot be written to."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system to write to")
    folder = elsewhere / f"pvl_test_{os.getpid()}"
    folder.mkdir()
    try:
        (tmp_path / "link").symlink_to(folder)
        tiny.save_pretrained(tmp_path / "link")
        assert torch.equal(logits(pvl.from_pretrained(tmp_path / "link")), logits(tiny))
    finally:
        shutil.rmtree(folder)


def test_a_relative_folder_and_the_current_one_will_do(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    tiny.save_pretrained("folder")
    tiny.save_pretrained(".")

    assert torch.equal(logits(pvl.from_pretrained("folder")), logits(tiny))
    assert torch.equal(logits(pvl.from_pretrained(".")), logits(tiny))


@pytest.mark.parametrize("room", [0, 1000, 20_000], ids=["no_room", "little_room", "room_for_the_tokenizer"])
def test_if_the_disk_is_full_the_old_folder_stays(tiny, saved, room):
    before = contents(saved)

    for folder in (saved, saved.parent / "new"):
        with full_disk(room), pytest.raises(Exception, match=r"(?i)too large|i/o|space"):
            changed(tiny).save_pretrained(folder)

    assert contents(saved.parent) == {f"folder/{name}": content for name, content in before.items()}
    assert not (saved.parent / "new").exists()
    assert torch.equal(logits(pvl.from_pretrained(saved)), logits(tiny))


@pytest.mark.parametrize("room", [1000, 20_000], ids=["little_room", "room_for_the_tokenizer"])
def test_if_the_process_is_killed_while_writing_the_old_folder_stays(tiny, saved, room):
    before, other = contents(saved), changed(tiny)

    kill_while(lambda: other.save_pretrained(saved), room=room)

    assert {name: content for name, content in contents(saved).items() if name in before} == before
    assert torch.equal(logits(pvl.from_pretrained(saved)), logits(tiny))
    other.save_pretrained(saved)  # and leftovers are no obstacle
    assert torch.equal(logits(pvl.from_pretrained(saved)), logits(other))


@pytest.mark.parametrize("files", range(1, 6))
def test_a_folder_of_two_saves_is_never_taken_for_one(tiny, saved, tmp_path, monkeypatch, files):
    """A save that stops between its files must not pass for a good one."""
    other = changed(tiny)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join([*WORDS[:5], *WORDS[:4:-1]]))
    other.tokenizer = transformers.BertTokenizerFast(str(tmp_path / "words" / "vocab.txt"))
    replaced = 0
    native = os.replace

    def replace_some(source: str | Path, target: str | Path) -> Path:
        nonlocal replaced
        if replaced == files:
            raise OSError("no space left on device")
        replaced += 1
        native(source, target)
        return Path(target)

    monkeypatch.setattr(Path, "replace", replace_some)
    with suppress(OSError):
        other.save_pretrained(saved)
    monkeypatch.undo()

    try:
        loaded = pvl.from_pretrained(saved)
    except (ValueError, FileNotFoundError):
        return
    assert any(torch.equal(logits(loaded), logits(model)) for model in (tiny, other))


def test_whoever_is_reading_the_old_file_goes_on_reading_it(tiny, saved):
    before = weights_file(saved).read_bytes()

    with weights_file(saved).open("rb") as reader:
        changed(tiny).save_pretrained(saved)

        assert reader.read() == before
    assert weights_file(saved).read_bytes() != before


def test_a_model_goes_on_when_its_folder_is_saved_over(tiny, saved):
    loaded = pvl.from_pretrained(saved)

    changed(tiny).save_pretrained(saved)

    assert torch.equal(logits(loaded), logits(tiny))


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
    description = json.loads(config_file(folder).read_text())
    (entry,) = metadata.keys() - {"format"}
    if config is not None:
        config(description)
        metadata[entry] = json.dumps(description)
    save_file(values, weights_file(folder), metadata=metadata)
    config_file(folder).write_text(json.dumps(description))


def _edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: _rewrite(folder, tensors=change)


def _edit_both(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: _rewrite(folder, config=change)


def vocabulary(folder: Path) -> Path:
    return folder / "tokenizer" / "tokenizer.json"


KEY = "clip.pvl_adapters.0.vision_down.weight"
Damage = tuple[Callable[[Path], object], type[Exception], str]
DAMAGE: dict[str, Damage] = {
    "truncated_weights": (truncate(weights_file, 0.5), ValueError, "model.safetensors is damaged"),
    "weights_without_their_end": (truncate(weights_file, 0.999), ValueError, "model.safetensors is damaged"),
    "empty_weights": (truncate(weights_file, 0.0), ValueError, "model.safetensors is damaged"),
    "no_weights": (lambda folder: weights_file(folder).unlink(), FileNotFoundError, "model.safetensors is missing"),
    "other_file_type": (
        lambda folder: weights_file(folder).write_text("hello" * 100), ValueError, "safetensors is damaged"),
    "weights_of_others": (
        lambda folder: save_file(load_file(weights_file(folder)), weights_file(folder)), ValueError, "different saves"),
    "missing_key": (_edit_tensors(lambda t: t.pop(KEY)), ValueError, f"missing.*{KEY}"),
    "unknown_key": (_edit_tensors(lambda t: t.update(more=torch.zeros(2))), ValueError, "unexpected.*more"),
    "other_shape": (_edit_tensors(lambda t: t.update({KEY: torch.zeros(8, 5)})), ValueError, rf"{KEY}.*\(8, 5\)"),
    "other_type": (
        _edit_tensors(lambda t: t.update({KEY: torch.zeros(8, 32, dtype=torch.int64)})), ValueError, f"{KEY}.*int64"),
    "truncated_config": (truncate(config_file, 0.5), ValueError, "config.json is no configuration of a MedCLIPSeg"),
    "empty_config": (truncate(config_file, 0.0), ValueError, "config.json is no configuration of a MedCLIPSeg"),
    "no_config": (lambda folder: config_file(folder).unlink(), FileNotFoundError, "config.json is missing"),
    "binary_config": (lambda folder: config_file(folder).write_bytes(b"\xff\xfe\x00"), ValueError, "config.json"),
    "list_config": (lambda folder: config_file(folder).write_text("[]"), ValueError, "config.json is no config"),
    "number_config": (lambda folder: config_file(folder).write_text("3"), ValueError, "config.json is no config"),
    "foreign_config": (
        lambda folder: config_file(folder).write_text('{"architectures": ["CLIPModel"], "model_type": "clip"}'),
        ValueError, "config.json is no configuration of a MedCLIPSeg"),
    "edited_config": (edit_json(config_file, lambda c: c["adapters"].update(beta=1.0)), ValueError, "different saves"),
    "newer": (_edit_both(lambda c: c.update(version=2)), ValueError, "version 2, expected 1.*release"),
    "newer_and_otherwise_named": (
        lambda folder: config_file(folder).write_text('{"format": "pvl_adapter.MedCLIPSeg", "version": 2}'),
        ValueError, "version 2, expected 1"),
    "missing_entry": (_edit_both(lambda c: c.pop("adapters")), ValueError, "config.json.*missing.*adapters"),
    "unknown_setting": (_edit_both(lambda c: c["adapters"].update(colour="red")), ValueError, "colour.*newer"),
    "wrong_setting": (_edit_both(lambda c: c["model"].update(num_upscale=-1)), ValueError, "num_upscale is -1"),
    "other_width": (_edit_both(lambda c: c["adapters"].update(dim=4)), ValueError, "shape"),
    "other_layers": (_edit_both(lambda c: c["adapters"].update(layers=[1])), ValueError, "unexpected"),
    "layers_beyond": (_edit_both(lambda c: c["adapters"].update(layers=[1, 9])), ValueError, "9"),
    "other_library": (_edit_both(lambda c: c["backbone"].update(library="jax")), ValueError, "'jax'"),
    "no_backbone": (_edit_both(lambda c: c.update(backbone={})), ValueError, "None, expected released"),
    "null_backbone": (_edit_both(lambda c: c.update(backbone=None)), ValueError, "describes no CLIP"),
    "half_a_backbone": (_edit_both(lambda c: c["backbone"].pop("network")), ValueError, "describes no CLIP"),
    "truncated_tokenizer": (truncate(vocabulary, 0.5), ValueError, "tokenizer.json is damaged"),
    "changed_tokenizer": (
        lambda folder: vocabulary(folder).write_text(vocabulary(folder).read_text().replace("polyp", "nodule")),
        ValueError, "tokenizer.json is damaged"),
    "no_tokenizer_file": (lambda folder: vocabulary(folder).unlink(), FileNotFoundError, "tokenizer.json is missing"),
    "no_tokenizer": (
        lambda folder: shutil.rmtree(folder / "tokenizer"), FileNotFoundError, "tokenizer.*is missing"),
    "nothing_at_all": (
        lambda folder: [shutil.rmtree(folder), folder.mkdir()], FileNotFoundError, "holds neither a config.json"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(saved, damage, error, message):
    damage(saved)

    with pytest.raises(error, match=message):
        pvl.from_pretrained(saved)


WITH_CLIP = (
    "truncated_weights",
    "missing_key",
    "unknown_key",
    "other_shape",
    "other_type",
    "truncated_config",
    "no_config",
    "edited_config",
    "newer",
    "unknown_setting",
    "wrong_setting",
    "other_width",
    "other_layers",
    "layers_beyond",
)


@pytest.mark.parametrize("name", WITH_CLIP)
def test_a_damaged_part_is_refused_and_the_clip_stays_as_it_was(tiny, tmp_path, name):
    damage, error, message = DAMAGE[name]
    folder = tiny.save_pretrained(tmp_path, whole=False)
    clip = pvl.remove_adapters(tiny.clip)
    damage(folder)

    with unchanged(clip), pytest.raises(error, match=message):
        pvl.from_pretrained(folder, clip=clip)


def test_a_damaged_tokenizer_leaves_the_clip_as_it_was(tiny, tmp_path):
    folder = tiny.save_pretrained(tmp_path, whole=False)
    clip = pvl.remove_adapters(copy.deepcopy(tiny.clip))
    vocabulary(folder).unlink()

    with unchanged(clip), pytest.raises(FileNotFoundError, match="is missing"):
        pvl.from_pretrained(folder, clip=clip)
    assert torch.equal(logits(pvl.from_pretrained(folder, clip=clip, tokenizer=tiny.tokenizer)), logits(tiny))


@pytest.mark.parametrize("file", [weights_file, config_file], ids=["weights", "config"])
def test_files_of_two_saves_are_refused(tiny, saved, tmp_path, file):
    tiny.provenance["note"] = "another"
    other = tiny.save_pretrained(tmp_path / "other")
    shutil.copy(file(other), file(saved))

    with pytest.raises(ValueError, match="of different saves"):
        pvl.from_pretrained(saved)


def test_a_model_of_others_is_refused(tmp_path):
    BY_NAME["transformers-clip"].build().save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"config\.json is no configuration of a MedCLIPSeg"):
        pvl.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["nowhere/at/all", "/nowhere"], ids=str)
def test_a_place_that_does_not_exist_is_refused(place):
    with pytest.raises(FileNotFoundError, match=place):
        pvl.from_pretrained(place)


def test_a_folder_made_on_another_system_loads(tiny, saved):
    """Line ends and indentation of the configuration do not matter."""
    description = json.loads(config_file(saved).read_text())
    config_file(saved).write_bytes(json.dumps(description, sort_keys=True).replace(", ", ",\r\n").encode())

    assert torch.equal(logits(pvl.from_pretrained(saved)), logits(tiny))
