"""Losses: soft contrastive alignment of patches and sentences, Dice with cross-entropy, and KL to a prior.

Source: arXiv 2602.20423 and github HealthX-Lab/MedCLIPSeg, commit 8d7ef36. The released Dice call reads image rows as
channels and leaves row 0 out; `dice_reduction="row"` reproduces that, the default is a Dice per image.

Shape alphabet: B batch, A adapters, C adapter width, N patches, D joint width, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvl_adapter.attention import at_least_float32, autocast_off

DiceReduction = Literal["image", "row"]
_DICE_SMOOTHING = 1e-5  # numerator and denominator, the default of MONAI's DiceLoss


def soft_targets(text_embeds: Tensor, *, temperature: float) -> Tensor:
    """How alike the sentences of a batch are, as distributions: `softmax(rownorm(T T^T / tau))`, without gradient.

    Args:
        text_embeds: [B, D].
        temperature: tau.

    Returns:
        [B, B], rows sum to one.
    """
    with torch.no_grad():
        similarity = text_embeds @ text_embeds.mT / temperature  # [B, B]
        return F.normalize(similarity, dim=-1).softmax(dim=-1)


def soft_contrastive_loss(patch_tokens: Tensor, text_embeds: Tensor, *, temperature: float = 0.2) -> Tensor:
    """Symmetric contrastive loss whose targets are soft: alike sentences are not pushed apart.

    Args:
        patch_tokens: [B, N, D], normalised here and averaged over patches.
        text_embeds: [B, D], used as they are (not normalised, as released).
        temperature: tau.

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes do not fit together or `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    if patch_tokens.ndim != 3 or text_embeds.shape != (patch_tokens.shape[0], patch_tokens.shape[-1]):
        raise ValueError(
            f"got patch_tokens {tuple(patch_tokens.shape)} and text_embeds {tuple(text_embeds.shape)}, "
            "expected [batch, patches, width] and [batch, width]"
        )
    with autocast_off(patch_tokens.device):
        patch_tokens, text_embeds = at_least_float32(patch_tokens), at_least_float32(text_embeds)
        image_embeds = F.normalize(patch_tokens, dim=-1).mean(dim=1)  # [B, D]
        logits = image_embeds @ text_embeds.mT / temperature  # [B, B], image to text
        targets = soft_targets(text_embeds, temperature=temperature)
        # The transposed targets are used as they are: their rows need not sum to one (as released).
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.mT, targets.mT)) / 2


class SoftContrastiveLoss(nn.Module):
    """Module form of `soft_contrastive_loss`."""

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, patch_tokens: Tensor, text_embeds: Tensor) -> Tensor:
        return soft_contrastive_loss(patch_tokens, text_embeds, temperature=self.temperature)


def dice_loss(logits: Tensor, target: Tensor, *, reduction: DiceReduction = "image") -> Tensor:
    """One minus the soft Dice coefficient of sigmoid probabilities, averaged.

    Args:
        logits: [B, H, W].
        target: [B, H, W], 0 or 1.
        reduction: "image" is one Dice per image; "row" one per image row, row 0 left out (what the release computes).

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes differ or `reduction` is unknown.
    """
    _check_pair(logits, target)
    if reduction not in ("image", "row"):
        raise ValueError(f"reduction is {reduction!r}, expected 'image' or 'row'")
    probability = at_least_float32(logits).sigmoid()
    target = target.to(probability.dtype)
    if reduction == "row":
        probability, target = probability[:, 1:], target[:, 1:]  # [B, H-1, W]
    else:
        probability, target = probability.flatten(1), target.flatten(1)  # [B, H*W]
    intersection = (probability * target).sum(dim=-1)
    total = probability.sum(dim=-1) + target.sum(dim=-1)
    return (1.0 - (2.0 * intersection + _DICE_SMOOTHING) / (total + _DICE_SMOOTHING)).mean()


def kl_loss(kl: Tensor, *, free_bits: float = 0.0) -> Tensor:
    """Mean KL divergence of the adapters' values from a standard normal, in nats for each channel.

    Args:
        kl: [B, 2 A, C], of `JointFeatures` or `SegmentationOutput`.
        free_bits: Nats that each channel of each direction may have for nothing, on average over the batch: below that
            it is not pushed on (Kingma et al., 2016, arXiv 1606.04934).

    Returns:
        Scalar.
    """
    return kl.mean(dim=0).clamp_min(free_bits).mean()


@dataclass(frozen=True)
class LossTerms:
    """The training loss and what it is made of, each a scalar tensor."""

    total: Tensor
    dice: Tensor
    bce: Tensor
    contrastive: Tensor
    kl: Tensor


class SegmentationLoss(nn.Module):
    """Weighted sum of Dice, binary cross-entropy, soft contrastive loss and, if asked for, KL divergence.

    Args:
        dice_weight: Weight of the Dice loss.
        bce_weight: Weight of the binary cross-entropy with logits.
        contrastive_weight: Weight of the soft contrastive loss.
        temperature: Of the soft contrastive loss.
        dice_reduction: "image" (default) or "row" (as released); see `dice_loss`.
        kl_weight: Weight of the KL divergence of the adapters' values; see `kl_loss`.
        free_bits: Of the KL divergence.
    """

    def __init__(
        self,
        *,
        dice_weight: float = 0.5,
        bce_weight: float = 0.5,
        contrastive_weight: float = 0.1,
        temperature: float = 0.2,
        dice_reduction: DiceReduction = "image",
        kl_weight: float = 0.0,
        free_bits: float = 0.0,
    ) -> None:
        super().__init__()
        self.dice_weight = dice_weight
        self.bce_weight = bce_weight
        self.contrastive_weight = contrastive_weight
        self.temperature = temperature
        self.dice_reduction: DiceReduction = dice_reduction
        self.kl_weight = kl_weight
        self.free_bits = free_bits

    def forward(
        self, logits: Tensor, target: Tensor, *, patch_tokens: Tensor, text_embeds: Tensor, kl: Tensor | None = None
    ) -> LossTerms:
        """Compute all terms.

        Args:
            logits: [B, H, W].
            target: [B, H, W], 0 or 1, of any type.
            patch_tokens: [B, N, D].
            text_embeds: [B, D].
            kl: [B, 2 A, C], of `model(image, text, kl=True)`; without it the term is 0.

        Raises:
            ValueError: If the shapes do not fit together, or `kl` has a weight but is not given.
        """
        if self.kl_weight and kl is None:
            raise ValueError(f"kl_weight is {self.kl_weight} but no kl is given; call model(image, text, kl=True)")
        _check_pair(logits, target)
        dice = dice_loss(logits, target, reduction=self.dice_reduction)
        logits = at_least_float32(logits)
        bce = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
        contrastive = soft_contrastive_loss(patch_tokens, text_embeds, temperature=self.temperature)
        divergence = logits.new_zeros(()) if kl is None else kl_loss(kl, free_bits=self.free_bits)
        total = self.dice_weight * dice + self.bce_weight * bce + self.contrastive_weight * contrastive
        total = total + self.kl_weight * divergence
        return LossTerms(total=total, dice=dice, bce=bce, contrastive=contrastive, kl=divergence)


def _check_pair(logits: Tensor, target: Tensor) -> None:
    if logits.ndim != 3 or logits.shape != target.shape:
        raise ValueError(
            f"got logits {tuple(logits.shape)} and target {tuple(target.shape)}, expected both [batch, height, width]"
        )
