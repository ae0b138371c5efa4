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
        if name not in tuple(AXES):
            raise ValueError(
                f"{ref}: got {name} of a volume of {shape} voxels, expected one slice; name it, as "
                f"{ref.file.name}#z={shape[2] // 2} (or x, y)"
            )
        if index >= shape[AXES.index(name)]:
            raise ValueError(f"{ref}: got {name}={index}, expected {name}=0 to {shape[AXES.index(name)] - 1}")
        return np.take(self.voxels, index, axis=AXES.index(name))[::-1, ::-1].T


def read_volume(ref: SliceRef) -> Volume:
    """A NIfTI file; raises ValueError if it is damaged, or not a 3-D volume of finite numbers."""
    status = ref.file.stat()
    return _read(SliceRef(ref.file), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)  # tables name slice after slice
def _read(ref: SliceRef, _modified: int, _size: int) -> Volume:
    try:
        import nibabel
    except ImportError as error:
        raise ValueError(f'{ref} needs nibabel, which is not installed; pip install "pvl-adapter[data]"') from error
    with reading(ref, "NIfTI"):
        image = nibabel.load(ref.file, mmap=False)
        if not isinstance(image, nibabel.Nifti1Image):
            raise TypeError(f"it is a {type(image).__name__}")
        voxels = np.asanyarray(image.dataobj)
    shape = voxels.shape + (1,) * (3 - voxels.ndim)
    if voxels.dtype.kind not in "buif" or not voxels.size or any(length != 1 for length in shape[3:]):
        got = f"{voxels.dtype} voxels of shape {voxels.shape}"
        raise ValueError(f"{ref}: got {got}, expected a 3-D volume of plain numbers; save one volume per file")
    if voxels.dtype.kind == "f":
        if bad := int((~np.isfinite(voxels)).sum()):
            raise ValueError(f"{ref}: got {bad} voxels that are NaN or infinite; replace them (np.nan_to_num)")
        voxels = voxels.astype(np.float32)  # half the memory
    orientations: Any = nibabel.orientations
    with reading(ref, "NIfTI with an affine that tells the orientation", fix="save it with one"):
        turn = orientations.io_orientation(image.affine)
        return Volume(orientations.apply_orientation(voxels.reshape(shape[:3]), turn))
