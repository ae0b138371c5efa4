"""pvl_adapter.metrics against figures of the released code, against loops and torchmetrics, and at the edges."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics.surface_dice import compute_surface_dice
from safetensors.numpy import load_file
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from pvl_adapter import metrics
from pvl_adapter.metrics import (
    bootstrap_interval,
    calibration,
    detection_auroc,
    dice,
    iou,
    released_surface_dice,
    risk_coverage,
    surface_dice,
    uncertainty_histogram,
)

OVERLAPS = [dice, iou, surface_dice, released_surface_dice]


def blob(shape: tuple[int, int], *, seed: int, density: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < density


def disk(shape: tuple[int, int], *, center: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("number", range(9))
def test_released_figures(number):
    """DSC and NSD of the released evaluation (recorded in goldens/metrics.safetensors); its DSC has 1e-8 below."""
    recorded = load_file(Path(__file__).parent / "goldens" / "metrics.safetensors")
    prediction, truth = (recorded[f"{name}.{number}"].astype(bool) for name in ("prediction", "truth"))

    assert released_surface_dice(prediction, truth) == pytest.approx(
        recorded[f"nsd_released.{number}"].item(), rel=0.0, abs=1e-15
    )
    assert dice(prediction, truth) == pytest.approx(recorded[f"dsc.{number}"].item(), rel=0.0, abs=1e-11)


def test_the_released_score_compares_areas_within_two_pixels():
    """It is nearly 1 for random pixels, which is why the true surface Dice stands beside it."""
    one, other = blob((96, 96), seed=0, density=0.4), blob((96, 96), seed=1, density=0.3)
    assert dice(one, other) < 0.4
    assert released_surface_dice(one, other) == released_surface_dice(one, other, tolerance=2.0) > 0.99


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0, 2.5])
def test_the_released_score_is_that_of_a_volume_one_voxel_thick(seed, tolerance):
    one, other = blob((7, 12), seed=seed, density=0.25), blob((7, 12), seed=seed + 9, density=0.1)
    volumes = [
        torch.from_numpy(np.pad(mask[..., None], 1)[None, None]).float() for mask in (one, other)
    ]  # [1, 1, H, W, 3]
    expected = compute_surface_dice(
        *volumes, class_thresholds=[tolerance], include_background=True, spacing=[1.0] * 3, use_subvoxels=True
    )
    assert released_surface_dice(one, other, tolerance=tolerance) == pytest.approx(expected.item(), abs=1e-6)


def test_overlap_by_hand():
    one, other = np.zeros((2, 3), dtype=bool), np.zeros((2, 3), dtype=bool)
    one[:, :2] = other[:, 1:] = True
    assert dice(one, other) == pytest.approx(2 * 2 / 8)
    assert iou(one, other) == pytest.approx(2 / 6)


def outline(mask: np.ndarray, *, spacing: tuple[float, float]) -> list[tuple[float, float, float]]:
    """Place and length of the line through each window of 2 x 2 pixels."""
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
    ids=["sprinkled", "disks", "full", "in corners"],
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
    assert surface_dice(one, other, tolerance=tolerance, spacing=spacing) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("score", OVERLAPS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 8)])
def test_nothing_found(score, shape):
    nothing, everything = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
    pixel = nothing.copy()
    pixel[-1, -1] = True

    assert score(nothing, nothing) == 1.0
    for something in (everything, pixel):
        assert score(nothing, something) == score(something, nothing) == 0.0
        assert score(something, something) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("score", OVERLAPS)
@pytest.mark.parametrize(
    "change",
    [np.rot90, np.fliplr, lambda mask: np.pad(mask, ((3, 0), (0, 5))), torch.from_numpy],
    ids=["turned", "mirrored", "in a larger image", "tensor"],
)
def test_scores_do_not_depend_on_how_an_image_lies(score, change, recwarn):
    one, other = disk((30, 41), center=(12, 18), radius=8), disk((30, 41), center=(15, 17), radius=9)
    one[3, 30:33] = True
    kept = one.copy()

    assert score(change(one.copy()), change(other.copy())) == pytest.approx(score(one, other), abs=1e-6)
    assert score(one, other) == pytest.approx(score(other, one), abs=1e-6)
    assert 0.0 < score(one, other) < 1.0
    assert (one == kept).all()
    assert not recwarn.list


# --- calibration -----------------------------------------------------------------------------------------------------


def maps(*, seed: int, shape: tuple[int, int] = (23, 31)) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that say too much, and what is there."""
    random = np.random.default_rng(seed)
    probability = random.random(shape)
    return probability, random.random(shape) < 0.2 + 0.5 * probability


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_equals_torchmetrics(bins):
    probability, truth = maps(seed=0)
    found = calibration(probability, truth, bins=bins)
    assert found.count.tolist() == np.histogram(probability, bins, range=(0.0, 1.0))[0].tolist()
    assert found.brier == pytest.approx(np.square(probability - truth).mean())
    flat = torch.from_numpy(probability).flatten(), torch.from_numpy(truth).int().flatten()
    for norm, value in (("l1", found.expected_error), ("max", found.largest_error)):
        assert value == pytest.approx(binary_calibration_error(*flat, n_bins=bins, norm=norm).item(), abs=1e-9)


def test_images_add_up():
    pairs = [maps(seed=seed, shape=(10 + seed, 7)) for seed in range(3)]
    first, second, third = (calibration(*pair) for pair in pairs)
    everything = calibration(*(np.concatenate([pair[part] for pair in pairs]) for part in (0, 1)))

    for total in (first + second + third, third + (first + second)):
        assert total.count.tolist() == everything.count.tolist()
        assert total.hits.tolist() == everything.hits.tolist()
        assert total.expected_error == pytest.approx(everything.expected_error)
        assert total.brier == pytest.approx(everything.brier)


def test_perfect_and_empty_bins():
    truth = blob((6, 9), seed=0)
    perfect = calibration(truth.astype(np.float32), truth)

    assert perfect.expected_error == perfect.largest_error == perfect.brier == 0.0
    assert perfect.count[1:-1].sum() == 0
    assert np.isnan(perfect.frequency[1:-1]).all()
    assert perfect.frequency[[0, -1]].tolist() == [0.0, 1.0]


# --- ranking by uncertainty ------------------------------------------------------------------------------------------


def aurc_by_sorting(uncertainty: np.ndarray, risk: np.ndarray) -> float:
    """Without ties."""
    ranked = [value for _, value in sorted(zip(uncertainty, risk, strict=True))]
    return sum(sum(ranked[:kept]) / kept for kept in range(1, len(ranked) + 1)) / len(ranked)


def test_aurc_equals_sorting():
    random = np.random.default_rng(0)
    uncertainty, risk = random.random(57), random.random(57)
    curve = risk_coverage(uncertainty, risk)

    assert curve.aurc == pytest.approx(aurc_by_sorting(uncertainty, risk))
    assert curve.optimal_aurc == pytest.approx(aurc_by_sorting(risk, risk))
    assert curve.random_aurc == pytest.approx(risk.mean())
    assert curve.excess_aurc == pytest.approx(curve.aurc - curve.optimal_aurc)
    assert curve.coverage[[0, -1]] == pytest.approx([1 / 57, 1.0])
    assert curve.risk[0] == risk[uncertainty.argmin()]


def test_aurc_of_ties_is_that_of_random_orders():
    random = np.random.default_rng(0)
    uncertainty, risk = random.integers(0, 4, 30).astype(float), random.random(30)
    orders = [aurc_by_sorting(uncertainty + 0.5 * random.random(30), risk) for _ in range(4000)]

    assert risk_coverage(uncertainty, risk).aurc == pytest.approx(np.mean(orders), abs=4 * np.std(orders) / 4000**0.5)
    order = random.permutation(30)
    assert risk_coverage(uncertainty[order], risk[order]).aurc == pytest.approx(risk_coverage(uncertainty, risk).aurc)
    assert risk_coverage(np.zeros(30), risk).aurc == pytest.approx(risk.mean())  # knows nothing


def test_the_best_and_the_worst_ranking():
    risk = np.random.default_rng(0).random(40)
    assert risk_coverage(risk, risk).excess_aurc == pytest.approx(0.0, abs=1e-12)
    assert risk_coverage(-risk, risk).aurc > risk.mean() > risk_coverage(np.exp(5 * risk), risk).aurc
    alone = risk_coverage([0.3], [0.7])
    assert alone.aurc == alone.optimal_aurc == alone.random_aurc == 0.7


def test_aurc_of_pixels_equals_that_of_cases():
    """With uncertainties in the middle of bins nothing is lost, however the pixels are spread over pictures."""
    random = np.random.default_rng(0)
    uncertainty = (random.integers(0, 50, (20, 30)) + 0.5) * math.log(2.0) / 50
    wrong = random.random((20, 30)) < uncertainty
    whole = uncertainty_histogram(uncertainty, wrong, bins=50).curve
    parts = uncertainty_histogram(uncertainty[:5], wrong[:5], bins=50) + uncertainty_histogram(
        uncertainty[5:], wrong[5:], bins=50
    )
    expected = risk_coverage(uncertainty.ravel(), wrong.ravel())

    for curve in (whole, parts.curve):
        assert curve.aurc == pytest.approx(expected.aurc)
        assert curve.optimal_aurc == pytest.approx(expected.optimal_aurc)
        assert curve.risk == pytest.approx(expected.risk)
        assert curve.coverage == pytest.approx(expected.coverage)


def test_aurc_of_very_many_pixels():
    """Too many to be ranked one by one: nothing wrong among the surest half, all wrong among the others."""
    half = uncertainty_histogram(np.zeros((1, 1)), np.zeros((1, 1), dtype=bool))
    other = uncertainty_histogram(np.full((1, 1), 0.6), np.ones((1, 1), dtype=bool))
    total = half + other
    for _ in range(30):
        total = total + total

    assert total.count.sum() == 2**31
    assert total.curve.aurc == pytest.approx(0.5 - 0.5 * math.log(2.0), abs=1e-6)
    assert total.curve.excess_aurc == pytest.approx(0.0, abs=1e-9)


def test_entropy_of_a_coin_is_not_out_of_range():
    """float32 rounds ln 2 up; pixels that are all wrong leave no ranking to gain from."""
    coin = torch.full((2, 2), math.log(2.0), dtype=torch.float32)

    counted = uncertainty_histogram(coin, torch.ones(2, 2, dtype=torch.bool))
    assert counted.hits[-1] == 4
    assert counted.curve.aurc == counted.curve.optimal_aurc == 1.0


def test_auroc_counts_pairs():
    """Of scores in and beyond [0, 1], with ties."""
    random = np.random.default_rng(0)
    score, present = random.integers(0, 20, 60) / 20, random.random(60) < 0.3
    expected = binary_auroc(torch.from_numpy(score), torch.from_numpy(present).int()).item()

    assert detection_auroc(score, present) == pytest.approx(expected, abs=1e-6)
    assert detection_auroc(-score, present) == pytest.approx(1.0 - expected, abs=1e-6)
    assert detection_auroc(1e6 + 1e-6 * score, present) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(detection_auroc([0.1, 0.2], [True, True]))
    assert math.isnan(detection_auroc([0.1, 0.2], [False, False]))


# --- intervals -------------------------------------------------------------------------------------------------------


def test_interval_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20

    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_sentences_about_one_image_are_drawn_together():
    """Every value ten times says no more than once."""
    values = np.random.default_rng(0).random(30)
    repeated = np.repeat(values, 10)
    names = [f"case_{index}.png" for index in np.repeat(np.arange(30), 10)]
    once, alone, together = (
        bootstrap_interval(values),
        bootstrap_interval(repeated),
        bootstrap_interval(repeated, groups=names),
    )

    assert together == pytest.approx(once)
    assert alone[1] - alone[0] < 0.5 * (once[1] - once[0])


def test_interval_of_few():
    assert bootstrap_interval([0.4]) == (0.4, 0.4)
    assert bootstrap_interval([0.4, 0.6], groups=["a", "a"]) == (0.5, 0.5)
    assert bootstrap_interval([0.7] * 5) == pytest.approx((0.7, 0.7))


# --- what is refused --------------------------------------------------------------------------------------------------

FULL, ODD = np.ones((2, 2), dtype=bool), np.ones((2, 3))


@pytest.mark.parametrize("score", OVERLAPS)
@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        (np.uint8(FULL), FULL, "uint8.*bool"),
        (FULL, ODD, "float64"),
        (FULL[None], FULL[None], "1, 2, 2"),
        (FULL, ODD > 0, "2, 3"),
    ],
    ids=["grey levels", "floats", "batch", "other shape"],
)
def test_masks_that_do_not_fit_are_refused(score, one, other, named):
    with pytest.raises(ValueError, match=named):
        score(one, other)


@pytest.mark.parametrize(
    ("score", "arguments", "settings", "named"),
    [
        (surface_dice, (FULL, FULL), {"tolerance": -1.0}, "tolerance"),
        (released_surface_dice, (FULL, FULL), {"tolerance": math.nan}, "tolerance"),
        (surface_dice, (FULL, FULL), {"spacing": (1.0,)}, "spacing"),
        (surface_dice, (FULL, FULL), {"spacing": (0.0, 1.0)}, "spacing"),
        (calibration, (np.full((2, 2), 1.2), FULL), {}, "probability.*1.2"),
        (calibration, (np.full((2, 2), math.nan), FULL), {}, "NaN"),
        (calibration, (ODD, FULL), {}, r"\(2, 3\) and \(2, 2\)"),
        (calibration, (FULL, np.ones((2, 2))), {}, "float64.*bool"),
        (calibration, (FULL, FULL), {"bins": 0}, "bins is 0"),
        (uncertainty_histogram, (FULL, FULL), {}, "uncertainty.*0.6931"),
        (risk_coverage, ([], []), {}, "no cases"),
        (risk_coverage, ([0.1, 0.2], [0.1]), {}, r"\(2,\) and \(1,\)"),
        (risk_coverage, ([math.nan], [0.1]), {}, "uncertainty.*NaN"),
        (risk_coverage, ([0.1], [math.inf]), {}, "risk.*infinite"),
        (detection_auroc, ([0.1, 0.2], [True]), {}, r"\(2,\) and \(1,\)"),
        (bootstrap_interval, ([],), {}, "0 values"),
        (bootstrap_interval, ([0.1, 0.2],), {"groups": ["a"]}, "2 values and 1 groups"),
        (bootstrap_interval, ([0.1, math.nan],), {}, "NaN"),
        (bootstrap_interval, ([0.1],), {"level": 1.0}, "level is 1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(score, arguments, settings, named):
    with pytest.raises(ValueError, match=named):
        score(*arguments, **settings)


def test_bins_must_agree():
    with pytest.raises(ValueError, match=r"15.*10"):
        calibration(FULL, FULL) + calibration(FULL, FULL, bins=10)


@pytest.mark.parametrize("missing", ["monai", "scipy"])
def test_a_missing_library_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{missing}.*pvl-adapter\[metrics\]"):
        importlib.reload(metrics)
