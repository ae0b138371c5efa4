"""The losses against the oracle."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from support import array, normal
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.losses import soft_targets

SHAPES = [(1, 4, 4), (3, 5, 7), (2, 8, 3)]


def logits_and_target(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return 3 * normal(*shape, seed=1), (normal(*shape, seed=2) > 0.3).long()


def features(batch: int = 4, patches: int = 5, width: int = 6) -> tuple[Tensor, Tensor]:
    return normal(batch, patches, width, seed=3), normal(batch, width, seed=4)


@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 3, 2), (2, 1, 8)], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_contrastive_loss_agrees_with_the_oracle(shape, temperature):
    patches, text = features(*shape)

    loss = pvl.SoftContrastiveLoss(temperature=temperature)(patches, text)

    expected = oracle.soft_contrastive_loss(array(patches), array(text), temperature=temperature)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
    torch.testing.assert_close(pvl.soft_contrastive_loss(patches, text, temperature=temperature), loss)


def test_soft_targets_agree_with_the_oracle_and_carry_no_gradient():
    _, text = features()

    targets = soft_targets(text.requires_grad_(), temperature=0.2)

    np.testing.assert_allclose(array(targets), oracle.soft_targets(array(text), temperature=0.2), rtol=1e-5)
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(4))
    assert not targets.requires_grad


@pytest.mark.parametrize("zero", ["patches", "text", "both"])
def test_contrastive_loss_of_zeros_has_finite_gradients(zero):
    patches, text = features()
    patches = (patches * 0 if zero != "text" else patches).requires_grad_()
    text = (text * 0 if zero != "patches" else text).requires_grad_()

    loss = pvl.soft_contrastive_loss(patches, text)
    loss.backward()

    assert torch.isfinite(loss)
    assert torch.isfinite(patches.grad).all()
    assert torch.isfinite(text.grad).all()


def test_contrastive_loss_is_computed_in_float32_under_autocast():
    patches, text = features(width=64)
    expected = pvl.soft_contrastive_loss(patches, text)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pvl.soft_contrastive_loss(patches, text)
    rounded = pvl.soft_contrastive_loss(patches.bfloat16(), text.bfloat16())

    torch.testing.assert_close(got, expected)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["image", "row"])
def test_dice_agrees_with_the_oracle(shape, reduction):
    logits, target = logits_and_target(shape)

    loss = pvl.dice_loss(logits, target, reduction=reduction)

    expected = oracle.dice_loss(array(logits), array(target), by_row=reduction == "row")
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


@pytest.mark.parametrize("foreground", [0, 1], ids=["empty", "full"])
def test_dice_of_a_perfect_mask_is_zero_even_if_empty_or_full(foreground):
    target = torch.full((2, 4, 4), foreground)
    logits = (2.0 * target - 1.0) * 100

    assert pvl.dice_loss(logits, target).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("target_type", [torch.bool, torch.uint8, torch.long, torch.float64], ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("reduction", ["image", "row"])
def test_the_segmentation_loss_is_the_weighted_sum_of_its_terms(reduction, dtype, rtol, target_type):
    """Of doubles in doubles, and of targets of any type."""
    logits, target = logits_and_target((2, 4, 5))
    logits, target = logits.to(dtype), target.to(target_type)
    patches, text = (each.to(dtype) for each in features(batch=2))

    terms = pvl.SegmentationLoss(
        dice_weight=0.3, bce_weight=0.6, contrastive_weight=0.2, temperature=0.5, dice_reduction=reduction
    )(logits, target, patch_tokens=patches, text_embeds=text)

    dice = oracle.dice_loss(array(logits), array(target), by_row=reduction == "row")
    bce = oracle.binary_cross_entropy(array(logits), array(target))
    contrastive = oracle.soft_contrastive_loss(array(patches), array(text), temperature=0.5)
    expected = {"dice": dice, "bce": bce, "contrastive": contrastive}
    expected["total"] = 0.3 * dice + 0.6 * bce + 0.2 * contrastive
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(terms, name).item(), value, rtol=rtol)
    assert terms.total.dtype == dtype


def test_the_default_weights_are_those_of_the_paper():
    logits, target = logits_and_target((2, 4, 5))
    patches, text = features(batch=2)

    terms = pvl.SegmentationLoss()(logits, target, patch_tokens=patches, text_embeds=text)

    torch.testing.assert_close(terms.total, 0.5 * terms.dice + 0.5 * terms.bce + 0.1 * terms.contrastive)
    torch.testing.assert_close(terms.dice, pvl.dice_loss(logits, target, reduction="image"))
    torch.testing.assert_close(terms.contrastive, pvl.soft_contrastive_loss(patches, text, temperature=0.2))
    for alone in (pvl.SoftContrastiveLoss()(patches, text), pvl.soft_contrastive_loss(patches, text)):
        assert torch.equal(alone, terms.contrastive)


@pytest.mark.parametrize(
    ("logits", "target"),
    [((2, 4, 4), (2, 4, 5)), ((2, 1, 4, 4), (2, 1, 4, 4)), ((4, 4), (4, 4)), ((2, 4, 4), (2, 1, 4, 4))],
    ids=str,
)
def test_masks_of_other_shapes_are_refused(logits, target):
    patches, text = features(batch=2)
    logits, target = torch.zeros(logits), torch.zeros(target)

    with pytest.raises(ValueError, match=r"logits \(.*target \(.*expected both \[batch, height, width\]"):
        pvl.dice_loss(logits, target)
    with pytest.raises(ValueError, match=r"logits \(.*target \(.*expected both \[batch, height, width\]"):
        pvl.SegmentationLoss()(logits, target, patch_tokens=patches, text_embeds=text)


@pytest.mark.parametrize(
    ("patches", "text"),
    [((2, 3, 4), (3, 4)), ((2, 3, 4), (2, 5)), ((2, 4), (2, 4)), ((2, 3, 4), (2, 3, 4))],
    ids=str,
)
def test_features_of_other_shapes_are_refused(patches, text):
    with pytest.raises(ValueError, match=r"patch_tokens \(.*text_embeds \(.*expected \[batch, patches, width\]"):
        pvl.SoftContrastiveLoss()(torch.zeros(patches), torch.zeros(text))


def test_settings_out_of_range_are_refused_by_name():
    for temperature in (0.0, -0.2):
        with pytest.raises(ValueError, match="temperature"):
            pvl.soft_contrastive_loss(*features(), temperature=temperature)
    with pytest.raises(ValueError, match="reduction"):
        pvl.dice_loss(*logits_and_target((1, 2, 2)), reduction="pixel")
