"""Whether a probability means what it says, counted in bins so that no map has to be kept.

The expected calibration error is that of Guo et al. 2017 (arXiv 1706.04599), as torchmetrics defines it for two
classes. Shape alphabet: H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pvl_adapter.metrics.inputs import Map, as_array, as_numbers, bin_of, check_bins, check_mask, check_shapes


@dataclass(frozen=True)
class Calibration:
    """Pixels by the probability they were given, in bins of equal width; `+` adds those of other pictures.

    Attributes:
        count: Pixels of each bin, int64 [bins].
        probability_sum: Of their probabilities.
        positives: How many of them are foreground, int64 [bins].
        squared_error: Of all pixels, summed.
    """

    count: np.ndarray
    probability_sum: np.ndarray
    positives: np.ndarray
    squared_error: float

    def __add__(self, other: Calibration) -> Calibration:
        check_bins(self.count, other.count)
        return Calibration(
            self.count + other.count,
            self.probability_sum + other.probability_sum,
            self.positives + other.positives,
            self.squared_error + other.squared_error,
        )

    @property
    def probability(self) -> np.ndarray:
        """Mean probability of each bin, NaN where there is no pixel: across, in a reliability diagram."""
        return _divide(self.probability_sum, self.count)

    @property
    def frequency(self) -> np.ndarray:
        """How much of each bin is foreground: up, in a reliability diagram."""
        return _divide(self.positives, self.count)

    @property
    def expected_error(self) -> float:
        """ECE: mean over pixels of their bin's distance between probability and frequency."""
        return float(np.abs(self.probability_sum - self.positives).sum() / self.count.sum())

    @property
    def largest_error(self) -> float:
        """Of any bin, however few its pixels."""
        return float(np.nanmax(np.abs(self.probability - self.frequency)))

    @property
    def brier(self) -> float:
        """Mean squared distance between probability and truth."""
        return self.squared_error / int(self.count.sum())


def calibration(probability: Map, truth: Map, *, bins: int = 15) -> Calibration:
    """Whether, of the pixels that were given 70%, 70% are foreground.

    torchmetrics' `BinaryCalibrationError` gives the same ECE but keeps every pixel to the end.

    Args:
        probability: [H, W], between 0 and 1.
        truth: [H, W], bool.
        bins: From 0 to 1.

    Raises:
        ValueError: If something is out of range, or of another shape.
    """
    values, positive = as_numbers(probability, "probability", most=1.0), as_array(truth)
    check_mask(positive)
    check_shapes(values, positive)
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected 1 or more")
    index = bin_of(values, bins=bins, most=1.0)
    return Calibration(
        count=np.bincount(index, minlength=bins),
        probability_sum=np.bincount(index, weights=values.ravel(), minlength=bins),
        positives=np.bincount(index[positive.ravel()], minlength=bins),
        squared_error=float(np.square(values - positive).sum()),
    )


def _divide(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return np.divide(one, other, out=np.full(len(other), np.nan), where=other > 0)
