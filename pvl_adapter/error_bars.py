"""Maps and error bars from few Monte-Carlo samples: at each pixel, the samples' logits are taken to be normal.

A pixel's logit sums what very many noise values do to it, so it is close to normal. Probability, entropies and mutual
information are then averages over a normal with the samples' mean and variance, not over the few samples themselves,
and the error of the probability follows from the errors of mean and variance.

Antithetic pairs (Hammersley and Morton, 1956) tell the mean best, because what is linear in the noise cancels. Of the
variance, a sample without a partner tells as much as a pair, for half the passes. So few samples come in pairs.

Variances are shrunk to the image's typical variance, as in Smyth, 2004 (limma). Nothing is smoothed over neighbours,
and the weight of the typical variance fades as samples are added.

Shape alphabet: B batch, H W pixels.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

PRIOR = 2.0
"""How many samples the image's typical variance counts as."""

_X = torch.linspace(-5.0, 5.0, 21)
_NODES = tuple(zip(_X.tolist(), torch.softmax(-_X.square() / 2, 0).tolist(), strict=True))  # of a standard normal


class LogitMoments(NamedTuple):
    """Of the logits of `number` samples or pairs, int64 [B]: their mean, and the sum of squared deviations from it,
    [B, H, W]. All are 0 where there is none."""

    number: Tensor
    mean: Tensor
    squares: Tensor


class NormalLogits(NamedTuple):
    """What is known of each pixel's logit: mean and variance of a sample, [B, H, W], and how well they are known.

    Attributes:
        mean: Of the samples' logits.
        variance: Of one sample's logit; NaN of a single sample.
        mean_variance: Squared standard error of `mean`; NaN of a single sample or pair.
        variance_degrees: Degrees of freedom of `variance`, [B].
        mean_degrees: Degrees of freedom of `mean_variance`, [B].
    """

    mean: Tensor
    variance: Tensor
    mean_variance: Tensor
    variance_degrees: Tensor
    mean_degrees: Tensor


def fit_logits(singles: LogitMoments, pairs: LogitMoments, half_differences: Tensor) -> NormalLogits:
    """Mean and variance of each pixel's logit from its samples.

    Args:
        singles: Of samples without a partner.
        pairs: Of the mean logits of antithetic pairs.
        half_differences: Sum over pairs of the squared half difference of their logits, [B, H, W].
    """
    u, k = singles.number[:, None, None], pairs.number[:, None, None]
    mean = torch.where(k > 0, pairs.mean, singles.mean)
    squares = half_differences + pairs.squares + singles.squares + u * (singles.mean - mean).square()
    degrees = k + u - (k == 0).long()
    typical = _typical((squares / degrees).clamp_min(1e-12).log(), mean).exp()  # NaN of a single sample
    variance = (PRIOR * typical + squares) / (PRIOR + degrees)

    ratio = _typical(pairs.squares / (k - 1), mean) / _typical(variance, mean)  # NaN of a single pair
    pair_variance = (PRIOR * ratio * variance + pairs.squares) / (PRIOR + k - 1)
    return NormalLogits(
        mean=mean,
        variance=variance,
        mean_variance=torch.where(k > 0, pair_variance / k, variance / u),
        variance_degrees=PRIOR + degrees.flatten(),
        mean_degrees=PRIOR + torch.where(k > 0, k - 1, degrees).flatten(),
    )


def normal_maps(fit: NormalLogits) -> dict[str, Tensor]:
    """The float maps of `Prediction`, [B, H, W]. The epistemic one is an average of divergences, so never below 0."""
    deviation = fit.variance.nan_to_num(0.0).sqrt()  # a single sample is taken as it is
    probability, complement, _, _ = _averages(fit.mean, deviation)
    aleatoric, epistemic, variance = torch.zeros(3, *fit.mean.shape, device=fit.mean.device)
    for x, weight in _NODES:
        logit = fit.mean + x * deviation
        p, q, size = logit.sigmoid(), (-logit).sigmoid(), logit.abs()
        aleatoric += weight * (torch.log1p((-size).exp()) + size * (-size).sigmoid())
        epistemic += weight * probability * _divergence(p / probability - 1)
        epistemic += weight * complement * _divergence(q / complement - 1)
        variance += weight * (p - probability).square()
    return {
        "probability": probability,
        "uncertainty": aleatoric + epistemic,
        "aleatoric": aleatoric,
        "epistemic": epistemic,
        "variance": variance.where(~fit.variance.isnan(), math.nan),
        "standard_error": standard_error(fit),
    }


def standard_error(fit: NormalLogits) -> Tensor:
    """Of the probability as an estimate of the infinite-sample mean, [B, H, W]; NaN of a single sample or pair."""
    _, _, slope, curvature = _averages(fit.mean, fit.variance.sqrt())
    spread = torch.polygamma(1, fit.variance_degrees / 2)[:, None, None]  # variance of the logarithm of the variance
    return (slope.square() * fit.mean_variance + (curvature * fit.variance / 2).square() * spread).sqrt()


def interval(fit: NormalLogits, level: float, *, probability: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of the infinite-sample probability, each [B, H, W]; NaN of a single sample or pair.

    Student's interval of the mean and the chi-square interval of the variance are both carried to the logit of the
    probability, where their reaches are added in squares. A symmetric interval would not hold: near 0 and 1 the
    probability follows the variance, and few samples often find it much too small.

    Args:
        fit: Of the logits.
        level: Share of pixels that it is to hold.
        probability: Where it lies, [B, H, W]; None is the probability of the fit.
    """
    p, q, slope, _ = _averages(fit.mean, fit.variance.sqrt())
    centre, reaches = p.log() - q.log(), []
    for share in ((1 - level) / 2, (1 + level) / 2):
        factor = fit.variance_degrees / _chi_square(share, fit.variance_degrees)
        end_p, end_q, _, _ = _averages(fit.mean, (factor[:, None, None] * fit.variance).sqrt())
        reaches.append(end_p.log() - end_q.log() - centre)
    of_mean = _student_t(level, fit.mean_degrees)[:, None, None] * slope / (p * q) * fit.mean_variance.sqrt()
    down = torch.hypot(torch.minimum(*reaches).clamp_max(0.0), of_mean)
    up = torch.hypot(torch.maximum(*reaches).clamp_min(0.0), of_mean)
    if probability is not None:
        centre = probability.clamp(1e-37, 1 - 2**-24).logit()
    return (centre - down).sigmoid(), (centre + up).sigmoid()


def _averages(mean: Tensor, deviation: Tensor) -> Tensor:
    """Of a normal logit: averages of the sigmoid, one minus it, and its first two derivatives, [4, B, H, W]."""
    averages = torch.zeros(4, *mean.shape, device=mean.device)
    for x, weight in _NODES:
        logit = mean + x * deviation
        p, q = logit.sigmoid(), (-logit).sigmoid()
        averages += weight * torch.stack((p, q, p * q, p * q * (q - p)))
    return averages


def _typical(values: Tensor, logits: Tensor) -> Tensor:
    """Average of each image's pixels of like logit: sure background, undecided, sure foreground, or in between."""
    place = (logits / 12).clamp(-1.0, 1.0)
    weights = torch.stack([(-place).relu(), 1 - place.abs(), place.relu()])  # [3, B, H, W]
    sums = (weights * values).sum((-2, -1), keepdim=True)
    return (weights * sums / weights.sum((-2, -1), keepdim=True).clamp_min(1e-12)).sum(0)


def _divergence(x: Tensor) -> Tensor:
    """(1 + x) log(1 + x) - x, which is never below 0; for a small x by its series, which rounding leaves so."""
    series = x.square() * (0.5 - x / 6 + x.square() / 12)
    return torch.where(x.abs() < 0.01, series, torch.special.xlog1py(1 + x, x) - x)


def _chi_square(share: float, degrees: Tensor) -> Tensor:
    """Quantile of the chi-square distribution, [B], by bisection on the CPU: not every device has the function."""
    half = degrees.cpu() / 2
    low, high = torch.zeros_like(half), 20 * half + 200
    for _ in range(40):
        middle = (low + high) / 2
        below = torch.special.gammainc(half, middle / 2) < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high.to(degrees.device)


def _student_t(level: float, degrees: Tensor) -> Tensor:
    """How many standard errors to each side hold a share `level`, [B]; Cornish and Fisher's series.

    Right to 1% for levels up to 0.99 and at least 3 degrees of freedom.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    t = z + (z**3 + z) / 4 / degrees + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / degrees**2
    t = t + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / degrees**3
    return t + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160 / degrees**4
