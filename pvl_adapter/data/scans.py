"""Inputs as stacks of slices, and where the maps of a slice belong in the input's own geometry."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, TiffImagePlugin

from pvl_adapter.data.inputs import Source
from pvl_adapter.data.label_files import itk_snap, label_image, nifti_extensions
from pvl_adapter.data.reading import eight_bit, limits_of, read_image
from pvl_adapter.data.volumes import AXES, Key, open_volume, slice_of, spacing, zeros
from pvl_adapter.image_files import SliceRef, count_frames
from pvl_adapter.prediction import FLOAT_MAPS, _levels

if TYPE_CHECKING:
    from pvl_adapter.data.results import LabelVoxels, Result


@dataclass(frozen=True)
class InputOptions:
    """How inputs are cut into slices and shown.

    Attributes:
        window: Center and width; see `pvl_adapter.data.read_image`.
        axes: Along which slices are cut, of "x" (sagittal), "y" (coronal) and "z" (axial). Probabilities of several are
            averaged. Empty means z, and of DICOM as it was acquired.
        slices: Which of them; None means all.
        scratch: Folder for temporary files, which are as large as volume and maps; None means the system's.
    """

    window: tuple[float, float] | None = None
    axes: tuple[str, ...] = ()
    slices: slice | None = None
    scratch: Path | None = None

    def __post_init__(self) -> None:
        if set(self.axes) - set(AXES) or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"axes are {self.axes}, expected some of {tuple(AXES)}, each once")
        if len(self.axes) > 1 and self.slices is not None:
            raise ValueError(f"got slices along {' and '.join(self.axes)}, expected one axis; name it, or take all")


class InputVolume:
    """The slices of an input; an image has one.

    Attributes:
        keys: Of the slices that are asked for, in order.
        axes: Along which they are cut.
        shape: Of the maps as they are written.
        solid: Whether slices lie side by side in space.
        complete: Whether all slices are asked for.
        pixel_mm2: Area of a pixel; NaN if unknown.
        slice_mm: Distance of neighbouring slices; NaN if unknown or not the same everywhere.
        notes: What a reviewer should know.
    """

    keys: list[Key]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    solid = False
    complete = True
    times = 1
    pixel_mm2 = slice_mm = math.nan
    order: Literal["C", "F"] = "C"

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

    def array(self, dtype: Any) -> np.ndarray:
        """Zeros of the volume's shape, on disk if there are many, so that memory does not grow with the volume."""
        return zeros(self.shape, dtype, folder=self.options.scratch, order=self.order)

    def choose(self, counts: dict[str, int]) -> None:
        """Sets the keys of the slices that are asked for, of so many along each axis that there is."""
        if part := self.source.part:
            if part[1] >= counts.get(part[0], 0):
                known = ", ".join(f"{count} along {axis}" for axis, count in counts.items())
                wanted = f"expected one of {known}, counted from 0"
                raise ValueError(f"{self.source.files[0]}: got {part[0]}={part[1]}, {wanted}")
            numbers = {part[0]: range(part[1], part[1] + 1)}
        else:
            every = slice(None) if self.options.slices is None else self.options.slices
            numbers = {axis: range(counts[axis])[every if counts[axis] > 1 else slice(None)] for axis in self.axes}
        self.axes = tuple(numbers)
        self.complete = all(len(chosen) == counts[axis] for axis, chosen in numbers.items())
        self.keys = [
            (axis, number, *time)
            for time in ([()] if self.times == 1 else [(time,) for time in range(self.times)])
            for axis, chosen in numbers.items()
            for number in chosen
        ]
        if not self.keys:
            raise ValueError(f"--slices leaves none of {counts[self.axes[0]]} slices; they are counted from 0")

    def parts(self, voxels: np.ndarray) -> list[np.ndarray]:
        """What hangs together in space of an array of the volume's shape, the same memory."""
        if not self.solid or len(self.keys) == self.times:
            return [self.view(voxels, key) for key in self.keys]
        return [voxels] if self.times == 1 else [voxels[..., time] for time in range(self.times)]

    def write(self, folder: Path, name: str, result: Result, found: LabelVoxels | None) -> None:
        """Write maps and label map to files `folder`/`name`...; here those of images. Frames become pages of a TIFF."""
        for k, stem in enumerate(result.stems(name)):
            for of in result.names:
                pages = (_levels(result.map(of, k, key), of if of in FLOAT_MAPS else "mask") for key in self.keys)
                self._save_pages(folder / f"{stem}_{short(of)}", pages)
            if result.options.maps:
                maps = {of: np.stack([result.map(of, k, key) for key in self.keys]) for of in result.kept}
                maps = {of: values[0] if len(values) == 1 else values for of, values in maps.items()}
                np.savez(folder / f"{stem}.npz", allow_pickle=False, **maps)
        if found is not None:
            views = [(self.view(found.values, key), self.view(found.entropy, key)) for key in self.keys]
            self._save_pages(folder / f"{name}_labels", (label_image(values, found.labels) for values, _ in views))
            scale = 65535.0 / math.log(len(found.labels) + 1)
            levels = (np.rint(nats * scale).astype(np.uint16) for _, nats in views)
            self._save_pages(folder / f"{name}_entropy", map(Image.fromarray, levels))

    def _save_pages(self, stem: Path, pages: Any) -> None:
        """Write one image as PNG, or frames as TIFF, one after the other."""
        if len(self.keys) == 1:
            next(iter(pages)).save(f"{stem}.png", compress_level=1)
            return
        with TiffImagePlugin.AppendingTiffWriter(f"{stem}.tif", new=True) as file:
            for page in pages:
                page.save(file, format="TIFF", compression="tiff_adobe_deflate")
                file.newFrame()


class ImageVolume(InputVolume):
    """A PNG, JPEG, BMP, TIFF, GIF or WebP, of one or several frames, which are read one at a time."""

    axes = ("frame",)

    def __init__(self, source: Source, options: InputOptions) -> None:
        super().__init__(source, options)
        self.count = count_frames(source.files[0])
        self.choose({"frame": self.count})
        self.shape = (self.count, 0, 0)

    def read(self, key: Key) -> np.ndarray:
        name = f"{self.source.files[0]}#frame={key[1]}" if self.count > 1 else self.source.files[0]
        pixels = read_image(name, window=self.options.window)
        if self.shape[1:] not in ((0, 0), pixels.shape[:2]):
            got = f"got {pixels.shape[:2]} pixels after {self.shape[1:]}"
            raise ValueError(f"{name}: {got}, expected frames of one size; name one, as #frame=0")
        self.shape = (self.count, *pixels.shape[:2])
        return pixels


class NiftiVolume(InputVolume):
    """A NIfTI volume, turned to the nearest right, anterior, superior axes and cut along some of them."""

    solid, order = True, "F"

    def __init__(self, source: Source, options: InputOptions) -> None:
        super().__init__(source, options)
        self.limits = limits_of(options.window)
        self.volume = open_volume(SliceRef(source.files[0]), scratch=options.scratch)
        self.image, self.shape, self.times = self.volume.image, self.volume.stored.shape, self.volume.times
        self.axes = options.axes or ("z",)
        self.choose(dict(zip(AXES, self.volume.shape, strict=True)))
        for axis in self.axes:
            if 1 in (sides := self.size((axis, 0))) and self.volume.shape.count(1) < 2:
                got = f"got slices of {sides[0]} x {sides[1]} pixels along {axis}"
                raise ValueError(
                    f"{source.files[0]}: {got}, expected more; cut along {AXES[self.volume.shape.index(1)]}"
                )
        if not self.image.header["qform_code"] and not self.image.header["sform_code"]:
            self.notes.append("the header does not say where left and right are (qform_code and sform_code are 0)")
        unit = {"meter": 1000.0, "micron": 0.001}.get(self.image.header.get_xyzt_units()[0], 1.0)
        steps = unit * self.image.affine[:3, :3]
        self.pixel_mm2, self.slice_mm = spacing(steps, self.volume.turn, self.axes[0])

    def read(self, key: Key) -> np.ndarray:
        return eight_bit(self.volume.slice(key), self.limits or self.volume.limits)

    def view(self, voxels: np.ndarray, key: Key) -> np.ndarray:
        return slice_of(voxels, self.volume.turn, key)

    def write(self, folder: Path, name: str, result: Result, found: LabelVoxels | None) -> None:
        for k, stem in enumerate(result.stems(name)):
            for of in dict.fromkeys((*result.names, *result.kept)):
                self.save(folder / f"{stem}_{short(of)}.nii.gz", result.voxels(of, k), name=short(of))
        if found is not None:
            extensions = nifti_extensions(found.labels)
            self.save(folder / f"{name}_labels.nii.gz", found.values, name="labels", extensions=extensions)
            self.save(folder / f"{name}_entropy.nii.gz", found.entropy, name="entropy")
            (folder / f"{name}_labels.txt").write_text(itk_snap(found.labels), encoding="utf-8")

    def save(self, file: Path, voxels: np.ndarray, *, name: str, extensions: Sequence[Any] = ()) -> None:
        """Write a map with the input's header."""
        header = self.image.header.copy()
        header.extensions.clear()  # they belong to the scan's own voxels
        header.extensions.extend(extensions)
        header.set_data_dtype(voxels.dtype)
        header.set_intent("label" if extensions else "none", name=name)
        header["cal_min"], header["cal_max"], header["descrip"] = 0.0, 0.0, b"pvl-adapter"
        image = type(self.image)(voxels, None, header)  # without an affine, so that both of the header's stay
        with (
            file.open("wb") as raw,
            gzip.GzipFile("", "wb", compresslevel=5, fileobj=raw, mtime=0) as packed,  # the same bytes every time
        ):
            image.to_stream(packed)


def short(name: str) -> str:
    """Of a map, in file names."""
    return name if name == "mask" else name.removesuffix("_mask")


def open_input(source: Source, options: InputOptions) -> InputVolume:
    """An input, cut into slices.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or has not the slices that are asked for.
    """
    from pvl_adapter.data.dicom_scans import DicomVolume

    kinds: dict[str, type[InputVolume]] = {"nifti": NiftiVolume, "dicom": DicomVolume}
    return kinds.get(source.kind or "", ImageVolume)(source, options)
