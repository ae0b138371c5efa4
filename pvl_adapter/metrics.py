"""Scores of masks (Dice, IoU, surface Dice), and of the probability and uncertainty beside them.

Masks are bool [H, W], maps float [H, W], lists one number per case; NumPy or torch. What has another type or shape, is
out of range or not finite raises ValueError. Needs the extra `metrics`.

Surface Dice: Nikolov et al. 2018 (arXiv 1809.04430). ECE: Guo et al. 2017 (arXiv 1706.04599). AURC and excess AURC:
Geifman et al. 2019 (arXiv 1805.08206). What the release calls NSD: github HealthX-Lab/MedCLIPSeg, commit 8d7ef36.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

if _missing := [name for name in ("monai", "scipy") if find_spec(name) is None]:
    raise ModuleNotFoundError(f'{" and ".join(_missing)} not installed: pip install "pvl-adapter[metrics]"')

from scipy.ndimage import distance_transform_edt  # type: ignore[import-untyped]
from scipy.special import digamma  # type: ignore[import-untyped]
from scipy.stats import bootstrap, mannwhitneyu  # type: ignore[import-untyped]

Map = np.ndarray | Tensor
Values = Sequence[float] | np.ndarray | Tensor

_RELEASED_EPSILON = 1e-8  # the release adds it to the denominator


def dice(prediction: Map, truth: Map) -> float:
    """Dice similarity coefficient; 1 if both masks are empty."""
    one, other = _masks(prediction, truth)
    area = int(one.sum()) + int(other.sum())
    return 2.0 * int((one & other).sum()) / area if area else 1.0


def iou(prediction: Map, truth: Map) -> float:
    """Intersection over union; 1 if both masks are empty."""
    one, other = _masks(prediction, truth)
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def surface_dice(
    prediction: Map, truth: Map, *, tolerance: float = 2.0, spacing: tuple[float, float] = (1.0, 1.0)
) -> float:
    """Normalised surface Dice in 2-D: the fraction of both outlines, by length, within `tolerance` of the other.

    Outlines run between pixels (MONAI's `use_subvoxels`), since counting edge pixels makes slanting outlines too short.
    The border of the image bounds a mask that touches it. 1 if both masks are empty, 0 if only one is.

    Args:
        prediction: [H, W], bool.
        truth: [H, W], bool.
        tolerance: In the unit of `spacing`.
        spacing: Height and width of a pixel.
    """
    one, other = _masks(prediction, truth, tolerance=tolerance)
    if len(spacing) != 2 or not all(0.0 < length < math.inf for length in spacing):
        raise ValueError(f"spacing is {spacing}, expected height and width of a pixel, above 0")
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    from monai.metrics.surface_dice import compute_surface_dice  # takes seconds to import

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy")  # MONAI warns of its own call
        score = compute_surface_dice(
            torch.from_numpy(one[None, None].astype(np.float32)),  # [1, 1, H, W]
            torch.from_numpy(other[None, None].astype(np.float32)),
            class_thresholds=[tolerance],
            include_background=True,
            spacing=list(spacing),
            use_subvoxels=True,
        )
    return min(1.0, score.item())


def released_surface_dice(prediction: Map, truth: Map, *, tolerance: float = 2.0) -> float:
    """The "NSD" of the release, for comparison with the paper (tolerance: 2 pixels); use `surface_dice` otherwise.

    The release treats a slice as a volume one voxel thick. The surface of that covers every foreground pixel, front and
    back, so areas are compared: the score is near the Dice or above it, and nearly 1 for random pixels.
    """
    one, other = _masks(prediction, truth, tolerance=tolerance)
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    rows, columns = (np.flatnonzero((one | other).any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # most of an image is background
    areas = _surface_of_slice(one[box]), _surface_of_slice(other[box])  # [h + 1, w + 1]
    near = [distance_transform_edt(area == 0.0) <= tolerance for area in areas]
    matched = areas[0][near[1]].sum() + areas[1][near[0]].sum()
    return float(2.0 * matched / (2.0 * (areas[0].sum() + areas[1].sum()) + _RELEASED_EPSILON))  # front and back


def _surface_of_slice(mask: np.ndarray) -> np.ndarray:
    """Area of the surface in front of a slice by marching cubes, for each window of 2 x 2 pixels: [H + 1, W + 1]."""
    padded = np.pad(mask, 1)
    corners = np.stack([padded[:-1, :-1], padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]])  # [4, H + 1, W + 1]
    corner = math.sqrt(3.0) / 8.0  # of a cube, cut off halfway between neighbours
    area = np.array([0.0, corner, math.sqrt(0.5), 0.5 + 3.0 * corner, 1.0])[corners.sum(axis=0)]
    diagonal = (corners[0] == corners[1]) & (corners[2] == corners[3]) & (corners[0] != corners[2])
    return np.where(diagonal, 2.0 * corner, area)


@dataclass(frozen=True)
class RiskCoverage:
    """The mean risk that is left when only the least uncertain cases are kept.

    Attributes:
        coverage: Fraction of cases kept, rising to 1.
        risk: Mean risk of the kept cases.
        aurc: Mean risk over all coverages; ties count as the mean over all their orders.
        optimal_aurc: AURC of a ranking by the risk itself.
    """

    coverage: np.ndarray
    risk: np.ndarray
    aurc: float
    optimal_aurc: float

    @property
    def excess_aurc(self) -> float:
        """AURC minus the optimal AURC."""
        return self.aurc - self.optimal_aurc

    @property
    def random_aurc(self) -> float:
        """AURC of a random ranking: the mean risk."""
        return float(self.risk[-1])


def risk_coverage(uncertainty: Values, risk: Values) -> RiskCoverage:
    """Rank cases by uncertainty (as `Prediction.review_score`) and keep the lowest; the risk may be 1 - Dice."""
    scores, risks = _numbers(uncertainty, "uncertainty").ravel(), _numbers(risk, "risk").ravel()
    _check_same(scores, risks)
    if not len(scores):
        raise ValueError("got no cases to rank, expected one or more")
    _, ties = np.unique(scores, return_inverse=True)
    return _curve(np.bincount(ties), np.bincount(ties, weights=risks), best=(np.ones(len(risks)), np.sort(risks)))


@dataclass(frozen=True)
class PixelBins:
    """Pixels in bins of equal width by a value, with the number of hits among them; `+` adds those of other images.

    No map has to be kept, where torchmetrics keeps every pixel (and MONAI averages over images).

    Attributes:
        count: Pixels of each bin, int64 [bins].
        value_sum: Sum of their values, float64 [bins].
        hits: How many are foreground (`calibration`) or wrong (`uncertainty_histogram`), int64 [bins].
        squared_error: Squared distance between value and hit, summed over all pixels.
    """

    count: np.ndarray
    value_sum: np.ndarray
    hits: np.ndarray
    squared_error: float

    def __add__(self, other: PixelBins) -> PixelBins:
        _check_same(self.count, other.count)
        return PixelBins(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def mean_value(self) -> np.ndarray:
        """Mean value of each bin, NaN in empty bins: x of a reliability diagram."""
        with np.errstate(invalid="ignore"):
            return self.value_sum / self.count

    @property
    def frequency(self) -> np.ndarray:
        """Fraction of hits in each bin, NaN in empty bins: y of a reliability diagram."""
        with np.errstate(invalid="ignore"):
            return self.hits / self.count

    @property
    def expected_error(self) -> float:
        """ECE: the distance between value and frequency of a bin, averaged over pixels."""
        return float(np.abs(self.value_sum - self.hits).sum() / self.count.sum())

    @property
    def largest_error(self) -> float:
        """MCE: the largest distance of any bin, however few its pixels."""
        return float(np.nanmax(np.abs(self.mean_value - self.frequency)))

    @property
    def brier(self) -> float:
        """Mean squared distance between value and hit."""
        return self.squared_error / int(self.count.sum())

    @cached_property
    def curve(self) -> RiskCoverage:
        """Hits (the risk) against coverage; the pixels of a bin are ties."""
        hits = int(self.hits.sum())
        return _curve(self.count, self.hits, best=(np.array([self.count.sum() - hits, hits]), np.array([0, hits])))


def calibration(probability: Map, truth: Map, *, bins: int = 15) -> PixelBins:
    """How often pixels of each probability are foreground: the ECE, MCE and Brier score of what it returns."""
    return _pixel_bins(_numbers(probability, "probability", largest=1.0), truth, bins=bins, largest=1.0)


def uncertainty_histogram(
    uncertainty: Map, wrong: Map, *, bins: int = 1000, largest: float = math.log(2.0)
) -> PixelBins:
    """How often pixels of each uncertainty (0 to `largest`: ln 2 for a binary entropy) are wrong: see its `curve`."""
    return _pixel_bins(_numbers(uncertainty, "uncertainty", largest=largest), wrong, bins=bins, largest=largest)


def detection_auroc(score: Values, present: Values) -> float:
    """Area under the ROC curve: how often `score` is higher where `present` (ties count half); NaN for one kind."""
    scores, wanted = _numbers(score, "score").ravel(), _numbers(present, "present").astype(bool).ravel()
    _check_same(scores, wanted)
    if wanted.all() or not wanted.any():
        return math.nan
    wins = mannwhitneyu(scores[wanted], scores[~wanted], method="asymptotic").statistic
    return float(wins / (wanted.sum() * (~wanted).sum()))


def bootstrap_interval(
    values: Values, *, groups: Sequence[object] | None = None, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; twice the mean if there is only one case or group.

    Args:
        values: One number per case.
        groups: What each case belongs to, for example its image: cases of a group are drawn together.
        level: Confidence level.
        seed: Of the draws.
    """
    numbers = _numbers(values, "values").ravel()
    members = range(len(numbers)) if groups is None else groups
    if not len(numbers) or len(members) != len(numbers):
        raise ValueError(f"got {len(numbers)} values and {len(members)} groups, expected as many, one or more")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}, expected a number between 0 and 1")
    numbering = {member: number for number, member in enumerate(dict.fromkeys(members))}
    index = np.array([numbering[member] for member in members])
    total, count = np.bincount(index, weights=numbers), np.bincount(index)
    if len(count) == 1:
        return float(numbers.mean()), float(numbers.mean())
    interval = bootstrap(
        (total, count),
        lambda total, count, axis: total.sum(axis=axis) / count.sum(axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=level,
        method="percentile",
        batch=max(1, 2_000_000 // len(count)),  # bounds the memory of the draws
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _pixel_bins(values: np.ndarray, hits: Map, *, bins: int, largest: float) -> PixelBins:
    (hit,) = _masks(hits)
    _check_same(values, hit)
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected 1 or more")
    index = np.minimum(np.floor(values.ravel() * (bins / largest)), bins - 1).astype(np.int64)  # the end in the last
    count, value_sum = np.bincount(index, minlength=bins), np.bincount(index, weights=values.ravel(), minlength=bins)
    hit_count = np.bincount(index[hit.ravel()], minlength=bins)
    return PixelBins(count, value_sum, hit_count, float(np.square(values - hit).sum()))


def _curve(count: np.ndarray, total: np.ndarray, *, best: tuple[np.ndarray, np.ndarray]) -> RiskCoverage:
    """From the sizes and summed risks of groups of ties, least uncertain first; `best` likewise, lowest risk first."""
    count, total = count[count > 0], total[count > 0]
    kept = np.cumsum(count)
    return RiskCoverage(kept / kept[-1], np.cumsum(total) / kept, aurc=_area(count, total), optimal_aurc=_area(*best))


def _area(count: np.ndarray, total: np.ndarray) -> float:
    """Mean over k of the mean risk of the first k cases, each group of ties in random order.

    Within a group of mean risk r after n cases of summed risk t, the mean risk at its m-th case is (t + m r) / (n + m).
    The sum of 1 / (n + m) is a difference of digamma functions, so that a group may hold any number of pixels.
    """
    count, total = count[count > 0].astype(np.float64), total[count > 0].astype(np.float64)
    before, summed = np.cumsum(count) - count, np.cumsum(total) - total
    mean = total / count
    reciprocals = digamma(before + count + 1.0) - digamma(before + 1.0)
    return float((mean * count + (summed - mean * before) * reciprocals).sum() / count.sum())


def _masks(*masks: Map, tolerance: float = 0.0) -> list[np.ndarray]:
    if not 0.0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}, expected 0 or more")
    arrays = [np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask) for mask in masks]
    for array in arrays:
        if array.dtype != np.bool_ or array.ndim != 2:
            raise ValueError(
                f"got a mask of {array.dtype} with shape {array.shape}, expected bool [height, width]: mask > 127"
            )
    _check_same(arrays[0], arrays[-1])
    return arrays


def _numbers(values: Any, name: str, *, largest: float = math.inf) -> np.ndarray:
    """Finite float64 numbers, between 0 and `largest` if that is given."""
    array = values.detach().cpu().double() if isinstance(values, Tensor) else values  # NumPy has no bfloat16
    numbers = np.asarray(array, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds NaN or infinite values, expected finite numbers")
    if largest == math.inf or not numbers.size:
        return numbers
    rounding = 1e-6 * largest  # of float32
    if numbers.min() < -rounding or numbers.max() > largest + rounding:
        raise ValueError(f"{name} is from {numbers.min():g} to {numbers.max():g}, expected 0 to {largest:.4g}")
    return numbers.clip(0.0, largest)


def _check_same(one: np.ndarray, other: np.ndarray) -> None:
    if one.shape != other.shape:
        raise ValueError(f"got shapes {one.shape} and {other.shape}, expected the same")
