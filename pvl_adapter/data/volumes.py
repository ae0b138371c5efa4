"""NIfTI volumes, cut into the slices that a radiologist's display shows.

Voxels are turned to the nearest right, anterior, superior axes (nibabel's `as_closest_canonical`). A slice shows the
patient's right on the viewer's left (axial and coronal), the front at the top (axial) or left (sagittal), and the head
at the top (sagittal and coronal). Voxels are not resampled, whatever their size in mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pvl_adapter.image_files import SliceRef, reading

AXES = "xyz"
PERCENTILES = (0.5, 99.5)
"""Of the values: black and white where no window is given."""


@dataclass
class Volume:
    """The voxels of a file.

    Attributes:
        voxels: [X, Y, Z], growing to the patient's right, front and head.
    """

    voxels: np.ndarray

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
        """The slice that a path names, [H, W]; it need not be named if there is but one.

        Raises:
            ValueError: If it is not named, or does not exist.
        """
        shape = self.voxels.shape
        if ref.part is None and 1 in shape:
            axis, index = 2 - shape[::-1].index(1), 0
        elif ref.part is None:
            raise ValueError(
                f"{ref}: got a volume of {shape} voxels, expected one slice; name it, as {ref.file.name}#z="
                f"{shape[2] // 2} (z=0 to z={shape[2] - 1}, or x, y)"
            )
        elif ref.part[0] == "frame":
            raise ValueError(f"{ref}: got a frame of a NIfTI volume, expected a slice, as #z={shape[2] // 2}")
        else:
            axis, index = AXES.index(ref.part[0]), ref.part[1]
        if index >= shape[axis]:
            raise ValueError(f"{ref}: got {AXES[axis]}={index}, expected {AXES[axis]}=0 to {shape[axis] - 1}")
        return np.take(self.voxels, index, axis=axis)[::-1, ::-1].T


def read_volume(ref: SliceRef) -> Volume:
    """A NIfTI file; the last two are kept, since tables name slice after slice.

    Raises:
        ValueError: If it is damaged, or not a 3-D volume of finite numbers.
    """
    status = ref.file.stat()
    return _read(SliceRef(ref.file), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _read(ref: SliceRef, _modified: int, _size: int) -> Volume:
    try:
        import nibabel
    except ImportError as error:
        raise ValueError(f'{ref} needs nibabel, which is not installed; pip install "pvl-adapter[data]"') from error
    with reading(ref, "NIfTI", fix="download or convert it again"):
        image = nibabel.load(ref.file, mmap=False)
        if not isinstance(image, nibabel.Nifti1Image):
            raise TypeError(f"it is a {type(image).__name__}")
        voxels = np.asanyarray(image.dataobj)
    shape = voxels.shape + (1,) * (3 - voxels.ndim)
    if voxels.dtype.kind not in "buif" or not voxels.size or any(length != 1 for length in shape[3:]):
        raise ValueError(
            f"{ref}: got {voxels.dtype} voxels of shape {voxels.shape}, expected a 3-D volume of plain numbers; save "
            "one volume per file"
        )
    if voxels.dtype.kind == "f":
        if bad := int((~np.isfinite(voxels)).sum()):
            raise ValueError(f"{ref}: got {bad} voxels that are NaN or infinite; replace them (np.nan_to_num)")
        voxels = voxels.astype(np.float32)  # half the memory
    orientations: Any = nibabel.orientations
    with reading(ref, "NIfTI with an affine that tells the orientation", fix="save it with one"):
        turn = orientations.io_orientation(image.affine)
        return Volume(orientations.apply_orientation(voxels.reshape(shape[:3]), turn))
