"""pvl_adapter.trust.scores against figures of the released code, against loops and torchmetrics, and at the edges."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics.calibration import CalibrationErrorMetric
from monai.metrics.surface_dice import compute_surface_dice
from safetensors.numpy import load_file
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from pvl_adapter.trust import scores

OVERLAPS = [scores.dice, scores.iou, scores.surface_dice, scores.released_surface_dice]


def blob(shape: tuple[int, int], *, seed: int, density: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < density


def disk(shape: tuple[int, int], *, center: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


@pytest.mark.golden
@pytest.mark.parametrize("number", range(9))
def test_released_figures(number):
    """DSC and NSD of the released evaluation (recorded in goldens/metrics.safetensors); its DSC has 1e-8 below."""
    recorded = load_file(Path(__file__).parent / "goldens" / "metrics.safetensors")
    prediction, truth = (recorded[f"{name}.{number}"].astype(bool) for name in ("prediction", "truth"))
    nsd, dsc = (recorded[f"{name}.{number}"].item() for name in ("nsd_released", "dsc"))
    assert scores.released_surface_dice(prediction, truth) == pytest.approx(nsd, rel=0.0, abs=1e-15)
    assert scores.dice(prediction, truth) == pytest.approx(dsc, rel=0.0, abs=1e-11)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0, 2.5])
def test_the_released_score_is_that_of_a_volume_one_voxel_thick(seed, tolerance):
    masks = blob((7, 12), seed=seed, density=0.25), blob((7, 12), seed=seed + 9, density=0.1)
    volumes = [torch.from_numpy(np.pad(mask[..., None], 1)[None, None]).float() for mask in masks]  # [1, 1, H, W, 3]
    expected = compute_surface_dice(*volumes, [tolerance], True, spacing=[1.0] * 3, use_subvoxels=True)
    assert scores.released_surface_dice(*masks, tolerance=tolerance) == pytest.approx(expected.item(), abs=1e-6)


def test_overlap_by_hand():
    one, other = np.zeros((2, 3), dtype=bool), np.zeros((2, 3), dtype=bool)
    one[:, :2] = other[:, 1:] = True
    assert scores.dice(one, other) == pytest.approx(2 * 2 / 8)
    assert scores.iou(one, other) == pytest.approx(2 / 6)


def outline(mask: np.ndarray, *, spacing: tuple[float, float]) -> list[tuple[float, float, float]]:
    """Position and length of the line through each window of 2 x 2 pixels."""
    padded, slanting, found = np.pad(mask, 1), math.hypot(*spacing) / 2.0, []
    for i, j in np.ndindex(padded.shape[0] - 1, padded.shape[1] - 1):
        (a, b), (c, d) = padded[i : i + 2, j : j + 2].tolist()
        straight = 2.0 * slanting if a == d else spacing[1] if a == b else spacing[0]
        if length := {1: slanting, 2: straight, 3: slanting}.get(a + b + c + d):
            found.append((i * spacing[0], j * spacing[1], length))
    return found


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (blob((9, 14), seed=0), blob((9, 14), seed=1, density=0.05)),
        (disk((20, 25), center=(9, 9), radius=6), disk((20, 25), center=(11, 14), radius=5)),
        (np.ones((8, 6), dtype=bool), disk((8, 6), center=(2.5, 2.5), radius=1)),
        (disk((20, 20), center=(0, 0), radius=9), disk((20, 20), center=(19, 3), radius=9)),
    ],
)
def test_surface_dice_equals_loops(one, other, tolerance, spacing):
    lines = outline(one, spacing=spacing), outline(other, spacing=spacing)
    matched = sum(
        length
        for mine, theirs in (lines, lines[::-1])
        for y, x, length in mine
        if min(math.hypot(y - v, x - u) for v, u, _ in theirs) <= tolerance
    )
    expected = matched / sum(length for _, _, length in [*lines[0], *lines[1]])
    assert scores.surface_dice(one, other, tolerance=tolerance, spacing=spacing) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("score", OVERLAPS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 8)])
def test_nothing_found(score, shape):
    nothing, everything, pixel = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
    pixel[-1, -1] = True
    assert score(nothing, nothing) == 1.0
    for something in (everything, pixel):
        assert score(nothing, something) == score(something, nothing) == 0.0
        assert score(something, something) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("score", OVERLAPS)
@pytest.mark.parametrize("change", [np.rot90, np.fliplr, lambda mask: np.pad(mask, ((3, 0), (0, 5))), torch.from_numpy])
def test_scores_do_not_depend_on_how_an_image_lies(score, change, recwarn):
    one, other = disk((30, 41), center=(12, 18), radius=8), disk((30, 41), center=(15, 17), radius=9)
    one[3, 30:33] = True
    assert score(change(one.copy()), change(other.copy())) == pytest.approx(score(one, other), abs=1e-6)
    assert score(one, other) == pytest.approx(score(other, one), abs=1e-6)
    assert 0.0 < score(one, other) < 1.0
    assert not recwarn.list


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_equals_torchmetrics_and_images_add_up(bins):
    random = np.random.default_rng(0)
    probability = random.random((23, 31))
    truth = random.random((23, 31)) < 0.2 + 0.5 * probability
    parts = [scores.calibration(probability[rows], truth[rows], bins=bins) for rows in (slice(7), slice(7, None))]
    for found in (scores.calibration(probability, truth, bins=bins), parts[0] + parts[1], parts[1] + parts[0]):
        assert found.count.tolist() == np.histogram(probability, bins, range=(0.0, 1.0))[0].tolist()
        assert found.brier == pytest.approx(np.square(probability - truth).mean())
        flat = torch.from_numpy(probability).flatten(), torch.from_numpy(truth).int().flatten()
        for norm, value in (("l1", found.expected_error), ("max", found.largest_error)):
            assert value == pytest.approx(binary_calibration_error(*flat, n_bins=bins, norm=norm).item(), abs=1e-9)


def test_calibration_by_hand_and_as_monai_has_it():
    """Six pixels in four bins: {.1, .2}, {.3, .4}, none and {.9, .95}, each with one pixel of foreground."""
    probability = np.array([[0.1, 0.2, 0.3], [0.4, 0.9, 0.95]])
    truth = np.array([[False, True, False], [True, True, False]])
    distances = np.array([abs(0.3 - 1), abs(0.7 - 1), abs(1.85 - 1)])  # summed over the pixels of a filled bin
    likelihood = [0.9, 0.2, 0.7, 0.4, 0.9, 0.05]
    found = scores.calibration(probability, truth, bins=4)
    assert found.nll == pytest.approx(-np.log(likelihood).mean())
    maps = [torch.from_numpy(np.float32(each))[None, None] for each in (probability, truth)]  # [1, 1, H, W]
    for value, how, expected in (
        (found.expected_error, "expected", distances.sum() / 6),
        (found.average_error, "average", (distances / 2).mean()),
        (found.largest_error, "maximum", distances.max() / 2),
    ):
        assert value == pytest.approx(expected)
        assert CalibrationErrorMetric(4, calibration_reduction=how)(*maps).item() == pytest.approx(expected)
    sure = scores.calibration(np.ones((1, 2)), np.array([[True, False]]))
    assert sure.nll == pytest.approx(12 * math.log(2.0))  # one mistake of a sure model: finite, 24 bits


def test_the_ends_of_the_range_and_empty_bins():
    """float32 rounds ln 2 up; pixels that are all wrong leave no ranking to gain from."""
    coin = scores.uncertainty_histogram(torch.full((2, 2), math.log(2.0)), torch.ones(2, 2, dtype=torch.bool))
    assert coin.hits[-1] == 4
    assert coin.curve.aurc == coin.curve.optimal_aurc == 1.0
    truth = blob((6, 9), seed=0)
    perfect = scores.calibration(truth.astype(np.float32), truth)
    assert perfect.expected_error == perfect.largest_error == perfect.brier == 0.0
    for of in (perfect.frequency, perfect.mean_value):
        assert np.isnan(of[1:-1]).all()
        assert of[[0, -1]].tolist() == [0.0, 1.0]


def aurc_by_sorting(uncertainty: np.ndarray, risk: np.ndarray) -> float:
    ranked = [value for _, value in sorted(zip(uncertainty, risk, strict=True))]  # no ties
    return sum(sum(ranked[:kept]) / kept for kept in range(1, len(ranked) + 1)) / len(ranked)


def test_aurc_equals_sorting():
    uncertainty, risk = np.random.default_rng(0).random((2, 57))
    curve = scores.risk_coverage(uncertainty, risk)
    assert curve.aurc == pytest.approx(aurc_by_sorting(uncertainty, risk))
    assert curve.optimal_aurc == pytest.approx(aurc_by_sorting(risk, risk))
    assert curve.random_aurc == pytest.approx(risk.mean())
    assert curve.excess_aurc == pytest.approx(curve.aurc - curve.optimal_aurc)
    assert (curve.coverage[0], curve.coverage[-1], curve.risk[0]) == (1 / 57, 1.0, risk[uncertainty.argmin()])
    alone = scores.risk_coverage([0.3], [0.7])
    assert alone.aurc == alone.optimal_aurc == alone.random_aurc == 0.7


def test_aurc_of_ties_is_that_of_random_orders():
    random = np.random.default_rng(0)
    uncertainty, risk = random.integers(0, 4, 30).astype(float), random.random(30)
    orders = [aurc_by_sorting(uncertainty + 0.5 * random.random(30), risk) for _ in range(4000)]
    found, order = scores.risk_coverage(uncertainty, risk).aurc, random.permutation(30)
    assert found == pytest.approx(np.mean(orders), abs=4 * np.std(orders) / 4000**0.5)
    assert scores.risk_coverage(uncertainty[order], risk[order]).aurc == pytest.approx(found)


def test_aurc_of_pixels_equals_that_of_cases():
    """With uncertainties in the middle of bins nothing is lost, however the pixels are spread over images."""
    random = np.random.default_rng(0)
    uncertainty = (random.integers(0, 50, (20, 30)) + 0.5) * math.log(2.0) / 50
    wrong = random.random((20, 30)) < uncertainty
    one, other = (scores.uncertainty_histogram(uncertainty[r], wrong[r], bins=50) for r in (slice(5), slice(5, None)))
    expected = scores.risk_coverage(uncertainty.ravel(), wrong.ravel())
    for curve in (scores.uncertainty_histogram(uncertainty, wrong, bins=50).curve, (one + other).curve):
        for name in ("aurc", "optimal_aurc", "risk", "coverage"):
            assert getattr(curve, name) == pytest.approx(getattr(expected, name)), name


def test_aurc_of_very_many_pixels():
    """Too many to be ranked one by one: nothing wrong among the surest half, all wrong among the others."""
    half = scores.uncertainty_histogram(np.zeros((1, 1)), np.zeros((1, 1), dtype=bool))
    total = half + scores.uncertainty_histogram(np.full((1, 1), 0.6), np.ones((1, 1), dtype=bool))
    for _ in range(30):
        total = total + total
    assert total.count.sum() == 2**31
    assert total.curve.aurc == pytest.approx(0.5 - 0.5 * math.log(2.0), abs=1e-6)
    assert total.curve.excess_aurc == pytest.approx(0.0, abs=1e-9)


def test_auroc_counts_pairs():
    """Of scores in and beyond [0, 1], with ties."""
    random = np.random.default_rng(0)
    score, present = random.integers(0, 20, 60) / 20, random.random(60) < 0.3
    expected = binary_auroc(torch.from_numpy(score), torch.from_numpy(present).int()).item()
    for values in (score, 1e6 + 1e-6 * score):
        assert scores.detection_auroc(values, present) == pytest.approx(expected, abs=1e-6)
    assert all(math.isnan(scores.detection_auroc([0.1, 0.2], [kind, kind])) for kind in (True, False))


def test_uncertainty_of_an_image_by_aggregator():
    """A bright square in a corner, larger or smaller than the patch, and a mask elsewhere or nowhere."""
    maps, masks = np.full((2, 20, 30), 0.1), np.zeros((2, 20, 30), dtype=bool)
    maps[:, 16:, 25:] = 0.6  # 4 x 5 pixels
    masks[0, 2:10, 3:12] = True
    assert scores.aggregate_uncertainty(maps, masks) == pytest.approx([0.1 + 0.5 * 20 / 600] * 2)
    for size, expected in ((4, 0.6), (5, 0.5), (99, 0.1 + 0.5 * 20 / 600)):
        assert scores.aggregate_uncertainty(maps, masks, how="patch", size=size) == pytest.approx([expected] * 2)
    far, without = scores.aggregate_uncertainty(maps, masks, how="boundary")
    assert (far, without) == pytest.approx((0.1, 0.1 + 0.5 * 20 / 600))  # no outline: the mean
    line, pixel = np.array([[1.0, 0.0, 0.0, 0.0, 1.0]]), np.array([[False, False, True, False, False]])
    near, far_off = (math.exp(-(distance**2) / 2) for distance in (0.5 / 2, 1.5 / 2))  # 8 pixels are 4 deviations of 2
    expected = 2 * far_off / (2 * far_off + 3 * near)
    assert scores.aggregate_uncertainty(line, pixel, how="boundary") == pytest.approx(expected)
    for how in ("mean", "patch", "boundary"):
        whole = scores.aggregate_uncertainty(torch.from_numpy(maps), torch.from_numpy(masks), how=how)
        assert float(scores.aggregate_uncertainty(maps[0], masks[0], how=how)) == pytest.approx(whole[0])
        assert scores.aggregate_uncertainty(maps[None], masks[None], how=how).shape == (1, 2)


def test_interval_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = scores.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert scores.bootstrap_interval(values) == (low, high) != scores.bootstrap_interval(values, seed=1)
    narrow = scores.bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    for few, groups, mean in (([0.4], None, 0.4), ([0.4, 0.6], ["a", "a"], 0.5), ([0.7] * 5, list("aaabc"), 0.7)):
        assert scores.bootstrap_interval(few, groups=groups) == pytest.approx((mean, mean))


def test_sentences_about_one_image_are_drawn_together():
    """Every value ten times says no more than once, in any order of the rows."""
    values = np.random.default_rng(0).random(30)
    repeated, names = np.repeat(values, 10), [f"case_{index:02}.png" for index in np.repeat(np.arange(30), 10)]
    once, alone = scores.bootstrap_interval(values), scores.bootstrap_interval(repeated)
    assert scores.bootstrap_interval(repeated, groups=names) == pytest.approx(once)
    assert scores.bootstrap_interval(repeated[::-1], groups=names[::-1]) == pytest.approx(once)
    assert alone[1] - alone[0] < 0.5 * (once[1] - once[0])


def test_interval_of_an_auroc():
    """As wide as the formula of Hanley and McNeil; of subjects drawn whole; draws of one kind are left out."""
    random = np.random.default_rng(0)
    present = np.arange(300) < 100
    score = random.normal(0.8 * present, 1.0)
    auroc, (low, high) = (
        scores.detection_auroc(score, present),
        scores.bootstrap_interval(score, present, statistic=scores.detection_auroc, resamples=2000),
    )
    one, two = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    error = math.sqrt((auroc * (1 - auroc) + 99 * (one - auroc**2) + 199 * (two - auroc**2)) / (100 * 200))
    assert (low, high) == pytest.approx((auroc - 1.96 * error, auroc + 1.96 * error), abs=0.3 * error)
    few = {"statistic": scores.detection_auroc, "resamples": 500}
    subjects = [f"subject {index % 10}" for index in range(300)]
    whole = scores.bootstrap_interval(score, present, groups=subjects, **few)
    again = scores.bootstrap_interval(np.tile(score, 3), np.tile(present, 3), groups=subjects * 3, **few)
    assert again == pytest.approx(whole)
    assert scores.bootstrap_interval([0.1, 0.9], [False, True], **few) == (1.0, 1.0)
    assert all(math.isnan(end) for end in scores.bootstrap_interval([0.1, 0.9], [True, True], **few))


FULL, ODD = np.ones((2, 2), dtype=bool), np.ones((2, 3))


@pytest.mark.parametrize(
    ("score", "arguments", "settings", "named"),
    [
        *((score, (np.uint8(FULL), FULL), {}, "uint8.*bool") for score in OVERLAPS),
        *((score, (FULL[None], FULL[None]), {}, "1, 2, 2") for score in OVERLAPS),
        *((score, (FULL, ODD > 0), {}, "2, 3") for score in OVERLAPS),
        (scores.surface_dice, (FULL, FULL), {"tolerance": -1.0}, "tolerance"),
        (scores.released_surface_dice, (FULL, FULL), {"tolerance": math.nan}, "tolerance"),
        (scores.surface_dice, (FULL, FULL), {"spacing": (1.0,)}, "spacing"),
        (scores.surface_dice, (FULL, FULL), {"spacing": (0.0, 1.0)}, "spacing"),
        (scores.calibration, (np.full((2, 2), 1.2), FULL), {}, "probability.*1.2"),
        (scores.calibration, (np.full((2, 2), math.nan), FULL), {}, "NaN"),
        (scores.calibration, (ODD, FULL), {}, r"\(2, 3\).*\(2, 2\)"),
        (scores.calibration, (FULL, FULL), {"bins": 0}, "bins is 0"),
        (scores.uncertainty_histogram, (FULL, FULL), {}, "uncertainty.*0.6931"),
        (scores.risk_coverage, ([], []), {}, "cases is 0"),
        (scores.risk_coverage, ([0.1, 0.2], [0.1]), {}, r"\(2,\).*\(1,\)"),
        (scores.risk_coverage, ([math.nan], [0.1]), {}, "NaN.*uncertainty"),
        (scores.detection_auroc, ([0.1, 0.2], [True]), {}, r"\(2,\).*\(1,\)"),
        (scores.aggregate_uncertainty, (ODD, FULL), {}, r"\(2, 3\).*\(2, 2\)"),
        (scores.aggregate_uncertainty, (FULL, FULL), {"how": "max"}, "max.*patch"),
        (scores.aggregate_uncertainty, (FULL, FULL), {"how": "patch", "size": 0}, "size is 0"),
        (scores.bootstrap_interval, ([],), {}, "values is 0"),
        (scores.bootstrap_interval, ([0.1, 0.2], [1.0]), {}, r"\(1,\).*\(2,\)"),
        (scores.bootstrap_interval, ([0.1, 0.2],), {"groups": ["a"]}, r"\(2,\).*\(1,\)"),
        (scores.bootstrap_interval, ([0.1],), {"level": 1.0}, "level is 1.0"),
        (scores.calibration(FULL, FULL).__add__, (scores.calibration(FULL, FULL, bins=10),), {}, "15.*10"),
    ],
)
def test_arguments_out_of_range_are_refused(score, arguments, settings, named):
    with pytest.raises(ValueError, match=named):
        score(*arguments, **settings)


@pytest.mark.parametrize("missing", ["monai", "scipy"])
def test_a_missing_library_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{missing}.*pvl-adapter\[trust\]"):
        importlib.reload(scores)
