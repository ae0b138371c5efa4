"""Uncertainty in one pass: what the head learns, what it promises, and that it knows which model it belongs to."""

from __future__ import annotations

import copy

import pytest
import torch
from saved_models import assert_equal_models, of_open_clip
from support import HOST, segmenter, unchanged
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.distill import mean_pass, moments
from pvl_adapter.sample_statistics import binary_entropy

COUNT = 40
IMAGES = torch.rand(COUNT, 3, 20, 30, generator=torch.Generator().manual_seed(0))
PROMPTS = HOST.ids.repeat(COUNT, 1)[:COUNT]


@pytest.fixture(scope="module")
def taught() -> tuple[pvl.MedCLIPSeg, pvl.DistillReport]:
    model = segmenter()
    return model, pvl.distill(model, IMAGES, PROMPTS, samples=8, steps=150)


def maps(model: pvl.MedCLIPSeg) -> tuple[Tensor, ...]:
    joint = mean_pass(model, model.prepare(IMAGES[:3]), PROMPTS[:3])
    return model.distilled(joint, model.head, size=model.image_size)


def test_every_map_is_of_one_distribution():
    mean, deviation = torch.linspace(-8, 8, 33)[:, None], torch.logspace(-3, 0.3, 20)
    probability, second, entropy = moments(mean.expand(33, 20), deviation.expand(33, 20))

    normal = mean[..., None] + deviation[:, None] * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    samples = normal.sigmoid()
    for got, expected in ((probability, samples), (second, samples.square()), (entropy, binary_entropy(samples))):
        torch.testing.assert_close(got, expected.mean(dim=-1), atol=6e-3, rtol=0.0)
    assert (binary_entropy(probability) - entropy).min() > -1e-6
    assert (second - probability.square()).min() > -1e-6


def test_the_head_is_nearer_to_the_samples_than_the_mean_pass_it_reads(taught):
    report = taught[1]

    assert report.probability_error < 0.8 * report.mean_pass_error
    assert report.held_out == 6
    assert 0.5 < report.variance_ratio < 2.0


def test_teaching_leaves_the_model_as_it_was_and_is_repeatable(taught):
    model, report = segmenter(), taught[1]
    before = copy.deepcopy(model)

    again = pvl.distill(model, IMAGES, PROMPTS, samples=8, steps=150)

    torch.testing.assert_close(maps(model), maps(taught[0]), atol=1e-5, rtol=0.0)
    assert again.worth_samples == pytest.approx(report.worth_samples, rel=0.01)
    assert not any(each.requires_grad for each in model.distilled.parameters())
    model.distilled = None
    assert_equal_models(model, before, HOST)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "adapters"])
def test_it_is_saved_with_the_model_and_in_its_card(open_clip_models, tmp_path, whole):
    model = of_open_clip(open_clip_models["native"])
    pvl.distill(model, IMAGES, ["a tumor at the left", "one polyp"] * (COUNT // 2), samples=4, steps=5)
    with unchanged(model):
        folder = model.save_pretrained(tmp_path, whole=whole)

    clip = None if whole else pvl.remove_adapters(copy.deepcopy(model.clip))
    loaded = pvl.from_pretrained(folder, clip=clip)

    assert_equal_models(loaded, model)
    assert loaded.distilled.facts == model.distilled.facts
    loaded.distilled.check(loaded)
    assert "Uncertainty in one pass" in (folder / "README.md").read_text()


def test_a_head_of_other_weights_is_refused_and_not_saved(open_clip_models, tmp_path, caplog):
    model = of_open_clip(open_clip_models["native"])
    pvl.distill(model, IMAGES, ["a tumor at the left", "one polyp"] * (COUNT // 2), samples=4, steps=5)
    model.distilled.check(model)
    model.distilled.check(copy.deepcopy(model).bfloat16())  # the same weights, rounded
    with torch.no_grad():
        model.head.mask_head[0].weight[0, 0] += 1.0

    with pytest.raises(ValueError, match="trained since"):
        model.distilled.check(model)
    loaded = pvl.from_pretrained(model.save_pretrained(tmp_path))

    assert loaded.distilled is None
    assert "without the distilled head" in caplog.text
    assert "one pass" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [(5, {}, "at least 20"), (40, {"samples": 3}, "samples is 3"), (40, {"held_out": 1.0}, "held_out"),
     (40, {"held_out": 0.001}, "too few")],
)  # fmt: skip
def test_what_cannot_teach_is_refused(count, settings, message):
    with pytest.raises(ValueError, match=message):
        pvl.distill(segmenter(), IMAGES[:count], PROMPTS[:count], **settings)
