"""`Prediction`: what is left to a human, in which order, and how it is looked at and kept."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import HOST, MAPS, assert_same_maps, full_disk, maps, segmenter
from torch import Tensor

import pvl_adapter as pvl

LN2 = math.log(2.0)
SIZES = [(20, 30), (64, 17), (32, 48)]  # height and width of the images


def image(size: tuple[int, int], *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def predicted() -> pvl.Prediction:
    """Of three images of different sizes."""
    return segmenter().predict([image(size, seed=seed) for seed, size in enumerate(SIZES)], HOST.text, num_samples=6)


@pytest.fixture(scope="module")
def unsure() -> pvl.Prediction:
    """Of a single sample, whose errors are unknown."""
    return segmenter().predict([image(SIZES[0])], HOST.ids[:1], num_samples=1)


def with_probability(prediction: pvl.Prediction, maps: list[Tensor], **more: Any) -> pvl.Prediction:
    """The same but for its probabilities and what follows from them."""
    probability = torch.stack(maps)
    entropy = torch.special.entr(probability) + torch.special.entr(1 - probability)
    others = {name: torch.zeros_like(probability) for name in ("epistemic", "variance", "standard_error")}
    return dataclasses.replace(
        prediction,
        probability=probability,
        mask=probability > 0.5,
        uncertainty=entropy,
        aleatoric=entropy,
        num_samples=torch.full((len(maps),), 2),
        **others,
        **more,
    )


def filled(inside: float, outside: float | None = None) -> Tensor:
    """A map whose left half has one value and whose right half another."""
    maps = torch.full((32, 48), inside if outside is None else outside)
    maps[:, :24] = inside
    return maps


# --- abstaining and ranking ------------------------------------------------------------------------------------------


def test_abstaining_leaves_uncertain_pixels_to_a_human(predicted):
    assert torch.equal(predicted.abstain(0.3), predicted.uncertainty > 0.3)
    assert predicted.abstain(0.0).all()
    assert not with_probability(predicted, [filled(0.5)]).abstain(LN2).any()  # no more uncertain than a coin


@pytest.mark.parametrize("threshold", [-0.1, 0.7, math.nan])
def test_no_uncertainty_is_outside_0_and_ln_2(threshold, predicted):
    with pytest.raises(ValueError, match=str(threshold)):
        predicted.abstain(threshold)


def test_the_review_score_is_one_minus_the_dice_to_expect(predicted):
    p = torch.rand(32, 48, generator=torch.Generator().manual_seed(3))
    mask = p > 0.5
    dice = 2 * p[mask].sum() / (p.sum() + mask.sum())
    kinds = [p, filled(1.0, 0.0), filled(0.0), filled(1e-6), filled(0.49)]

    anything, sure, nothing, hardly, missed = with_probability(predicted, kinds).review_score.tolist()

    assert anything == pytest.approx(1 - dice.item(), abs=2e-3)
    assert max(sure, nothing) < 1e-6
    assert hardly < 0.01
    assert 0.9 < missed <= 1.0  # not one pixel of what may well be half an image


# --- in the image's geometry -----------------------------------------------------------------------------------------


def assert_of_size(maps: dict[str, np.ndarray], size: tuple[int, int]) -> None:
    assert set(maps) == {"mask", *MAPS}
    for name, values in maps.items():
        assert values.shape == size, name
        assert values.dtype == (bool if name == "mask" else np.float32), name


def test_maps_are_brought_to_the_size_of_each_image(predicted):
    for index, size in enumerate(SIZES):
        assert_of_size(predicted.at_original_size(index), size)
        assert predicted.images[index].size == size[::-1]
    same = predicted.at_original_size(2)  # an image as large as the network's
    assert np.array_equal(same["mask"], predicted.mask[2].numpy())
    for name in MAPS:
        np.testing.assert_allclose(same[name], getattr(predicted, name)[2].numpy(), atol=1e-6)


def test_one_image_serves_several_sentences_and_without_images_maps_stay_as_they_are():
    model = segmenter()
    several = model.predict(image((20, 30)), HOST.text, num_samples=2)
    bare = model.predict(HOST.image, HOST.text, num_samples=2, prepared=True)

    for index in range(3):
        assert_of_size(several.at_original_size(index), (20, 30))
    assert not bare.images
    assert_of_size(bare.at_original_size(1), HOST.image_size)


def test_masks_are_resized_to_whole_pixels_and_maps_smoothly(predicted):
    larger = with_probability(predicted, [filled(1.0, 0.0)], images=(image((64, 96)),)).at_original_size(0)

    assert np.array_equal(larger["mask"], np.arange(96)[None].repeat(64, 0) < 48)
    assert len(np.unique(larger["probability"])) > 2
    assert larger["probability"].min() >= 0
    assert larger["probability"].max() <= 1


# --- summaries and files ---------------------------------------------------------------------------------------------


def test_a_summary_can_be_written_as_json(predicted, unsure):
    for prediction in (predicted, unsure):
        summaries = json.loads(json.dumps(prediction.to_dict(), allow_nan=False))

        assert len(summaries) == len(prediction.mask)
        for index, summary in enumerate(summaries):
            assert summary["num_samples"] == prediction.num_samples[index]
            assert summary["foreground_fraction"] == pytest.approx(prediction.mask[index].float().mean().item())
            assert summary["expected_foreground_fraction"] == pytest.approx(prediction.probability[index].mean().item())
            assert summary["largest_uncertainty_nats"] == pytest.approx(prediction.uncertainty[index].max().item())
            assert summary["review_score"] == pytest.approx(prediction.review_score[index].item())
    assert unsure.to_dict()[0]["largest_standard_error"] is None
    assert predicted.to_dict()[0]["largest_standard_error"] == pytest.approx(predicted.standard_error[0].max().item())


def files_of(names: list[str], *more: str) -> set[str]:
    ends = ("_mask.png", "_probability.png", "_uncertainty.png", "_overlay.png", *more)
    return {"predictions.json", *(f"{name}{end}" for name in names for end in ends)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_images_are_saved_in_their_own_geometry_and_maps_in_the_networks(predicted, tmp_path):
    folder = predicted.save(tmp_path / "new" / "folder", maps=True)

    assert folder == tmp_path / "new" / "folder"
    assert set(contents(folder)) == files_of(["0000", "0001", "0002"], ".npz")
    for index, size in enumerate(SIZES):
        with np.load(folder / f"{index:04d}.npz", allow_pickle=False) as saved:
            assert set(saved) == {"mask", *MAPS}
            for name in saved:
                np.testing.assert_array_equal(saved[name], getattr(predicted, name)[index].numpy())
        maps = predicted.at_original_size(index)
        mask = np.asarray(Image.open(folder / f"{index:04d}_mask.png"))
        assert np.array_equal(mask, maps["mask"].astype(np.uint8) * 255)
        for name, most in (("probability", 1.0), ("uncertainty", LN2)):
            with Image.open(folder / f"{index:04d}_{name}.png") as levels:
                assert levels.mode == "I;16"
                np.testing.assert_allclose(np.asarray(levels) / 65535 * most, maps[name], atol=1 / 65535)
        with Image.open(folder / f"{index:04d}_overlay.png") as overlay:
            assert (overlay.size, overlay.mode) == (size[::-1], "RGB")
    assert contents(predicted.save(folder, maps=True)) == contents(predicted.save(tmp_path / "again", maps=True))


def test_extreme_values_fill_the_whole_range_of_levels(predicted, tmp_path):
    with_probability(predicted, [filled(1.0), filled(0.0), filled(0.5)]).save(tmp_path)

    for name, expected in {"probability": [65535, 0, 32768], "uncertainty": [0, 0, 65535]}.items():
        levels = [np.asarray(Image.open(tmp_path / f"000{index}_{name}.png"))[0, 0] for index in range(3)]
        assert levels == expected


def test_summaries_are_saved_by_name(predicted, tmp_path):
    names = ["left.v2", "right eye", "both"]
    predicted.save(tmp_path, names=names)

    assert set(contents(tmp_path)) == files_of(names)
    summaries = json.loads((tmp_path / "predictions.json").read_text())
    assert [summary.pop("name") for summary in summaries] == names
    assert summaries == json.loads(json.dumps(predicted.to_dict()))


def test_an_overlay_shows_the_image_where_there_is_nothing_to_tell(predicted, tmp_path):
    shown = image((32, 48))
    with_probability(predicted, [filled(1.0, 0.0), filled(0.5)], images=(shown, shown)).save(tmp_path / "shown")
    with_probability(predicted, [filled(0.5)], images=()).save(tmp_path / "bare")

    original, overlay, doubt = (
        np.asarray(one).astype(int)
        for one in (shown, *(Image.open(tmp_path / "shown" / f"000{index}_overlay.png") for index in range(2)))
    )
    assert np.array_equal(overlay[:, 24:], original[:, 24:])
    assert (overlay[:, :24, 1] - original[:, :24, 1]).mean() > 20  # green
    assert doubt[..., 0].min() > 200  # red
    assert not any("overlay" in name for name in contents(tmp_path / "bare"))


@pytest.mark.parametrize("names", [["a", "b"], [*"aba"], [], [*"abcd"], ["a", "b", ""], ["a", "b", "../c"]], ids=str)
def test_names_that_cannot_be_told_apart_or_name_no_file_are_refused(names, predicted, tmp_path):
    with pytest.raises(ValueError, match="names"):
        predicted.save(tmp_path / "folder", names=names)

    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("room", [0, 200, 2000])
def test_on_a_full_disk_nothing_is_half_written(room, predicted, tmp_path):
    expected = contents(predicted.save(tmp_path / "whole"))
    other = with_probability(predicted, [filled(0.25)] * 3)
    old = contents(other.save(tmp_path / "folder"))

    with full_disk(room), pytest.raises(OSError):  # noqa: PT011, the words are the system's
        predicted.save(tmp_path / "folder")

    now = contents(tmp_path / "folder")
    assert set(now) == set(old)  # no temporary file lies about
    assert all(now[name] in (old[name], expected[name]) for name in now)
    assert now["predictions.json"] == old["predictions.json"]
    assert contents(predicted.save(tmp_path / "folder")) == expected


def test_a_plot_is_a_figure_that_can_be_saved(predicted, unsure):
    bare = segmenter().predict(HOST.image[:1], HOST.text[:1], num_samples=0, prepared=True)

    for prediction in (predicted, unsure, bare):
        figure = prediction.plot()
        figure.savefig(io.BytesIO(), dpi=30)
        assert len([axis for axis in figure.axes if axis.get_title()]) == 4 * len(prediction.mask)


def test_some_pairs_of_a_prediction_are_a_prediction(predicted):
    part = predicted[1:]
    assert_same_maps(maps(part), [values[1:] for values in maps(predicted)], atol=0.0)
    assert (part.images, part.texts) == (predicted.images[1:], predicted.texts[1:])
    assert part.to_dict() == predicted.to_dict()[1:]
    torch.testing.assert_close(part.interval(), tuple(bound[1:] for bound in predicted.interval()), equal_nan=True)


def test_some_sentences_of_a_prediction_keep_their_only_image():
    shown = image(SIZES[0])
    several = segmenter().predict(shown, HOST.text, num_samples=2)

    assert several[1:].image(1).tobytes() == shown.tobytes()
    assert several[1:].at_original_size(1)["mask"].shape == SIZES[0]
