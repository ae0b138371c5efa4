"""Pictures in: whatever the user holds becomes the tensor the network takes.

Shape alphabet: B batch, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
Images = Picture | Sequence[Picture]
"""A picture or several, of any sizes: a path, a PIL image, an array [H, W] or [H, W, 3], a tensor [H, W] or [3, H, W]
or, for several, [B, 3, H, W]; 8-bit or float in [0, 1], colours in the order red, green, blue. Only a single float
tensor [B, 3, H, W] is no raw picture: it is taken to be prepared."""


def prepare_images(
    pictures: Images,
    *,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str = "RGB",
    resize: str = "bicubic",
) -> Tensor:
    """Resize (the aspect ratio is not kept), scale to [0, 1] and normalise.

    A picture file is turned upright as its EXIF orientation says, and its transparency is dropped.

    Args:
        pictures: One or several; a float tensor [B, 3, H, W] is taken to be prepared and returned as it is.
        size: Height and width in pixels.
        mean: Of each channel, in the order of `channel_order`, in [0, 1].
        std: Likewise.
        channel_order: Of the result, "RGB" or "BGR".
        resize: "bicubic" (Pillow's, antialiased) or "opencv_bilinear" (OpenCV's default, without antialiasing, rounded
            to 8 bits; within one grey level of it).

    Returns:
        [B, 3, H, W], float32.

    Raises:
        ValueError: If something is no picture.
    """
    if isinstance(pictures, Tensor) and pictures.ndim == 4 and pictures.is_floating_point():
        return pictures
    several = to_pil(pictures)
    if not several:
        raise ValueError("no picture was given")
    resized = _opencv_bilinear if resize == "opencv_bilinear" else _bicubic
    images = torch.stack([resized(picture, size) for picture in several]) / 255.0  # [B, 3, H, W]
    if channel_order == "BGR":
        images = images.flip(1)
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def to_pil(pictures: object) -> tuple[Image.Image, ...]:
    """Pictures as a viewer shows them, upright and in RGB; none for prepared tensors."""
    if isinstance(pictures, Tensor) and pictures.ndim == 4:
        if pictures.is_floating_point():
            return ()
        pictures = list(pictures)
    return tuple(_open(picture) for picture in (pictures if isinstance(pictures, (list, tuple)) else [pictures]))


def prepare_masks(masks: Images, *, size: tuple[int, int]) -> Tensor:
    """Masks as training and scoring take them: nearest neighbour, as OpenCV's; grey levels from 127 are foreground.

    Args:
        masks: One or several, of any sizes: a path, a PIL image, or an array or tensor [H, W], 8-bit or bool.
        size: Height and width in pixels.

    Returns:
        [B, H, W], bool.

    Raises:
        ValueError: If something is no mask.
    """
    several = masks if isinstance(masks, (list, tuple)) else [masks]
    if not several:
        raise ValueError("no mask was given")
    return torch.stack([_opencv_nearest(_grey_levels(mask), size) for mask in several]) >= 127  # [B, H, W]


def _bicubic(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """[3, H, W], grey levels."""
    return _tensor(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _opencv_bilinear(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """[3, H, W], grey levels."""
    return F.interpolate(_tensor(picture)[None], size=size, mode="bilinear", align_corners=False)[0].round()


def _opencv_nearest(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """[H, W]; in double precision as OpenCV's, where `F.interpolate` may take the neighbour before."""
    rows, columns = (
        (torch.arange(wanted, dtype=torch.float64) * (1.0 / (wanted / given))).long().clamp(max=given - 1)
        for wanted, given in zip(size, levels.shape, strict=True)
    )
    return levels[rows[:, None].to(levels.device), columns.to(levels.device)]


def _tensor(picture: Image.Image) -> Tensor:
    array = torch.from_numpy(np.array(picture, dtype=np.float32))  # [H, W, 3]
    return rearrange(array, "h w c -> c h w").contiguous()


def _grey_levels(mask: object) -> Tensor:
    """A mask as grey levels, [H, W]."""
    if isinstance(mask, (str, os.PathLike)):
        with _file(mask) as opened:
            return _grey_levels(opened)
    if isinstance(mask, Image.Image):
        _refuse_deep(mask)
        return torch.from_numpy(np.array(ImageOps.exif_transpose(mask).convert("L")))
    levels = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
    if not isinstance(levels, Tensor):
        raise ValueError(f"got a {type(mask).__name__}, expected a mask: a path, a PIL image, an array or a tensor")
    if levels.ndim != 2 or levels.dtype not in (torch.bool, torch.uint8) or not levels.numel():
        raise ValueError(
            f"got a mask of {levels.dtype} with shape {tuple(levels.shape)}, expected [height, width], bool or uint8"
        )
    return levels.to(torch.uint8) * (255 if levels.dtype == torch.bool else 1)


def _open(picture: object) -> Image.Image:
    """As a PIL image in RGB."""
    if isinstance(picture, (str, os.PathLike)):
        with _file(picture) as opened:
            return _open(opened)
    if isinstance(picture, Image.Image):
        _refuse_deep(picture)
        return ImageOps.exif_transpose(picture).convert("RGB")
    if isinstance(picture, Tensor):
        array = picture.detach().cpu().numpy()
        return _open(rearrange(array, "c h w -> h w c") if array.ndim == 3 else array)
    if isinstance(picture, np.ndarray):
        return Image.fromarray(_eight_bit(picture)).convert("RGB")
    raise ValueError(f"got a {type(picture).__name__}, expected a picture: a path, a PIL image, an array or a tensor")


@contextmanager
def _file(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """A picture file, read within; Pillow's own errors about its content do not always name it."""
    try:
        with Image.open(path) as opened:
            yield opened
    except OSError as error:
        if error.errno is not None:  # of the file system, with the path
            raise
        raise ValueError(f"{os.fspath(path)} is damaged or no picture ({error})") from error


def _refuse_deep(picture: Image.Image) -> None:
    if picture.mode.startswith(("I", "F")):  # converting would cut everything off at 255, silently
        raise ValueError(
            f"the picture has more than 8 bits (mode {picture.mode}), expected 8; choose what is black and what is "
            "white, and give a float array between 0 and 1"
        )


def _eight_bit(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise ValueError(
            f"got a picture of shape {array.shape}, expected [height, width] or [height, width, 3], or [3, height, "
            "width] for a tensor"
        )
    if array.size == 0:
        raise ValueError(f"got an empty picture of shape {array.shape}, expected at least one pixel")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"got a picture of {array.dtype}, expected uint8, or float between 0 and 1")
    if not np.isfinite(array).all():
        raise ValueError("the picture holds NaN or infinite values, expected finite numbers")
    low, high = float(array.min()), float(array.max())
    if low < 0.0 or high > 1.0:
        raise ValueError(f"got a float picture with values from {low:g} to {high:g}, expected 0 to 1; rescale it")
    return np.round(array * 255.0).astype(np.uint8)
