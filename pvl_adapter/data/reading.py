"""Images and masks of any kind of file as 8-bit grey levels or colours, and as foreground."""

from __future__ import annotations

import math
import os

import numpy as np

from pvl_adapter.data.dicom import read_dicom, read_stored
from pvl_adapter.data.volumes import PERCENTILES, read_volume
from pvl_adapter.image_files import SliceRef, is_high_bit_depth, open_image
from pvl_adapter.images import foreground, mask_levels


def read_image(path: str | os.PathLike[str], *, window: tuple[float, float] | None = None) -> np.ndarray:
    """An image as 8-bit grey levels or colours.

    Image files are turned upright as their EXIF orientation says, and their transparency is dropped. uint8 stays as it
    is, and colours of 16 bits lose the lower 8. Of everything else (grey of more than 8 bits, and NIfTI of any type)
    `window` says what is black and what is white, linear between. DICOM counts after its own rescaling (HU in CT), and
    MONOCHROME1 is inverted. NIfTI slices are turned as radiologists' displays show them, the patient's right on the
    left; see `pvl_adapter.data.volumes`.

    Args:
        path: A PNG, JPEG, BMP, TIFF, GIF, WebP, NIfTI or DICOM file, with the slice or frame if it has several:
            "scan.nii.gz#z=40", "cine.dcm#frame=3", "stack.tif#frame=3", counted from 0.
        window: Center and width in the units of the file: black is center - width / 2, white center + width / 2. None
            means the first window that a DICOM file gives, else the 0.5th to the 99.5th percentile, of the image, or of
            the whole volume so that its slices are alike.

    Returns:
        uint8, [H, W] or, in the order red, green, blue, [H, W, 3].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, not an image, or holds values that are not finite; or if the window is not one.
    """
    limits, inverted, ref = limits_of(window), False, SliceRef.parse(path)
    if ref.label is not None:
        raise ValueError(f"{ref}: got a label, expected an image; labels are for masks, leave out label=")
    kind = ref.kind()
    if kind == "nifti":
        volume = read_volume(ref)
        values, limits = volume.named(ref), limits or volume.limits
    elif kind == "dicom":
        values, limits, inverted = read_dicom(ref, limits=limits)
    else:
        image = open_image(ref)[0]
        if not is_high_bit_depth(image):
            return np.array(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))
        values = np.asarray(image)
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"{ref}: got {bad} pixels that are NaN or infinite, expected finite values; replace them")
    levels = eight_bit(values, limits)
    return np.array(255 - levels if inverted else levels, order="C")


def read_mask(path: str | os.PathLike[str], *, label: int | None = None) -> np.ndarray:
    """Which pixels of a mask are foreground; see `pvl_adapter.images.foreground` for the rule.

    DICOM counts as it is stored, and NIfTI slices are turned as by `read_image`.

    Args:
        path: As for `read_image`; may also name the label: "atlas.nii.gz#z=40&label=17".
        label: Of a label map: the value that is foreground.

    Returns:
        Bool, [H, W].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or it cannot be told what is foreground; the message lists the levels found.
    """
    ref = SliceRef.parse(path)
    if label is not None and ref.label not in (None, label):
        raise ValueError(f"{ref}: got the label {ref.label} in the name and {label} beside it; give it once")
    kind, label = ref.kind(), ref.label if label is None else label
    known, lossy = None, False
    if kind == "nifti":
        volume = read_volume(ref)
        levels, known = volume.named(ref), volume.levels
    elif kind == "dicom":
        levels = read_stored(ref)
    else:
        image, lossy = open_image(ref)
        levels = mask_levels(image)
    try:
        return np.array(foreground(levels, label=label, known=known, lossy=lossy), order="C")
    except ValueError as error:
        raise ValueError(f"{ref}: {error}") from error


def limits_of(window: tuple[float, float] | None) -> tuple[float, float] | None:
    """Black and white of a window."""
    if window is None:
        return None
    numbers = [float(number) for number in window]
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
        raise ValueError(f"window is {tuple(window)}, expected center and a positive width, as (40, 400)")
    return numbers[0] - numbers[1] / 2, numbers[0] + numbers[1] / 2


def eight_bit(values: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    """Values as uint8; limits None means of the values' own percentiles, and that uint8 stays as it is."""
    if values.dtype == np.uint8 and limits is None:
        return values
    low, high = limits or np.percentile(values, PERCENTILES)
    if high <= low:  # one value everywhere, or nearly
        return np.where(values > low, np.uint8(255), np.uint8(0))
    return np.rint(np.clip((values.astype(np.float64) - low) / (high - low), 0.0, 1.0) * 255.0).astype(np.uint8)
