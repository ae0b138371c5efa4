"""What a hostile user would try: wrong arguments, NaN in the network, hooks that change things, unusual hosts."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes import TINY_RELEASED
from hosts import BY_NAME
from support import HOST, MAPS, images, injected, randomise, segmenter, speaking_segmenter
from thread_oracle import plain_towers
from torch import Tensor, nn

import pvl_adapter as pvl
from pvl_adapter import kernels

IMAGES = images()
ERRORS = (ValueError, TypeError)


@pytest.fixture(scope="module")
def speaking() -> pvl.MedCLIPSeg:
    return speaking_segmenter()


# --- arguments of predict --------------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any]] = [
    *(("seed", value) for value in (-1, 1.5, "0")),
    *(("memory_budget", value) for value in (0, -5, 1.5)),
    *(("num_samples", value) for value in (1.5, True, -1, None, "auto")),
    *(("threshold", value) for value in (2, -0.1, math.nan)),
    *(("text", value) for value in (None, "", " \t\n", [], [["a polyp"]])),
    *(("text", ["a polyp", value, "a tumor"]) for value in ("", 3)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=repr)
def test_wrong_arguments_of_predict_are_refused_by_name(speaking, name, value):
    arguments = {"image": IMAGES, "text": ["a polyp", "a tumor", "a lesion"], "num_samples": 2, name: value}

    with pytest.raises(ERRORS, match=name):
        speaking.predict(**arguments)


def test_wrong_settings_of_auto_are_refused_by_name():
    for name, values in {"tolerance": (0.0, math.nan), "percentile": (0.0, 101.0), "max_samples": (1, 3, 4.5)}.items():
        for value in values:
            with pytest.raises(ERRORS, match=name):
                pvl.Auto(**{name: value})
    for limits in ({"percentile": 0.5}, {"tolerance": 5.0, "percentile": 100, "max_samples": 4}):
        assert vars(pvl.Auto(**limits)).items() >= limits.items()


def test_words_beyond_the_context_are_cut_with_a_warning(speaking):
    with pytest.warns(UserWarning, match="16"):
        assert speaking.tokenize("tumor " * 5000).shape == (1, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speaking.tokenize("a polyp at the left")


@pytest.mark.parametrize("several", [True, False], ids=["batch", "list"])
def test_float_images_are_raw_unless_said_to_be_prepared(several):
    model, raw = segmenter(), torch.rand(3, 3, *HOST.image_size, generator=torch.Generator().manual_seed(0))
    prepared = model.prepare(list(raw))

    got = model.predict(raw if several else list(raw), HOST.ids, num_samples=0)
    told = model.predict(prepared, HOST.ids, num_samples=0, prepared=True)

    torch.testing.assert_close(got.probability, model(prepared, HOST.ids).logits.sigmoid())
    torch.testing.assert_close(told.probability, got.probability)
    with pytest.raises(ValueError, match="prepared"):
        model.predict(prepared, HOST.ids)  # beyond [0, 1]


NOT_PREPARED = {
    "one": lambda: HOST.image[0],
    "bytes": lambda: HOST.image.to(torch.uint8),
    "list": lambda: list(HOST.image),
    "images": lambda: IMAGES,
}


@pytest.mark.parametrize("make", NOT_PREPARED.values(), ids=NOT_PREPARED)
def test_only_a_float_batch_can_be_prepared(make):
    with pytest.raises(ERRORS, match=r"prepared|image"):
        segmenter().predict(make(), HOST.ids, prepared=True)


def test_a_generator_as_seed_gives_its_next_number():
    model, source = segmenter(), torch.Generator().manual_seed(5)

    first, second = (model.predict(IMAGES, HOST.ids, num_samples=2, seed=source).probability for _ in range(2))
    again = model.predict(IMAGES, HOST.ids, num_samples=2, seed=torch.Generator().manual_seed(5)).probability

    assert torch.equal(first, again)
    assert not torch.equal(first, second)


# --- NaN in the network ----------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[pvl.MedCLIPSeg], nn.Parameter]] = {
    "adapter": lambda model: model.clip.pvl_adapters[1].vision_up.weight,
    "gate": lambda model: model.clip.pvl_adapters[0].two_way.text_to_image.gate,
    "head": lambda model: model.head.mask_head[2].bias,
    "image_tower": lambda model: next(model.clip.visual.transformer.resblocks[2].parameters()),
    "text_tower": lambda model: next(model.clip.transformer.resblocks[0].parameters()),
}


@pytest.mark.parametrize("number", [0, 2, "auto"])
@pytest.mark.parametrize("part", PARTS)
def test_a_network_that_gives_nan_says_so_instead_of_finding_nothing(part, number):
    model = segmenter()
    with torch.no_grad():
        PARTS[part](model).flatten()[0] = math.nan

    with pytest.raises(ValueError, match=r"NaN|finite"):
        model.predict(IMAGES, HOST.ids, num_samples=pvl.Auto(max_samples=4) if number == "auto" else number)


def test_a_prediction_with_nan_is_not_saved(tmp_path):
    prediction = segmenter().predict(IMAGES, HOST.ids, num_samples=2)
    probability = prediction.probability.clone()
    probability[1, 2, 3] = math.nan

    with pytest.raises(ValueError, match=r"NaN|finite"):
        dataclasses.replace(prediction, probability=probability).save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists() or not list((tmp_path / "folder").iterdir())


# --- estimates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
@pytest.mark.parametrize("number", [4, 12])
def test_intervals_hold_the_probability_and_widen_with_the_level(number, antithetic):
    prediction = segmenter().predict(IMAGES, HOST.ids, num_samples=number, antithetic=antithetic)
    (low, high), (lower, higher) = prediction.interval(0.5), prediction.interval(0.95)

    for lesser, larger in ((lower, low), (low, prediction.probability), (prediction.probability, high), (high, higher)):
        assert (lesser <= larger + 1e-6).all()
    assert lower.min() >= 0
    assert higher.max() <= 1
    assert ((higher - lower).mean() / (high - low).mean()) > 2
    for level in (0.0, 1.0, -0.5, math.nan, 95):
        with pytest.raises(ERRORS, match=r"level|between"):
            prediction.interval(level)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["mean_pass", "one_sample", "one_pair"])
def test_intervals_are_unknown_where_the_error_is(number):
    lower, upper = segmenter().predict(IMAGES, HOST.ids, num_samples=number).interval(0.95)

    assert lower.isnan().all()
    assert upper.isnan().all()


@pytest.mark.parametrize("number", [1, 2, 8, "auto"])
@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
def test_all_terms_come_from_one_estimator(number, antithetic):
    """The epistemic part is then a mutual information, never below 0."""
    count = pvl.Auto(tolerance=1e-9, max_samples=6) if number == "auto" else number
    got = segmenter().predict(IMAGES, HOST.ids, num_samples=count, antithetic=antithetic)
    total = torch.special.entr(got.probability) + torch.special.entr(1 - got.probability)

    torch.testing.assert_close(got.uncertainty, total, atol=2e-6, rtol=0.0)
    torch.testing.assert_close(got.uncertainty, got.aleatoric + got.epistemic, atol=1e-6, rtol=0.0)
    assert got.epistemic.min() >= 0
    assert number == 1 or (got.epistemic == 0).float().mean() < 0.01


# --- hooks that change what passes -----------------------------------------------------------------------------------


def hook(block: nn.Module, when: str) -> Any:
    """Adds 1 to what a block returns, or to what it is given."""
    if when == "after":
        return block.register_forward_hook(lambda _, args, output: output + 1.0)

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + 1.0, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 1.0}

    return block.register_forward_pre_hook(before, with_kwargs=True)


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("index", [1, -1], ids=["second", "last"])
@pytest.mark.parametrize("side", [0, 1], ids=["image", "text"])
@pytest.mark.parametrize("name", ["open_clip-inlined_text", "transformers-clip"])
def test_a_hook_that_changes_a_block_is_refused_in_every_way_in(name, side, index, when):
    host = BY_NAME[name]
    model = segmenter(host)
    prepared = model.prepare(IMAGES)
    ways: list[Callable[[], Tensor]] = [
        lambda: host.run(model.clip),
        lambda: pvl.encode(model.clip, host.image, host.text).patch_tokens,
        lambda: model(prepared, host.text).logits,
        lambda: model.predict(IMAGES, host.text, num_samples=0).probability,
        lambda: model.predict(IMAGES, host.text, num_samples=2).probability,
    ]
    expected = [way() for way in ways]

    handle = hook(plain_towers(host, model.clip)[side].blocks[index], when)
    for way in ways:
        with pytest.raises(RuntimeError, match="hook"):
            way()
    with pvl.disable_adapters(model.clip):
        host.run(model.clip)
    handle.remove()

    assert all(torch.equal(way(), answer) for way, answer in zip(ways, expected, strict=True))


# --- hosts and types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_on_a_processor_without_it_is_warned_of_once(native, monkeypatch):
    monkeypatch.setattr(kernels, "has_native_bfloat16", lambda: native)
    model = segmenter().bfloat16()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        predictions = [model.predict(IMAGES, HOST.ids, num_samples=2) for _ in range(2)]

    assert sum("bfloat16" in str(warning.message) for warning in caught) == (0 if native else 1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(getattr(one, name).dtype == torch.float32 for one in predictions for name in MAPS)


# --- prompts ---------------------------------------------------------------------------------------------------------

PROMPTS = {
    "\u201cone\u201d polyp\u2019s edge": '"one" polyp\'s edge',
    "left &amp; right": "left & right",
    "left &amp;amp; right": "left & right",
    "\ufb01ne \ufb02at tissue": "fine flat tissue",
    "\u00e2\u0153\u201d tumor": "\u2714 tumor",
    "  one\t\tlarge \n polyp  ": "one large polyp",
    "one large polyp": "one large polyp",
}


@pytest.mark.parametrize(("prompt", "cleaned"), PROMPTS.items(), ids=lambda text: ascii(text))
def test_prompts_are_cleaned_as_the_authors_do_where_asked(prompt, cleaned):
    seen: list[str] = []

    def tokenizer(sentences: list[str]) -> Tensor:
        seen.extend(sentences)
        return HOST.ids[: len(sentences)]

    for config in (pvl.MedCLIPSegConfig(clean_prompts=True), pvl.MedCLIPSegConfig()):
        pvl.MedCLIPSeg(injected(HOST), config=config, tokenizer=tokenizer).tokenize(prompt)

    assert seen == [cleaned, prompt]


def test_the_published_network_cleans_prompts():
    model = TINY_RELEASED.build()

    assert model.config.clean_prompts
    assert not pvl.MedCLIPSegConfig().clean_prompts


# --- gates -----------------------------------------------------------------------------------------------------------


def test_gates_hold_one_element_and_published_scalars_still_load():
    attention = randomise(pvl.ProbCrossAttention(4, gate_init=0.7))
    state = attention.state_dict()
    assert state["gate"].shape == (1,)

    other = pvl.ProbCrossAttention(4)
    other.load_state_dict({**state, "gate": state["gate"].reshape(())})

    assert torch.equal(other.gate, attention.gate)
