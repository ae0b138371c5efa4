"""How predictions compare with the truth: what calibration counts, and what judges it afterwards.

Shape alphabet: B batch, M cases, L levels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pvl_adapter.trust.evidence import evidence_of
from pvl_adapter.trust.scorer import THRESHOLDS

if TYPE_CHECKING:
    from pvl_adapter.prediction import Prediction
    from pvl_adapter.trust.scorer import Scorer


@dataclass(frozen=True)
class Cases:
    """Pairs of image and sentence beside their truth, as NumPy arrays with a line for each.

    Attributes:
        subjects: Names, [M].
        texts: Sentences, [M].
        present: Whether there is something to find, [M].
        missed: Share of the truth outside the outer mask of each of `THRESHOLDS`, [M, L]; 0 where there is none.
        outer_area: Share of the image in those masks, [M, L].
        wrong: Share of the inner mask of each threshold that is not of the truth, [M, L]; 0 of an empty mask.
        found: Share of the truth in those masks, [M, L].
        presence: The presence score, [M].
        area: True, expected, and a scale of the error of the expected: shares of the image, [M, 3].
        loss: One minus the Dice of the mask, [M].
        risk: The expected loss, [M].
        pixel_errors: Share of the image that is wrong and not more uncertain than each share of ln 2, [M, L].
        pixels_kept: Share of the image that is not more uncertain, [M, L].
        distance: From the images that the scorer was learned on, [M].
    """

    subjects: np.ndarray
    texts: np.ndarray
    present: np.ndarray
    missed: np.ndarray
    outer_area: np.ndarray
    wrong: np.ndarray
    found: np.ndarray
    presence: np.ndarray
    area: np.ndarray
    loss: np.ndarray
    risk: np.ndarray
    pixel_errors: np.ndarray
    pixels_kept: np.ndarray
    distance: np.ndarray

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, lines: np.ndarray | slice) -> Cases:
        return Cases(*(getattr(self, field.name)[lines] for field in fields(self)))

    def pixel_losses(self, limit: float) -> np.ndarray:
        """Of abstention from pixels: the share of wrong ones, where each that is left out counts as `limit`, [M, L];
        from none kept to all."""
        return (self.pixel_errors + limit * (1.0 - self.pixels_kept))[:, ::-1]

    def pair_losses(self, limit: float) -> np.ndarray:
        """Of abstention from pairs: the loss, where a pair that is left out counts as `limit`, [M, L]; likewise."""
        kept = self.risk[:, None] < THRESHOLDS.double().numpy()
        return np.where(kept, self.loss[:, None], limit)

    @classmethod
    def join(cls, parts: Sequence[Cases]) -> Cases:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def compare(
    scorer: Scorer, prediction: Prediction, truth: Tensor, subjects: Sequence[str], texts: Sequence[str]
) -> Cases:
    """Args: truth: Bool, [B, H, W], at the prediction's size. subjects, texts: Of the B pairs."""
    truth, mask = truth.cpu(), prediction.mask.cpu()
    size, pixels = truth.flatten(1).sum(dim=1), truth[0].numel()  # [B]
    evidence = evidence_of(prediction)
    outer, inner = scorer.outer_scores(evidence), scorer.inner_scores(evidence)
    hit, all_inner = above(inner, truth), above(inner, torch.ones_like(truth))  # 2 x [B, L]
    sure = 1.0 - prediction.uncertainty.float().cpu() / math.log(2.0)
    expected, deviation = scorer.area(evidence)
    columns = {
        "present": size > 0,
        "missed": (1.0 - above(outer, truth) / size.clamp_min(1)[:, None]) * (size > 0)[:, None],
        "outer_area": above(outer, torch.ones_like(truth)) / pixels,
        "wrong": (1.0 - hit / all_inner.clamp_min(1.0)) * (all_inner > 0),
        "found": hit / size.clamp_min(1)[:, None],
        "presence": scorer.presence_score(evidence),
        "area": torch.stack([size / pixels, expected, deviation], dim=1),
        "loss": dice_losses(mask, truth),
        "risk": scorer.risk(evidence),
        "pixel_errors": above(sure, mask != truth) / pixels,
        "pixels_kept": above(sure, torch.ones_like(truth)) / pixels,
        "distance": scorer.distance(evidence),
    }
    return Cases(
        np.array(subjects),
        np.array(texts),
        **{
            name: (column.float() if column.is_floating_point() else column).numpy() for name, column in columns.items()
        },
    )


def dice_losses(mask: Tensor, truth: Tensor) -> Tensor:
    """One minus the Dice of bool masks [B, H, W], [B]; 0 where both are empty."""
    size = (mask.sum(dim=(1, 2)) + truth.sum(dim=(1, 2))).float()
    return torch.where(size > 0, 1.0 - 2.0 * (mask & truth).sum(dim=(1, 2)) / size.clamp_min(1.0), 0.0)


def above(scores: Tensor, chosen: Tensor) -> Tensor:
    """How many of the chosen pixels have a score above each of `THRESHOLDS`, [B, L]; `chosen` is bool [B, H, W]."""
    below = torch.bucketize(scores.flatten(1).contiguous(), THRESHOLDS)  # thresholds below the score
    counts = torch.zeros(len(scores), len(THRESHOLDS) + 1, dtype=torch.float64)
    counts.scatter_add_(1, below, chosen.flatten(1).double())
    return counts.flip(1).cumsum(dim=1).flip(1)[:, 1:]
