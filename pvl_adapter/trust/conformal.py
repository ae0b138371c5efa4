"""Distribution-free guarantees from the losses and scores of exchangeable subjects.

A subject has any number of cases, and the next one is any case of the next subject. So each subject counts once: losses
are averaged within subjects, and in ranks its cases share the weight of one (hierarchical conformal prediction: Lee,
Barber and Willett, 2023, arXiv 2306.06342).

Shape alphabet: M cases, n subjects, L levels from the safest to the boldest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray


def subject_means(values: Array, subjects: Sequence[str] | Array) -> Array:
    """Means over each subject's cases: [M, ...] to [n, ...], subjects sorted by name."""
    _, index = np.unique(np.asarray(subjects), return_inverse=True)
    total = np.zeros((index.max(initial=-1) + 1, *values.shape[1:]))
    np.add.at(total, index, values)
    return total / np.bincount(index).reshape(-1, *[1] * (values.ndim - 1))


def fewest_subjects(alpha: float) -> int:
    """With fewer, nothing but an empty promise keeps an expected loss of `alpha`."""
    return int(np.ceil(1.0 / alpha - 1.0 - 1e-9))


def controlled_level(losses: Array, alpha: float) -> int:
    """The boldest level whose expected loss on the next subject is at most `alpha`; -1 if none is.

    Conformal risk control (Angelopoulos et al., 2022, arXiv 2208.02814). Where a loss falls from one level to the next,
    it is taken for the largest of the levels before: that keeps the guarantee.

    Args:
        losses: Of subjects, [n, L], between 0 and 1.
        alpha: The expected loss that is allowed.
    """
    rising = np.maximum.accumulate(losses, axis=1)
    bound = (rising.sum(axis=0) + 1.0) / (len(losses) + 1.0)  # as if the next subject lost everything
    return int((bound <= alpha + 1e-12).sum()) - 1


def tested_level(losses: Array, limit: float, *, start: int, confidence: float) -> int:
    """The boldest level whose expected loss is at most `limit` with so much confidence; -1 if none is.

    Learn then test (Angelopoulos et al., 2021, arXiv 2110.01052): levels are tested one after the other from `start`,
    which other subjects have to tell, up to the first that fails. Each is tested by betting (Waudby-Smith and Ramdas,
    2020, arXiv 2010.09686): if the expected loss is above the limit, the wealth of bets against that reaches w with
    probability 1 / w at most. Losses that vary little are told from the limit by far fewer subjects than Hoeffding's
    and Bentkus's bounds need.

    Args:
        losses: Of subjects, [n, L], between 0 and 1.
        limit: The expected loss that is allowed.
        start: The level that is tested first.
        confidence: Chance that the promise holds, over draws of the subjects.
    """
    from mapie.risk_control.fwer_control import control_fwer  # type: ignore[import-untyped]

    losses = np.random.default_rng(0).permutation(losses[:, start:])  # names of subjects may have an order
    times = np.arange(1, len(losses) + 1)[:, None]
    means = (0.5 + losses.cumsum(axis=0)) / (times + 1)
    variances = (0.25 + ((losses - means) ** 2).cumsum(axis=0)) / (times + 1)
    before = np.concatenate([np.full_like(variances[:1], 0.25), variances[:-1]])  # a bet knows the subjects before it
    bets = np.sqrt(2.0 * np.log(1.0 / (1.0 - confidence)) / (len(losses) * before)).clip(max=0.9 / (1.0 - limit))
    wealth = np.log1p(bets * (limit - losses)).cumsum(axis=0).max(axis=0)
    p_values = np.exp(-wealth.clip(min=0.0))
    passed = control_fwer(p_values, 1.0 - confidence, fwer_method="fixed_sequence")
    return start + len(passed) - 1 if len(passed) else -1


class Ranks(NamedTuple):
    """Scores of calibration cases, rising, and which share of a subject each is; the shares sum to n."""

    scores: Array
    shares: Array

    @classmethod
    def of(cls, scores: Array, subjects: Sequence[str] | Array) -> Ranks:
        _, index, count = np.unique(np.asarray(subjects), return_inverse=True, return_counts=True)
        order = np.argsort(scores, kind="stable")
        return cls(np.asarray(scores, dtype=np.float64)[order], (1.0 / count[index])[order])

    @property
    def subjects(self) -> float:
        return float(self.shares.sum())

    def p_value(self, scores: Array) -> Array:
        """How likely a score at least as high is, if the next case is like those: at most x with probability x."""
        above = np.concatenate([self.shares[::-1].cumsum()[::-1], [0.0]])  # share at or above each score
        first = np.searchsorted(self.scores, scores, side="left")
        return (above[first] + 1.0) / (self.subjects + 1.0)

    def quantile(self, alpha: float) -> float:
        """What the next case's score exceeds with probability `alpha` at most; infinite for too few subjects."""
        enough = self.shares.cumsum() >= (1.0 - alpha) * (self.subjects + 1.0) - 1e-9
        return float(self.scores[enough.argmax()]) if enough.any() else float("inf")


def shift_p_value(familiarity: Array, subjects: Sequence[str] | Array, *, unlike: float = 0.05) -> float:
    """How likely so many unlike images are, at most, if all of a dataset's subjects are like the calibration's.

    Single images may pass where this does not. Hoeffding's bound on the mean share of unlike images of a subject.

    Args:
        familiarity: `Prediction.familiarity` of all its pairs, [M].
        subjects: Whose each is, [M].
        unlike: An image is unlike at that familiarity or less.
    """
    shares = subject_means((np.asarray(familiarity) <= unlike).astype(np.float64), subjects)
    share = float(shares.mean())
    if share <= unlike:
        return 1.0
    apart = share * math.log(share / unlike)
    apart += (1.0 - share) * math.log((1.0 - share) / (1.0 - unlike)) if share < 1.0 else 0.0
    return math.exp(-len(shares) * apart)
