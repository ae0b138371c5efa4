"""The one way in for images and masks: files, PIL images, arrays and tensors become what the network takes.

Shape alphabet: B batch, H W pixels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from pvl_adapter.image_files import SliceRef, is_high_bit_depth, open_image, upright
from pvl_adapter.resizing import resize_image, resize_mask

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
Images = ImageLike | Sequence[ImageLike]
"""One raw image or several, of any sizes: a path (of NIfTI and multi-page files with the slice or frame, as
"scan.nii.gz#z=40"), a PIL image, an array [H, W] or [H, W, 3], a tensor [H, W] or [3, H, W] or, for several,
[B, 3, H, W]; uint8 or float in [0, 1], colours in the order red, green, blue."""

_ONE_THREAD = threading.Lock()  # Pillow reads a file late, and wrongly for two threads at once
_ROUNDING = 1e-4  # by which a float image may leave [0, 1]
_FULL = (1, 255, 65535)  # the level of foreground in a mask of two levels
_THRESHOLD = 127  # of 255: the official rule for masks with grey edges
_NEAR = 16  # levels this near to 0 or 255 are traces of compression
_CHROMA = 32  # levels by which the channels of a grey JPEG may differ


def prepare_images(
    images: Images,
    *,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str = "RGB",
    resize: str = "bicubic",
) -> Tensor:
    """Resize raw images (the aspect ratio is not kept), scale them to [0, 1] and normalise.

    Image files are turned upright as their EXIF orientation says, and their transparency is dropped. NIfTI and DICOM
    files are read by `pvl_adapter.data.read_image` in its default window.

    Args:
        images: One or several. A tensor [B, 3, H, W] means the same as a list of its images; ValueError if one is none.
        size: Height and width in pixels.
        mean: Of each channel, in the order of `channel_order`, in [0, 1].
        std: Likewise.
        channel_order: Of the result, "RGB" or "BGR".
        resize: "bicubic" (Pillow's, antialiased) or "opencv_bilinear" (OpenCV's default, not antialiased), to uint8.

    Returns:
        [B, 3, H, W], float32; on the device of a uint8 tensor [B, 3, H, W] that has the size already, else on the CPU.
    """
    if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.shape[1:] == (3, *size) and len(images):
        levels = images
    else:
        items = to_pil(images)
        if not items:
            raise ValueError("got no image, expected one or more")
        levels = torch.stack([resize_image(image, size, resize=resize) for image in items])  # [B, 3, H, W]
    if channel_order == "BGR":
        levels = levels.flip(1)
    center, scale = (torch.tensor(values, device=levels.device).view(3, 1, 1) for values in (mean, std))
    return (levels / 255.0 - center) / scale


def to_pil(images: Images) -> tuple[Image.Image, ...]:
    """Raw images as 8-bit PIL images, upright and in RGB; raises ValueError if something is not an image."""
    return tuple(_to_pil(image) for image in _items(images, batch_ndim=4))


def prepare_masks(masks: Images, *, size: tuple[int, int]) -> Tensor:
    """Masks as training and scoring take them, resized to the nearest neighbour as by OpenCV.

    Args:
        masks: One or several, of any sizes: a path, a PIL image, an array or tensor [H, W] or, for several, a tensor
            [B, H, W]. See `foreground` for their values; ValueError if something is not a mask.
        size: Height and width in pixels.

    Returns:
        [B, H, W], bool, on the CPU.
    """
    items = _items(masks, batch_ndim=3)
    if not items:
        raise ValueError("got no mask, expected one or more")
    return torch.stack([resize_mask(_read_mask(mask), size) for mask in items])


def foreground(
    levels: np.ndarray, *, label: int | None = None, known: np.ndarray | None = None, lossy: bool = False
) -> np.ndarray:
    """Which pixels of a mask are foreground.

    A mask has the level 0 and one more: 1, 255, 65535 or True. In a mask of 8 bits with grey edges or traces of lossy
    compression, levels from 127 are foreground, as in the official code. Anything else is a label map and needs a
    label; without one a ValueError lists its levels.

    Args:
        levels: [H, W] or, where the channels agree, [H, W, 3]; integers, bool or float.
        label: The level that is foreground.
        known: Levels of the whole that this is a slice of; None means the levels of `levels`.
        lossy: Lossy compression may have changed the levels.

    Returns:
        [H, W], bool.
    """
    if levels.ndim == 3:
        if (apart := int(np.ptp(levels, axis=2).max())) > (_CHROMA if lossy else 0):
            raise ValueError(f"got a mask in colours ({apart} levels apart), expected grey: save one level per label")
        levels = levels[:, :, 1]
    counts = np.bincount(levels.ravel(), minlength=256) if levels.dtype == np.uint8 and known is None else None
    if known is None:
        known = np.unique(levels) if counts is None else np.flatnonzero(counts)
    if known.dtype.kind == "f":  # integers that were scaled when they were saved are nearly integers
        known, levels = np.unique(np.round(known, 3)), np.round(levels, 3)
    if label is not None:
        return np.asarray(levels == label)
    above = known[known != 0]
    if len(above) == 0 or (len(above) == 1 and above[0] in _FULL):
        return np.asarray(levels != 0)
    if counts is not None and _is_black_and_white(counts, lossy=lossy):
        return levels >= _THRESHOLD
    shown = ", ".join(f"{level:g}" for level in known[:8]) + f" and {len(known) - 8} more" * (len(known) > 8)
    fix = "give a label: #label=2 behind the file name, or label=2 in read_mask"
    raise ValueError(f"got a mask that is not binary: its levels are {shown}; expected 0 and one of {_FULL}; {fix}")


def _is_black_and_white(counts: np.ndarray, *, lossy: bool) -> bool:
    """Whether a histogram [256] is that of two levels with grey edges or traces of compression."""
    if lossy:
        return bool(counts[_THRESHOLD:].any())
    total, grey, between = counts.sum(), counts[1:255].sum(), counts[_NEAR + 1 : 255 - _NEAR].sum()
    edges = grey <= 0.01 * total and between <= 0.1 * min(counts[0], counts[255])
    compressed = between == 0 and counts[255 - _NEAR : 255].any()  # labels are small, so none is nearly white
    resampled = np.count_nonzero(counts) > 16 and between <= 0.1 * total
    return bool(counts[255 - _NEAR :].any() and (edges or compressed or resampled))


def mask_levels(image: Image.Image) -> np.ndarray:
    """The levels of an upright PIL image for `foreground`; the indices of a coloured palette are labels."""
    if image.mode in ("LA", "La"):
        image = image.convert("L")
    if image.mode in ("1", "L") or is_high_bit_depth(image):
        return np.asarray(image)
    colours = np.asarray(image.convert("RGB"))
    return np.asarray(image) if image.mode == "P" and np.ptp(colours, axis=2).any() else colours


def _items(values: object, *, batch_ndim: int) -> list[object]:
    several = isinstance(values, (list, tuple)) or (isinstance(values, Tensor) and values.ndim == batch_ndim)
    return list(values) if several else [values]  # type: ignore[call-overload]


def _to_pil(image: object) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        ref = SliceRef.parse(image)
        if ref.kind() != "image" or ref.label is not None:
            from pvl_adapter.data.reading import read_image

            return Image.fromarray(read_image(image)).convert("RGB")
        opened = open_image(ref)[0]
    elif isinstance(image, Image.Image):
        opened = _single(image)
    else:
        opened = Image.fromarray(_eight_bit(_array(image, "an image")))
    if is_high_bit_depth(opened):
        fix = "read it by pvl_adapter.data.read_image(path, window=(center, width)), or give a float array in [0, 1]"
        raise ValueError(f"got an image of more than 8 bits ({image}), expected 8; {fix}")
    return opened if opened.mode == "RGB" else opened.convert("RGB")


def _read_mask(mask: object) -> np.ndarray:
    """[H, W], bool."""
    if isinstance(mask, (str, os.PathLike)):
        from pvl_adapter.data.reading import read_mask

        return read_mask(mask)
    if isinstance(mask, Image.Image):
        return foreground(mask_levels(_single(mask)))
    levels = _array(mask, "a mask")
    if levels.ndim != 2 or not levels.size or levels.dtype.kind not in "buif":
        raise ValueError(f"got a mask {levels.shape} of {levels.dtype}, expected [height, width], bool or uint8")
    return foreground(levels)


def _array(values: object, expected: str) -> np.ndarray:
    """Images [C, H, W] as [H, W, C]."""
    if isinstance(values, Tensor):
        array = values.detach().cpu().numpy()
        return rearrange(array, "c h w -> h w c") if array.ndim == 3 else array
    if not isinstance(values, np.ndarray):
        raise ValueError(f"got a {type(values).__name__}, expected {expected}: a path, PIL image, array or tensor")
    return values


def _single(image: Image.Image) -> Image.Image:
    """A PIL image, upright."""
    with _ONE_THREAD:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO" and image.tell() == 0:
            got = f"got an image file of {frames} pages or frames"
            raise ValueError(f"{got}, expected one image; give image.copy() of it")
        return upright(image)


def _eight_bit(array: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, 3], uint8."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or (array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3)):
        expected = "[height, width] or [height, width, 3], or [3, height, width] for a tensor"
        raise ValueError(f"got an image of shape {array.shape}, expected {expected}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"got an image of {array.dtype}, expected uint8, or float between 0 and 1")
    low, high = float(array.min()), float(array.max())
    if not (low >= -_ROUNDING and high <= 1.0 + _ROUNDING):  # as well if one is NaN
        fix = "rescale it, or say prepared=True in predict if it comes from model.prepare"
        raise ValueError(f"got a float image with values from {low:g} to {high:g}, expected 0 to 1; {fix}")
    return np.round(array.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def appearance(images: Tensor) -> Tensor:
    """What prepared images [B, 3, H, W] look like, whatever they show, [B, 18]: grey levels, contrast at 5 scales."""
    grey = images.float().mean(dim=1, keepdim=True)  # [B, 1, H, W]
    shares = torch.tensor([0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99], device=grey.device)
    numbers = list(grey.flatten(1).quantile(shares, dim=1))
    for _ in range(5):
        coarse = F.avg_pool2d(grey, 2)
        fine = grey - F.interpolate(coarse, size=grey.shape[-2:], mode="bilinear")
        numbers += [
            (fine.square().mean(dim=(1, 2, 3)) + 1e-6).log(),
            (fine.abs().flatten(1).quantile(0.9, dim=1) + 1e-4).log(),
        ]
        grey = coarse
    return torch.stack(numbers, dim=1)
