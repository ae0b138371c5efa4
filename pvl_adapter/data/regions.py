"""Cleaning of masks: the largest region and holes, plane by plane, so that memory does not grow with a volume.

Pixels hang together by their sides, voxels by their faces, as scipy.ndimage has it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pvl_adapter.data.volumes import zeros


def keep_largest(mask: np.ndarray, *, scratch: Path | None = None) -> None:
    """Empties all of a uint8 mask, in place, but its largest region; of equal ones the first stays."""
    mask, regions, count = _regions(mask, of=1, scratch=scratch)
    if count < 2:
        return
    sizes = np.zeros(count + 1, np.int64)
    for marks in regions:
        sizes += np.bincount(marks.ravel(), minlength=count + 1)
    for plane, marks in zip(mask, regions, strict=True):
        plane[marks != 1 + sizes[1:].argmax()] = 0


def fill_holes(mask: np.ndarray, *, scratch: Path | None = None) -> None:
    """Fills what a uint8 mask encloses, in place: what is not in it and does not reach the border."""
    mask, regions, count = _regions(mask, of=0, scratch=scratch)
    outside = np.zeros(count + 1, bool)
    outside[0] = True  # the mask itself
    for axis in (axis for axis, length in enumerate(mask.shape) if length > 1):
        for border in (0, -1):
            outside[np.unique(regions.take(border, axis))] = True
    for plane, marks in zip(mask, regions, strict=True):
        plane[~outside[marks]] = 1


def _regions(mask: np.ndarray, *, of: int, scratch: Path | None) -> tuple[np.ndarray, np.ndarray, int]:
    """The mask, its longest stride first; number of the region that each pixel of this value is in; their count."""
    from scipy import ndimage  # type: ignore[import-untyped]

    mask = mask.T if mask.flags.f_contiguous else mask
    same, regions = zeros(mask.shape, bool, folder=scratch), zeros(mask.shape, np.int32, folder=scratch)
    for plane, inside in zip(mask, same, strict=True):
        np.equal(plane, of, out=inside)
    return mask, regions, int(ndimage.label(same, output=regions))
