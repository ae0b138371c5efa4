"""Whether the uncertain cases are the wrong ones, and the low scores the absent targets.

The area under the risk-coverage curve and its excess over the best are those of Geifman et al. 2019 (arXiv 1805.08206).
Shape alphabet: H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pvl_adapter.metrics.inputs import (
    Map,
    Values,
    as_array,
    as_numbers,
    bin_of,
    check_bins,
    check_mask,
    check_shapes,
    of_the_extra,
)

_COIN = math.log(2.0)  # the largest binary entropy, in nats


@dataclass(frozen=True)
class RiskCoverage:
    """What is left wrong when only the surest are kept.

    Attributes:
        coverage: Part that is kept, rising to 1.
        risk: Mean risk of what is kept.
        aurc: Area under the curve: mean risk over all coverages. Ties are taken in random order, on average.
        optimal_aurc: Of a ranking by the risk itself.
    """

    coverage: np.ndarray
    risk: np.ndarray
    aurc: float
    optimal_aurc: float

    @property
    def excess_aurc(self) -> float:
        """What a perfect ranking would take off."""
        return self.aurc - self.optimal_aurc

    @property
    def random_aurc(self) -> float:
        """Of a ranking that knows nothing: the mean risk."""
        return float(self.risk[-1])


def risk_coverage(uncertainty: Values, risk: Values) -> RiskCoverage:
    """Rank cases by uncertainty, surest first.

    Args:
        uncertainty: One number each, as `Prediction.review_score`.
        risk: Likewise, as 1 - Dice.

    Raises:
        ValueError: If there are none, not as many of one as of the other, or some are not finite.
    """
    scores, risks = as_numbers(uncertainty, "uncertainty").ravel(), as_numbers(risk, "risk").ravel()
    check_shapes(scores, risks)
    if not len(scores):
        raise ValueError("there are no cases to rank")
    _, group = np.unique(scores, return_inverse=True)
    count, total = np.bincount(group), np.bincount(group, weights=risks)
    optimal = _area(np.ones(len(risks)), np.sort(risks))
    return _curve(count, total, optimal_aurc=optimal)


@dataclass(frozen=True)
class UncertaintyHistogram:
    """Pixels and wrong pixels by uncertainty, in bins of equal width; `+` adds those of other pictures.

    Attributes:
        count: Pixels of each bin, int64 [bins].
        wrong: How many of them the mask has wrong, int64 [bins].
    """

    count: np.ndarray
    wrong: np.ndarray

    def __add__(self, other: UncertaintyHistogram) -> UncertaintyHistogram:
        check_bins(self.count, other.count)
        return UncertaintyHistogram(self.count + other.count, self.wrong + other.wrong)

    @cached_property
    def curve(self) -> RiskCoverage:
        """With the pixels of one bin as ties."""
        errors = int(self.wrong.sum())
        optimal = _area(np.array([self.count.sum() - errors, errors]), np.array([0, errors]))
        return _curve(self.count, self.wrong, optimal_aurc=optimal)


def uncertainty_histogram(
    uncertainty: Map, wrong: Map, *, bins: int = 1000, most: float = _COIN
) -> UncertaintyHistogram:
    """Whether the pixels that the mask has wrong are the uncertain ones.

    Args:
        uncertainty: [H, W], between 0 and `most`.
        wrong: [H, W], bool.
        bins: From 0 to `most`.
        most: The largest uncertainty there can be; of an entropy in nats ln 2.

    Raises:
        ValueError: If something is out of range, or of another shape.
    """
    values, errors = as_numbers(uncertainty, "uncertainty", most=most), as_array(wrong)
    check_mask(errors)
    check_shapes(values, errors)
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected 1 or more")
    index = bin_of(values, bins=bins, most=most)
    return UncertaintyHistogram(
        count=np.bincount(index, minlength=bins), wrong=np.bincount(index[errors.ravel()], minlength=bins)
    )


def _curve(count: np.ndarray, total: np.ndarray, *, optimal_aurc: float) -> RiskCoverage:
    """From groups of ties, surest first: how many there are and their summed risk."""
    filled = count > 0
    kept = np.cumsum(count[filled])
    return RiskCoverage(
        coverage=kept / kept[-1],
        risk=np.cumsum(total[filled]) / kept,
        aurc=_area(count[filled], total[filled]),
        optimal_aurc=optimal_aurc,
    )


def _area(count: np.ndarray, total: np.ndarray) -> float:
    """Mean over k of the mean risk of the first k, each group of ties in random order.

    Within a group of mean risk r after n cases of summed risk t, the m-th case makes that (t + m r) / (n + m); the sum
    of 1 / (n + m) is a difference of digamma functions, so that a group may hold any number of pixels.
    """
    with of_the_extra():
        from scipy.special import digamma  # type: ignore[import-untyped]

    count, total = count[count > 0].astype(np.float64), total[count > 0].astype(np.float64)
    before, summed = np.cumsum(count) - count, np.cumsum(total) - total
    mean = total / count
    reciprocals = digamma(before + count + 1.0) - digamma(before + 1.0)
    return float((mean * count + (summed - mean * before) * reciprocals).sum() / count.sum())


def detection_auroc(score: Values, present: Values) -> float:
    """Area under the ROC curve of a score that should be high for some cases, as of targets that are absent.

    Args:
        score: One number each.
        present: Bool, those for which it should be high.

    Returns:
        NaN if all cases are of one kind.

    Raises:
        ValueError: If there are not as many of one as of the other, or some are not finite.
    """
    with of_the_extra():
        from scipy.stats import rankdata  # type: ignore[import-untyped]
        from torchmetrics.functional.classification import binary_auroc

    scores, wanted = as_numbers(score, "score").ravel(), as_array(present).astype(bool).ravel()
    check_shapes(scores, wanted)
    if wanted.all() or not wanted.any():
        return math.nan
    ranks = rankdata(scores, method="dense") / len(scores)  # of what is not between 0 and 1 it would take the sigmoid
    return float(binary_auroc(torch.from_numpy(ranks), torch.from_numpy(wanted.astype(np.int64))))
