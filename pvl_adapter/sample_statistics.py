"""Running statistics of a batch's samples, from which the maps of a prediction are taken.

Entropies are in nats, as in MedCLIPSeg (arXiv 2602.20423). The split of the total into aleatoric (mean of entropies)
and epistemic (what the samples disagree about) is that of Depeweg et al., 2018 (arXiv 1710.07283).

Shape alphabet: B batch, s b samples and images of one chunk, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from pvl_adapter.error_bars import LogitMoments, NormalLogits, fit_logits, normal_maps, standard_error
from pvl_adapter.noise import INDEPENDENT, Draws, on_device

_LARGEST_LOGIT = 60.0  # beyond it a float32 probability is 0 or 1, and infinity has no variance


class Moments:
    """Running means and squares of maps [B, H, W], vectors or numbers, merged by chunks (Chan et al., 1983)."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.count = [0] * shape[0]
        self.mean = torch.zeros(*shape, device=device)
        self.squares = torch.zeros(*shape, device=device)

    def merge(self, images: Sequence[int], values: Tensor) -> None:
        """Take in values [s, b, ...] of some images that have had as many each."""
        if not len(values):
            return
        index, count = on_device(images, values.device), self.count[images[0]]
        share = len(values) / (count + len(values))
        mean, before = values.mean(dim=0), self.mean[index]  # 2 x [b, H, W]
        self.squares[index] += (values - mean).square().sum(dim=0) + (mean - before).square() * (count * share)
        self.mean[index] = before.lerp(mean, share)
        for image in images:
            self.count[image] = count + len(values)

    def of_logits(self) -> LogitMoments:
        return LogitMoments(on_device(self.count, self.mean.device), self.mean, self.squares)


class Statistics:
    """Running statistics of a batch's samples: memory does not grow with their number.

    Independent samples are averaged as they are. Others are taken for draws of a normal logit, see error_bars.py.

    Args:
        shape: B, H and W.
        draws: Which samples are antithetic pairs.
        device: Of the maps.

    Attributes:
        count: How many samples each image has had.
        rounding: What rounding may do to the logits, [B, H, W]; part of the standard error.
        areas: Of the mean probability of a sample's pixels, [B].
        features: Of `JointFeatures.likeness` and `JointFeatures.summary`, [B, 3 + 2 D]; None before the first.
    """

    def __init__(self, shape: Sequence[int], *, draws: Draws, device: torch.device) -> None:
        self.draws = draws
        self.count = [0] * shape[0]
        self.rounding: Tensor | None = None
        self.singles, self.pairs = Moments(shape, device), Moments(shape, device)  # of logits
        self.half_differences = torch.zeros(*shape, device=device)  # of the logits of pairs, squared and summed
        self.first_of_pair = torch.zeros(*shape, device=device)  # its logits, until its partner comes
        self.probabilities, self.entropies = Moments(shape, device), Moments(shape, device)
        self.areas = Moments(shape[:1], device)
        self.features: Moments | None = None

    def add(self, images: Sequence[int], start: int, logits: Tensor) -> None:
        """Take in samples' logits [s, b, H, W], float32, of some images that have had `start` each."""
        index = on_device(images, logits.device)
        for image in images:
            self.count[image] = start + len(logits)
        probabilities = logits.sigmoid()
        self.areas.merge(images, probabilities.mean(dim=(2, 3)))
        if self.draws == INDEPENDENT:
            self.probabilities.merge(images, probabilities)
            self.entropies.merge(images, binary_entropy(probabilities))
        logits = logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        if self._awaits_partner(start):
            start, logits = start - 1, torch.cat([self.first_of_pair[index][None], logits])
        if self._awaits_partner(start + len(logits)):
            self.first_of_pair[index] = logits[-1]
            logits = logits[:-1]
        singles = [s for s in range(len(logits)) if not self.draws.is_paired(start + s)]
        paired = [s for s in range(len(logits)) if self.draws.is_paired(start + s)]
        self.singles.merge(images, logits[on_device(singles, logits.device)])
        first, second = (logits[on_device(paired[place::2], logits.device)] for place in range(2))
        self.pairs.merge(images, (first + second) / 2)
        self.half_differences[index] += ((first - second) / 2).square().sum(dim=0)

    def add_features(self, images: Sequence[int], features: Tensor) -> None:
        """Take in what the samples' joint features say of the pairs, [s, b, 3 + 2 D]."""
        if self.features is None:
            self.features = Moments((len(self.count), features.shape[-1]), features.device)
        self.features.merge(images, features)

    def fit(self) -> NormalLogits:
        """The samples as draws of normal logits."""
        singles, images = self.singles, [b for b, count in enumerate(self.count) if self._awaits_partner(count)]
        if images:  # a sample without its partner is a single one
            singles = deepcopy(singles)
            singles.merge(images, self.first_of_pair[on_device(images, singles.mean.device)][None])
        fit = fit_logits(singles.of_logits(), self.pairs.of_logits(), self.half_differences)
        return fit if self.rounding is None else fit._replace(mean_variance=fit.mean_variance + self.rounding.square())

    def maps(self, fit: NormalLogits) -> dict[str, Tensor]:
        """The float maps of a `Prediction`, [B, H, W]."""
        if self.draws != INDEPENDENT:
            return normal_maps(fit)
        probability, aleatoric = self.probabilities.mean, self.entropies.mean
        epistemic = (binary_entropy(probability) - aleatoric).clamp_min(0.0)  # below 0 by rounding alone
        others = on_device(self.count, probability.device)[:, None, None] - 1
        return {
            "probability": probability,
            "uncertainty": aleatoric + epistemic,
            "aleatoric": aleatoric,
            "epistemic": epistemic,
            "variance": (self.probabilities.squares / others).where(others > 0, math.nan),
            "standard_error": standard_error(fit),
        }

    def _awaits_partner(self, count: int) -> bool:
        """Whether the last of so many samples is the first of a pair."""
        return count > 0 and self.draws.is_paired(count - 1) and self.draws.of(count - 1)[1] > 0


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy of a Bernoulli variable in nats, 0 at 0 and 1."""
    return torch.special.entr(probability) + torch.special.entr(1.0 - probability)
