"""What sentences find in one input: maps of its slices, kept on disk, and what is written and measured of them.

Shape alphabet: K sentences, n slices, H W pixels of the network, h w pixels of a slice as it was given.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from pvl_adapter.prediction import _SMOOTHING, FLOAT_MAPS, Prediction, overlay

if TYPE_CHECKING:
    from pvl_adapter.data.scans import InputVolume, Key

MEASURES = ["review_score", "found_pixels", "found_mm2", "found_ml", "max_probability", "mean_uncertainty"]
MEASURES += ["abstained_fraction", "num_samples", "standard_error"]
"""What `Result.measures` tells."""


@dataclass(frozen=True)
class ResultOptions:
    """How results are made and written.

    Attributes:
        threshold: Of the prediction.
        abstain: Nats; pixels with more uncertainty are marked. None marks none.
        maps: Whether to write all maps as floats.
        model_hash: Of the model, to be named in the files.
    """

    threshold: float = 0.5
    abstain: float | None = None
    maps: bool = False
    model_hash: str = ""


class Result:
    """What K sentences find in an input, filled batch by batch.

    Attributes:
        names: Of the maps that are written.
    """

    def __init__(self, volume: InputVolume, labels: Sequence[Any], options: ResultOptions) -> None:
        self.volume, self.labels, self.options = volume, labels, options
        self.kept = ("mask", *(FLOAT_MAPS if options.maps else FLOAT_MAPS[:2]))
        self.names = ("mask", *FLOAT_MAPS[:2], *(("abstain",) if options.abstain is not None else ()))
        self.index = {key: index for index, key in enumerate(volume.keys)}
        self.maps: dict[str, np.ndarray] = {}  # each [K, n, H, W]
        self.areas: list[dict[Key, int]] = [{} for _ in labels]  # pixels of each slice's mask
        self.sums = np.zeros((len(labels), 7))
        self.errors = np.full(len(labels), -math.inf)
        self.most = np.zeros(len(labels))

    def add(self, keys: Sequence[Key], prediction: Prediction) -> None:
        """Take in slices: `prediction` has those of the first, sentence by sentence, then those of the next."""
        count = len(self.labels)
        maps = {
            name: rearrange(getattr(prediction, name).cpu().numpy(), "(n k) h w -> k n h w", k=count)
            for name in self.kept
        }
        for name, values in maps.items():
            if name not in self.maps:
                shape = (count, len(self.index), *values.shape[2:])
                self.maps[name] = self.volume.array(shape, values.dtype)
            self.maps[name][:, [self.index[key] for key in keys]] = values
        samples = rearrange(prediction.num_samples.cpu().numpy(), "(n k) -> k n", k=count)
        self._sum(maps["probability"], maps["mask"], maps["uncertainty"])
        self.sums[:, 5] += samples.sum(axis=1)
        errors = rearrange(prediction.standard_error.amax(dim=(1, 2)).cpu().numpy(), "(n k) -> k n", k=count)
        self.errors = np.maximum(self.errors, errors.max(axis=1))  # NaN stays
        for k in range(count):
            for key in keys:
                self.areas[k][key] = int(self.map("mask", k, key).sum())

    def _sum(self, probability: np.ndarray, mask: np.ndarray, uncertainty: np.ndarray) -> None:
        """Add up what `measures` says of values [K, n, h, w]."""
        abstain = math.nan if self.options.abstain is None else self.options.abstain
        totals = [probability * mask, probability, mask, uncertainty, uncertainty > abstain]
        sums = [values.sum(axis=(1, 2, 3), dtype=np.float64) for values in totals]
        self.sums += np.stack([*sums, np.zeros_like(sums[0]), np.full_like(sums[0], probability[0].size)], axis=1)
        self.most = np.maximum(self.most, probability.max(axis=(1, 2, 3)))

    def map(self, name: str, k: int, key: Key) -> np.ndarray:
        """A map of a slice at the input's size, resized as by `Prediction.at_original_size`: [h, w]."""
        if name == "abstain":
            return (self.map("uncertainty", k, key) > self.options.abstain).astype(np.uint8)
        values, size = torch.from_numpy(self.maps[name][k, self.index[key]])[None, None], self.volume.size(key)
        if values.dtype == torch.bool:
            return F.interpolate(values.byte(), size=size, mode="nearest")[0, 0].numpy()
        return F.interpolate(values.float(), size=size, mode="bilinear", align_corners=False)[0, 0].numpy()

    def voxels(self, name: str, k: int) -> np.ndarray:
        """A map of the whole input; of slices that were not asked for 0, in the uncertainty NaN: the volume's shape."""
        made: np.ndarray | None = None
        for key in self.index:
            values = self.map(name, k, key)
            if made is None:
                made = self.volume.array(self.volume.shape, values.dtype)
                if name == "uncertainty":  # 0 nats would say that the model was sure
                    made[...] = math.nan
            self.volume.view(made, key)[...] = values
        assert made is not None
        return made

    def write(self, folder: Path, name: str) -> None:
        """Write all files `folder`/`name`...; those of a sentence have it in their names if there are several."""
        self.volume.write(folder, self.stems(name), self)

    def stems(self, name: str) -> list[str]:
        """What the files of each sentence begin with."""
        return [name] if len(self.labels) == 1 else [f"{name}_{slug(label.name)}" for label in self.labels]

    def save_overlay(self, file: Path, k: int) -> None:
        """The slice with the largest mask."""
        key = max(self.areas[k], key=lambda key: self.areas[k][key])
        image = Image.fromarray(self.volume.read(key))
        overlay(image, {name: self.map(name, k, key) for name in ("mask", "uncertainty")}).save(file, compress_level=1)

    def measures(self, k: int) -> dict[str, float]:
        """What review.csv says of a sentence; probability, uncertainty and abstained fraction at the network's size."""
        hit, probable, masked, nats, abstained, samples, pixels = self.sums[k]
        volume, area, several = self.volume, sum(self.areas[k].values()), len(self.index) > 1
        few = _SMOOTHING * pixels
        return {
            "review_score": 1.0 - (2.0 * hit + few) / (probable + masked + few),
            "found_pixels": area,
            "found_mm2": math.nan if several else area * volume.pixel_mm2,
            "found_ml": area * volume.pixel_mm2 * volume.slice_mm / 1000.0 if several else math.nan,
            "max_probability": self.most[k],
            "mean_uncertainty": nats / pixels,
            "abstained_fraction": math.nan if self.options.abstain is None else abstained / pixels,
            "num_samples": samples / len(self.index),
            "standard_error": self.errors[k],
        }


def slug(text: str) -> str:
    """A sentence as part of a file name; what does not fit or cannot be in one is told apart by a hash."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if words.replace("-", " ") == text.lower() and len(words) <= 48:
        return words
    return f"{words[:40]}-{hashlib.sha256(repr(text).encode()).hexdigest()[:8]}"
