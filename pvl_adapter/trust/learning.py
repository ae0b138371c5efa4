"""Learns the scores of scorer.py from predictions with their truth.

Shape alphabet: B batch, M pairs, H W pixels, P F numbers of a pixel and of a pair, K components, D joint width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pvl_adapter.trust.cases import Cases, compare, dice_losses
from pvl_adapter.trust.conformal import subject_means
from pvl_adapter.trust.evidence import Evidence, evidence_of, logits_of
from pvl_adapter.trust.scorer import Directions, Neighbours, Perceptron, Scorer, about_pairs

if TYPE_CHECKING:
    from pvl_adapter.prediction import Prediction

_PIXELS = 800  # of a pair that are learned from
_USUAL = 500  # images that are remembered
_MANY = 1000  # pairs: enough for larger networks of pairs
_CHOICES = {"outer": ("probability", "refined", "density"), "inner": ("probability", "refined", "gain")}

Labelled = tuple["Prediction", Tensor, Sequence[str], Sequence[str]]
"""A prediction with its truth, bool [B, H, W], and the subjects and sentences of its pairs."""


def learn(
    labelled: Sequence[Labelled], chosen_by: Sequence[Labelled], *, alpha: float, loss_limit: float, pixel_limit: float
) -> Scorer:
    """Learn scores from some subjects; others choose between families of masks, and whether a temperature helps."""
    generator = torch.Generator().manual_seed(0)
    seen = [evidence_of(prediction) for prediction, *_ in labelled]
    pixels = [_some_pixels(evidence, each[1], generator) for evidence, each in zip(seen, labelled, strict=True)]
    numbers, hits, probability = (torch.cat(column) for column in zip(*pixels, strict=True))
    many = sum(len(evidence.pairs) for evidence in seen) >= _MANY
    images, texts = (
        _directions(torch.cat([getattr(each, of) for each in seen]), count=16 if many else 8)
        for of in ("image", "text")
    )
    pairs = torch.cat([about_pairs(evidence, images, texts) for evidence in seen])  # [M, F + 2 K]
    size = torch.cat([truth.float().mean(dim=(1, 2)) for _, truth, *_ in labelled])  # [M]
    loss = torch.cat([dice_losses(prediction.mask.cpu(), truth) for prediction, truth, *_ in labelled])
    entropy = F.binary_cross_entropy_with_logits
    area = size.repeat_interleave(len(hits) // len(size))  # of the truth of a pixel's pair
    of_pixels: dict[str, Any] = {"hidden": 24, "steps": 1500, "decay": 1e-3}
    of_pairs: dict[str, Any] = {"hidden": 32 if many else 16, "steps": 300 if many else 150, "decay": 1.0}
    refined = Perceptron.learn(numbers, hits, entropy, **of_pixels)
    expected = torch.cat([refined.of_pixels(each.pixels, each.pairs).sigmoid().mean(dim=(1, 2)) for each in seen])
    scorer = Scorer(
        temperature=_temperature(probability, hits),
        pixels=refined,
        density=Perceptron.learn(numbers[area > 0], (hits * size.mean() / area)[area > 0], _weighted, **of_pixels),
        present=Perceptron.learn(pairs, (size > 0).float(), entropy, **of_pairs),
        loss=Perceptron.learn(pairs, loss, entropy, **of_pairs),
        area_error=Perceptron.learn(pairs, (expected - size).abs() + 1e-4, _laplace, **of_pairs),
        images=images,
        texts=texts,
        usual=_neighbours(torch.cat([evidence.appearance for evidence in seen])),
    )
    scorer = _choose(scorer, chosen_by, alpha=alpha)
    cases = Cases.join([compare(scorer, *each) for each in chosen_by])
    losses = cases.pair_losses(loss_limit), cases.pixel_losses(pixel_limit)
    means = [subject_means(each, cases.subjects).mean(axis=0) for each in losses]
    first, second = (int(np.flatnonzero(mean <= mean.min() + 1e-9)[-1]) for mean in means)  # the boldest of the best
    return replace(scorer, loss_start=first, pixel_start=second)


def _some_pixels(evidence: Evidence, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [M, P + F], truth and probability [M] of random pixels of each pair."""
    numbers = rearrange(evidence.pixels, "b h w p -> b (h w) p")
    index = torch.stack([torch.randperm(numbers.shape[1], generator=generator)[:_PIXELS] for _ in numbers])
    some = numbers.gather(1, index[:, :, None].expand(-1, -1, numbers.shape[2]))  # [B, 800, P]
    some = torch.cat([some, evidence.pairs[:, None].expand(-1, index.shape[1], -1)], dim=2)
    hit, probability = (each.flatten(1).gather(1, index).flatten().float() for each in (truth, evidence.probability))
    return some.flatten(0, 1), hit, probability


def _laplace(log_scale: Tensor, error: Tensor) -> Tensor:
    """Negative log-likelihood of absolute errors."""
    return (log_scale + error * (-log_scale).exp()).mean()


def _weighted(logit: Tensor, hit: Tensor) -> Tensor:
    """Entropy of hits that count more or less than 1; then the odds are the expected weight of a hit."""
    return (hit * F.softplus(-logit) + (hit == 0) * F.softplus(logit)).mean()


def _directions(vectors: Tensor, *, count: int) -> Directions:
    center = vectors.mean(dim=0)
    _, deviations, directions = torch.linalg.svd(vectors - center, full_matrices=False)
    deviations = deviations / max(1, len(vectors) - 1) ** 0.5
    count = min(count, int((deviations > 1e-3 * deviations[0]).sum()))
    vectors = (directions[:count] / deviations[:count, None]).contiguous()  # as it is read back, for equal rounding
    return Directions(center, vectors)


def _neighbours(vectors: Tensor) -> Neighbours:
    vectors = torch.unique(vectors, dim=0)  # several sentences may be about one image
    center = vectors.mean(dim=0)
    shrinkage = (0.02 * vectors.var(dim=0) + 1e-6).diag()
    whitening = torch.linalg.inv(torch.linalg.cholesky((vectors - center).T.cov() + shrinkage)).T
    some = vectors[torch.linspace(0, len(vectors) - 1, min(len(vectors), _USUAL)).long()]
    return Neighbours(center, whitening, (some - center) @ whitening)


def _temperature(probability: Tensor, hits: Tensor) -> tuple[float, float]:
    """Factor and offset of the logits with the least entropy; a convex problem, so it does not diverge."""
    logits = logits_of(probability)
    with torch.enable_grad():
        found = torch.tensor([1.0, 0.0], requires_grad=True)
        optimizer = torch.optim.LBFGS([found], max_iter=50, line_search_fn="strong_wolfe")

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(found[0] * logits + found[1], hits)
            (loss + 1e-4 * (found - torch.tensor([1.0, 0.0])).square().sum()).backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(step)  # type: ignore[no-untyped-call]
    factor, offset = found.tolist()
    return max(factor, 1e-2), offset  # never turned around


def _choose(scorer: Scorer, judged: Sequence[Labelled], *, alpha: float) -> Scorer:
    """The families whose masks are the best at a loss of `alpha`, and the temperature if it helps."""
    before, after = (
        sum(float(F.binary_cross_entropy(of(each.probability.cpu()), truth.float())) for each, truth, *_ in judged)
        for of in (lambda probability: probability.float().clamp(1e-6, 1 - 1e-6), scorer.calibrated)
    )
    if after >= before:
        scorer = replace(scorer, temperature=(1.0, 0.0))
    best: dict[str, tuple[float, str]] = {}
    for name in ("probability", "refined", "density", "gain"):
        trial = replace(scorer, outer=name, inner=name)
        cases = Cases.join([compare(trial, *each) for each in judged])
        found = cases[cases.present]
        missed, wrong = subject_means(found.missed, found.subjects), subject_means(cases.wrong, cases.subjects)
        level = int((np.maximum.accumulate(missed.mean(axis=0)) <= alpha).sum()) - 1
        gains = {"outer": -float(found.outer_area[:, level].mean())}
        level = int((np.maximum.accumulate(wrong.mean(axis=0)[::-1]) <= alpha).sum()) - 1
        gains["inner"] = float(found.found[:, ::-1][:, level].mean())
        for side, gain in gains.items():
            if name in _CHOICES[side]:
                best[side] = max(best.get(side, (-np.inf, "")), (gain, name))
    return replace(scorer, outer=best["outer"][1], inner=best["inner"][1])
