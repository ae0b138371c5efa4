"""NIfTI volumes, cut into the slices that a radiologist's display shows.

Voxels are turned to the nearest right, anterior, superior axes (as nibabel's `as_closest_canonical`). A slice is shown
with the patient's right on the viewer's left (axial x and coronal), the front at the top (axial) or left (sagittal),
and the head at the top (sagittal and coronal); voxels stay as they are, whatever their size in mm.
"""

from __future__ import annotations

import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pvl_adapter.data.issues import ReadError, reason

AXES = "xyz"
PERCENTILES = (0.5, 99.5)
"""Of the values: what is black and white where nobody says."""


class Volume:
    """The voxels of a file.

    Attributes:
        voxels: [X, Y, Z], growing to the patient's right, front and head.
    """

    def __init__(self, voxels: np.ndarray) -> None:
        self.voxels = voxels

    @cached_property
    def limits(self) -> tuple[float, float]:
        """What is black and what is white where nobody says, of all slices alike."""
        low, high = np.percentile(self.voxels, PERCENTILES)
        return float(low), float(high)

    @cached_property
    def levels(self) -> np.ndarray:
        """The different values that it holds, sorted."""
        return np.unique(self.voxels)

    def slice(self, axis: str | None, index: int | None) -> np.ndarray:
        """One slice as it is shown, [H, W].

        Args:
            axis: "x", "y" or "z"; None if there is but one slice.
            index: Counted from 0, towards right, front or head.
        """
        if axis is None or index is None:
            single = [number for number, length in enumerate(self.voxels.shape) if length == 1]
            if not single:
                raise ReadError(
                    f"volume where a slice is needed: it is {self.voxels.shape} voxels",
                    f"name the slice: #z=0 to #z={self.voxels.shape[2] - 1} behind the file name, or #x=, #y=",
                )
            axis, index = AXES[single[-1]], 0
        count = self.voxels.shape[AXES.index(axis)]
        if not 0 <= index < count:
            raise ReadError(
                f"slice does not exist: {axis}={index}, the volume has {count} along {axis}",
                f"give {axis}=0 to {axis}={count - 1}",
            )
        cut = np.take(self.voxels, index, axis=AXES.index(axis))
        return cut[::-1, ::-1].T


def read_volume(file: Path) -> Volume:
    """A NIfTI file; the last two that were read are kept, for tables name slice after slice.

    Raises:
        ReadError: If it is damaged, or holds no volume of finite numbers.
    """
    status = file.stat()
    return _read(os.fspath(file), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _read(file: str, _modified: int, _size: int) -> Volume:
    try:
        import nibabel
    except ImportError as error:
        raise ReadError("NIfTI needs nibabel: it is not installed", 'pip install "pvl-adapter[data]"') from error
    try:
        image = nibabel.load(file, mmap=False)
        if not isinstance(image, nibabel.Nifti1Image):
            raise ReadError(f"file is no NIfTI: nibabel reads a {type(image).__name__}", "convert it to NIfTI")
        voxels = np.asanyarray(image.dataobj)
        orientations: Any = nibabel.orientations
        orientation = orientations.io_orientation(image.affine)
    except ReadError:
        raise
    except Exception as error:  # of damaged files nibabel says anything from EOFError to zlib.error
        raise ReadError(
            f"file is damaged or no NIfTI: {reason(error)}", "fetch or convert it again (cut off on the way?)"
        ) from error
    if voxels.dtype.kind not in "buif":
        raise ReadError(f"volume is not of plain numbers: {voxels.dtype}", "save one grey value for each voxel")
    shape = voxels.shape + (1,) * (3 - voxels.ndim)
    if voxels.size == 0 or any(length != 1 for length in shape[3:]):
        raise ReadError(f"volume is not 3-D: it has shape {voxels.shape}", "save one volume a file")
    if voxels.dtype.kind == "f":
        if not np.isfinite(voxels).all():
            bad = int((~np.isfinite(voxels)).sum())
            raise ReadError(f"values are not finite: {bad} voxels are NaN or infinite", "replace them (np.nan_to_num)")
        voxels = voxels.astype(np.float32)  # half the memory
    if np.isnan(orientation).any():
        raise ReadError("orientation is unknown: the affine is singular", "save the file with a valid affine")
    return Volume(orientations.apply_orientation(voxels.reshape(shape[:3]), orientation))
