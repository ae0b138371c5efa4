"""Monte-Carlo inference: which samples are computed, in which chunks, and when they are enough.

Shape alphabet: B batch, S samples, s b samples and images of one chunk, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pvl_adapter.config import is_int, require
from pvl_adapter.error_bars import standard_error
from pvl_adapter.noise import FEW_PAIRS, INDEPENDENT, MEAN, PAIRS, Draws, on_device
from pvl_adapter.sample_statistics import Statistics

NUM_SAMPLES = 30  # every map at least as near to infinitely many samples as 30 plain averages, see docs/inference.md


@dataclass(frozen=True)
class Auto:
    """Sample each image until its probability map is known well enough.

    Args:
        tolerance: Standard error of the probability that is good enough.
        percentile: Percentage of an image's pixels that must reach it.
        max_samples: Where to give up; of an odd number the last has no partner and is not taken.

    Raises:
        ValueError: If a value is out of range.
    """

    tolerance: float = 0.01
    percentile: float = 99.0
    max_samples: int = 128

    def __post_init__(self) -> None:
        require(self.tolerance > 0, "tolerance", self.tolerance, "a positive standard error of the probability")
        require(0 < self.percentile <= 100, "percentile", self.percentile, "a percentage of pixels, above 0")
        require(is_int(self.max_samples) and self.max_samples >= 4, "max_samples", self.max_samples, "4 or more")


@dataclass(frozen=True)
class MonteCarloConfig:
    """How many samples are taken.

    Args:
        num_samples: S; 0 is one deterministic pass with the mean values; `Auto` decides for each image.
        antithetic: Take some samples in pairs whose noise is each other's negative, and all of `Auto`'s.

    Raises:
        ValueError: If `num_samples` is neither 0 or more nor an `Auto`.
    """

    num_samples: int | Auto = NUM_SAMPLES
    antithetic: bool = True

    def __post_init__(self) -> None:
        count = self.num_samples
        valid = isinstance(count, Auto) or (is_int(count) and count >= 0)
        require(valid, "num_samples", count, "a number, 0 for the mean pass, pvl_adapter.Auto(), or 'distilled'")

    @property
    def draws(self) -> Draws:
        """Which samples take which noise."""
        if not self.antithetic or self.num_samples == 0:
            return INDEPENDENT
        return PAIRS if self.auto else FEW_PAIRS

    @property
    def auto(self) -> Auto | None:
        return self.num_samples if isinstance(self.num_samples, Auto) else None


class Chunk(NamedTuple):
    """Samples of some images that one forward computes.

    Attributes:
        images: Indices within the batch, b of them.
        samples: Indices of the samples of each, s of them.
    """

    images: Sequence[int]
    samples: range


class MonteCarlo:
    """Says which samples to compute next, and summarises them.

    Each image gets the same samples in the same order whatever `rows` is. `Auto` looks after
    four, then after every two.

    Args:
        shape: B, H and W.
        device: Of the maps.
        config: How many samples.
        rows: How many rows (samples times images) one chunk may have.
        keep: Keep the samples too.

    Attributes:
        statistics: Of the samples so far.
        samples: All samples' probabilities, [S, B, H, W], if they are kept.

    Raises:
        ValueError: If samples are to be kept whose number is not known beforehand.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        device: torch.device,
        config: MonteCarloConfig,
        rows: int,
        keep: bool = False,
    ) -> None:
        if keep and config.auto:
            raise ValueError("samples can only be returned of a fixed number, num_samples is Auto()")
        self.config = config
        self.rows = rows
        count = config.num_samples
        self.statistics = Statistics(shape, draws=config.draws, device=device)
        self.samples: Tensor | None = None
        if keep and not isinstance(count, Auto):
            self.samples = torch.zeros(max(1, count), *shape, device=device)
        if isinstance(count, Auto):
            self._samples = range(4)
        else:
            self._samples = range(count) if count else range(MEAN, 0)
        self._tasks = [Chunk(range(shape[0]), self._samples)]

    def next_chunk(self) -> Chunk | None:
        """What to compute next; None at the end."""
        if not self._tasks and self.config.auto:
            self._look(self.config.auto)
        if not self._tasks:
            return None
        images, samples = self._tasks.pop()
        if len(images) > self.rows:
            self._tasks.append(Chunk(images[self.rows :], samples))
            images = images[: self.rows]
        some = samples[: max(1, self.rows // len(images))]
        if len(some) < len(samples):
            self._tasks.append(Chunk(images, samples[len(some) :]))
        return Chunk(images, some)

    def shrink(self, chunk: Chunk, error: Exception) -> None:
        """Memory ran out while a chunk was computed: halve the rows, and take it again.

        Raises:
            Exception: The error, if it is another one or a single row is too much.
        """
        signs = ("out of memory", "can't allocate memory", "not enough memory")
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
            sign in str(error) for sign in signs
        )
        if len(chunk.images) * len(chunk.samples) == 1 or not out_of_memory:
            raise error
        self.rows = min(self.rows, len(chunk.images) * len(chunk.samples)) // 2
        self._tasks.append(chunk)

    def add(self, chunk: Chunk, logits: Tensor) -> None:
        """Take in a chunk's logits, [s, b, H, W], float32."""
        start = max(0, chunk.samples[0])  # a mean pass is the only sample
        self.statistics.add(chunk.images, start, logits)
        if self.samples is not None:
            self.samples[start : start + len(logits), on_device(chunk.images, logits.device)] = logits.sigmoid()

    def _look(self, auto: Auto) -> None:
        """Plan one more pair for the images that are not known well enough: the loop's one wait for a GPU."""
        statistics, start = self.statistics, self._samples.stop
        if start + 2 > auto.max_samples:
            return
        error = standard_error(statistics.fit()).flatten(1)  # [B, H W]
        settled = (error.quantile(auto.percentile / 100, dim=1) < auto.tolerance).tolist()
        going = [b for b, count in enumerate(statistics.count) if count == start and not settled[b]]
        if going:
            self._samples = range(start, start + 2)
            self._tasks.append(Chunk(going, self._samples))
