"""DICOM pictures and masks, one frame at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pvl_adapter.data.issues import ReadError, reason
from pvl_adapter.data.volumes import PERCENTILES


def is_dicom(file: Path) -> bool:
    """Whether a file is DICOM by its name or content; such files often have no extension."""
    if file.suffix.lower() in (".dcm", ".dicom"):
        return True
    with file.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM"


def read_dicom(
    file: Path, *, frame: int | None, limits: tuple[float, float] | None
) -> tuple[np.ndarray, tuple[float, float] | None, bool]:
    """A frame as it is to be shown.

    Args:
        file: With or without several frames.
        frame: Counted from 0; None if there is but one.
        limits: What is black and white in the units of the file (HU in CT), None means as the file says, or else by
            percentiles.

    Returns:
        Values [H, W] or [H, W, 3]; which of them are black and white, None if they are grey levels of 8 bits already;
        and whether black and white are to be exchanged.

    Raises:
        ReadError: If it is damaged or holds no picture.
    """
    header, stored = _read(file, frame=frame, raw=False)
    photometric = str(header.get("PhotometricInterpretation", ""))
    try:
        if photometric == "PALETTE COLOR":
            from pydicom.pixels.processing import apply_color_lut

            colours = apply_color_lut(stored, header)
            return (colours >> 8 if colours.dtype == np.uint16 else colours)[..., :3].astype(np.uint8), None, False
        if stored.ndim == 3:
            bits = int(header.get("BitsStored", 8))
            return (stored >> max(bits - 8, 0)).astype(np.uint8), None, False
        values, rescaled = _rescaled(header, stored, frame or 0)
        own = _own_window(header, values, frame or 0)
    except Exception as error:  # a header may hold anything
        raise ReadError(f"DICOM header is faulty: {reason(error)}", "mend or export it again") from error
    inverted = photometric == "MONOCHROME1"
    if own is None and not rescaled and int(header.get("BitsStored", 8)) <= 8:
        depth = 255.0 / (2 ** int(header.get("BitsStored", 8)) - 1)
        return np.rint(stored * depth).astype(np.uint8), None, inverted
    if limits is not None:
        return values, limits, inverted
    if own is not None:
        return (*own, inverted)
    low, high = np.percentile(values, PERCENTILES)
    return values, (float(low), float(high)), inverted


def read_stored(file: Path, *, frame: int | None) -> np.ndarray:
    """The stored values of a frame, [H, W] or [H, W, 3]: masks and label maps mean these."""
    return _read(file, frame=frame, raw=True)[1]


def _read(file: Path, *, frame: int | None, raw: bool) -> tuple[Any, np.ndarray]:
    try:
        import pydicom
        from pydicom.pixels.utils import pixel_array
    except ImportError as error:
        raise ReadError("DICOM needs pydicom: it is not installed", 'pip install "pvl-adapter[data]"') from error
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
    except Exception as error:  # of damaged files pydicom says anything
        raise ReadError(f"file is damaged or no DICOM: {reason(error)}", "fetch or export it again") from error
    if "Rows" not in header or "Columns" not in header:
        kind = header.get("Modality", "unknown")
        raise ReadError(
            f"DICOM file holds no picture: its modality is {kind}",
            "give files that hold pictures, or fetch it again if it was cut off",
        )
    try:
        count = int(header.get("NumberOfFrames") or 1)
    except (TypeError, ValueError) as error:
        raise ReadError(f"DICOM header is faulty: {reason(error)}", "mend or export it again") from error
    if frame is None and count > 1:
        raise ReadError(
            f"several frames where one is needed: the file has {count}",
            f"name the frame: #frame=0 to #frame={count - 1} behind the file name",
        )
    if frame is not None and not 0 <= frame < count:
        raise ReadError(
            f"frame does not exist: frame={frame}, the file has {count}", f"give frame=0 to frame={count - 1}"
        )
    try:
        stored = pixel_array(file, index=frame or 0, raw=raw)
    except Exception as error:  # damaged, or compressed in a way that needs another package: pydicom says which
        syntax = getattr(getattr(header.file_meta, "TransferSyntaxUID", None), "name", "unknown")
        raise ReadError(
            f"DICOM pixels cannot be decoded: {reason(error)} (transfer syntax {syntax})",
            "fetch it again; or install what pydicom names; or decompress it, for example by gdcmconv --raw",
        ) from error
    return header, stored


def _group(header: Any, name: str, frame: int) -> Any:
    """A functional group of a frame, or what it has in common with the others, or the header itself."""
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    shared = header.get("SharedFunctionalGroupsSequence")
    for groups, index in ((per_frame, frame), (shared, 0)):
        if groups and index < len(groups) and groups[index].get(name):
            return groups[index][name][0]
    return header


def _rescaled(header: Any, stored: np.ndarray, frame: int) -> tuple[np.ndarray, bool]:
    """Values in the units of the file, [H, W], and whether they differ from the stored ones."""
    from pydicom.pixels.processing import apply_modality_lut

    group = _group(header, "PixelValueTransformationSequence", frame)
    slope, intercept = float(group.get("RescaleSlope", 1.0)), float(group.get("RescaleIntercept", 0.0))
    if header.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, header).astype(np.float64), True
    return stored * slope + intercept, (slope, intercept) != (1.0, 0.0)


def _own_window(header: Any, values: np.ndarray, frame: int) -> tuple[np.ndarray, tuple[float, float]] | None:
    """Values, and which of them the file itself wants to be black and white; of several windows the first.

    DICOM PS3.3, C.11.2: functions LINEAR, LINEAR_EXACT and SIGMOID, or a table.
    """
    group = _group(header, "FrameVOILUTSequence", frame)
    if group.get("VOILUTSequence"):
        from pydicom.pixels.processing import apply_voi

        bits = int(group.VOILUTSequence[0].LUTDescriptor[2])
        return apply_voi(np.rint(values).astype(np.int64), group).astype(np.float64), (0.0, 2.0**bits - 1)
    if group.get("WindowCenter") is None or group.get("WindowWidth") is None:
        return None
    center, width = (float(np.atleast_1d(group[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    function = str(group.get("VOILUTFunction") or "LINEAR")
    if not np.isfinite([center, width]).all() or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(-4.0 * (values - center) / width)), (0.0, 1.0)
    if function == "LINEAR":  # between the centers of the first and the last grey level
        center, width = center - 0.5, width - 1.0
    return values, (center - width / 2, center + width / 2)
