"""Running statistics of a batch's samples: a probability, its error and its uncertainties.

Entropies are in nats, as in MedCLIPSeg (arXiv 2602.20423). The split of the total into aleatoric (mean of entropies)
and epistemic (what the samples disagree about) is that of Depeweg et al., 2018 (arXiv 1710.07283). Antithetic pairs, a
sample and the one of the negative noise, cancel what is linear in the noise (Hammersley and Morton, 1956).

Shape alphabet: B batch, s b samples and images of one chunk, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Moments:
    """Running mean and squared deviations of maps [B, H, W], merged by chunks (Chan, Golub and LeVeque, 1983)."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.mean = torch.zeros(*shape, device=device)
        self.squares = torch.zeros(*shape, device=device)

    def merge(self, images: Sequence[int], values: Tensor, *, count: int) -> None:
        """Take in values [s, b, H, W] of some images that have had `count` each."""
        images, share = list(images), len(values) / (count + len(values))
        mean, before = values.mean(dim=0), self.mean[images]  # 2 x [b, H, W]
        self.squares[images] += (values - mean).square().sum(dim=0) + (mean - before).square() * (count * share)
        self.mean[images] = before.lerp(mean, share)


class Statistics:
    """Running statistics of a batch's samples: memory does not grow with their number.

    Of antithetic samples the moments of pair means are kept too: samples of a pair are not independent, pairs are.

    Args:
        shape: B, H and W.
        antithetic: The samples come in pairs.
        device: Of the maps.

    Attributes:
        count: How many samples each image has had.
        mean_pass: Probabilities of the deterministic pass, [B, H, W], if it is to count. It is biased and
            deterministic; all estimates weight it as one pair. It gives a single pair an error bar: their average is
            wrong, in the mean of squares, by half their distance.
        rounding: What rounding may do to the logits, [B, H, W]; part of the standard error.
    """

    def __init__(self, shape: Sequence[int], *, antithetic: bool, device: torch.device) -> None:
        self.antithetic = antithetic
        self.count = [0] * shape[0]
        self.mean_pass: Tensor | None = None
        self.rounding: Tensor | None = None
        self.samples = Moments(shape, device)
        self.pair_means = Moments(shape, device)
        self.mean_entropy = Moments(shape, device)
        self.first_of_pair = torch.zeros(*shape, device=device)

    def add(self, images: Sequence[int], start: int, probabilities: Tensor) -> None:
        """Take in samples [s, b, H, W], float32, of some images that have had `start` each."""
        self.samples.merge(images, probabilities, count=start)
        self.mean_entropy.merge(images, binary_entropy(probabilities), count=start)
        for image in images:
            self.count[image] = start + len(probabilities)
        if not self.antithetic:
            return
        if start % 2:
            probabilities = torch.cat([self.first_of_pair[list(images)][None], probabilities])
        if len(probabilities) % 2:
            self.first_of_pair[list(images)] = probabilities[-1]
        if pairs := len(probabilities) // 2:
            means = (probabilities[: 2 * pairs : 2] + probabilities[1 : 2 * pairs : 2]) / 2  # [pairs, b, H, W]
            self.pair_means.merge(images, means, count=start // 2)

    def take_mean_pass(self, images: Sequence[int], probabilities: Tensor) -> None:
        """Let the deterministic pass [b, H, W] of some images count."""
        if self.mean_pass is None:
            self.mean_pass = torch.zeros_like(self.first_of_pair)
        self.mean_pass[list(images)] = probabilities

    @property
    def probability(self) -> Tensor:
        """Estimate of the infinite-sample mean, [B, H, W]."""
        return self._with_mean_pass(self.samples.mean, self.mean_pass)

    @property
    def aleatoric(self) -> Tensor:
        """Mean of entropies, by the same weights as `probability`, so that their difference is never negative."""
        return self._with_mean_pass(
            self.mean_entropy.mean, None if self.mean_pass is None else binary_entropy(self.mean_pass)
        )

    @property
    def variance(self) -> Tensor:
        """Of one sample's probability, unbiased, [B, H, W]; NaN where the samples are too few to tell.

        The squared deviations of S samples from their mean add up to S (variance - variance of the mean) on average.
        """
        count, pairs, unpaired = self._counts
        variance = (self.samples.squares + self._paired / count) / (count - unpaired / count)
        return variance.masked_fill((pairs == 1) | (count < 2), math.nan)

    @property
    def standard_error(self) -> Tensor:
        """Root of the mean squared error of `probability`, [B, H, W]; NaN where it cannot be told."""
        count, pairs, unpaired = self._counts
        if self.mean_pass is not None:
            bias = (self.samples.mean - self.mean_pass).square()  # or more: it holds the error of the samples' mean too
            scatter = pairs * self.pair_means.squares / (pairs - 1).clamp_min(1)
            squared = (scatter + bias) / (pairs + 1) ** 2
        else:
            squared = (self._paired + unpaired * self.variance) / count**2
        if self.rounding is not None:
            squared = squared + (self.rounding * self.probability * (1 - self.probability)).square()
        return squared.sqrt()

    @property
    def degrees_of_freedom(self) -> Tensor:
        """How many independent deviations `standard_error` was estimated from, [B]."""
        count, pairs, unpaired = (each.flatten() for each in self._counts)
        independent = torch.where(pairs > 0, pairs + unpaired, count)
        return (independent - (0 if self.mean_pass is not None else 1)).clamp_min(0)

    def _with_mean_pass(self, samples: Tensor, mean_pass: Tensor | None) -> Tensor:
        pairs = self._counts[1]
        return samples if mean_pass is None else (pairs * samples + mean_pass) / (pairs + 1)

    @property
    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Samples, pairs, and samples without a partner of each image, 3 x [B, 1, 1]."""
        count = torch.tensor(self.count, device=self.first_of_pair.device)[:, None, None]
        pairs = count // 2 * self.antithetic
        return count, pairs, count - 2 * pairs

    @property
    def _paired(self) -> Tensor:
        """What the pairs add to the variance of the sum of all samples, [B, H, W]; 0 for a single pair."""
        pairs = self._counts[1]
        return 4 * pairs * self.pair_means.squares / (pairs - 1).clamp_min(1)


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
