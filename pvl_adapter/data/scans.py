"""Inputs as stacks of slices, and where the maps of a slice belong in the input's own geometry."""

from __future__ import annotations

import gzip
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from einops import rearrange
from PIL import Image

from pvl_adapter.data.inputs import Source
from pvl_adapter.data.reading import read_image
from pvl_adapter.prediction import _levels

if TYPE_CHECKING:
    from pvl_adapter.data.results import Result

ORIENTATIONS: Any = nib.orientations
AXES = "xyz"  # of the volume turned to right, anterior, superior: slices are sagittal, coronal, axial
IN_MEMORY = 1 << 22  # bytes; larger arrays are kept on disk

Key = tuple[Any, ...]
"""A slice: its axis ("x", "y", "z", or "frame" as it was acquired), its number and, if there are several, its time."""


@dataclass(frozen=True)
class InputOptions:
    """How inputs are cut into slices and shown.

    Attributes:
        window: Center and width; see `pvl_adapter.data.read_image`.
        axes: Along which slices are cut, of "x", "y" and "z"; empty means z, and of DICOM as it was acquired.
        slices: Which of them; None means all.
        scratch: Folder for temporary files, which are as large as the maps; None means the system's.
    """

    window: tuple[float, float] | None = None
    axes: tuple[str, ...] = ()
    slices: slice | None = None
    scratch: Path | None = None


class InputVolume:
    """The slices of an input; an image has one.

    Attributes:
        keys: Of the slices that are asked for, in order.
        shape: Of the maps as they are written.
        pixel_mm2: Area of a pixel; NaN if unknown.
        slice_mm: Distance of neighbouring slices; NaN if unknown or not the same everywhere.
        notes: What a reviewer should know.
    """

    keys: list[Key]
    shape: tuple[int, ...]
    pixel_mm2 = slice_mm = math.nan

    def __init__(self, source: Source, options: InputOptions) -> None:
        self.source, self.options = source, options
        self.notes: list[str] = []
        if not source.files[0].is_file():
            raise FileNotFoundError(f"{source.files[0]} does not exist; correct the name, or put it there")

    def read(self, key: Key) -> np.ndarray:
        """A slice as the model is shown it: uint8, [h, w] or [h, w, 3]."""
        raise NotImplementedError

    def view(self, voxels: np.ndarray, key: Key) -> np.ndarray:
        """Where a slice lies in an array of the volume's shape: [h, w], the same memory."""
        return voxels[key[1]]

    def size(self, key: Key) -> tuple[int, int]:
        """Height and width of a slice."""
        height, width = self.view(np.broadcast_to(np.uint8(0), self.shape), key).shape
        return height, width

    def array(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Zeros, as a rule on disk, so that memory does not grow with the volume; in the order of NIfTI files."""
        shape = tuple(shape)
        if math.prod(shape) * np.dtype(dtype).itemsize <= IN_MEMORY:
            return np.zeros(shape, dtype, order="F")
        with tempfile.TemporaryFile(dir=self.options.scratch) as file:  # without a name: it goes with the array
            return np.memmap(file, dtype, "w+", shape=shape, order="F")

    def write(self, folder: Path, stems: Sequence[str], result: Result) -> None:
        """Write the result of each sentence to files `folder`/`stem`...; here those of a single image."""
        for k, stem in enumerate(stems):
            for name in result.names:
                values = result.map(name, k, self.keys[0])
                levels = Image.fromarray(values * np.uint8(255)) if name == "abstain" else _levels(values, name)
                levels.save(folder / f"{stem}_{name}.png", compress_level=1)
            result.save_overlay(folder / f"{stem}_overlay.png", k)
            full = {name: result.map(name, k, self.keys[0]) for name in result.kept} if result.options.maps else None
            maps = full or {name: values[k, 0] for name, values in result.maps.items()}
            np.savez_compressed(folder / f"{stem}.npz", allow_pickle=False, **maps)

    def choose(self, axis: str, count: int) -> list[Key]:
        """Keys of the slices that are asked for."""
        if self.source.part:
            read_image(self.source.location, window=self.options.window)  # refuses a slice that is not there
            return [self.source.part]
        numbers = range(count) if count == 1 else range(count)[self.options.slices or slice(None)]
        if not numbers:
            raise ValueError(f"--slices leaves none of {count} slices; they are counted from 0")
        return [(axis, number) for number in numbers]


class ImageVolume(InputVolume):
    """A PNG, JPEG, BMP, TIFF, GIF or WebP; large ones are read once and not kept."""

    def __init__(self, source: Source, options: InputOptions) -> None:
        super().__init__(source, options)
        self.keys = [source.part or ("frame", 0)]

    def read(self, key: Key) -> np.ndarray:
        pixels = read_image(self.source.location, window=self.options.window)
        self.shape = (1, *pixels.shape[:2])
        return pixels

    def view(self, voxels: np.ndarray, key: Key) -> np.ndarray:
        return voxels[0]


class NiftiVolume(InputVolume):
    """A NIfTI volume, turned to the nearest right, anterior, superior axes and cut along one of them."""

    image: Any

    def __init__(self, source: Source, options: InputOptions) -> None:
        super().__init__(source, options)
        self.axis = source.part[0] if source.part else (options.axes or ("z",))[0]
        self.read((self.axis, 0))  # refuses a damaged volume
        self.image = nib.load(source.files[0])
        self.turn = ORIENTATIONS.io_orientation(self.image.affine)
        self.shape = self.image.shape
        self.keys = self.choose(self.axis, len(self.stack(np.broadcast_to(np.uint8(0), self.shape))))
        if not self.image.header["qform_code"] and not self.image.header["sform_code"]:
            self.notes.append("the header does not say where left and right are (qform_code and sform_code are 0)")
        unit = {"meter": 1000.0, "micron": 0.001}.get(self.image.header.get_xyzt_units()[0], 1.0)
        steps = unit * self.image.affine[:3, np.argsort(self.turn[:, 0])].T  # mm of one voxel to the right, ...
        across = np.roll(steps, -AXES.index(self.axis), axis=0)  # from slice to slice first
        self.pixel_mm2 = float(np.linalg.norm(np.cross(across[1], across[2])))
        self.slice_mm = float(abs(np.linalg.det(across)) / self.pixel_mm2)

    def read(self, key: Key) -> np.ndarray:
        return read_image(f"{self.source.files[0]}#{key[0]}={key[1]}", window=self.options.window)

    def stack(self, voxels: np.ndarray) -> np.ndarray:
        """Stored voxels, seen as slices the way `read_image` shows them: [slices, h, w], the same memory."""
        axes = (*voxels.shape, 1, 1)[:3]
        turned = ORIENTATIONS.apply_orientation(voxels.reshape(axes), self.turn)
        first = np.moveaxis(turned, AXES.index(self.axis), 0)
        return rearrange(first, "n across up -> n up across")[:, ::-1, ::-1]

    def view(self, voxels: np.ndarray, key: Key) -> np.ndarray:
        return self.stack(voxels)[key[1]]

    def write(self, folder: Path, stems: Sequence[str], result: Result) -> None:
        for k, stem in enumerate(stems):
            result.save_overlay(folder / f"{stem}_overlay.png", k)
            for name in result.names:
                self.save(folder / f"{stem}_{name}.nii.gz", result.voxels(name, k), name)

    def save(self, file: Path, voxels: np.ndarray, name: str) -> None:
        """Write a map with the input's header."""
        header = self.image.header.copy()
        header.extensions.clear()  # they belong to the scan's own voxels
        header.set_data_dtype(voxels.dtype)
        header.set_intent("none", name=name)
        header["cal_min"], header["cal_max"], header["descrip"] = 0.0, 0.0, b"pvl-adapter"
        image = type(self.image)(voxels, None, header)  # without an affine, so that both of the header's stay
        with (
            file.open("wb") as raw,
            gzip.GzipFile("", "wb", compresslevel=5, fileobj=raw, mtime=0) as packed,  # the same bytes every time
        ):
            image.to_stream(packed)


def open_input(source: Source, options: InputOptions) -> InputVolume:
    """An input, cut into slices.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or has not the slices that are asked for.
    """
    from pvl_adapter.data.dicom_scans import DicomVolume

    kinds: dict[str, type[InputVolume]] = {"nifti": NiftiVolume, "dicom": DicomVolume}
    return kinds.get(source.kind or "", ImageVolume)(source, options)
