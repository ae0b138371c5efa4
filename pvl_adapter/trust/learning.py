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

from pvl_adapter.trust.cases import Cases, compare
from pvl_adapter.trust.conformal import subject_means
from pvl_adapter.trust.evidence import logits_of, pair_evidence
from pvl_adapter.trust.scorer import Perceptron, Scorer, joint_evidence

if TYPE_CHECKING:
    from pvl_adapter.prediction import Prediction

_PIXELS = 800  # of a pair that are learned from
_COMPONENTS = 16  # of summaries
_CHOICES = {"outer": ("probability", "refined", "density"), "inner": ("probability", "refined", "precision")}

Labelled = tuple["Prediction", Tensor, Sequence[str], Sequence[str]]
"""A prediction with its truth, bool [B, H, W], and the subjects and sentences of its pairs."""


def learn(
    labelled: Sequence[Labelled], chosen_by: Sequence[Labelled], *, alpha: float, loss_limit: float, pixel_limit: float
) -> Scorer:
    """Learn scores from some subjects; others choose between families of masks, and whether a temperature helps."""
    generator = torch.Generator().manual_seed(0)
    pixels = [_some_pixels(prediction, truth, generator) for prediction, truth, *_ in labelled]
    numbers, hits, probability = (torch.cat(column) for column in zip(*pixels, strict=True))
    pairs = torch.cat([pair_evidence(prediction) for prediction, *_ in labelled])  # [M, F]
    present = torch.cat([truth.flatten(1).any(dim=1) for _, truth, *_ in labelled]).float()
    size = torch.cat([truth.float().mean(dim=(1, 2)) for _, truth, *_ in labelled])
    size = size.repeat_interleave(_PIXELS)  # of the truth of a pixel's pair
    loss = torch.cat([_losses(prediction.mask.cpu(), truth) for prediction, truth, *_ in labelled])
    entropy = F.binary_cross_entropy_with_logits
    center, directions = _main_directions(torch.cat([each.summary.cpu().chunk(2, dim=1)[0] for each, *_ in labelled]))
    kind: dict[str, Any] = {"hidden": 24, "steps": 1500, "decay": 1e-3}
    scorer = Scorer(
        temperature=(1.0, 0.0),
        pixels=Perceptron.learn(numbers, hits, entropy, **kind),
        density=Perceptron.learn(numbers[size > 0], (hits * size.mean() / size)[size > 0], _weighted, **kind),
        present=Perceptron.learn(pairs, present, entropy, hidden=8),
        loss=Perceptron.learn(pairs, loss, entropy, hidden=8),
        area_error=Perceptron(pairs.shape[1], 1),
        center=center,
        directions=directions,
    )
    error = torch.cat([scorer.area(each)[0] - truth.float().mean(dim=(1, 2)) for each, truth, *_ in labelled]).abs()
    scorer = replace(scorer, area_error=Perceptron.learn(pairs, error + 1e-4, _laplace, hidden=8))
    scorer = _choose(replace(scorer, temperature=_temperature(probability, hits)), chosen_by, alpha=alpha)
    cases = Cases.join([compare(scorer, *each) for each in chosen_by])
    losses = cases.pair_losses(loss_limit), cases.pixel_losses(pixel_limit)
    first, second = (int(subject_means(each, cases.subjects).mean(axis=0).argmin()) for each in losses)
    return replace(scorer, loss_start=first, pixel_start=second)


def _some_pixels(prediction: Prediction, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Evidence [M, P + F], truth and probability [M] of random pixels of each pair."""
    numbers = rearrange(joint_evidence(prediction), "b h w p -> b (h w) p")
    index = torch.stack([torch.randperm(numbers.shape[1], generator=generator)[:_PIXELS] for _ in numbers])
    some = numbers.gather(1, index[:, :, None].expand(-1, -1, numbers.shape[2])).flatten(0, 1)
    hit, probability = (
        each.cpu().flatten(1).gather(1, index).flatten().float() for each in (truth, prediction.probability)
    )
    return some, hit, probability


def _losses(mask: Tensor, truth: Tensor) -> Tensor:
    """One minus the Dice, [B]; 0 where both are empty."""
    size = (mask.sum(dim=(1, 2)) + truth.sum(dim=(1, 2))).float()
    return torch.where(size > 0, 1.0 - 2.0 * (mask & truth).sum(dim=(1, 2)) / size.clamp_min(1.0), 0.0)


def _laplace(log_scale: Tensor, error: Tensor) -> Tensor:
    """Negative log-likelihood of absolute errors."""
    return (log_scale + error * (-log_scale).exp()).mean()


def _weighted(logit: Tensor, hit: Tensor) -> Tensor:
    """Entropy of hits that count more or less than 1; then the odds are the expected weight of a hit."""
    return (hit * F.softplus(-logit) + (hit == 0) * F.softplus(logit)).mean()


def _main_directions(summaries: Tensor) -> tuple[Tensor, Tensor]:
    """Center, and the main directions over their deviations, [K, D]."""
    center = summaries.float().mean(dim=0)
    _, deviations, directions = torch.linalg.svd(summaries.float() - center, full_matrices=False)
    deviations = deviations / max(1, len(summaries) - 1) ** 0.5
    count = min(_COMPONENTS, int((deviations > 1e-3 * deviations[0]).sum()))
    return center, directions[:count] / deviations[:count, None]


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
    for name in ("probability", "refined", "density", "precision"):
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
