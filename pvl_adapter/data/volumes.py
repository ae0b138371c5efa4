"""NIfTI volumes, cut into the slices that a radiologist's display shows.

Voxels are turned to the nearest right, anterior, superior axes. A slice shows the patient's right on the viewer's left
(axial and coronal), the front at the top (axial) or left (sagittal), and the head at the top (sagittal and coronal).
Voxels are not resampled, whatever their size in mm.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pvl_adapter.image_files import SliceRef, reading

AXES = "xyz"
PERCENTILES = (0.5, 99.5)
"""Of the values: black and white where no window is given."""


class Volume:
    """Voxels [X, Y, Z] of a file, growing to the patient's right, front and head."""

    def __init__(self, voxels: np.ndarray) -> None:
        self.voxels = voxels

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Black and white where no window is given, the same for all slices."""
        low, high = np.percentile(self.voxels, PERCENTILES)
        return float(low), float(high)

    @cached_property
    def levels(self) -> np.ndarray:
        """The distinct values, sorted."""
        return np.unique(self.voxels)

    def slice(self, ref: SliceRef) -> np.ndarray:
        """The slice that a path names, [H, W]; it need not be named if there is but one."""
        shape = self.voxels.shape
        name, index = ref.part or (AXES[2 - shape[::-1].index(1)] if 1 in shape else "no slice", 0)
        if name not in tuple(AXES) or index >= shape[AXES.index(name)]:
            got = f"got {name}={index} of a volume of {shape} voxels" if ref.part else f"got a volume of {shape} voxels"
            example = f"{ref.file.name}#z={shape[2] // 2} (or x, y)"
            raise ValueError(f"{ref}: {got}, expected one of its slices, counted from 0; name it, as {example}")
        return np.take(self.voxels, index, axis=AXES.index(name))[::-1, ::-1].T


def read_volume(ref: SliceRef) -> Volume:
    """A NIfTI file; raises ValueError if it is damaged or not a 3-D volume of finite numbers."""
    status = ref.file.stat()
    return _read(SliceRef(ref.file), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)  # tables name slice after slice
def _read(ref: SliceRef, _modified: int, _size: int) -> Volume:
    with reading(ref, "NIfTI with an affine that tells the orientation"):
        import nibabel

        orientations: Any = nibabel.orientations
        image: Any = nibabel.load(ref.file, mmap=False)
        voxels = np.asanyarray(image.dataobj)
        voxels = voxels.reshape(voxels.shape + (1,) * (3 - voxels.ndim))
        voxels = orientations.apply_orientation(voxels, orientations.io_orientation(image.affine))
    if voxels.dtype.kind not in "buif" or not voxels.size or any(length != 1 for length in voxels.shape[3:]):
        got = f"{voxels.dtype} voxels of shape {voxels.shape}"
        raise ValueError(f"{ref}: got {got}, expected a 3-D volume of plain numbers; save one volume per file")
    if voxels.dtype.kind == "f":
        if bad := int((~np.isfinite(voxels)).sum()):
            raise ValueError(f"{ref}: got {bad} voxels that are NaN or infinite; replace them (np.nan_to_num)")
        voxels = voxels.astype(np.float32)  # half the memory
    return Volume(voxels.reshape(voxels.shape[:3]))
