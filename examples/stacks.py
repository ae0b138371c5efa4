"""Inputs of examples/predict.py as stacks of slices, and what is found in them, written in their own geometry."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from sources import Source

import pvl_adapter as pvl
from pvl_adapter.atomic import write_atomically
from pvl_adapter.data import read_picture
from pvl_adapter.prediction import FLOAT_MAPS, overlay

AXES = "xyz"  # of the volume turned to right, anterior, superior: slices are sagittal, coronal, axial


class Stack:
    """Slices of an input; a picture has one.

    Attributes:
        shape: Slices, rows and columns.
        numbers: Of the slices that are asked for.
        pixel_mm2: Area of a pixel; NaN if unknown.
        slice_mm: Distance of neighbouring slices; NaN if unknown or not everywhere the same.
        notes: What a reviewer should know.
    """

    shape: tuple[int, int, int]
    numbers: Sequence[int]
    pixel_mm2 = slice_mm = math.nan

    def __init__(self, source: Source, args: argparse.Namespace) -> None:
        self.source, self.args = source, args
        self.notes: list[str] = []
        if not source.files[0].is_file():
            raise FileNotFoundError(f"{source.files[0]} does not exist; correct the name, or put it there")
        if source.part:
            read_picture(source.place, window=args.window)  # refuses a slice that is not there

    def read(self, number: int) -> np.ndarray:
        """A slice as the model is shown it: uint8, [h, w] or [h, w, 3]."""
        raise NotImplementedError

    def write(self, path: Path, answer: Answer) -> list[Path]:
        """Write what was found to files that begin with `path`, here of a single slice, as pictures; returns them."""
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".part") as folder:
            answer.last.save(folder, names=[path.name])
            if "abstain" in answer.maps:
                write_png(Path(folder) / f"{path.name}_abstain.png", answer.maps["abstain"][0] * np.uint8(255))
            written = [file for file in sorted(Path(folder).iterdir()) if file.name != "predictions.json"]
            return [file.replace(path.parent / file.name) for file in written]

    def choose(self) -> Sequence[int]:
        """Numbers of the slices that are asked for."""
        if self.source.part:
            return [self.source.part[1]]
        count = self.shape[0]
        numbers = range(count) if count == 1 else range(count)[self.args.slices]
        if not numbers:
            raise ValueError(f"--slices leaves none of {count} slices; they are counted from 0")
        return numbers


class Answer:
    """What a sentence finds in an input, filled slice by slice.

    Attributes:
        maps: "mask", "probability", "uncertainty" and, if pixels are left to a human, "abstain"; [slices, rows,
            columns]. Slices not asked for are 0, in the uncertainty NaN.
        last: What the model said of the last slice.
    """

    last: pvl.Prediction

    def __init__(self, stack: Stack, text: str) -> None:
        self.stack, self.text = stack, text
        blank = {"mask": np.uint8(0), "probability": np.float32(0), "uncertainty": np.float32(math.nan)}
        blank |= {} if stack.args.abstain is None else {"abstain": np.uint8(0)}
        self.maps = {name: np.full(stack.shape, value) for name, value in blank.items()}
        self.small: list[tuple[torch.Tensor, torch.Tensor]] = []  # mask and probability as predicted
        self.summaries: list[dict[str, Any]] = []

    def add(self, number: int, batch: pvl.Prediction, index: int) -> None:
        """Take in a slice, one of a batch."""
        names = ("mask", *FLOAT_MAPS, "num_samples")
        own = {name: getattr(batch, name)[index : index + 1] for name in names}
        self.last = dataclasses.replace(batch, **own, pictures=batch.pictures[index : index + 1])
        maps = self.last.at_original_size(0)
        if self.stack.args.abstain is not None:
            maps["abstain"] = maps["uncertainty"] > self.stack.args.abstain
        for name, slices in self.maps.items():
            slices[number] = maps[name]
        self.small.append((self.last.mask.cpu(), self.last.probability.float().cpu()))
        self.summaries += self.last.to_dict()

    def overlay(self) -> np.ndarray:
        """The slice with the largest find, tinted."""
        number = max(self.stack.numbers, key=lambda number: self.maps["mask"][number].sum())
        picture = Image.fromarray(self.stack.read(number))
        return overlay(picture, {name: slices[number] for name, slices in self.maps.items()})

    def measures(self) -> dict[str, str]:
        """What review.csv says of it."""
        stack, several = self.stack, len(self.summaries) > 1
        mask, probability = (rearrange(torch.cat(maps), "n h w -> 1 (n h) w") for maps in zip(*self.small, strict=True))
        tall = dataclasses.replace(self.last, mask=mask, probability=probability)  # all slices as one picture
        area = int(self.maps["mask"].sum())
        abstained = self.maps["abstain"][list(stack.numbers)].mean() if "abstain" in self.maps else math.nan
        errors = [summary["largest_standard_error"] for summary in self.summaries]
        measured = {
            "review_score": tall.review_score.item(),
            "found_pixels": area,
            "found_mm2": math.nan if several else area * stack.pixel_mm2,
            "found_ml": area * stack.pixel_mm2 * stack.slice_mm / 1000.0 if several else math.nan,
            "max_probability": float(self.maps["probability"].max()),
            "mean_uncertainty": np.nanmean(self.maps["uncertainty"], dtype=np.float64),
            "abstained_fraction": abstained,
            "num_samples": np.mean([summary["num_samples"] for summary in self.summaries]),
            "standard_error": math.nan if None in errors else max(errors),
        }
        return {name: "" if math.isnan(value) else f"{round(value, 6):.12g}" for name, value in measured.items()}


class PictureStack(Stack):
    """A PNG, JPEG, BMP or TIFF."""

    def __init__(self, source: Source, args: argparse.Namespace) -> None:
        super().__init__(source, args)
        self.pixels = read_picture(source.place, window=args.window)
        self.shape, self.numbers = (1, *self.pixels.shape[:2]), [0]

    def read(self, number: int) -> np.ndarray:
        return self.pixels


class NiftiStack(Stack):
    """A NIfTI volume, turned to the nearest right, anterior, superior axes and cut along one of them."""

    def __init__(self, source: Source, args: argparse.Namespace) -> None:
        super().__init__(source, args)
        self.axis = source.part[0] if source.part else args.axis
        self.read(0)  # refuses what is no sound volume
        self.image = nib.load(source.files[0])
        self.turn = nib.orientations.io_orientation(self.image.affine)
        self.shape = self.as_slices(np.empty(self.image.shape, np.uint8)).shape
        self.numbers = self.choose()
        if not self.image.header["qform_code"] and not self.image.header["sform_code"]:
            self.notes.append("the header does not say where left and right are (qform_code and sform_code are 0)")
        unit = {"meter": 1000.0, "micron": 0.001}.get(self.image.header.get_xyzt_units()[0], 1.0)
        steps = unit * self.image.affine[:3, np.argsort(self.turn[:, 0])].T  # mm of one voxel to the right, ...
        across = np.roll(steps, -AXES.index(self.axis), axis=0)  # from slice to slice first
        self.pixel_mm2 = float(np.linalg.norm(np.cross(across[1], across[2])))
        self.slice_mm = float(abs(np.linalg.det(across)) / self.pixel_mm2)

    def read(self, number: int) -> np.ndarray:
        return read_picture(f"{self.source.files[0]}#{self.axis}={number}", window=self.args.window)

    def as_slices(self, voxels: np.ndarray) -> np.ndarray:
        """Stored voxels, seen as slices the way `read_picture` shows them: [slices, h, w], the same memory."""
        axes = (*voxels.shape, 1, 1)[:3]
        turned = nib.orientations.apply_orientation(voxels.reshape(axes), self.turn)
        first = np.moveaxis(turned, AXES.index(self.axis), 0)
        return rearrange(first, "n across up -> n up across")[:, ::-1, ::-1]

    def write(self, path: Path, answer: Answer) -> list[Path]:
        overlaid = write_png(path.with_name(f"{path.name}_overlay.png"), answer.overlay())
        return [*(self._write(path, name, slices) for name, slices in answer.maps.items()), overlaid]

    def _write(self, path: Path, name: str, slices: np.ndarray) -> Path:
        voxels = np.empty(self.image.shape, slices.dtype)
        self.as_slices(voxels)[:] = slices
        header = self.image.header.copy()
        header.extensions.clear()  # they are of the scan's own voxels
        header.set_data_dtype(voxels.dtype)
        header.set_intent("none", name=name)
        header["cal_min"], header["cal_max"], header["descrip"] = 0.0, 0.0, b"pvl-adapter"
        image = type(self.image)(voxels, None, header)  # without an affine, so that both of the header's stay

        def write(temporary: Path) -> None:
            with temporary.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=5, fileobj=raw, mtime=0) as packed:
                image.to_stream(packed)

        file = path.with_name(f"{path.name}_{name}.nii.gz")
        write_atomically(file, write)
        return file


def write_png(file: Path, pixels: np.ndarray) -> Path:
    write_atomically(file, lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"))
    return file
