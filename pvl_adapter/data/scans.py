"""Inputs of `pvl-adapter predict` as stacks of slices, and the results, written in the input's own geometry."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

import pvl_adapter as pvl
from pvl_adapter.data import read_image
from pvl_adapter.data.inputs import Source
from pvl_adapter.prediction import overlay

AXES = "xyz"  # of the volume turned to right, anterior, superior: slices are sagittal, coronal, axial
BLANK = {"mask": np.uint8(0), "probability": np.float32(0), "uncertainty": np.float32(math.nan), "abstain": np.uint8(0)}


class InputVolume:
    """The slices of an input; an image has one.

    Attributes:
        shape: Slices, rows and columns.
        numbers: Of the slices that are asked for.
        pixel_mm2: Area of a pixel; NaN if unknown.
        slice_mm: Distance of neighbouring slices; NaN if unknown or not the same everywhere.
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

    def read(self, number: int) -> np.ndarray:
        """A slice as the model is shown it: uint8, [h, w] or [h, w, 3]."""
        raise NotImplementedError

    def write(self, folder: Path, name: str, result: Result) -> None:
        """Write the result to files `folder`/`name`...; here those of a single image."""
        result.last.save(folder, names=[name])
        (folder / "predictions.json").unlink()  # review.csv has it
        if self.args.abstain is not None:
            abstain = Image.fromarray(result.map("abstain", self.numbers[0]) * np.uint8(255))
            abstain.save(folder / f"{name}_abstain.png", compress_level=1)
        if self.args.maps:
            np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **result.last.at_original_size(0))

    def choose(self) -> Sequence[int]:
        """Numbers of the slices that are asked for."""
        if self.source.part:
            read_image(self.source.location, window=self.args.window)  # refuses a slice that is not there
            return [self.source.part[1]]
        count = self.shape[0]
        numbers = range(count) if count == 1 else range(count)[self.args.slices]
        if not numbers:
            raise ValueError(f"--slices leaves none of {count} slices; they are counted from 0")
        return numbers


class Result:
    """What a sentence finds in an input, filled slice by slice.

    Attributes:
        slices: Maps of each slice at the network's size, [H, W].
        area: Pixels of each slice's mask at the input's size.
        last: Of the last slice, with its image.
    """

    last: pvl.Prediction

    def __init__(self, volume: InputVolume, text: str) -> None:
        self.volume, self.text = volume, text
        self.slices: dict[int, dict[str, torch.Tensor]] = {}
        self.area: dict[int, int] = {}
        self.summaries: list[dict[str, Any]] = []

    @property
    def names(self) -> list[str]:
        """Of the maps that are written of a volume."""
        return [name for name in BLANK if name != "abstain" or self.volume.args.abstain is not None]

    def add(self, number: int, batch: pvl.Prediction, index: int) -> None:
        """Take in a slice, one of a batch."""
        own = {
            field.name: value[index : index + 1]
            for field in dataclasses.fields(batch)
            if (value := getattr(batch, field.name)) is not None
        }
        self.last = dataclasses.replace(batch, **own)
        maps = {name: getattr(self.last, name)[0].cpu() for name in ("mask", "probability", "uncertainty")}
        if self.volume.args.abstain is not None:
            maps["abstain"] = maps["uncertainty"] > self.volume.args.abstain
        self.slices[number] = maps
        self.area[number] = int(self.map("mask", number).sum())
        self.summaries += self.last.to_dict()

    def map(self, name: str, number: int) -> np.ndarray:
        """A map of a slice at the input's size, resized as by `Prediction.at_original_size`: [h, w]."""
        if name == "abstain":
            return (self.map("uncertainty", number) > self.volume.args.abstain).astype(np.uint8)
        values, size = self.slices[number][name][None, None], self.volume.shape[1:]
        if values.dtype == torch.bool:
            return F.interpolate(values.byte(), size=size, mode="nearest")[0, 0].numpy()
        return F.interpolate(values.float(), size=size, mode="bilinear", align_corners=False)[0, 0].numpy()

    def save_overlay(self, file: Path) -> None:
        """The slice with the largest mask."""
        number = max(self.area, key=lambda number: self.area[number])
        image = Image.fromarray(self.volume.read(number))
        overlay(image, {name: self.map(name, number) for name in ("mask", "uncertainty")}).save(file)

    def measures(self) -> dict[str, str]:
        """What review.csv says; probability, uncertainty and abstained fraction at the network's size."""
        several, volume, area = len(self.slices) > 1, self.volume, sum(self.area.values())
        maps = {
            name: torch.cat([each[name] for each in self.slices.values()]) for name in self.slices[min(self.slices)]
        }
        tall = {name: maps[name][None].to(self.last.mask.device) for name in ("mask", "probability")}  # [1, n H, W]
        errors = [summary["largest_standard_error"] for summary in self.summaries]
        measured = {
            "review_score": dataclasses.replace(self.last, **tall).review_score.item(),
            "found_pixels": area,
            "found_mm2": math.nan if several else area * volume.pixel_mm2,
            "found_ml": area * volume.pixel_mm2 * volume.slice_mm / 1000.0 if several else math.nan,
            "max_probability": maps["probability"].max().item(),
            "mean_uncertainty": maps["uncertainty"].double().mean().item(),
            "abstained_fraction": maps["abstain"].double().mean().item() if "abstain" in maps else math.nan,
            "num_samples": np.mean([summary["num_samples"] for summary in self.summaries]),
            "standard_error": math.nan if None in errors else max(errors),
        }
        return {name: "" if math.isnan(value) else f"{round(value, 6):.12g}" for name, value in measured.items()}


class ImageVolume(InputVolume):
    """A PNG, JPEG, BMP, TIFF, GIF or WebP; large ones are read once and not kept."""

    numbers = (0,)

    def read(self, number: int) -> np.ndarray:
        pixels = read_image(self.source.location, window=self.args.window)
        self.shape = (1, *pixels.shape[:2])
        return pixels


class NiftiVolume(InputVolume):
    """A NIfTI volume, turned to the nearest right, anterior, superior axes and cut along one of them."""

    def __init__(self, source: Source, args: argparse.Namespace) -> None:
        super().__init__(source, args)
        self.axis = source.part[0] if source.part else args.axis
        self.read(0)  # refuses a damaged volume
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
        return read_image(f"{self.source.files[0]}#{self.axis}={number}", window=self.args.window)

    def as_slices(self, voxels: np.ndarray) -> np.ndarray:
        """Stored voxels, seen as slices the way `read_image` shows them: [slices, h, w], the same memory."""
        axes = (*voxels.shape, 1, 1)[:3]
        turned = nib.orientations.apply_orientation(voxels.reshape(axes), self.turn)
        first = np.moveaxis(turned, AXES.index(self.axis), 0)
        return rearrange(first, "n across up -> n up across")[:, ::-1, ::-1]

    def write(self, folder: Path, name: str, result: Result) -> None:
        result.save_overlay(folder / f"{name}_overlay.png")
        for of in result.names:
            voxels = np.full(self.image.shape, BLANK[of])
            slices = self.as_slices(voxels)
            for number in self.numbers:
                slices[number] = result.map(of, number)
            header = self.image.header.copy()
            header.extensions.clear()  # they belong to the scan's own voxels
            header.set_data_dtype(voxels.dtype)
            header.set_intent("none", name=of)
            header["cal_min"], header["cal_max"], header["descrip"] = 0.0, 0.0, b"pvl-adapter"
            image = type(self.image)(voxels, None, header)  # without an affine, so that both of the header's stay
            with (
                (folder / f"{name}_{of}.nii.gz").open("wb") as raw,
                gzip.GzipFile("", "wb", compresslevel=5, fileobj=raw, mtime=0) as packed,  # the same bytes every time
            ):
                image.to_stream(packed)
