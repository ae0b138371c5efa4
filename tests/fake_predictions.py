"""Predictions of a network that finds what is bright, so that what is written can be told from the picture alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import pvl_adapter as pvl
from pvl_adapter.data.inputs import Source, find_sources
from pvl_adapter.data.presets import labels_of
from pvl_adapter.data.results import Result, ResultOptions
from pvl_adapter.data.scans import InputOptions, open_input

Seen = Callable[[np.ndarray, int], np.ndarray]


def bright(image: np.ndarray, _: int) -> np.ndarray:
    """The grey level is the probability."""
    return (image if image.ndim == 2 else image[..., 0]).astype(np.float32) / 255


def prediction(probability: np.ndarray, *, threshold: float = 0.5, **others: Any) -> pvl.Prediction:
    """Of probabilities [B, H, W]."""
    found = torch.from_numpy(probability)
    entropy = torch.special.entr(found) + torch.special.entr(1 - found)
    zeros, pairs = torch.zeros_like(found), torch.zeros(len(found))
    return pvl.Prediction(
        mask=found > threshold,
        probability=found,
        uncertainty=entropy,
        aleatoric=entropy,
        epistemic=zeros,
        variance=zeros,
        standard_error=zeros,
        num_samples=torch.full((len(found),), 2),
        logits=(zeros, zeros),
        area_deviation=pairs,
        likeness=torch.zeros(len(found), 3),
        summary=torch.zeros(len(found), 2),
        threshold=threshold,
        **others,
    )


def source_of(path: Any) -> Source:
    (source,), _ = find_sources([str(path)], output=path.parent / "nowhere")
    return source


def found_in(
    path: Any,
    *,
    sentences: Sequence[str] = ("what is bright",),
    seen: Seen = bright,
    batch: int = 3,
    options: InputOptions | None = None,
    labels: Any = None,
    **how: Any,
) -> Result:
    """What the network finds in a file or folder, slices of one size a batch."""
    volume = open_input(source_of(path), options or InputOptions())
    labels = labels or labels_of(sentences)
    result = Result(volume, labels, ResultOptions(**how))
    for axis in volume.axes:
        keys = [key for key in volume.keys if key[0] == axis]
        for start in range(0, len(keys), batch):
            some = keys[start : start + batch]
            images = [volume.read(key) for key in some]
            pairs = [seen(image, k) for image in images for k in range(len(labels))]
            result.add(some, prediction(np.stack(pairs), threshold=result.options.threshold))
    return result
