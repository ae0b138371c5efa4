"""What sentences find in one input: maps of its slices, kept on disk, and what is written and measured of them.

Shape alphabet: K sentences, n slices, H W pixels of the network, h w pixels of a slice as it was given.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from pvl_adapter.data.label_files import label_overlay, legend
from pvl_adapter.data.presets import Label
from pvl_adapter.data.regions import fill_holes, keep_largest
from pvl_adapter.data.volumes import Key, zeros
from pvl_adapter.image_files import write_image
from pvl_adapter.label_map import Overlap, combine, overlaps
from pvl_adapter.prediction import _SMOOTHING, FLOAT_MAPS, Prediction, overlay

if TYPE_CHECKING:
    from pvl_adapter.data.scans import InputVolume
    from pvl_adapter.trust.calibration import Calibration

MEASURES = ["review_score", "found_pixels", "least_pixels", "most_pixels", "found_mm2", "least_mm2", "most_mm2"]
MEASURES += ["found_ml", "least_ml", "most_ml", "presence", "flagged", "abstained", "max_probability"]
MEASURES += ["mean_uncertainty", "abstained_fraction", "num_samples", "standard_error"]
"""What `Result.measures` tells. From least to most goes the interval of the true area or volume, where the model is
calibrated for one."""

PROMISED = ("outer_mask", "inner_mask")


@dataclass(frozen=True)
class ResultOptions:
    """How results are made and written.

    Attributes:
        threshold: Of the prediction.
        abstain: Nats; pixels with more uncertainty are marked. None marks none.
        maps: Whether to write all maps as floats; of several axes, also what these disagree about.
        largest_component: Keep of each mask the largest part that hangs together, in space where slices do.
        fill_holes: Fill what masks enclose, likewise.
        overlay: Whether to write a picture of the slice with the largest mask.
        model_hash: Of the model, to be named in the files.
        created: Date and time in the files; None means now.
    """

    threshold: float = 0.5
    abstain: float | None = None
    maps: bool = False
    largest_component: bool = False
    fill_holes: bool = False
    overlay: bool = True
    model_hash: str = ""
    created: datetime | None = None


class LabelVoxels(NamedTuple):
    """One label for every voxel, in the volume's shape.

    Attributes:
        values: Of the labels; 0 is background.
        entropy: In nats; NaN in slices that were not asked for.
        labels: In the order of their values.
        overlaps: Pairs of labels whose single masks share voxels.
    """

    values: np.ndarray
    entropy: np.ndarray
    labels: list[Label]
    overlaps: tuple[Overlap, ...]


class Result:
    """What K sentences find in an input, filled batch by batch.

    Attributes:
        keys: Slices in which maps can be looked at; where several axes are averaged, those along the first.
        kept: The float maps there are.
        names: All maps that are written.
    """

    def __init__(self, volume: InputVolume, labels: Sequence[Label], options: ResultOptions) -> None:
        self.volume, self.labels, self.options = volume, labels, options
        self.averaged = len(volume.axes) > 1
        step = 1 if volume.options.slices is None else volume.options.slices.step or 1
        if step > 1 and volume.solid and (options.largest_component or options.fill_holes):
            raise ValueError(
                f"every slice of {step} was asked for, expected neighbours to clean masks; leave out the step"
            )
        if self.averaged:
            self.kept: tuple[str, ...] = ("probability", "uncertainty", *(["epistemic"] if options.maps else []))
        else:
            self.kept = FLOAT_MAPS if options.maps else FLOAT_MAPS[:2]
        self.names = ("mask", "probability", "uncertainty", *(["abstain"] if options.abstain is not None else []))
        self.keys = [key for key in volume.keys if key[0] == volume.axes[0]]
        self.maps: dict[str, Any] = {}  # of a slice each [K, n, H, W]; of averages [K] in the volume's shape
        self.calibration: Calibration | None = None
        self.promised: list[dict[str, Any]] = [{} for _ in labels]
        self._index = {key: index for index, key in enumerate(volume.keys)}
        self._sums = np.zeros((len(labels), 6))
        self._samples, self._most, self._error = np.zeros((3, len(labels)))
        self._areas = np.zeros((2, len(labels)))  # expected, and the scale of its error
        self._flagged = np.zeros(len(labels))

    def add(self, keys: Sequence[Key], prediction: Prediction) -> None:
        """Take in slices: `prediction` has those of the first, sentence by sentence, then those of the next."""
        if (
            prediction.no_promise != Prediction.no_promise
            and prediction.calibration is None
            and not self._samples.any()
        ):
            self.volume.notes.append(f"no promises: {prediction.no_promise}")
        of_slice = partial(_of_slices, count=len(self.labels))
        names = ("mask", *(FLOAT_MAPS[:2] if self.averaged else self.kept))
        maps = {name: of_slice(getattr(prediction, name)) for name in names}
        self._samples += of_slice(prediction.num_samples).sum(axis=1)
        self._error = np.maximum(self._error, of_slice(prediction.standard_error.amax(dim=(1, 2))).max(axis=1))
        if self.averaged:
            self._add_to_averages(keys, maps)
            return
        if (calibration := prediction.calibration) is not None:
            self.calibration = calibration
            found = {name: getattr(calibration, name)(prediction) for name in PROMISED}
            maps |= {name: of_slice(values) for name, values in found.items() if values is not None}
            self._areas += np.stack([of_slice(each).sum(axis=1) for each in calibration.area_moments(prediction)])
            self._flagged += of_slice(calibration.flagged(prediction)).sum(axis=1)
            if len(self._index) == 1:
                self._promise(calibration, prediction)
        at = [self._index[key] for key in keys]
        for name, values in maps.items():
            if name not in self.maps:
                shape = (len(self.labels), len(self._index), *values.shape[2:])
                self.maps[name] = zeros(shape, values.dtype, folder=self.volume.options.scratch)
            self.maps[name][:, at] = values
        self.names += tuple(name for name in PROMISED if name in maps and name not in self.names)
        self._sum(maps["probability"], maps["mask"], maps["uncertainty"])

    def _add_to_averages(self, keys: Sequence[Key], maps: dict[str, np.ndarray]) -> None:
        for name in ("probability", *(["uncertainty"] if "epistemic" in self.kept else [])):
            voxels = self.maps.setdefault(name, [self.volume.array(np.float32) for _ in self.labels])
            for whole, slices in zip(voxels, maps[name], strict=True):
                for key, values in zip(keys, slices, strict=True):
                    self.volume.view(whole, key)[...] += resized(values, self.volume.size(key)) / len(self.volume.axes)

    def _promise(self, calibration: Calibration, prediction: Prediction) -> None:
        """Verdicts on an image."""
        presence = calibration.presence(prediction)
        for name, values in {
            "presence": presence and presence.verdict,
            "abstained": None if (found := calibration.abstained(prediction)) is None else found.tolist(),
        }.items():
            for k, value in enumerate(values or []):
                self.promised[k][name] = value

    def _sum(self, probability: np.ndarray, mask: np.ndarray, uncertainty: np.ndarray) -> None:
        """Add up what `measures` says of values [K, n, h, w]."""
        abstain = math.inf if self.options.abstain is None else self.options.abstain
        totals = [probability * mask, probability, mask, uncertainty, uncertainty > abstain, np.ones_like(mask)]
        self._sums += np.stack([values.sum(axis=(1, 2, 3), dtype=np.float64) for values in totals], axis=1)
        self._most = np.maximum(self._most, probability.max(axis=(1, 2, 3)))

    # ---- maps -------------------------------------------------------------------------------------------------------

    def map(self, name: str, k: int, key: Key, *, mode: str = "bilinear") -> np.ndarray:
        """A map of a slice at the input's size, [h, w]: masks resized by nearest neighbour, as by `Prediction`."""
        if name == "abstain":
            return self.map("uncertainty", k, key) > self.options.abstain
        if name == "mask" and self._masks:
            return self.volume.view(self._masks[k], key).astype(bool)
        if not self.averaged:
            return resized(self.maps[name][k, self._index[key]], self.volume.size(key), mode=mode)
        probability = np.clip(self.volume.view(self.maps["probability"][k], key), 0.0, 1.0)
        if name == "mask":
            return probability > self.options.threshold
        nats = torch.special.entr(torch.from_numpy(np.stack([probability, 1 - probability]))).sum(dim=0).numpy()
        if name == "epistemic":  # what is in the average's entropy and in no axis'
            return np.maximum(nats - self.volume.view(self.maps["uncertainty"][k], key), 0.0)
        return probability if name == "probability" else nats

    def voxels(self, name: str, k: int) -> np.ndarray:
        """A map in the volume's shape; of slices that were not asked for 0, and NaN where that would say "sure"."""
        floats = name in FLOAT_MAPS
        voxels = self.volume.array(np.float32 if floats else np.uint8)
        if floats and name != "probability" and not self.volume.complete:
            voxels[...] = math.nan
        for key in self.keys:
            self.volume.view(voxels, key)[...] = self.map(name, k, key)
        return voxels

    @cached_property
    def _masks(self) -> list[np.ndarray]:
        """Cleaned ones, in the volume's shape; none if that is not asked for."""
        cleaning = [(keep_largest, self.options.largest_component), (fill_holes, self.options.fill_holes)]
        masks: list[np.ndarray] = []
        if any(asked for _, asked in cleaning):
            self.__dict__["_masks"] = []  # those of the model while these are made
            masks = [self.voxels("mask", k) for k in range(len(self.labels))]
            for part in (part for mask in masks for part in self.volume.parts(mask)):
                for clean in (clean for clean, asked in cleaning if asked):
                    clean(part, scratch=self.volume.options.scratch)
        return masks

    @cached_property
    def areas(self) -> list[dict[Key, int]]:
        """Pixels of the mask in each slice, of each sentence."""
        for key in self.keys if self.averaged else ():
            maps = (np.stack([self.map(name, k, key) for k in range(len(self.labels))]) for name in self.names[1:3])
            probability, uncertainty = (values[:, None] for values in maps)
            self._sum(probability, probability > self.options.threshold, uncertainty)
        return [{key: int(self.map("mask", k, key).sum()) for key in self.keys} for k in range(len(self.labels))]

    def label_voxels(self) -> LabelVoxels:
        """One label for every voxel: of the sentences whose masks hold it, the one of the highest probability."""
        count, shared = len(self.labels), torch.zeros(len(self.labels), len(self.labels), dtype=torch.int64)
        numbers = np.array([0, *(label.value for label in self.labels)])
        values = self.volume.array(np.uint8 if numbers.max() < 256 else np.uint16)
        entropy, names = self.volume.array(np.float32), [label.name for label in self.labels]
        if not self.volume.complete:
            entropy[...] = math.nan
        for key in self.keys:
            probability = np.stack([self.map("probability", k, key, mode="nearest") for k in range(count)])
            masks = np.stack([self.map("mask", k, key) for k in range(count)])
            found = combine(probability, threshold=self.options.threshold, masks=masks, names=names)
            shared += found.shared
            self.volume.view(values, key)[...] = numbers[found.labels]
            nats = found.entropy.numpy()
            if not self.averaged:
                small = torch.from_numpy(self.maps["probability"][:, self._index[key]])  # [K, H, W]
                sure = None if self.calibration is None else self.calibration.scorer.calibrated(small)
                nats = combine(small, threshold=self.options.threshold, calibrated=sure).entropy.numpy()
            self.volume.view(entropy, key)[...] = resized(nats, self.volume.size(key))
        ordered = sorted(self.labels, key=lambda label: label.value)
        return LabelVoxels(values, entropy, ordered, overlaps(shared, names))

    # ---- files and numbers ------------------------------------------------------------------------------------------

    def write(self, folder: Path, name: str) -> None:
        """Write all files `folder`/`name`...; those of a sentence have it in their names if there are several."""
        found = self.label_voxels() if len(self.labels) > 1 else None
        self.volume.write(folder, name, self, found)
        if found is not None:
            shared = [overlap._asdict() for overlap in found.overlaps]
            facts = {"overlaps": shared, "entropy_is_calibrated": self.calibration is not None}
            text = json.dumps({"labels": legend(found.labels), **facts}, indent=2) + "\n"
            (folder / f"{name}_labels.json").write_text(text, encoding="utf-8")
        for k, stem in enumerate(self.stems(name) if self.options.overlay else []):
            key = max(self.keys, key=lambda key: self.areas[k][key])
            maps = {name: self.map(name, k, key) for name in ("mask", "uncertainty")}
            image = Image.fromarray(self.volume.read(key))
            write_image(folder / f"{stem}_overlay.jpg", overlay(image, maps))
        if found is not None and self.options.overlay:
            key = max(self.keys, key=lambda key: sum(areas[key] for areas in self.areas))
            image = Image.fromarray(self.volume.read(key))
            image = label_overlay(image, self.volume.view(found.values, key), found.labels)
            write_image(folder / f"{name}_labels_overlay.jpg", image)

    def stems(self, name: str) -> list[str]:
        """What the names of each sentence's files begin with."""
        return [name] if len(self.labels) == 1 else [f"{name}_{slug(label.name)}" for label in self.labels]

    def measures(self, k: int) -> dict[str, Any]:
        """What review.csv says of a sentence; NaN or "" where it is not known.

        Probability, uncertainty and abstained fraction are the model's own, at the network's size; of averaged axes, at
        the volume's.
        """
        volume, several = self.volume, len(self._index) > 1
        area = sum(self.areas[k].values()) / volume.times
        hit, probable, masked, nats, abstained, pixels = self._sums[k]
        few = _SMOOTHING * pixels
        least, most = self._interval(k)
        found = dict(zip(("found", "least", "most"), (area, least, most), strict=True))
        units = {"mm2": math.nan if several else volume.pixel_mm2}
        units["ml"] = volume.pixel_mm2 * volume.slice_mm / 1000.0 if several else math.nan
        return {
            **dict.fromkeys(MEASURES, ""),
            "review_score": 1.0 - (2.0 * hit + few) / (probable + masked + few),
            **{f"{name}_pixels": value for name, value in found.items()},
            **{f"{name}_{unit}": value * size for unit, size in units.items() for name, value in found.items()},
            **({} if self.calibration is None else {"flagged": bool(self._flagged[k] > len(self._index) / 2)}),
            **self.promised[k],
            "max_probability": self._most[k],
            "mean_uncertainty": nats / pixels,
            "abstained_fraction": math.nan if self.options.abstain is None else abstained / pixels,
            "num_samples": self._samples[k] / len(self._index),
            "standard_error": self._error[k],
        }

    @property
    def notes(self) -> list[str]:
        """What a reviewer should know of the input, and of masks that their own intervals do not allow."""
        notes = list(self.volume.notes)
        for k, label in enumerate(self.labels):
            area, (least, most) = sum(self.areas[k].values()), self._interval(k)
            if area < least or area > most:
                notes.append(f"the mask of {label.name!r} is not within its interval, so trust neither")
        return notes

    def _interval(self, k: int) -> tuple[float, float]:
        """Of the true pixels of an image, or of all slices of a subject; NaN where none is promised."""
        volume, several = self.volume, len(self._index) > 1
        if self.calibration is None or volume.times > 1 or (several and not (volume.solid and volume.complete)):
            return math.nan, math.nan
        expected, error = torch.from_numpy(self._areas[:, k])
        interval = self.calibration.interval_of_sums(expected, error, volume=several)
        least, most = (math.nan, math.nan) if interval is None else interval.tolist()
        pixels = math.prod(volume.size(self.keys[0]))
        return least * pixels, most * pixels


def _of_slices(values: torch.Tensor, *, count: int) -> np.ndarray:
    """Values of pairs as those of sentences and slices, [K, n, ...]."""
    return rearrange(values.cpu().numpy(), "(n k) ... -> k n ...", k=count)


def resized(values: np.ndarray, size: tuple[int, int], *, mode: str = "bilinear") -> np.ndarray:
    """A map [H, W] as [h, w]; masks always by nearest neighbour."""
    if values.dtype == bool:
        return resized(values.view(np.uint8), size, mode="nearest").astype(bool)
    made = torch.from_numpy(values)[None, None]
    made = made if values.dtype == np.uint8 else made.float()
    return F.interpolate(made, size, mode=mode, **({} if mode == "nearest" else {"align_corners": False}))[0, 0].numpy()


def slug(text: str) -> str:
    """A sentence as part of a file name; what does not fit or cannot be in one is told apart by a hash."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if words.replace("-", " ") == text.lower() and len(words) <= 48:
        return words
    return f"{words[:40]}-{hashlib.sha256(repr(text).encode()).hexdigest()[:8]}"
