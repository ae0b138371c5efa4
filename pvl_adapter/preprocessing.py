"""Pictures in: whatever the user holds becomes the tensor the network takes.

Shape alphabet: B batch, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
Pictures = Picture | Sequence[Picture] | Tensor
"""A picture or several: a path, a PIL image, an array [H, W] or [H, W, 3] (8-bit, or float in [0, 1]); or tensors that
are prepared already, float [B, 3, H, W]."""


def prepare_images(pictures: Pictures, *, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resize (the aspect ratio is not kept), scale to [0, 1] and normalise.

    Args:
        pictures: One or several; a float tensor is taken to be prepared and returned as it is.
        size: Height and width in pixels.
        mean: Of red, green and blue, in [0, 1].
        std: Likewise.

    Returns:
        [B, 3, H, W], float32.

    Raises:
        ValueError: If something is no picture.
    """
    if isinstance(pictures, Tensor):
        if not pictures.is_floating_point():
            raise ValueError(
                f"a tensor of {pictures.dtype} was given; tensors must be prepared already (float, normalised, "
                "[batch, 3, height, width]), give raw pictures as arrays or PIL images"
            )
        return pictures
    several = pictures if isinstance(pictures, (list, tuple)) else [pictures]
    if not several:
        raise ValueError("no picture was given")
    height, width = size
    arrays = [
        np.asarray(_open(picture).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        for picture in several
    ]
    images = torch.from_numpy(np.stack(arrays)) / 255.0  # [B, H, W, 3]
    images = (images - torch.tensor(mean)) / torch.tensor(std)
    return rearrange(images, "b h w c -> b c h w").contiguous()


def _open(picture: object) -> Image.Image:
    """As a PIL image in RGB."""
    if isinstance(picture, (str, os.PathLike)):
        with Image.open(picture) as opened:
            return _open(opened)
    if isinstance(picture, Image.Image):
        if picture.mode.startswith(("I", "F")):  # converting would cut everything off at 255, silently
            raise ValueError(
                f"the picture has more than 8 bits (mode {picture.mode}), expected 8; choose what is black and what is "
                "white, and give a float array between 0 and 1"
            )
        return picture.convert("RGB")
    if isinstance(picture, np.ndarray):
        return Image.fromarray(_eight_bit(picture)).convert("RGB")
    raise ValueError(f"got a {type(picture).__name__}, expected a picture: a path, a PIL image or an array")


def _eight_bit(array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise ValueError(f"got an array of shape {array.shape}, expected [height, width] or [height, width, 3]")
    if array.size == 0:
        raise ValueError(f"got an empty array of shape {array.shape}, expected at least one pixel")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"got an array of {array.dtype}, expected uint8, or float between 0 and 1")
    if not np.isfinite(array).all():
        raise ValueError("the picture holds NaN or infinite values, expected finite numbers")
    low, high = float(array.min()), float(array.max())
    if low < 0.0 or high > 1.0:
        raise ValueError(f"got a float array with values from {low:g} to {high:g}, expected 0 to 1; rescale it")
    return np.round(array * 255.0).astype(np.uint8)
