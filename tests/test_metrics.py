"""pvl_adapter.metrics against figures of the released code, against loops, and at the edges."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torchmetrics.functional.classification import binary_calibration_error

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


def mask(*lines: str) -> np.ndarray:
    return np.array([[character == "#" for character in line] for line in lines])


def blob(shape: tuple[int, int], *, seed: int, density: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < density


def disk(shape: tuple[int, int], *, center: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


# --- figures of the released code ------------------------------------------------------------------------------------


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


def test_released_figure_compares_areas_not_outlines():
    """Two sprinklings of random pixels."""
    one, other = blob((96, 96), seed=0, density=0.4), blob((96, 96), seed=1, density=0.3)

    assert dice(one, other) < 0.4
    assert released_surface_dice(one, other) > 0.99


def test_released_figure_is_of_two_pixels_unless_said():
    one, other = disk((60, 60), center=(30, 30), radius=15), disk((60, 60), center=(30, 36), radius=15)

    assert released_surface_dice(one, other) == released_surface_dice(one, other, tolerance=2.0)
    assert released_surface_dice(one, other, tolerance=0.0) < released_surface_dice(one, other)
    assert released_surface_dice(one, other, tolerance=6.0) > 1.0 - 1e-9


def released_by_loops(prediction: np.ndarray, truth: np.ndarray, *, tolerance: float) -> float:
    """In three dimensions and by hand: the surface of marching cubes through every block of 2 x 2 x 2 voxels."""

    def surface(values: np.ndarray) -> dict[tuple[int, int, int], float]:
        volume = np.zeros((values.shape[0] + 2, values.shape[1] + 2, 3), dtype=bool)
        volume[1:-1, 1:-1, 1] = values
        blocks = np.ndindex(*(length - 1 for length in volume.shape))
        areas = {(i, j, k): area_of(volume[i : i + 2, j : j + 2, k : k + 2]) for i, j, k in blocks}
        return {place: area for place, area in areas.items() if area > 0.0}

    def area_of(block: np.ndarray) -> float:
        face = block[:, :, 0] | block[:, :, 1]  # only one layer of a block can have any
        inside = [np.array(place) for place in np.ndindex(2, 2) if face[place]]
        if len(inside) == 4:
            return 1.0
        if len(inside) == 2 and (inside[0] != inside[1]).all():
            return 2.0 * triangle((0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5))
        if len(inside) == 2:
            return math.dist((0.5, 0, 0), (0, 0, 0.5)) * 1.0
        if len(inside) == 1:
            return triangle((0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5))
        if len(inside) == 3:  # without (1, 1): up at (0, 0), and halfway along the four cut edges
            up, right, left = (0, 0, 0.5), (1, 0, 0.5), (0, 1, 0.5)
            low_right, low_left = (1, 0.5, 0), (0.5, 1, 0)
            return triangle(up, right, left) + triangle(right, low_right, low_left) + triangle(right, low_left, left)
        return 0.0

    def triangle(*corners: tuple[float, float, float]) -> float:
        a, b, c = (np.array(corner, dtype=float) for corner in corners)
        return float(np.linalg.norm(np.cross(b - a, c - a))) / 2.0

    one, other = surface(prediction), surface(truth)
    matched = sum(
        area
        for mine, theirs in ((one, other), (other, one))
        for place, area in mine.items()
        if min(math.dist(place, there) for there in theirs) <= tolerance
    )
    return matched / (sum(one.values()) + sum(other.values()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0, 2.5])
def test_released_figure_equals_three_dimensional_loops(seed, tolerance):
    one, other = blob((7, 12), seed=seed, density=0.25), blob((7, 12), seed=seed + 9, density=0.1)
    expected = released_by_loops(one, other, tolerance=tolerance)

    assert released_surface_dice(one, other, tolerance=tolerance) == pytest.approx(expected, rel=1e-9)


# --- overlap and outlines --------------------------------------------------------------------------------------------


def test_overlap_by_hand():
    one, other = mask("##.", "##.", "..."), mask(".##", ".##", "...")

    assert dice(one, other) == pytest.approx(2 * 2 / 8)
    assert iou(one, other) == pytest.approx(2 / 6)


def outline_by_loops(
    prediction: np.ndarray, truth: np.ndarray, *, tolerance: float, spacing: tuple[float, float]
) -> float:
    """Lengths of the lines through windows of 2 x 2 pixels, and all distances between windows."""

    def outline(values: np.ndarray) -> list[tuple[float, float, float]]:
        padded = np.pad(values, 1)
        found = []
        for i in range(padded.shape[0] - 1):
            for j in range(padded.shape[1] - 1):
                (a, b), (c, d) = padded[i : i + 2, j : j + 2].tolist()
                slanting = math.hypot(*spacing) / 2.0
                if a + b + c + d in (1, 3):
                    length = slanting
                elif a + b + c + d == 2:
                    length = 2.0 * slanting if a == d else spacing[1] if a == b else spacing[0]
                else:
                    continue
                found.append((i * spacing[0], j * spacing[1], length))
        return found

    one, other = outline(prediction), outline(truth)
    matched = sum(
        length
        for mine, theirs in ((one, other), (other, one))
        for y, x, length in mine
        if min(math.hypot(y - v, x - u) for v, u, _ in theirs) <= tolerance
    )
    return matched / sum(length for _, _, length in [*one, *other])


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (blob((9, 14), seed=0), blob((9, 14), seed=1, density=0.05)),
        (blob((1, 20), seed=2), blob((1, 20), seed=3, density=0.2)),
        (disk((20, 25), center=(9, 9), radius=6), disk((20, 25), center=(11, 14), radius=5)),
        (np.ones((8, 6), dtype=bool), mask("......", "......", "..##..", "..##..", *["......"] * 4)),
        (disk((20, 20), center=(0, 0), radius=9), disk((20, 20), center=(19, 3), radius=9)),
    ],
    ids=["sprinkled", "one row", "disks", "full", "in corners"],
)
def test_surface_dice_equals_loops(one, other, tolerance, spacing):
    expected = outline_by_loops(one, other, tolerance=tolerance, spacing=spacing)

    assert surface_dice(one, other, tolerance=tolerance, spacing=spacing) == pytest.approx(expected, abs=1e-6)


def test_surface_dice_of_a_shifted_square():
    """Shifted by 3: at a tolerance of 3 all is near, at 2 only the sides along the shift."""
    one, other = np.zeros((40, 40), dtype=bool), np.zeros((40, 40), dtype=bool)
    one[10:30, 5:25] = True
    other[10:30, 8:28] = True

    assert surface_dice(one, other, tolerance=3.0) == 1.0
    assert 0.4 < surface_dice(one, other, tolerance=2.0) < 0.6
    assert surface_dice(one, other, tolerance=2.0, spacing=(1.0, 0.5)) == 1.0  # half as wide: shifted by 1.5


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
    [
        np.transpose,
        np.flipud,
        np.fliplr,
        np.rot90,
        lambda values: np.pad(values, ((3, 0), (0, 5))),
        torch.from_numpy,
        np.asfortranarray,
    ],
    ids=["transposed", "upside down", "mirrored", "turned", "in a larger picture", "tensor", "fortran"],
)
def test_scores_do_not_depend_on_how_a_picture_lies(score, change: Callable):
    one, other = disk((30, 41), center=(12, 18), radius=8), disk((30, 41), center=(15, 17), radius=9)
    one[3, 30:33] = True

    assert score(change(one.copy()), change(other.copy())) == pytest.approx(score(one, other), abs=1e-6)
    assert score(one, other) == pytest.approx(score(other, one), abs=1e-6)
    assert 0.0 < score(one, other) < 1.0


@pytest.mark.parametrize("score", OVERLAPS)
def test_masks_are_left_as_they_are_and_nothing_is_warned_of(score, recwarn):
    one, other = blob((12, 10), seed=0), blob((12, 10), seed=1)
    kept = one.copy(), other.copy()

    score(one, other)

    assert (one == kept[0]).all()
    assert (other == kept[1]).all()
    assert not recwarn.list


@pytest.mark.parametrize("score", OVERLAPS)
@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (np.zeros((3, 4), dtype=np.uint8), np.zeros((3, 4), dtype=bool), r"uint8.*take\s+mask > 127"),
        (np.zeros((3, 4), dtype=bool), np.zeros((3, 4)), "float64"),
        (np.zeros((1, 3, 4), dtype=bool), np.zeros((1, 3, 4), dtype=bool), r"\(1, 3, 4\)"),
        (np.zeros((3, 4), dtype=bool), np.zeros((4, 3), dtype=bool), r"\(3, 4\) and \(4, 3\)"),
    ],
    ids=["grey levels", "floats", "batch", "other shape"],
)
def test_what_is_no_pair_of_masks_is_refused(score, one, other, message):
    with pytest.raises(ValueError, match=message):
        score(one, other)


@pytest.mark.parametrize("score", [surface_dice, released_surface_dice])
@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_tolerance_out_of_range(score, tolerance):
    with pytest.raises(ValueError, match=r"tolerance is .*expected 0 or more"):
        score(np.ones((2, 2), dtype=bool), np.ones((2, 2), dtype=bool), tolerance=tolerance)


@pytest.mark.parametrize("spacing", [(1.0,), (0.0, 1.0), (1.0, -2.0), (1.0, 1.0, 1.0)])
def test_spacing_out_of_range(spacing):
    with pytest.raises(ValueError, match=r"spacing is .*height and width"):
        surface_dice(np.ones((2, 2), dtype=bool), np.ones((2, 2), dtype=bool), spacing=spacing)


@pytest.mark.parametrize("missing", ["monai.metrics.surface_dice", "scipy.ndimage", "scipy.stats"])
def test_a_library_that_is_missing_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    one, other = disk((9, 9), center=(4, 4), radius=2), disk((9, 9), center=(4, 4), radius=3)

    with pytest.raises(ModuleNotFoundError, match=rf"{missing} is not installed.*pvl-adapter\[metrics\]"):
        [surface_dice(one, other), released_surface_dice(one, other), bootstrap_interval([0.1, 0.2])]


# --- calibration -----------------------------------------------------------------------------------------------------


def maps(*, seed: int, shape: tuple[int, int] = (23, 31)) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that say too much, and what is there."""
    random = np.random.default_rng(seed)
    probability = random.random(shape)
    return probability, random.random(shape) < 0.2 + 0.5 * probability


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_equals_loops_and_torchmetrics(bins):
    probability, truth = maps(seed=0)
    found = calibration(probability, truth, bins=bins)

    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for value, positive in zip(probability.ravel(), truth.ravel(), strict=True):
        members[min(int(value * bins), bins - 1)].append((value, positive))
    gaps = [abs(sum(value for value, _ in each) - sum(positive for _, positive in each)) for each in members]
    squares = [(value - positive) ** 2 for each in members for value, positive in each]

    assert found.count.tolist() == [len(each) for each in members]
    assert found.expected_error == pytest.approx(sum(gaps) / probability.size)
    assert found.largest_error == pytest.approx(
        max(gap / len(each) for gap, each in zip(gaps, members, strict=True) if each)
    )
    assert found.brier == pytest.approx(sum(squares) / len(squares))
    for norm, value in (("l1", found.expected_error), ("max", found.largest_error)):
        theirs = binary_calibration_error(
            torch.from_numpy(probability).flatten(), torch.from_numpy(truth).int().flatten(), n_bins=bins, norm=norm
        )
        assert value == pytest.approx(theirs.item(), abs=1e-9)


def test_pictures_add_up():
    pairs = [maps(seed=seed, shape=(10 + seed, 7)) for seed in range(3)]
    first, second, third = (calibration(*pair) for pair in pairs)
    everything = calibration(*(np.concatenate([pair[part] for pair in pairs]) for part in (0, 1)))

    for total in (first + second + third, third + (first + second)):
        assert total.count.tolist() == everything.count.tolist()
        assert total.positives.tolist() == everything.positives.tolist()
        assert total.expected_error == pytest.approx(everything.expected_error)
        assert total.brier == pytest.approx(everything.brier)


def test_perfect_and_empty_bins():
    truth = blob((6, 9), seed=0)
    perfect = calibration(truth.astype(np.float32), truth)

    assert perfect.expected_error == perfect.largest_error == perfect.brier == 0.0
    assert perfect.count[1:-1].sum() == 0
    assert np.isnan(perfect.frequency[1:-1]).all()
    assert perfect.frequency[[0, -1]].tolist() == [0.0, 1.0]


def test_honest_probabilities_are_calibrated():
    random = np.random.default_rng(0)
    probability = random.random((400, 500))
    truth = random.random((400, 500)) < probability

    assert calibration(probability, truth).expected_error < 0.005
    assert calibration(probability, truth).brier == pytest.approx(1 / 6, abs=0.002)
    assert calibration(1.0 - probability, truth).expected_error > 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_types_of_maps(dtype):
    probability, truth = (torch.from_numpy(part) for part in maps(seed=1))

    assert calibration(probability.to(dtype), truth).count.sum() == truth.numel()


@pytest.mark.parametrize(
    ("probability", "truth", "bins", "message"),
    [
        (np.full((2, 2), 1.2), np.ones((2, 2), dtype=bool), 15, "probability is from 1.2 to 1.2, expected 0 to 1"),
        (np.full((2, 2), math.nan), np.ones((2, 2), dtype=bool), 15, "NaN"),
        (np.ones((2, 3)), np.ones((2, 2), dtype=bool), 15, r"\(2, 3\) and \(2, 2\)"),
        (np.ones((2, 2)), np.ones((2, 2)), 15, "float64.*expected bool"),
        (np.ones((2, 2)), np.ones((2, 2), dtype=bool), 0, "bins is 0"),
    ],
)
def test_what_is_no_probability_is_refused(probability, truth, bins, message):
    with pytest.raises(ValueError, match=message):
        calibration(probability, truth, bins=bins)


def test_bins_must_agree():
    pair = maps(seed=0)
    with pytest.raises(ValueError, match="15 and 10 bins"):
        calibration(*pair) + calibration(*pair, bins=10)
    with pytest.raises(ValueError, match="1000 and 10 bins"):
        uncertainty_histogram(0.5 * pair[0], pair[1]) + uncertainty_histogram(0.5 * pair[0], pair[1], bins=10)


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


def test_best_worst_and_monotone_rankings():
    risk = np.random.default_rng(0).random(40)

    assert risk_coverage(risk, risk).excess_aurc == pytest.approx(0.0, abs=1e-12)
    assert risk_coverage(-risk, risk).aurc > risk.mean()
    assert risk_coverage(np.exp(5 * risk), risk).aurc == pytest.approx(risk_coverage(risk, risk).aurc)
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


@pytest.mark.parametrize("all_wrong", [False, True])
def test_pixels_of_one_kind(all_wrong):
    wrong = np.full((4, 5), all_wrong)
    curve = uncertainty_histogram(maps(seed=0, shape=(4, 5))[0] * math.log(2.0), wrong).curve

    assert curve.aurc == pytest.approx(float(all_wrong))
    assert curve.optimal_aurc == pytest.approx(float(all_wrong))


def test_entropy_of_a_coin_is_not_out_of_range():
    """float32 rounds ln 2 up."""
    coin = torch.full((2, 2), math.log(2.0), dtype=torch.float32)

    assert uncertainty_histogram(coin, torch.ones(2, 2, dtype=torch.bool)).wrong[-1] == 4
    with pytest.raises(ValueError, match=r"expected 0 to 0\.6931"):
        uncertainty_histogram(coin + 0.01, torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("uncertainty", "risk", "message"),
    [
        ([], [], "no cases"),
        ([0.1, 0.2], [0.1], r"\(2,\) and \(1,\)"),
        ([math.nan], [0.1], "uncertainty holds NaN"),
        ([0.1], [math.inf], "risk holds NaN or infinite"),
    ],
)
def test_what_cannot_be_ranked_is_refused(uncertainty, risk, message):
    with pytest.raises(ValueError, match=message):
        risk_coverage(uncertainty, risk)


def test_auroc_equals_counting_pairs():
    random = np.random.default_rng(0)
    score, present = random.integers(-20, 20, 60).astype(float), random.random(60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in score[present] for b in score[~present]]

    assert detection_auroc(score, present) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert detection_auroc(-score, present) == pytest.approx(1.0 - np.mean(pairs), abs=1e-6)
    assert detection_auroc(1e6 + 1e-6 * score, present) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_auroc_of_one_kind_is_none():
    assert math.isnan(detection_auroc([0.1, 0.2], [True, True]))
    assert math.isnan(detection_auroc([0.1, 0.2], [False, False]))
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        detection_auroc([0.1, 0.2], [True])


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


def test_sentences_about_one_picture_are_drawn_together():
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "got 0 values"),
        ({"values": [0.1, 0.2], "groups": ["a"]}, "got 2 values and 1 groups"),
        ({"values": [0.1, math.nan]}, "NaN"),
        ({"values": [0.1], "level": 1.0}, "level is 1.0"),
    ],
)
def test_what_has_no_interval(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**arguments)
