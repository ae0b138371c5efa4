"""A small segmenter for the tests of the examples: its masks cover part of every image, not all alike sure."""

from __future__ import annotations

import torch
from support import randomise

import pvl_adapter as pvl


def small_segmenter(name: str) -> pvl.MedCLIPSeg:
    """On one of the small CLIPs of the fixture `open_clip_models`."""
    torch.manual_seed(0)
    backbone = pvl.load_backbone(name)
    pvl.inject_adapters(backbone.clip, pvl.PVLConfig(layers=(0, 2), dim=8))
    randomise(backbone.clip.pvl_adapters)
    model = pvl.MedCLIPSeg(backbone.clip, tokenizer=backbone.tokenizer).eval()
    randomise(model.head, seed=1)
    return model
