"""Several sentences on the same images: to the last bit what each gives by itself; refused by other weights."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from saved_models import of_open_clip
from support import FEW_HOSTS, HOST, assert_same_bits, blocks, images, maps, randomise, segmenter
from torch import nn

import pvl_adapter as pvl
from pvl_adapter import kernels, segmentation

IMAGES = images()
AUTO = pvl.Auto(tolerance=0.02, max_samples=6)


def assert_same(got: pvl.Prediction, expected: pvl.Prediction) -> None:
    """In all that a prediction holds."""
    for name in ("logits", "area_deviation", "likeness", "summary", "appearance", "num_samples"):
        assert_same_bits(getattr(got, name), getattr(expected, name))
    assert_same_bits([got.mask, *maps(got)], [expected.mask, *maps(expected)])
    assert (got.texts, got.images) == (expected.texts, expected.images)
    assert (got.samples is None) == (expected.samples is None)
    assert got.samples is None or torch.equal(got.samples, expected.samples)


def taught(model: pvl.MedCLIPSeg, doubted: float) -> pvl.MedCLIPSeg:
    """With a distilled head, untaught, that doubts about that share of pairs."""
    head = pvl.DistilledHead(model.head.dim).eval().requires_grad_(False)
    head.facts |= {"weights": "", "held_out": 9}
    head.check = lambda _: None
    head.limit.fill_(1e-3 if doubted else 1e9)
    model.distilled = head
    return model


def test_every_family_answers_from_a_part_as_from_the_images(host):
    model = segmenter(host, config=pvl.PVLConfig(layers=(2,), dim=8))
    part, text = model.image_part(IMAGES), host.text_of(host.ids.flip(0))
    model.predict(part, host.text, num_samples=0)

    assert_same(model.predict(part, text, num_samples=2), model.predict(IMAGES, text, num_samples=2))


@pytest.mark.parametrize("number", [5, 0, AUTO, "distilled", "doubted"], ids=str)
@pytest.mark.parametrize(
    "layers",
    [pytest.param((2,), id="shared"), pytest.param((0, 2), id="nothing_to_share", marks=pytest.mark.slow)],
)
def test_every_way_of_sampling_in_any_precision_in_any_order(number, layers, monkeypatch):
    monkeypatch.setattr(kernels, "has_native_bfloat16", lambda: True)
    monkeypatch.setattr(segmentation, "NUM_SAMPLES", 4)  # of what the head doubts
    model = segmenter(config=pvl.PVLConfig(layers=layers, dim=8))
    if isinstance(number, str):
        model, number = taught(model, doubted=number == "doubted"), "distilled"

    def ask(image: Any, *, autocast: bool, **settings: Any) -> pvl.Prediction:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model.predict(image, HOST.text, num_samples=number, **settings)

    several = {"return_samples": True} if number in (5, 0) else {}
    for some, ways in (
        (IMAGES[:1], [(False, {}), (True, several)]),
        (IMAGES, [(True, {"memory_budget": 1, "seed": 3}), (False, several)]),
    ):
        part = model.image_part(some)
        for autocast, settings in ways:
            settings = {"antithetic": not autocast, **settings}
            assert_same(ask(part, autocast=autocast, **settings), ask(some, autocast=autocast, **settings))


def test_an_ensemble_asks_a_part_too():
    first, second = segmenter(), segmenter()
    randomise(second.clip.pvl_adapters, seed=5)
    ensemble = pvl.Ensemble([first, second])
    part = ensemble.model.image_part(IMAGES)

    for text in (HOST.ids, HOST.ids.flip(0)):
        assert_same(ensemble.predict(part, text, num_samples=2), ensemble.predict(IMAGES, text, num_samples=2))
        assert_same(first.predict(part, text, num_samples=2), first.predict(IMAGES, text, num_samples=2))


def test_what_changes_for_a_while_finds_what_it_would_without_a_part():
    model = segmenter(config=pvl.PVLConfig(layers=(2,), dim=8))
    part, text = model.image_part(IMAGES[0]), HOST.ids
    joined = model.predict(part, text, num_samples=2)
    seen: list[torch.Tensor] = []

    with pvl.disable_adapters(model.clip):
        assert_same(model.predict(part, text, num_samples=0), model.predict(IMAGES[0], text, num_samples=0))
    handle = next(iter(blocks(model.clip).values())).register_forward_hook(lambda _, args, output: seen.append(output))
    for image in (part, IMAGES[0]):
        model.predict(image, text, num_samples=2)
    handle.remove()

    assert len(seen) > 2
    assert_same_bits(seen[: len(seen) // 2][-1], seen[-1])
    assert_same(model.predict(part, text, num_samples=2), joined)


@pytest.mark.parametrize("host", FEW_HOSTS, ids=str)
def test_images_are_opened_and_what_comes_before_the_first_adapter_is_computed_once(host, monkeypatch, tmp_path):
    model = segmenter(host, config=pvl.PVLConfig(layers=(2,), dim=8))
    runs: Counter[str] = Counter()
    names = {id(block): name for name, block in blocks(model.clip).items()}
    for kind in {type(block) for block in blocks(model.clip).values()}:

        def forward(self: nn.Module, *args: object, own: Callable = kind.forward, **kwargs: object) -> object:
            runs[names[id(self)]] += 1
            return own(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    IMAGES[0].save(tmp_path / "image.png")

    part = model.image_part(tmp_path / "image.png")
    (tmp_path / "image.png").unlink()
    for ids in host.ids.split(1):
        model.predict(part, host.text_of(ids), num_samples=2)

    assert Counter(runs.values()) == {1: 3, 3: len(runs) - 3}  # three image blocks come before the adapter


# --- refused ---------------------------------------------------------------------------------------------------------


def other_weights(model: pvl.MedCLIPSeg) -> pvl.MedCLIPSeg:
    randomise(next(iter(blocks(model.clip).values())))
    return model


CHANGES: dict[str, Callable[[pvl.MedCLIPSeg], pvl.MedCLIPSeg]] = {
    "model": lambda model: segmenter(),
    "copy": copy.deepcopy,
    "weights": other_weights,
    "loaded": lambda model: (model.load_state_dict(segmenter(HOST).state_dict()), model)[1],
    "type": lambda model: model.double(),
    "device": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_of_another_model_or_of_other_weights_is_refused_in_one_line(change):
    model = segmenter()
    part, text = model.image_part(IMAGES[0]), HOST.ids
    model.predict(part, text, num_samples=0)

    with pytest.raises(ValueError, match=r"image part.*another model.*model\.image_part\(image\)") as told:
        CHANGES[change](model).predict(part, text, num_samples=0)
    assert "\n" not in str(told.value)


def test_a_part_is_refused_when_its_model_is_gone_and_images_as_predict_refuses_them():
    part, model = segmenter().image_part(IMAGES[0]), segmenter()

    with pytest.raises(ValueError, match="another model"):
        model.predict(part, HOST.ids)
    with pytest.raises(ValueError, match="3 images and 2 sentences"):
        model.predict(model.image_part(IMAGES), HOST.ids[:2])
    with pytest.raises(ValueError, match="prepared=True is for"):
        model.image_part(IMAGES, prepared=True)


def test_prepared_tensors_make_a_part_too_and_sentences_are_kept(open_clip_models):
    model = of_open_clip(open_clip_models["native"])
    pixels = model.prepare(IMAGES[:1])
    part = model.image_part(pixels, prepared=True)

    for text in ("a tumor at the left", ["one polyp", "a tumor"]):
        assert_same(model.predict(part, text, num_samples=2), model.predict(pixels, text, num_samples=2, prepared=True))
