"""NIfTI volumes, cut into the slices that a radiologist's display shows, without reading them into memory.

Voxels are turned to the nearest right, anterior, superior axes. A slice shows the patient's right on the viewer's left
(axial and coronal), the front at the top (axial) or left (sagittal), and the head at the top (sagittal and coronal).
Voxels are not resampled, whatever their size in mm.
"""

from __future__ import annotations

import gzip
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pvl_adapter.image_files import SliceRef, reading

AXES = "xyz"
PERCENTILES = (0.5, 99.5)
"""Of the values: black and white where no window is given."""

Key = tuple[Any, ...]
"""A slice: its axis ("x", "y", "z", or "frame" as it was acquired), its number and, if there are several, its time."""

_CHUNK = 1 << 18  # voxels
_IN_MEMORY = 1 << 20  # bytes


class Volume:
    """Voxels of a file, as they are stored in it, with time as the fourth axis.

    Attributes:
        image: As nibabel reads it.
        turn: Orientation of the stored axes, as of `nibabel.io_orientation`.
        shape: Slices along x, y and z.
        times: Points in time.
    """

    def __init__(self, image: Any, turn: np.ndarray, stored: np.ndarray, *, scratch: Path | None) -> None:
        self.image, self.turn, self.stored, self.scratch = image, turn, stored, scratch
        lengths = (*stored.shape, 1, 1)
        self.shape = tuple(lengths[axis] for axis in np.argsort(turn[:, 0]))
        self.times = (*lengths, 1)[3] if stored.ndim > 3 else 1

    def slice(self, key: Key) -> np.ndarray:
        """Values of a slice, [h, w]."""
        return self._scaled(slice_of(self.stored, self.turn, key))

    def named(self, ref: SliceRef) -> np.ndarray:
        """The slice that a path names, [h, w]; it need not be named if there is but one."""
        name, index = ref.part or (AXES[2 - self.shape[::-1].index(1)] if 1 in self.shape else "no slice", 0)
        if name not in tuple(AXES) or index >= self.shape[AXES.index(name)]:
            got = f"got {name}={index} of" if ref.part else "got"
            example = f"{ref.file.name}#z={self.shape[2] // 2} (or x, y)"
            expected = f"expected one of its slices, counted from 0; name it, as {example}"
            raise ValueError(f"{ref}: {got} a volume of {self.shape} voxels, {expected}")
        return self.slice((name, index))

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Black and white where no window is given, the same for all slices."""
        values = zeros((self.stored.size,), self._scaled(self.stored[:0]).dtype, folder=self.scratch)
        for start, chunk in self._chunks():
            values[start : start + len(chunk)] = chunk
        low, high = np.percentile(values, PERCENTILES, overwrite_input=True)  # sorts them where they are, on disk
        return float(low), float(high)

    @cached_property
    def levels(self) -> np.ndarray:
        """The distinct values, sorted."""
        levels = self._scaled(self.stored[:0]).ravel()
        for _, chunk in self._chunks():
            levels = np.union1d(levels, chunk)
        return levels

    def count_bad(self) -> int:
        """Voxels that are NaN or infinite."""
        return sum(int((~np.isfinite(chunk)).sum()) for _, chunk in self._chunks())

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        flat = self.stored.reshape(-1, order="F")  # as it is stored, so no copy
        for start in range(0, flat.size, _CHUNK):
            yield start, self._scaled(flat[start : start + _CHUNK])

    def _scaled(self, stored: np.ndarray) -> np.ndarray:
        from nibabel.volumeutils import apply_read_scaling

        slope, inter = (np.asanyarray(value) for value in (self.image.dataobj.slope, self.image.dataobj.inter))
        values: np.ndarray = apply_read_scaling(np.array(stored), slope, inter)
        return values.astype(np.float32 if values.dtype.kind == "f" else values.dtype.newbyteorder("="))


def slice_of(voxels: np.ndarray, turn: np.ndarray, key: Key) -> np.ndarray:
    """A slice of stored voxels as a radiologist sees it, [h, w], the same memory."""
    from nibabel.orientations import apply_orientation

    axis, number, *time = key
    if voxels.ndim > 3:
        voxels = voxels[(..., *(time or [0]), *[0] * (voxels.ndim - 4))]
    grown = voxels[(..., *[None] * (3 - voxels.ndim))]
    turned: Any = apply_orientation(grown, turn)  # type: ignore[no-untyped-call]
    return np.moveaxis(turned, AXES.index(axis), 0)[number][::-1, ::-1].T


def spacing(steps: np.ndarray, turn: np.ndarray, axis: str) -> tuple[float, float]:
    """Area of a pixel in mm2, and distance of neighbouring slices in mm, of voxels that need not be at right angles.

    Args:
        steps: From voxel to voxel in mm, a column for each stored axis, [3, 3].
        turn: Orientation of the stored axes.
        axis: Along which slices are cut.
    """
    across = np.roll(steps.T[np.argsort(turn[:, 0])], -AXES.index(axis), axis=0)  # from slice to slice first
    area = float(np.linalg.norm(np.cross(across[1], across[2])))
    return area, float(abs(np.linalg.det(across)) / area)


def zeros(
    shape: Sequence[int], dtype: Any, *, folder: Path | None = None, order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """Zeros, large ones in a file in `folder` (None: the system's), so that memory does not grow with them."""
    shape = tuple(shape)
    if math.prod(shape) * np.dtype(dtype).itemsize <= _IN_MEMORY:
        return np.zeros(shape, dtype, order=order)
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name: it goes with the array, also of a killed process
        return np.memmap(file, dtype, "w+", shape=shape, order=order)


def read_volume(ref: SliceRef) -> Volume:
    """A NIfTI file in three dimensions; raises ValueError if it is none, or damaged, or holds NaN."""
    status = ref.file.stat()
    return _read(SliceRef(ref.file), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)  # tables name slice after slice
def _read(ref: SliceRef, _modified: int, _size: int) -> Volume:
    if (volume := open_volume(ref)).times > 1:
        got = f"got {volume.times} points in time, a shape of {volume.stored.shape}"
        raise ValueError(f"{ref}: {got}, expected a 3-D volume of plain numbers; save one volume per file")
    return volume


def open_volume(ref: SliceRef, *, scratch: Path | None = None) -> Volume:
    """A NIfTI file in three dimensions and time; one that is packed is unpacked to a temporary file in `scratch`.

    Raises:
        ValueError: If it is damaged, or not a volume of finite numbers.
    """
    with reading(ref, "NIfTI with an affine that tells the orientation"):
        import nibabel

        image: Any = nibabel.load(ref.file)
        turn = nibabel.io_orientation(image.affine)  # type: ignore[no-untyped-call]
        if not np.isfinite(turn).all():
            raise ValueError("its axes do not span space")
        proxy = image.dataobj
        if empty := not all(proxy.shape):
            stored = np.zeros(proxy.shape, proxy.dtype)
        else:
            with ref.file.open("rb") if ref.file.suffix.lower() == ".nii" else _unpacked(ref.file, scratch) as plain:
                stored = np.memmap(plain, proxy.dtype, "r", offset=proxy.offset, shape=proxy.shape, order="F")
    if stored.dtype.kind not in "buif" or empty or any(length != 1 for length in stored.shape[4:]):
        got = f"got {stored.dtype} voxels of shape {stored.shape}"
        raise ValueError(f"{ref}: {got}, expected a 3-D volume of plain numbers; save one volume per file")
    volume = Volume(image, turn, stored, scratch=scratch)
    if volume.slice(("z", 0)).dtype.kind == "f" and (bad := volume.count_bad()):
        raise ValueError(f"{ref}: got {bad} voxels that are NaN or infinite; replace them (np.nan_to_num)")
    return volume


@contextmanager
def _unpacked(file: Path, scratch: Path | None) -> Iterator[Any]:
    with tempfile.TemporaryFile(dir=scratch) as plain, gzip.open(file) as packed:
        shutil.copyfileobj(packed, plain, _CHUNK)
        plain.flush()
        yield plain
