"""`Prediction`: what is left to a human, in which order, and how it is looked at and kept."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from support import full_disk
from test_segmentation import HOST, segmenter
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.monte_carlo import Statistics

LN2 = math.log(2.0)
MAPS = ("probability", "uncertainty", "aleatoric", "epistemic", "variance", "standard_error")
SIZES = [(20, 30), (64, 17), (32, 48)]  # height and width of pictures


def prediction_of(*samples: Tensor, pictures: tuple[Image.Image, ...] = ()) -> pvl.Prediction:
    """From the samples' probabilities, [S, H, W] for each image."""
    statistics = [Statistics(antithetic=False) for _ in samples]
    for one, maps in zip(statistics, samples, strict=True):
        for sample in maps:
            one.add(sample)
    return pvl.Prediction.from_statistics(statistics, threshold=0.5, pictures=pictures)


def constant(*probabilities: float, size: tuple[int, int] = (32, 48)) -> Tensor:
    """One sample of each value, everywhere the same."""
    return torch.tensor(probabilities).view(-1, 1, 1).expand(-1, *size)


def half_filled(inside: float, outside: float) -> Tensor:
    maps = constant(outside, outside).clone()
    maps[:, :, :24] = inside
    return maps


def picture(size: tuple[int, int], *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def predicted() -> pvl.Prediction:
    """Of three pictures of different sizes."""
    torch.manual_seed(0)
    pictures = [picture(size, seed=seed) for seed, size in enumerate(SIZES)]
    return segmenter().predict(pictures, HOST.text, num_samples=6)


@pytest.fixture(scope="module")
def unsure() -> pvl.Prediction:
    """Of a single sample, whose errors are unknown."""
    torch.manual_seed(0)
    return segmenter().predict([picture(SIZES[0])], HOST.ids[:1], num_samples=1)


# --- abstaining and ranking ------------------------------------------------------------------------------------------


def test_abstaining_leaves_uncertain_pixels_to_a_human(predicted):
    assert torch.equal(predicted.abstain(0.3), predicted.uncertainty > 0.3)
    assert predicted.abstain(0.0).all()
    assert predicted.abstain(0.3).dtype == torch.bool
    assert predicted.abstain(0.6).sum() <= predicted.abstain(0.3).sum()


def test_not_even_a_coin_is_more_uncertain_than_ln_2():
    assert not prediction_of(constant(0.5, 0.5)).abstain(LN2).any()


@pytest.mark.parametrize("threshold", [-0.1, 0.7, 1.0, math.nan])
def test_no_uncertainty_is_outside_0_and_ln_2(threshold, predicted):
    with pytest.raises(ValueError, match=f"threshold is {threshold}, expected nats between 0 and ln 2"):
        predicted.abstain(threshold)


def test_review_scores_rank_by_how_much_the_mask_may_be_wrong(predicted):
    sure = half_filled(1.0, 0.0)
    nearly = half_filled(0.95, 0.02)
    doubtful = half_filled(0.6, 0.4)
    nothing = constant(0.0, 0.0)
    hardly = constant(1e-6, 1e-6)
    coin = constant(0.51, 0.51)
    missed = constant(0.49, 0.49)

    scores = prediction_of(sure, nearly, doubtful, nothing, hardly, coin, missed).review_score
    assert scores.shape == (7,)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert scores[0] < 1e-6
    assert scores[0] < scores[1] < scores[2]
    assert scores[3] < 1e-6
    assert scores[4] < 0.01
    assert scores[5] > 0.3
    assert scores[6] > 0.9  # not one pixel of what may well be half an image
    assert ((predicted.review_score > 0) & (predicted.review_score < 1)).all()


def test_the_review_score_is_one_minus_the_dice_to_expect():
    maps = torch.rand(1, 32, 48, generator=torch.Generator().manual_seed(3))
    prediction = prediction_of(maps)
    mask, p = maps[0] > 0.5, maps[0]

    dice = 2 * p[mask].sum() / (p.sum() + mask.sum())

    assert prediction.review_score.item() == pytest.approx(1 - dice.item(), abs=2e-3)


def test_maps_are_those_of_the_samples():
    prediction = prediction_of(constant(0.2, 0.6), constant(0.0, 1.0), constant(1.0, 1.0))

    def entropy(p: float) -> float:
        return -(p * math.log(p) + (1 - p) * math.log(1 - p))

    assert prediction.probability[:, 0, 0].tolist() == pytest.approx([0.4, 0.5, 1.0])
    assert prediction.uncertainty[:, 0, 0].tolist() == pytest.approx([entropy(0.4), LN2, 0.0])
    assert prediction.aleatoric[:, 0, 0].tolist() == pytest.approx([(entropy(0.2) + entropy(0.6)) / 2, 0.0, 0.0])
    torch.testing.assert_close(prediction.aleatoric + prediction.epistemic, prediction.uncertainty)
    assert prediction.variance[:, 0, 0].tolist() == pytest.approx([0.08, 0.5, 0.0])
    assert prediction.standard_error[:, 0, 0].tolist() == pytest.approx([0.2, 0.5, 0.0])
    assert prediction.mask[:, 0, 0].tolist() == [False, False, True]
    assert prediction.num_samples.tolist() == [2, 2, 2]


def test_a_prediction_is_frozen(predicted):
    with pytest.raises(dataclasses.FrozenInstanceError):
        predicted.probability = None


# --- in the picture's geometry ---------------------------------------------------------------------------------------


def assert_of_size(maps: dict[str, np.ndarray], size: tuple[int, int]) -> None:
    assert set(maps) == {"mask", *MAPS}
    for name, values in maps.items():
        assert values.shape == size, name
        assert values.dtype == (bool if name == "mask" else np.float32), name


def test_maps_are_brought_to_the_size_of_each_picture(predicted):
    for index, size in enumerate(SIZES):
        assert_of_size(predicted.at_original_size(index), size)
        assert predicted.picture(index).size == size[::-1]
    same = predicted.at_original_size(2)  # a picture as large as the network's
    assert np.array_equal(same["mask"], predicted.mask[2].numpy())
    for name in MAPS:
        np.testing.assert_allclose(same[name], getattr(predicted, name)[2].numpy(), atol=1e-6)


def test_one_picture_serves_several_sentences():
    prediction = segmenter().predict(picture((20, 30)), HOST.text, num_samples=2)

    for index in range(3):
        assert_of_size(prediction.at_original_size(index), (20, 30))
        assert prediction.picture(index).size == (30, 20)


def test_a_picture_that_is_stored_lying_is_answered_upright(tmp_path):
    lying = Image.fromarray(np.full((20, 30, 3), 128, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    lying.save(tmp_path / "turned.jpg", exif=exif)

    prediction = segmenter().predict(tmp_path / "turned.jpg", HOST.ids[:1], num_samples=2)

    assert prediction.picture(0).size == (20, 30)
    assert_of_size(prediction.at_original_size(0), (30, 20))


def test_without_pictures_maps_stay_at_the_size_of_the_network():
    prediction = segmenter().predict(HOST.image, HOST.text, num_samples=2)

    assert prediction.picture(0) is None
    assert_of_size(prediction.at_original_size(1), HOST.image_size)


def test_masks_are_resized_to_whole_pixels_and_maps_smoothly():
    maps = half_filled(1.0, 0.0)
    small = prediction_of(maps, pictures=(picture((64, 96)),)).at_original_size(0)

    assert np.array_equal(small["mask"], np.arange(96)[None].repeat(64, 0) < 48)
    assert len(np.unique(small["probability"])) > 2
    assert small["probability"].min() >= 0
    assert small["probability"].max() <= 1


# --- summaries -------------------------------------------------------------------------------------------------------


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


# --- saving ----------------------------------------------------------------------------------------------------------


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def of_name(name: str) -> set[str]:
    return {f"{name}{end}" for end in (".npz", "_mask.png", "_probability.png", "_uncertainty.png", "_overlay.png")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_everything_is_saved_in_the_geometry_of_the_pictures(predicted, tmp_path):
    folder = predicted.save(tmp_path / "new" / "folder")

    assert folder == tmp_path / "new" / "folder"
    assert files(folder) == {"predictions.json"}.union(*map(of_name, ("0000", "0001", "0002")))
    for index, size in enumerate(SIZES):
        maps = predicted.at_original_size(index)
        with np.load(folder / f"{index:04d}.npz", allow_pickle=False) as saved:
            assert set(saved) == set(maps)
            for name, values in maps.items():
                np.testing.assert_array_equal(saved[name], values)
                assert saved[name].dtype == values.dtype
        mask = np.asarray(Image.open(folder / f"{index:04d}_mask.png"))
        assert np.array_equal(mask, maps["mask"].astype(np.uint8) * 255)
        for name, most in (("probability", 1.0), ("uncertainty", LN2)):
            with Image.open(folder / f"{index:04d}_{name}.png") as image:
                assert image.mode == "I;16"
                levels = np.asarray(image)
            np.testing.assert_allclose(levels / 65535 * most, maps[name], atol=1 / 65535)
        with Image.open(folder / f"{index:04d}_overlay.png") as overlay:
            assert overlay.size == size[::-1]
            assert overlay.mode == "RGB"


def test_extreme_values_fill_the_whole_range_of_levels(tmp_path):
    prediction_of(constant(1.0, 1.0), constant(0.0, 0.0), constant(0.5, 0.5)).save(tmp_path)

    def level(name: str) -> int:
        return int(np.asarray(Image.open(tmp_path / name))[0, 0])

    assert [level(f"000{index}_probability.png") for index in range(3)] == [65535, 0, 32768]
    assert [level(f"000{index}_uncertainty.png") for index in range(3)] == [0, 0, 65535]


def test_summaries_are_saved_by_name(predicted, tmp_path):
    names = ["left.v2", "right eye", "both"]
    predicted.save(tmp_path, names=names)

    assert files(tmp_path) == {"predictions.json"}.union(*map(of_name, names))
    summaries = json.loads((tmp_path / "predictions.json").read_text())
    assert [summary.pop("name") for summary in summaries] == names
    assert summaries == json.loads(json.dumps(predicted.to_dict()))


def test_without_pictures_there_is_nothing_to_lay_over(tmp_path):
    segmenter().predict(HOST.image, HOST.text, num_samples=2).save(tmp_path)

    assert not any("overlay" in name for name in files(tmp_path))
    assert Image.open(tmp_path / "0000_mask.png").size == HOST.image_size[::-1]


def test_an_overlay_shows_the_picture_where_there_is_nothing_to_tell(tmp_path):
    shown = picture((32, 48))
    maps = half_filled(1.0, 0.0)
    prediction_of(maps, constant(0.5, 0.5), pictures=(shown, shown)).save(tmp_path)

    original = np.asarray(shown).astype(int)
    overlay = np.asarray(Image.open(tmp_path / "0000_overlay.png")).astype(int)
    doubt = np.asarray(Image.open(tmp_path / "0001_overlay.png")).astype(int)
    assert np.array_equal(overlay[:, 24:], original[:, 24:])
    assert (overlay[:, :24, 1] - original[:, :24, 1]).mean() > 20  # green
    assert (overlay[:, :24, 0] <= original[:, :24, 0]).all()
    assert doubt[..., 0].min() > 200  # red


@pytest.mark.parametrize(
    "names",
    [["a", "b"], ["a", "b", "a"], [], ["a", "b", "c", "d"], ["a", "b", ""], ["a", "b", "../c"], ["a", "b", "c/d"]],
    ids=["too_few", "alike", "none", "too_many", "empty", "elsewhere", "below"],
)
def test_names_that_cannot_be_told_apart_or_name_no_file_are_refused(names, predicted, tmp_path):
    with pytest.raises(ValueError, match="expected 3 different"):
        predicted.save(tmp_path / "folder", names=names)

    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("room", [0, 200, 2000], ids=["no_room", "little_room", "some_room"])
def test_on_a_full_disk_nothing_is_half_written(room, predicted, tmp_path):
    expected = contents(predicted.save(tmp_path / "whole"))
    other = prediction_of(*[constant(0.25, 0.75)] * 3, pictures=predicted.pictures)
    old = contents(other.save(tmp_path / "folder"))

    with full_disk(room), pytest.raises(OSError, match=r"(?i)too large|i/o|space|encoder"):
        predicted.save(tmp_path / "folder")

    now = contents(tmp_path / "folder")
    assert set(now) == set(old)  # no temporary file lies about
    assert all(now[name] in (old[name], expected[name]) for name in now)
    assert now["predictions.json"] == old["predictions.json"]
    assert contents(predicted.save(tmp_path / "folder")) == expected


def test_saving_twice_is_saving_once(predicted, tmp_path):
    first = contents(predicted.save(tmp_path))

    assert contents(predicted.save(tmp_path)) == first


def test_unknown_errors_are_saved_as_unknown(unsure, tmp_path):
    unsure.save(tmp_path)

    with np.load(tmp_path / "0000.npz", allow_pickle=False) as saved:
        assert np.isnan(saved["standard_error"]).all()
        assert np.isnan(saved["variance"]).all()
        assert np.isfinite(saved["probability"]).all()
    (summary,) = json.loads((tmp_path / "predictions.json").read_text())
    assert summary["largest_standard_error"] is None


# --- plotting --------------------------------------------------------------------------------------------------------


def test_a_plot_is_a_figure_that_can_be_saved(predicted, unsure, tmp_path):
    bare = segmenter().predict(HOST.image[:1], HOST.text[:1], num_samples=0)

    for prediction in (predicted, unsure, bare):
        figure = prediction.plot()
        assert isinstance(figure, Figure)
        titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
        assert len(titles) == 4 * len(prediction.mask)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=30)
        assert Image.open(buffer).size[0] > 100
