"""Monte-Carlo inference: many stochastic passes become a probability, its error and its uncertainties.

Entropies are in nats, as in MedCLIPSeg (arXiv 2602.20423). The split of the total into aleatoric (mean of entropies)
and epistemic (what the samples disagree about) is that of Depeweg et al., 2018 (arXiv 1710.07283). Antithetic pairs, a
sample and the one of the negative noise, cancel what is linear in the noise (Hammersley and Morton, 1956).

Shape alphabet: B batch, S samples, s b samples and images of one chunk, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvl_adapter.config import is_int, require
from pvl_adapter.noise import MEAN


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
        require(is_int(self.max_samples) and self.max_samples >= 2, "max_samples", self.max_samples, "2 or more")


@dataclass(frozen=True)
class MonteCarloConfig:
    """How many samples are taken.

    Args:
        num_samples: S; 0 is one deterministic pass with the mean values; `Auto` decides for each image.
        antithetic: Sample in pairs whose noise is each other's negative.

    Raises:
        ValueError: If `num_samples` is neither 0 or more nor an `Auto`.
    """

    num_samples: int | Auto = 30
    antithetic: bool = True

    def __post_init__(self) -> None:
        count = self.num_samples
        valid = isinstance(count, Auto) or (is_int(count) and count >= 0)
        require(valid, "num_samples", count, "a number of samples, 0 for the mean pass, or pvl_adapter.Auto()")

    @property
    def auto(self) -> Auto | None:
        return self.num_samples if isinstance(self.num_samples, Auto) else None


class Statistics:
    """Running statistics of one image's samples, one map at a time: memory does not grow with their number.

    Means and squared deviations are Welford's. Of antithetic samples, which come one after the other, the deviations of
    pair means are kept too: samples of a pair are not independent, pairs are.

    Args:
        antithetic: The samples come in pairs.
        mean_pass: Probabilities of the deterministic pass, [H, W], if it is to count. It is biased and deterministic;
            all estimates weight it as one pair. It gives a single pair an error bar: their average is wrong, in the
            mean of squares, by half their distance.
    """

    def __init__(self, *, antithetic: bool, mean_pass: Tensor | None = None) -> None:
        self.antithetic = antithetic
        self.mean_pass = mean_pass
        self.count = 0
        self.pairs = 0
        self.first_of_pair: Tensor | None = None
        self.mean: Any = 0.0
        self.squares: Any = 0.0
        self.mean_entropy: Any = 0.0
        self.pair_mean: Any = 0.0
        self.pair_squares: Any = 0.0

    def add(self, sample: Tensor) -> None:
        """Take in one sample's probabilities, [H, W], float32."""
        self.count += 1
        deviation = sample - self.mean
        self.mean = self.mean + deviation / self.count
        self.squares = self.squares + deviation * (sample - self.mean)
        self.mean_entropy = self.mean_entropy + (binary_entropy(sample) - self.mean_entropy) / self.count
        if not self.antithetic:
            return
        if self.first_of_pair is None:
            self.first_of_pair = sample
            return
        mean = (self.first_of_pair + sample) / 2
        self.first_of_pair = None
        self.pairs += 1
        deviation = mean - self.pair_mean
        self.pair_mean = self.pair_mean + deviation / self.pairs
        self.pair_squares = self.pair_squares + deviation * (mean - self.pair_mean)

    @property
    def probability(self) -> Tensor:
        """Estimate of the infinite-sample mean, [H, W]."""
        return self._with_mean_pass(self.mean, self.mean_pass)

    @property
    def aleatoric(self) -> Tensor:
        """Mean of entropies, by the same weights as `probability`, so that their difference is never negative."""
        return self._with_mean_pass(
            self.mean_entropy, None if self.mean_pass is None else binary_entropy(self.mean_pass)
        )

    @property
    def variance(self) -> Tensor:
        """Of one sample's probability, unbiased, [H, W]; NaN where the samples are too few to tell.

        The squared deviations of S samples from their mean add up to S (variance - variance of the mean) on average.
        """
        if self.pairs == 1 or self.count < 2:
            return torch.full_like(self.mean, math.nan)
        return (self.squares + self._paired / self.count) / (self.count - self._unpaired / self.count)

    @property
    def standard_error(self) -> Tensor:
        """Root of the mean squared error of `probability`, [H, W]; NaN where it cannot be told."""
        if self.mean_pass is not None:
            bias = (self.mean - self.mean_pass).square()  # or more: it holds the error of the samples' mean too
            scatter = self.pairs * self.pair_squares / max(self.pairs - 1, 1)
            return (scatter + bias).sqrt() / (self.pairs + 1)
        return ((self._paired + self._unpaired * self.variance) / self.count**2).sqrt()

    @property
    def degrees_of_freedom(self) -> int:
        """How many independent deviations `standard_error` was estimated from."""
        independent = self.pairs + self._unpaired if self.pairs else self.count
        return max(0, independent - (0 if self.mean_pass is not None else 1))

    def _with_mean_pass(self, samples: Tensor, mean_pass: Tensor | None) -> Tensor:
        return samples if mean_pass is None else (self.pairs * samples + mean_pass) / (self.pairs + 1)

    @property
    def _unpaired(self) -> int:
        return self.count - 2 * self.pairs

    @property
    def _paired(self) -> Any:
        """What the pairs add to the variance of the sum of all samples."""
        return 4 * self.pairs * self.pair_squares / (self.pairs - 1) if self.pairs > 1 else 0.0


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

    Each image gets the same samples in the same order whatever `rows` is. `Auto` with antithetic pairs looks first at
    a deterministic pass and one pair, then after every pair.

    Args:
        batch: B.
        config: How many samples.
        rows: How many rows (samples times images) one chunk may have.
        keep: Keep the samples too.

    Raises:
        ValueError: If samples are to be kept whose number is not known beforehand.
    """

    def __init__(self, *, batch: int, config: MonteCarloConfig, rows: int, keep: bool = False) -> None:
        if keep and config.auto:
            raise ValueError("samples can only be returned of a fixed number, num_samples is Auto()")
        self.config = config
        self.rows = rows
        everyone, count = range(batch), config.num_samples
        self.statistics = [Statistics(antithetic=config.antithetic and count != 0) for _ in everyone]
        self._kept: list[list[Tensor]] | None = [[] for _ in everyone] if keep else None
        if isinstance(count, Auto):
            self._samples = range(MEAN if config.antithetic else 0, 2)
        else:
            self._samples = range(count) if count else range(MEAN, 0)
        self._tasks = [Chunk(everyone, self._samples)] if batch else []

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
        """Take in a chunk's logits, [s, b, H, W].

        Raises:
            ValueError: If they hold NaN.
        """
        probabilities = logits.float().sigmoid()
        if probabilities.isnan().any():
            raise ValueError(
                f"the network's output holds NaN in {int(probabilities.isnan().sum())} of {probabilities.numel()} "
                "pixels, expected finite logits: its weights hold NaN, or overflow in this type; load them again, or "
                "use float32"
            )
        for sample, maps in zip(chunk.samples, probabilities, strict=True):
            for b, probability in zip(chunk.images, maps, strict=True):
                if self.config.auto and sample == MEAN:
                    self.statistics[b].mean_pass = probability
                    continue
                self.statistics[b].add(probability)
                if self._kept is not None:
                    self._kept[b].append(probability)

    @property
    def samples(self) -> Tensor | None:
        """All samples' probabilities, [S, B, H, W], if they were to be kept."""
        return None if self._kept is None else torch.stack([torch.stack(maps) for maps in self._kept], dim=1)

    def _look(self, auto: Auto) -> None:
        """Plan one more pair for the images that are not known well enough."""
        going = [b for b, one in enumerate(self.statistics) if not self._settled(one, auto)]
        start = self._samples.stop
        if going and start + 2 <= auto.max_samples:
            self._samples = range(start, start + 2)
            self._tasks.append(Chunk(going, self._samples))

    def _settled(self, statistics: Statistics, auto: Auto) -> bool:
        if statistics.count < self._samples.stop:  # settled at an earlier look
            return True
        error = statistics.standard_error.flatten().double()
        return bool(torch.quantile(error, auto.percentile / 100) < auto.tolerance)


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy of a Bernoulli variable in nats, 0 at 0 and 1."""
    return torch.special.entr(probability) + torch.special.entr(1.0 - probability)


def student_t_factor(level: float, degrees_of_freedom: int) -> float:
    """How many standard errors to each side hold a share `level` of cases, for an error estimated from few samples.

    The quantile (1 + level) / 2 of Student's t, found by bisection on its distribution function (Abramowitz and Stegun,
    26.7.3 and 26.7.4); infinite for 0 degrees of freedom.
    """
    if degrees_of_freedom < 1:
        return math.inf

    def share(angle: float) -> float:
        cosine, term, total = math.cos(angle), 1.0, 0.0
        odd = degrees_of_freedom % 2
        for k in range(1 + odd, degrees_of_freedom, 2):
            total += term * (cosine if odd else 1.0)
            term *= k / (k + 1) * cosine**2
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees_of_freedom)
