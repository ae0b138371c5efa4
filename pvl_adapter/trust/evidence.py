"""What a prediction shows of its own reliability: numbers for each pixel and each pair, of which promises are made.

All of it is computed on the CPU, in float32.

Shape alphabet: B batch, H W pixels, P numbers of a pixel, F numbers of a pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from pvl_adapter.prediction import Prediction

_LARGEST_LOGIT = 12.0
_WINDOWS = (0.03, 0.08, 0.2)  # sides of windows around a pixel, as shares of the image's
_TINY = 1e-6


def logits_of(probability: Tensor) -> Tensor:
    return torch.logit(probability.float().clamp(_TINY, 1.0 - _TINY)).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)


class Evidence(NamedTuple):
    """What a prediction shows.

    Attributes:
        probability: [B, H, W].
        pixels: Numbers of each pixel, [B, H, W, P].
        pairs: Numbers of each pair, [B, F].
        image: What the image is like, in the joint space, [B, D].
        text: Likewise the sentence.
        appearance: What the image looks like apart from its content, [B, 18].
    """

    probability: Tensor
    pixels: Tensor
    pairs: Tensor
    image: Tensor
    text: Tensor
    appearance: Tensor


def evidence_of(prediction: Prediction) -> Evidence:
    image, text = prediction.summary.float().cpu().chunk(2, dim=1)
    looks = cast(Tensor, prediction.appearance).float().cpu()
    return Evidence(prediction.probability.float().cpu(), _pixels(prediction), _pairs(prediction), image, text, looks)


def _pixels(prediction: Prediction) -> Tensor:
    """[B, H, W, P]: the logit, how much samples disagree, and the mean probability of windows around the pixel."""
    probability, epistemic, variance = (
        getattr(prediction, name).float().cpu()[:, None] for name in ("probability", "epistemic", "variance")
    )  # [B, 1, H, W]
    disagreement, spread = epistemic.clamp_min(0.0).sqrt(), variance.nan_to_num().clamp_min(0.0).sqrt()
    maps = [logits_of(probability), disagreement, spread]
    for share in _WINDOWS:
        radius = max(1, round(share * min(probability.shape[-2:]) / 2))
        around = F.avg_pool2d(probability, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
        maps.append(logits_of(around))
    return rearrange(torch.cat(maps, dim=1), "b p h w -> b h w p")


def _pairs(prediction: Prediction) -> Tensor:
    """[B, F]: expected area, highest probabilities, agreement within and between samples, compactness, likeness."""
    probability, mask, uncertainty, epistemic = (
        getattr(prediction, name).float().cpu() for name in ("probability", "mask", "uncertainty", "epistemic")
    )
    flat = rearrange(probability, "b h w -> b (h w)")
    area, total = flat.mean(dim=1), flat.sum(dim=1)  # 2 x [B]
    few = max(1, round(0.003 * flat.shape[1]))
    relative = prediction.area_deviation.float().cpu() / (area + 1e-4)
    y, x = torch.meshgrid(*(torch.linspace(0.0, 1.0, size) for size in probability.shape[-2:]), indexing="ij")
    y, x = y.flatten(), x.flatten()
    weight = flat.square() / flat.square().sum(dim=1, keepdim=True).clamp_min(_TINY)
    centre_y, centre_x = (weight * y).sum(dim=1), (weight * x).sum(dim=1)
    edge = flat * (1.0 - flat)  # large along the outline
    extent = (weight * ((y - centre_y[:, None]).square() + (x - centre_x[:, None]).square())).sum(dim=1).sqrt()
    numbers = torch.stack(
        [
            (area + 1e-4).log(),
            (mask.mean(dim=(1, 2)) + 1e-4).log(),
            logits_of(flat.amax(dim=1)),
            logits_of(flat.topk(few, dim=1).values.mean(dim=1)),
            logits_of(prediction.expected_dice.cpu()),
            (uncertainty.sum(dim=(1, 2)) / total.clamp_min(1.0)).log1p(),
            (epistemic.sum(dim=(1, 2)) / total.clamp_min(1.0)).clamp_min(0.0).sqrt(),
            ((edge * epistemic.flatten(1)).sum(dim=1) / edge.sum(dim=1).clamp_min(_TINY)).clamp_min(0.0).sqrt(),
            (relative + 1e-3).log(),
            (extent / (area + 1e-4).sqrt() + 1e-3).log(),
        ],
        dim=1,
    )
    return torch.cat([numbers, prediction.likeness.float().cpu()], dim=1)
