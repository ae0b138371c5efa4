"""Pictures and masks from files: PNG, JPEG, BMP, TIFF, slices of NIfTI volumes and DICOM frames.

A file name may say which part of a file is meant: `scan.nii.gz#z=40`, `cine.dcm#frame=3`, both counted from 0; and
which value of a label map is foreground: `atlas.nii.gz#z=40&label=17`, `labels.png#label=2`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pvl_adapter.data.dicom import is_dicom, read_dicom, read_stored
from pvl_adapter.data.issues import ReadError, listed, reason
from pvl_adapter.data.volumes import PERCENTILES, Volume, read_volume

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
VOLUME_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".dicom")

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # Pillow's others are no medium for scans, and some run programs
_ADDRESS = re.compile(r"(?P<file>.+)#(?P<parts>[a-z]+=[^/#]*)", re.DOTALL)
_FULL = (1, 255, 65535)  # what foreground is called in a mask of two levels
_FROM = 127  # of 255: the released rule for masks whose edges have become grey
_EDGE_LEVELS = 16  # a map of labels has hardly more; grey edges do
_EDGE_PART = 0.1  # of the pixels: more grey than that is no edge
_NEAR = 16  # grey levels: as near to 0 or 255 is a trace of compression
_TRACES = 4  # levels; with so few, 1 may be a label and 255 what is left out, as in PASCAL VOC
_TRACE_PART = 0.01  # of the pixels: then they are traces all the same
_CHROMA = 32  # grey levels that the colours of a grey JPEG may differ by


@dataclass(frozen=True)
class Address:
    """A file name, taken apart.

    Attributes:
        file: The file itself.
        part: Which slice or frame: "x", "y", "z" or "frame", and its number from 0.
        label: Of a label map: the value that is foreground.
    """

    file: Path
    part: tuple[str, int] | None = None
    label: int | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Address:
        """Take a name apart.

        Raises:
            ReadError: If what stands behind # is not understood.
        """
        match = _ADDRESS.fullmatch(os.fspath(path))
        if match is None or Path(path).exists():  # a file may be called so
            return cls(Path(path))
        part: tuple[str, int] | None = None
        label: int | None = None
        for piece in match["parts"].split("&"):
            name, _, number = piece.partition("=")
            if not re.fullmatch(r"\d+", number) or name not in ("x", "y", "z", "frame", "label"):
                raise ReadError(
                    f"part of a file is not understood: #{match['parts']}",
                    "write #z=40 (or x, y), #frame=3, #label=2, or two of them as #z=40&label=2",
                )
            if name == "label":
                label = int(number)
            elif part is not None:
                raise ReadError(f"part of a file is ambiguous: #{match['parts']}", "name one slice or frame")
            else:
                part = (name, int(number))
        return cls(Path(match["file"]), part, label)


def read_picture(path: str | os.PathLike[str], *, window: tuple[float, float] | None = None) -> np.ndarray:
    """A picture in grey levels or colours of 8 bits.

    A picture file is turned upright as its EXIF orientation says, and its transparency is dropped. What has 8 bits
    stays as it is, and colours of 16 bits lose the lower 8. Of everything else (grey of more than 8 bits, and NIfTI
    whatever its type) `window` decides what is black and what is white, linearly between and rounded to the nearest
    level; DICOM counts after its own rescaling (HU in CT), and its MONOCHROME1 is inverted. Slices of NIfTI are turned
    as radiologists' displays show them, the patient's right on the left; see `pvl_adapter.data.volumes`.

    Args:
        path: A PNG, JPEG, BMP, TIFF, NIfTI or DICOM file, with the slice or frame of the last two if there are several:
            "scan.nii.gz#z=40", "cine.dcm#frame=3", counted from 0.
        window: Center and width in the units of the file: black is center - width / 2, white center + width / 2. None
            means the first window that a DICOM file gives, or else the 0.5th to the 99.5th percentile, of the picture,
            or of the whole volume so that its slices are alike.

    Returns:
        uint8, [H, W] or, in the order red, green, blue, [H, W, 3].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, is no picture, or holds values that are not finite; or if the window is no window.
    """
    limits = _limits(window)
    with _naming(path) as address:
        if address.label is not None:
            raise ReadError("label where a picture is needed: labels are of masks", "remove label= from the name")
        inverted = False
        shown: tuple[float, float] | None
        if _is_nifti(address):
            volume = read_volume(address.file)
            values, shown = volume.slice(*_slice(address)), limits or volume.limits
        elif is_dicom(address.file):
            values, shown, inverted = read_dicom(address.file, frame=_frame(address), limits=limits)
        else:
            values = _picture_values(address)
            shown = None if values.dtype == np.uint8 else limits
        levels = _eight_bit(values, shown)
        return np.ascontiguousarray(255 - levels if inverted else levels)


def read_mask(path: str | os.PathLike[str], *, label: int | None = None) -> np.ndarray:
    """What is foreground in a mask.

    A mask has one level for foreground (1, 255 or 65535, or True) and 0. If it has 8 bits and its edges are grey, or it
    has traces of lossy compression, levels from 127 are foreground, as in the released code. Colours are taken for grey
    if their channels agree; the indices of a coloured palette are labels. DICOM counts as it is stored, and slices of
    NIfTI are turned as by `read_picture`.

    Args:
        path: As for `read_picture`; may also name the label: "atlas.nii.gz#z=40&label=17".
        label: Of a label map: the value that is foreground.

    Returns:
        Bool, [H, W].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or it cannot be told what is foreground; the message lists the levels found.
    """
    with _naming(path) as address:
        if label is not None and address.label not in (None, label):
            raise ReadError(f"label is ambiguous: {address.label} in the name, {label} given", "give it once")
        label = address.label if label is None else label
        known: np.ndarray | None = None  # levels of more than this slice
        lossy = False
        if _is_nifti(address):
            volume: Volume = read_volume(address.file)
            values = volume.slice(*_slice(address))
            known = volume.levels if label is None else None
        elif is_dicom(address.file):
            values = read_stored(address.file, frame=_frame(address))
        else:
            values, lossy = _mask_values(address)
        return np.ascontiguousarray(_foreground(_grey(values, lossy=lossy), known=known, lossy=lossy, label=label))


# ---- which file, which part -----------------------------------------------------------------------------------------


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[Address]:
    """A file's address; errors about its content name it."""
    try:
        address = Address.of(path)
        if not address.file.exists():
            raise FileNotFoundError(f"{address.file} does not exist")
        if address.file.is_dir():
            raise ReadError("file is a folder: expected a file", "give one of its files")
        if not address.file.stat().st_size:
            raise ReadError("file is empty: it has 0 bytes", "fetch or save it again")
        yield address
    except ReadError as error:
        raise ReadError(error.problem, error.fix, file=os.fspath(path)) from error.__cause__


def _is_nifti(address: Address) -> bool:
    return address.file.name.lower().endswith(VOLUME_SUFFIXES)


def _slice(address: Address) -> tuple[str | None, int | None]:
    if address.part is not None and address.part[0] == "frame":
        raise ReadError("part of a file does not exist: NIfTI has no frames", "name a slice, as #z=40")
    return address.part or (None, None)


def _frame(address: Address) -> int | None:
    if address.part is not None and address.part[0] != "frame":
        raise ReadError("part of a file does not exist: DICOM files have frames", "name one as #frame=3, or none")
    return None if address.part is None else address.part[1]


# ---- grey levels ----------------------------------------------------------------------------------------------------


def _limits(window: tuple[float, float] | None) -> tuple[float, float] | None:
    if window is None:
        return None
    numbers = [float(number) for number in window]
    if len(numbers) != 2 or not all(math.isfinite(number) for number in numbers) or numbers[1] <= 0:
        raise ValueError(f"window is {tuple(window)}, expected center and a positive width, as (40, 400)")
    return numbers[0] - numbers[1] / 2, numbers[0] + numbers[1] / 2


def _eight_bit(values: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    """Grey levels of values; limits None means of the values' own percentiles, and that uint8 stays as it is."""
    if values.dtype == np.uint8 and limits is None:
        return values
    if not np.isfinite(values).all():
        raise ReadError(
            f"values are not finite: {int((~np.isfinite(values)).sum())} pixels are NaN or infinite", "replace them"
        )
    if limits is None:
        low, high = np.percentile(values, PERCENTILES)
        limits = float(low), float(high)
    low, high = limits
    if high <= low:  # one value everywhere, or nearly
        return np.where(values > low, np.uint8(255), np.uint8(0))
    return np.rint(np.clip((values.astype(np.float64) - low) / (high - low), 0.0, 1.0) * 255.0).astype(np.uint8)


def _picture_values(address: Address) -> np.ndarray:
    """Of a picture file: uint8 [H, W] or [H, W, 3], or deeper [H, W]."""
    picture, _ = _open(address)
    if _is_deep(picture):
        return np.asarray(picture)
    return np.asarray(picture.convert("L" if picture.mode in ("1", "L", "LA", "La") else "RGB"))


def _mask_values(address: Address) -> tuple[np.ndarray, bool]:
    """Of a picture file: its levels, and whether lossy compression may have changed them."""
    picture, lossy = _open(address)
    if picture.mode in ("1", "L") or _is_deep(picture):
        return np.asarray(picture), lossy
    if picture.mode in ("LA", "La"):
        return np.asarray(picture.convert("L")), lossy
    colours = np.asarray(picture.convert("RGB"))
    if picture.mode == "P" and np.ptp(colours, axis=2).any():
        return np.asarray(picture), lossy
    return colours, lossy


def _is_deep(picture: Image.Image) -> bool:
    return picture.mode.startswith(("I", "F"))


def _open(address: Address) -> tuple[Image.Image, bool]:
    """A picture, read and turned upright, and whether it is a JPEG."""
    if address.part is not None:
        raise ReadError(
            f"part of a file does not exist: {address.file.suffix or 'a picture'} has no slices or frames",
            f"remove #{address.part[0]}= from the name",
        )
    try:
        with Image.open(address.file, formats=_FORMATS) as opened:
            if opened.format == "TIFF" and getattr(opened, "n_frames", 1) > 1:
                raise ReadError(
                    f"several pages where one is needed: the TIFF has {getattr(opened, 'n_frames', 1)}",
                    "save each page as a file of its own",
                )
            return ImageOps.exif_transpose(opened), opened.format in ("JPEG", "MPO")
    except ReadError:
        raise
    except Exception as error:  # of damaged files Pillow says anything from SyntaxError to struct.error
        if isinstance(error, OSError) and error.errno is not None:  # of the file system
            raise
        what = "cannot identify it as PNG, JPEG, BMP or TIFF" if "identify" in str(error) else reason(error)
        raise ReadError(f"file is damaged or no picture: {what}", "fetch or save it again, as PNG at best") from error


# ---- foreground -----------------------------------------------------------------------------------------------------


def _grey(values: np.ndarray, *, lossy: bool) -> np.ndarray:
    """[H, W]; channels that agree are one."""
    if values.ndim == 2:
        return values
    apart = int(np.ptp(values, axis=2).max())
    if apart > (_CHROMA if lossy else 0):
        raise ReadError(
            f"mask has colours: its channels differ by up to {apart} levels",
            "save it in grey, one level for each label (and name the one that is meant: #label=2)",
        )
    return np.asarray(values[:, :, 1])


def _foreground(levels: np.ndarray, *, known: np.ndarray | None, lossy: bool, label: int | None) -> np.ndarray:
    if levels.dtype == bool:
        levels = levels.astype(np.uint8)
        known = known if known is None else known.astype(np.uint8)
    if label is not None:
        return np.asarray(
            np.isclose(levels, label, rtol=0.0, atol=1e-3) if levels.dtype.kind == "f" else levels == label
        )
    counts: np.ndarray | None = None  # of the levels of a picture; slices have no grey edges
    if known is None and levels.dtype == np.uint8:
        counts = np.bincount(levels.ravel(), minlength=256)
        known = np.flatnonzero(counts)
    elif known is None:
        known = np.unique(levels)
    if known.dtype.kind == "f" and np.isfinite(known).all() and (abs(known - np.rint(known)) < 1e-3).all():
        known, levels = np.unique(np.rint(known)), np.rint(levels)  # a scale factor has left traces
    above = known[known != 0]
    if not len(above) or (len(above) == 1 and above[0] in _FULL):
        return levels != 0
    if counts is not None and _has_grey_edges(counts, lossy=lossy):
        return levels >= _FROM
    found = [f"{level:g}" for level in known]
    raise ReadError(
        f"mask is not binary: its levels are {listed(found)}",
        "save 0 and 255, or name the one that is foreground: #label=2 behind the file name (label=2 in read_mask)",
    )


def _has_grey_edges(counts: np.ndarray, *, lossy: bool) -> bool:
    """Whether the levels of a mask, as a histogram [256], are those of black and white with traces between them."""
    levels = np.flatnonzero(counts)
    if levels[-1] < _FROM:
        return False
    if lossy:
        return True
    between = counts[_NEAR + 1 : 255 - _NEAR].sum()
    if not between and levels[-1] == 255:
        return len(levels) > _TRACES or bool(counts[1:255].sum() <= _TRACE_PART * counts.sum())
    return len(levels) > _EDGE_LEVELS and levels[-1] >= 255 - _NEAR and bool(between <= _EDGE_PART * counts.sum())
