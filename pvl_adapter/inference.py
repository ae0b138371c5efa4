"""Monte-Carlo inference: many stochastic passes become a mask, a probability and its uncertainties.

Entropies are in nats, as in MedCLIPSeg (arXiv 2602.20423). The split of the total into aleatoric (mean of entropies)
and epistemic (what the samples disagree about) is that of Depeweg et al., 2018 (arXiv 1710.07283).

Shape alphabet: B batch, S samples, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """What a model says of pictures, and how sure it is. All maps are [B, H, W].

    Attributes:
        mask: Bool, probability above the threshold.
        probability: Mean over samples of the sigmoid.
        uncertainty: Binary entropy of the probability in nats, at most ln 2; `aleatoric` plus `epistemic`.
        aleatoric: Mean of the samples' entropies, in nats: what even a sure model cannot tell from this picture.
        epistemic: What the samples disagree about, in nats, never negative.
        standard_error: Of `probability` as an estimate of the infinite-sample mean; NaN for a single sample.
        num_samples: S.
    """

    mask: Tensor
    probability: Tensor
    uncertainty: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    standard_error: Tensor
    num_samples: int


def monte_carlo(draw: Callable[[], Tensor], *, num_samples: int, threshold: float) -> Prediction:
    """Run `draw` repeatedly and summarise, one sample at a time: memory does not grow with S.

    Args:
        draw: Gives the logits of one stochastic pass, [B, H, W].
        num_samples: S, at least 1.
        threshold: Probability above which a pixel belongs to the mask, in [0, 1].

    Raises:
        ValueError: If an argument is out of range.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected 1 or more")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold is {threshold}, expected a probability between 0 and 1")
    probability = draw().float().sigmoid()  # [B, H, W]
    squares, aleatoric = torch.zeros_like(probability), binary_entropy(probability)
    for count in range(2, num_samples + 1):  # Welford's running mean and sum of squared deviations
        sample = draw().float().sigmoid()
        deviation = sample - probability
        probability = probability + deviation / count
        squares = squares + deviation * (sample - probability)
        aleatoric = aleatoric + (binary_entropy(sample) - aleatoric) / count
    variance = squares / (num_samples - 1) if num_samples > 1 else torch.full_like(probability, torch.nan)
    total = binary_entropy(probability)
    return Prediction(
        mask=probability > threshold,
        probability=probability,
        uncertainty=total,
        aleatoric=torch.minimum(aleatoric, total),  # rounding alone can lift it above the total
        epistemic=(total - aleatoric).clamp_min(0.0),
        standard_error=(variance / num_samples).sqrt(),
        num_samples=num_samples,
    )


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy of a Bernoulli variable in nats, 0 at 0 and 1."""
    return torch.special.entr(probability) + torch.special.entr(1.0 - probability)
