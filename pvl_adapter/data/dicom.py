"""DICOM images and masks, one frame at a time, by pydicom's own transforms."""

from __future__ import annotations

from typing import Any

import numpy as np

from pvl_adapter.data.volumes import PERCENTILES
from pvl_adapter.image_files import SliceRef, reading

Limits = tuple[float, float]  # black and white


def read_dicom(ref: SliceRef, *, limits: Limits | None) -> tuple[np.ndarray, Limits | None, bool]:
    """A frame as it is to be shown.

    Args:
        ref: The file, and the frame if it has several.
        limits: Black and white in the units of the file (HU in CT); None means as the file says, else by percentiles.

    Returns:
        Values [H, W] or [H, W, 3]; their limits, None if they are uint8 already; whether to invert them (MONOCHROME1).
    """
    header, stored = _read(ref, raw=False)
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

    with reading(ref, "DICOM with a valid header", fix="export it again"):
        bits, photometric = int(header.get("BitsStored", 8)), str(header.get("PhotometricInterpretation", ""))
        if photometric == "PALETTE COLOR":
            stored = apply_color_lut(stored, header)[..., :3]
            bits = stored.dtype.itemsize * 8
        if stored.ndim == 3:
            return (stored >> max(bits - 8, 0)).astype(np.uint8), None, False
        values = apply_modality_lut(stored, header)
        inverted, windowed = photometric == "MONOCHROME1", _windowed(header, values)
        if windowed and not limits:
            return *windowed, inverted
        if bits <= 8 and not windowed and np.array_equal(values, stored):
            return np.rint(stored * (255.0 / (2**bits - 1))).astype(np.uint8), None, inverted
        low, high = limits or np.percentile(values, PERCENTILES)
    return values, (float(low), float(high)), inverted


def read_stored(ref: SliceRef) -> np.ndarray:
    """The stored values of a frame, [H, W] or [H, W, 3], which masks and label maps mean."""
    return _read(ref, raw=True)[1]


def _read(ref: SliceRef, *, raw: bool) -> tuple[Any, np.ndarray]:
    """Header, with the frame's own attributes, and stored values."""
    with reading(ref, "DICOM"):
        import pydicom
        from pydicom.pixels.utils import pixel_array

        header: Any = pydicom.dcmread(ref.file, stop_before_pixels=True)
        modality, count = header.get("Modality", "unknown"), int(header.get("NumberOfFrames") or 1)
    if "Rows" not in header or "Columns" not in header:
        fix = "leave it out, or download it again if it was cut off"
        raise ValueError(f"{ref}: got DICOM without an image (modality {modality}), expected one; {fix}")
    name, frame = ref.part or ("frame", 0)
    if name != "frame" or frame >= count or (ref.part is None and count > 1):
        got = f"{name}={frame}" if ref.part else "no frame"
        raise ValueError(f"{ref}: got {got}, expected one of its {count} frames; name it, as #frame=0 (the first)")
    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", "unknown")
    fix = "download it again, install what pydicom names, or decompress it, for example by gdcmconv --raw"
    with reading(
        ref, f"DICOM whose pixels can be decoded, of transfer syntax {getattr(syntax, 'name', syntax)}", fix=fix
    ):
        stored = pixel_array(ref.file, index=frame, raw=raw)
    for groups, index in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        for group in (header.get(groups) or [])[index : index + 1]:
            for element in group:  # each a sequence of one item, as in a header of a single frame
                if element.VR == "SQ" and element.value:
                    header.update(element.value[0])
    return header, stored


def _windowed(header: Any, values: np.ndarray) -> tuple[np.ndarray, Limits] | None:
    """Values by the file's own table or first window (DICOM PS3.3, C.11.2), and black and white of them, if any."""
    from pydicom.pixels.processing import apply_voi, apply_windowing

    if header.get("VOILUTSequence"):
        bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
        return apply_voi(np.rint(values).astype(np.int64), header).astype(np.float64), (0.0, 2.0**bits - 1)
    width = header.get("WindowWidth")
    if header.get("WindowCenter") is None or width is None or not float(np.atleast_1d(width)[0]) >= 1:
        return None
    with np.errstate(over="ignore"):  # of the exponential in SIGMOID
        black, white = apply_windowing(np.array([-1e9, 1e9]), header)  # pydicom scales to the range of stored values
    return apply_windowing(values, header).astype(np.float64), (float(black), float(white))
