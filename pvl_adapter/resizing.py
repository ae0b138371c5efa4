"""Resizing of images and masks: Pillow's bicubic, and what OpenCV computes, bit for bit.

Shape alphabet: H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from pvl_adapter.config import require

_COEFFICIENT = 1 << 11  # OpenCV's fixed point for 8-bit images


def resize_image(image: Image.Image, size: tuple[int, int], *, resize: str = "bicubic") -> Tensor:
    """[3, H, W], uint8, of an RGB image; see `prepare_images`."""
    require(resize in ("bicubic", "opencv_bilinear"), "resize", resize, '"bicubic" or "opencv_bilinear"')
    if resize == "opencv_bilinear":
        levels = opencv_bilinear(image, size)
    else:
        levels = np.array(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))  # [H, W, 3]
    return torch.from_numpy(rearrange(levels, "h w c -> c h w").copy())


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    """[H, W], bool; nearest neighbour in double precision as OpenCV's, where `F.interpolate` may take another one."""
    rows, columns = (
        (np.arange(wanted) * (1.0 / (wanted / given))).astype(np.int64).clip(max=given - 1)
        for wanted, given in zip(size, mask.shape, strict=True)
    )
    return torch.from_numpy(mask[rows][:, columns])


def opencv_bilinear(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """cv2.resize(image, INTER_LINEAR) of 8 bits, exact in every value: [H, W, 3].

    OpenCV computes in integers: coefficients of 11 bits, 4 bits cut off after the columns, 16 and 2 after the rows
    (modules/imgproc/src/resize.cpp: HResizeLinear, VResizeLinear).
    """
    top, bottom, above, below = _neighbours(image.height, size[0], clip_fraction=False)
    left, right, before, behind = _neighbours(image.width, size[1], clip_fraction=True)

    def along(rows: np.ndarray) -> np.ndarray:
        if image.height > 4 * len(rows):  # of a large image only the rows that count are copied
            strips = [np.asarray(image.crop((0, row, image.width, row + 1))) for row in rows.tolist()]
            levels = np.concatenate(strips).astype(np.int32)
        else:
            levels = np.asarray(image)[rows].astype(np.int32)
        return (levels[:, left] * before[:, None] + levels[:, right] * behind[:, None]) >> 4  # [H, W, 3]

    rows = ((above[:, None, None] * along(top)) >> 16) + ((below[:, None, None] * along(bottom)) >> 16)
    return ((rows + 2) >> 2).astype(np.uint8)


def _neighbours(given: int, wanted: int, *, clip_fraction: bool) -> tuple[np.ndarray, ...]:
    """Of each position on a resized axis: the two positions it lies between, and their integer coefficients.

    Beyond the edge OpenCV clips positions everywhere, but fractions on the column axis alone.
    """
    position = ((np.arange(wanted) + 0.5) * (1.0 / (wanted / given)) - 0.5).astype(np.float32)
    low = np.floor(position).astype(np.int64)
    fraction = position - low.astype(np.float32)
    if clip_fraction:
        fraction[(low < 0) | (low >= given - 1)] = 0.0
    first, second = (np.rint(part * np.float32(_COEFFICIENT)).astype(np.int32) for part in (1.0 - fraction, fraction))
    return low.clip(0, given - 1), (low + 1).clip(0, given - 1), first, second
