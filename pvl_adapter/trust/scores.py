"""Scores of masks (Dice, IoU, surface Dice), and of the probability and uncertainty beside them.

Masks are bool [H, W], maps float [H, W], lists one number per case; NumPy or torch. What has another type or shape, is
out of range or not finite raises ValueError. Needs the extra `trust`.

Surface Dice: Nikolov et al. 2018 (arXiv 1809.04430). ECE: Guo et al. 2017 (arXiv 1706.04599). AURC and excess AURC:
Geifman et al. 2019 (arXiv 1805.08206). Patches of uncertainty: Kahl et al. 2024 (arXiv 2401.08501). What the release
calls NSD: github HealthX-Lab/MedCLIPSeg, commit 8d7ef36.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pvl_adapter.config import require

if _missing := [name for name in ("monai", "scipy") if find_spec(name) is None]:
    raise ModuleNotFoundError(f'{" and ".join(_missing)} not installed: pip install "pvl-adapter[trust]"')

from scipy.ndimage import distance_transform_edt  # type: ignore[import-untyped]
from scipy.special import digamma  # type: ignore[import-untyped]
from scipy.stats import rankdata  # type: ignore[import-untyped]

Map = np.ndarray | Tensor
Values = Sequence[float] | np.ndarray | Tensor
_SMALLEST = 2.0**-24  # half the step of float32 below 1: the nearest that a probability comes to 0 and 1 in the NLL


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
    The border of the image bounds a mask that touches it. 1 if both masks are empty, 0 if only one is. `tolerance` has
    the unit of `spacing`, the height and width of a pixel.
    """
    one, other = _masks(prediction, truth, tolerance=tolerance)
    valid = len(spacing) == 2 and all(0.0 < length < math.inf for length in spacing)
    require(valid, "spacing", spacing, "height and width of a pixel, above 0")
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    from monai.metrics.surface_dice import compute_surface_dice  # takes seconds to import

    found, wanted = (torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (one, other))  # [1, 1, H, W]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy")  # MONAI warns of its own call
        score = compute_surface_dice(
            found, wanted, [tolerance], include_background=True, spacing=list(spacing), use_subvoxels=True
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
    return float(2.0 * matched / (2.0 * (areas[0].sum() + areas[1].sum()) + 1e-8))  # front and back; 1e-8 as released


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
    """The mean risk that is left when only the least uncertain cases are kept."""

    coverage: np.ndarray  # fraction of cases kept, rising to 1
    risk: np.ndarray  # mean risk of the kept cases
    aurc: float  # mean risk over all coverages; ties count as the mean over all their orders
    optimal_aurc: float  # of a ranking by the risk itself

    @property
    def excess_aurc(self) -> float:
        return self.aurc - self.optimal_aurc

    @property
    def random_aurc(self) -> float:
        return float(self.risk[-1])  # the mean risk


def risk_coverage(uncertainty: Values, risk: Values) -> RiskCoverage:
    """Rank cases by uncertainty (as `Prediction.review_score`) and keep the lowest; the risk may be 1 - Dice."""
    scores, risks = _numbers(uncertainty, "uncertainty").ravel(), _numbers(risk, "risk").ravel()
    _check_same(scores, risks)
    require(len(scores) > 0, "number of cases", 0, "1 or more")
    _, ties = np.unique(scores, return_inverse=True)
    return _curve(np.bincount(ties), np.bincount(ties, weights=risks), best=(np.ones(len(risks)), np.sort(risks)))


@dataclass(frozen=True)
class PixelBins:
    """Pixels of any number of images (add them by `+`) in bins of equal width by a value, and the hits among them."""

    count: np.ndarray  # [bins], int64
    value_sum: np.ndarray  # [bins], float64: of the pixels' values
    hits: np.ndarray  # [bins], int64: pixels that are foreground (`calibration`) or wrong (`uncertainty_histogram`)
    squared_error: float  # between value and hit, summed over all pixels
    log_loss: float  # in nats, of the value as the probability of a hit, summed over all pixels

    def __add__(self, other: PixelBins) -> PixelBins:
        _check_same(self.count, other.count)
        return PixelBins(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def mean_value(self) -> np.ndarray:
        """x of a reliability diagram, [bins]; NaN in empty bins."""
        return self.value_sum / np.where(self.count, self.count, np.nan)

    @property
    def frequency(self) -> np.ndarray:
        """y of a reliability diagram, the fraction of hits, [bins]; NaN in empty bins."""
        return self.hits / np.where(self.count, self.count, np.nan)

    @property
    def expected_error(self) -> float:
        """ECE: the distance between value and frequency of a bin, averaged over pixels."""
        return float(np.abs(self.value_sum - self.hits).sum() / self.count.sum())

    @property
    def average_error(self) -> float:
        """ACE: the same, averaged over the bins that have pixels; near-certain background does not dominate it."""
        return float(np.nanmean(np.abs(self.mean_value - self.frequency)))

    @property
    def largest_error(self) -> float:
        """MCE: the largest distance of any bin, however few its pixels."""
        return float(np.nanmax(np.abs(self.mean_value - self.frequency)))

    @property
    def brier(self) -> float:
        """Mean squared distance between value and hit."""
        return self.squared_error / int(self.count.sum())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats; values are kept 2^-24 from 0 and 1, so that it is finite."""
        return self.log_loss / int(self.count.sum())

    @cached_property
    def curve(self) -> RiskCoverage:
        """Hits (the risk) against coverage; the pixels of a bin are ties."""
        hits = int(self.hits.sum())
        return _curve(self.count, self.hits, best=(np.array([self.count.sum() - hits, hits]), np.array([0, hits])))


def calibration(probability: Map, truth: Map, *, bins: int = 15) -> PixelBins:
    """How often pixels of each probability are foreground: ECE, ACE, MCE, Brier score and NLL are its properties."""
    return _pixel_bins(probability, truth, name="probability", bins=bins, largest=1.0)


def uncertainty_histogram(uncertainty: Map, wrong: Map, *, bins: int = 1000) -> PixelBins:
    """How often pixels of each uncertainty (a binary entropy, 0 to ln 2) are wrong: see its `curve`."""
    return _pixel_bins(uncertainty, wrong, name="uncertainty", bins=bins, largest=math.log(2.0))


def aggregate_uncertainty(
    uncertainty: Map, mask: Map, *, how: Literal["mean", "patch", "boundary"] = "mean", size: int = 8
) -> np.ndarray:
    """One number for each image, [...], of maps [..., H, W] and predicted masks: a score for `detection_auroc`.

    The "mean" over the image; "patch", the largest mean of any patch of `size` x `size` pixels (or as much as the image
    has); or "boundary", the mean in a soft band about `size` pixels wide along the mask's outline (a Gaussian, four
    standard deviations wide). Without an outline, in an empty or full mask, that is the mean.
    """
    values, masks = _numbers(uncertainty, "uncertainty"), _masks(*mask.reshape(-1, *mask.shape[-2:]))
    require(values.shape == mask.shape, "shape", values.shape, f"that of the mask, {tuple(mask.shape)}")
    require(how in ("mean", "patch", "boundary"), "how", how, '"mean", "patch" or "boundary"')
    require(size >= 1, "size", size, "1 or more")
    *batch, height, width = values.shape
    if how == "patch":
        maps, patch = torch.from_numpy(values).reshape(-1, 1, height, width), (min(size, height), min(size, width))
        return F.avg_pool2d(maps, patch, stride=1).amax(dim=(1, 2, 3)).reshape(batch).numpy()
    weights = np.ones((len(masks), height, width))
    for index, found in enumerate(masks):
        if how == "boundary" and found.any() and not found.all():
            distance = distance_transform_edt(found) + distance_transform_edt(~found)
            weights[index] = np.exp(-8.0 * ((distance - 0.5) / size) ** 2)  # outlines lie between pixels
    return np.average(values, axis=(-2, -1), weights=weights.reshape(values.shape))


def detection_auroc(score: Values, present: Values) -> float:
    """Area under the ROC curve: how often `score` is higher where `present` (ties count half); NaN for one kind."""
    scores, wanted = _numbers(score, "score").ravel(), _numbers(present, "present").astype(bool).ravel()
    _check_same(scores, wanted)
    count = int(wanted.sum())
    pairs = count * (len(wanted) - count)
    return float((rankdata(scores)[wanted].sum() - count * (count + 1) / 2) / pairs) if pairs else math.nan


def bootstrap_interval(
    values: Values,
    *others: Values,
    statistic: Callable[..., float] = np.mean,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 9999,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, or of any `statistic(values, *others)` of cases.

    For an AUROC give scores, kinds and `detection_auroc`. Cases of one group, for example of one subject, are drawn
    together. Draws whose statistic is NaN are left out.
    """
    cases = [_numbers(each, "values").ravel() for each in (values, *others)]
    members = np.arange(len(cases[0])) if groups is None else np.asarray(groups)
    for each in cases:
        _check_same(each, members)
    require(len(members) > 0, "number of values", 0, "1 or more")
    require(0.0 < level < 1.0, "level", level, "a number between 0 and 1")
    _, index, count = np.unique(members, return_inverse=True, return_counts=True)
    total, rows = np.bincount(index, weights=cases[0]), np.split(np.argsort(index), np.cumsum(count)[:-1])
    random, found, batch = np.random.default_rng(seed), [], max(1, 2_000_000 // len(count))  # bounds the memory
    for left in range(resamples, 0, -batch):
        drawn = random.integers(len(count), size=(min(left, batch), len(count)))  # groups
        if statistic is np.mean and not others:  # all draws at once
            found.extend(total[drawn].sum(axis=1) / count[drawn].sum(axis=1))
        else:
            of_draws = (np.concatenate([rows[group] for group in draw]) for draw in drawn)
            found.extend(statistic(*(each[chosen] for each in cases)) for chosen in of_draws)
    kept = np.array(found)[~np.isnan(found)]
    low, high = np.quantile(kept, [0.5 - level / 2, 0.5 + level / 2]) if len(kept) else (math.nan, math.nan)
    return float(low), float(high)


def _pixel_bins(values: Map, hits: Map, *, name: str, bins: int, largest: float) -> PixelBins:
    numbers, (hit,) = _numbers(values, name), _masks(hits)
    _check_same(numbers, hit)
    require(bins >= 1, "bins", bins, "1 or more")
    rounding = 1e-6 * largest  # of float32
    low, high = float(numbers.min(initial=0.0)), float(numbers.max(initial=0.0))
    require(-rounding <= low and high <= largest + rounding, f"range of {name}", (low, high), f"0 to {largest:.4g}")
    numbers = numbers.clip(0.0, largest)
    index = np.minimum(np.floor(numbers.ravel() * (bins / largest)), bins - 1).astype(np.int64)  # the end in the last
    count, value_sum = np.bincount(index, minlength=bins), np.bincount(index, weights=numbers.ravel(), minlength=bins)
    hits = np.bincount(index[hit.ravel()], minlength=bins)
    likelihood = np.abs(numbers - ~hit).clip(_SMALLEST, 1.0)
    return PixelBins(count, value_sum, hits, np.square(numbers - hit).sum(), -np.log(likelihood).sum())


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
    require(0.0 <= tolerance < math.inf, "tolerance", tolerance, "0 or more")
    arrays = [np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask) for mask in masks]
    for array in arrays:
        got = str(array.dtype), array.shape
        require(array.dtype == np.bool_ and array.ndim == 2, "mask", got, "bool [height, width]: mask > 127")
    _check_same(arrays[0], arrays[-1])
    return arrays


def _numbers(values: Any, name: str) -> np.ndarray:
    array = values.detach().cpu().double() if isinstance(values, Tensor) else values  # NumPy has no bfloat16
    numbers = np.asarray(array, dtype=np.float64)
    wrong = int((~np.isfinite(numbers)).sum())
    require(not wrong, f"number of NaN or infinite values in {name}", wrong, "0")
    return numbers


def _check_same(one: np.ndarray, other: np.ndarray) -> None:
    require(one.shape == other.shape, "shape", one.shape, f"that of the other argument, {other.shape}")
