"""Rounding: what autocast changes is corrected, and bfloat16 is computed only where the processor can."""

from __future__ import annotations

import pytest
import torch
from support import assert_same_maps, images, maps, predict, segmenter

import pvl_adapter as pvl
from pvl_adapter import kernels

IMAGES = images()


@pytest.fixture(scope="module")
def model() -> pvl.MedCLIPSeg:
    return segmenter()


def rounded(model: pvl.MedCLIPSeg, number: int | pvl.Auto, **settings: object) -> pvl.Prediction:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return predict(model, number, **settings)


def test_autocasts_rounding_is_part_of_the_error_bar(model, monkeypatch):
    monkeypatch.setattr(kernels, "has_native_bfloat16", lambda: True)
    exact, low = predict(model, 1000), rounded(model, 1000)
    error = (low.probability - exact.probability).square().mean()
    told = low.standard_error.square().mean() - exact.standard_error.square().mean()

    assert error > 1e-7  # autocast rounds
    assert error < 4 * told
    look = pvl.Auto(tolerance=1.0)
    assert (rounded(model, look).probability - predict(model, look).probability).abs().max() < 0.02


def test_bfloat16_without_instructions_is_computed_in_float32_with_a_warning(model, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "has_native_bfloat16", lambda: False)

    with pytest.warns(UserWarning, match="bfloat16 instructions"):
        assert_same_maps(maps(rounded(model, 4)), maps(predict(model, 4)))
    with pytest.warns(UserWarning, match="bfloat16 instructions"):
        backbone = pvl.load_backbone("ViT-S-32-alt", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in backbone.clip.parameters()} == {torch.float32}
