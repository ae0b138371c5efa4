"""One mask against another.

The surface Dice is that of Nikolov et al. 2018 (arXiv 1809.04430), through MONAI; the released variant is that of
github HealthX-Lab/MedCLIPSeg, commit 8d7ef36. Shape alphabet: H W pixels.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch

from pvl_adapter.metrics.inputs import Map, as_masks, of_the_extra

_RELEASED_EPSILON = 1e-8  # the release adds it to the denominator


def dice(prediction: Map, truth: Map) -> float:
    """Dice similarity coefficient; 1 where both masks are empty.

    Args:
        prediction: [H, W], bool.
        truth: Likewise.

    Raises:
        ValueError: If they are no bool masks of one shape.
    """
    one, other = as_masks(prediction, truth)
    area = int(one.sum()) + int(other.sum())
    return 2.0 * int((one & other).sum()) / area if area else 1.0


def iou(prediction: Map, truth: Map) -> float:
    """Intersection over union; otherwise as `dice`."""
    one, other = as_masks(prediction, truth)
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def surface_dice(
    prediction: Map, truth: Map, *, tolerance: float = 2.0, spacing: tuple[float, float] = (1.0, 1.0)
) -> float:
    """Normalised surface Dice in 2-D: which part of both outlines, by length, lies within `tolerance` of the other.

    Outlines run between pixels (MONAI's sub-voxel way): a window of 2 x 2 pixels that holds both kinds has the length
    of the line that parts them, and distances are those between windows. Counting edge pixels instead would make a
    slanting outline shorter than it is. The border of the picture bounds a mask that touches it.

    Args:
        prediction: [H, W], bool.
        truth: Likewise.
        tolerance: In the unit of `spacing`.
        spacing: Height and width of a pixel.

    Returns:
        1 where both masks are empty, 0 where one is.

    Raises:
        ValueError: If they are no bool masks of one shape, or a number is out of range.
    """
    one, other = as_masks(prediction, truth)
    _check_tolerance(tolerance)
    if len(spacing) != 2 or not all(0.0 < length < math.inf for length in spacing):
        raise ValueError(f"spacing is {spacing}, expected height and width of a pixel, above 0")
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    with of_the_extra():
        from monai.metrics.surface_dice import compute_surface_dice

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy")  # MONAI 1.5 and 1.6, of themselves
        score = compute_surface_dice(
            torch.from_numpy(np.ascontiguousarray(one)[None, None]).float(),  # [1, 1, H, W]
            torch.from_numpy(np.ascontiguousarray(other)[None, None]).float(),
            class_thresholds=[tolerance],
            include_background=True,
            spacing=list(spacing),
            use_subvoxels=True,
        )
    return min(1.0, score.item())


def released_surface_dice(prediction: Map, truth: Map, *, tolerance: float = 2.0) -> float:
    """The "NSD" of the released evaluation, for comparison with the paper. It is none: see `surface_dice`.

    It takes the slice for a volume one voxel thick. The surface of that runs over every foreground pixel, front and
    back, so it is the areas that are compared: it comes out near the Dice or above it, and for two sprinklings of
    random pixels it is nearly 1.

    Args:
        prediction: [H, W], bool.
        truth: Likewise.
        tolerance: In pixels; the paper's is 2.

    Returns:
        1 where both masks are empty, 0 where one is; for others never quite 1.

    Raises:
        ValueError: If they are no bool masks of one shape, or the tolerance is negative.
    """
    with of_the_extra():
        from scipy.ndimage import distance_transform_edt  # type: ignore[import-untyped]

    one, other = as_masks(prediction, truth)
    _check_tolerance(tolerance)
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    rows, columns = (np.flatnonzero((one | other).any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # of both, since pictures may be large
    areas = _surface_of_slice(one[box]), _surface_of_slice(other[box])  # [h + 1, w + 1]
    near = [distance_transform_edt(area == 0.0) <= tolerance for area in areas]
    matched = areas[0][near[1]].sum() + areas[1][near[0]].sum()
    return float(2.0 * matched / (2.0 * (areas[0].sum() + areas[1].sum()) + _RELEASED_EPSILON))  # front and back


def _surface_of_slice(mask: np.ndarray) -> np.ndarray:
    """Area of the surface in front of a slice, for each window of 2 x 2 pixels: [H + 1, W + 1].

    The surface is that of marching cubes, halfway between neighbours. It cuts a corner off a cube (one pixel), or an
    edge (two), is the slanting hexagon's half and a half square (three), or the whole face (four).
    """
    padded = np.pad(mask, 1)
    corners = np.stack([padded[:-1, :-1], padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]])  # [4, H + 1, W + 1]
    corner = math.sqrt(3.0) / 8.0
    area = np.array([0.0, corner, math.sqrt(0.5), 0.5 + 3.0 * corner, 1.0])[corners.sum(axis=0)]
    diagonal = (corners[0] == corners[1]) & (corners[2] == corners[3]) & (corners[0] != corners[2])
    return np.where(diagonal, 2.0 * corner, area)


def _check_tolerance(tolerance: float) -> None:
    if not 0.0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}, expected 0 or more")
