"""Opening image files: which slice, frame or label of a file is meant, and errors that name the file.

A path may end in what is meant, counted from 0: `scan.nii.gz#z=40`, `cine.dcm#frame=3`, `stack.tif#frame=3`; and in the
foreground value of a label map: `atlas.nii.gz#z=40&label=17`, `labels.png#label=2`.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
VOLUME_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".dicom")

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "JPEG2000", "PPM")  # some others of Pillow's run programs
_REFERENCE = re.compile(r"(.+)#(?:([xyz]|frame)=(\d+)(?:&label=(\d+))?|label=(\d+))", re.DOTALL)
_LIKE_A_REFERENCE = re.compile(r".+#[a-z]+=[^/#]*", re.DOTALL)


@dataclass(frozen=True)
class SliceRef:
    """A path, split into the file and what is meant of it."""

    file: Path
    part: tuple[str, int] | None = None  # "x", "y", "z" or "frame", and its number from 0
    label: int | None = None  # the value of a label map that is foreground

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> SliceRef:
        """Split a path; raises ValueError if the part behind # is not understood."""
        text = os.fspath(path)
        if not _LIKE_A_REFERENCE.fullmatch(text) or Path(path).exists():  # a real file name may contain '#'
            return cls(Path(path))
        if not (match := _REFERENCE.fullmatch(text)):
            raise ValueError(f"{path}: expected one of #z=40 (or x, y), #frame=3, #label=2 or #z=40&label=2 behind it")
        file, name, index, *labels = match.groups()
        label = labels[0] or labels[1]
        return cls(Path(file), (name, int(index)) if name else None, int(label) if label else None)

    def __str__(self) -> str:
        parts = [f"{self.part[0]}={self.part[1]}"] if self.part else []
        parts += [] if self.label is None else [f"label={self.label}"]
        return f"{self.file}{'#' if parts else ''}{'&'.join(parts)}"

    def kind(self) -> str:
        """Of the file: "nifti" or "image" by its name, "dicom" by name or content; errors if it is none or empty."""
        if not self.file.exists():
            raise FileNotFoundError(f"{self.file} does not exist; correct the path, or put the file there")
        if self.file.is_dir():
            raise ValueError(f"{self.file} is a folder, expected a file; give one of its files")
        if not self.file.stat().st_size:
            raise ValueError(f"{self.file} is empty (0 bytes); download or save it again")
        if self.file.name.lower().endswith(VOLUME_SUFFIXES):
            return "nifti"
        return "dicom" if is_dicom(self.file) else "image"


def is_dicom(file: Path) -> bool:
    """Whether a file is DICOM by its name or content; such files often have no extension."""
    if file.suffix.lower() in DICOM_SUFFIXES:
        return True
    with file.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM"


@contextmanager
def reading(ref: SliceRef | str, what: str, *, fix: str = "download or save it again") -> Iterator[None]:
    """Turn whatever a library raises about the content of a file into a ValueError that names the file."""
    try:
        yield
    except Image.DecompressionBombError as error:
        fix = "save it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        raise ValueError(f"{ref} has more pixels than Pillow opens ({reason(error)}); {fix}") from error
    except ImportError as error:
        raise ValueError(f'{ref} needs {error.name}; pip install "pvl-adapter[data]"') from error
    except Exception as error:  # damaged files make libraries raise almost anything, SyntaxError included
        if isinstance(error, OSError) and error.errno is not None:  # from the file system, with the path
            raise
        raise ValueError(f"{ref} is damaged or not {what} ({reason(error)}); {fix}") from error


def reason(error: BaseException, *, most: int = 300) -> str:
    """The message of another library's exception, in one line."""
    text = " ".join(str(error).split())
    return (text[:most] + "..." if len(text) > most else text) or type(error).__name__


def open_image(ref: SliceRef) -> tuple[Image.Image, bool]:
    """One image or frame of an image file, upright, and whether lossy compression is likely; else ValueError."""
    name, number = ref.part or ("frame", 0)
    with reading(ref, "an image"), Image.open(ref.file, formats=_FORMATS) as opened:
        count = _count(opened)
        if name == "frame" and number < count and (ref.part or count == 1):
            opened.seek(number)
            return upright(opened), opened.format in ("JPEG", "MPO")
    got = f"{name}={number} of {count} pages or frames" if ref.part else f"{count} pages or frames"
    raise ValueError(f"{ref}: got {got}, expected one; name it, as {ref.file}#frame=0 (the first)")


def count_frames(file: Path) -> int:
    """Pages or frames of an image file; raises ValueError if it is none."""
    with reading(SliceRef(file), "an image"), Image.open(file, formats=_FORMATS) as opened:
        return _count(opened)


def _count(opened: Image.Image) -> int:
    # other images of an MPO are previews or depth maps of the first, which is what every viewer shows
    return 1 if opened.format == "MPO" else int(getattr(opened, "n_frames", 1))


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says; the same object, without a copy, if it is upright already."""
    image.load()  # which turns some formats
    return image if image.getexif().get(0x0112, 1) == 1 else ImageOps.exif_transpose(image)


def is_high_bit_depth(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits per value; Pillow's conversion would cut everything off at 255."""
    return image.mode.startswith(("I", "F"))


def write_image(path: Path, image: Image.Image) -> None:
    """Write a .png quickly, or a .jpg.

    A full disk raises its own OSError, which Pillow hides where it writes to a file itself.
    """
    encoded = io.BytesIO()
    if path.suffix == ".jpg":
        image.save(encoded, format="JPEG", quality=90)
    elif image.mode in ("L", "I;16"):
        encoded.write(_grey_png(image))
    else:
        image.save(encoded, format="PNG", compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)
    path.write_bytes(encoded.getbuffer())


def _grey_png(image: Image.Image) -> bytes:
    """Grey of 8 or 16 bits as PNG: differences to the row above, in Huffman's code and runs.

    Pillow tries five filters on each row, which takes more than twice as long, and most of the time of predicting many
    images (benchmarks/throughput.py); its files are a tenth smaller.
    """
    import numpy as np

    values, depth = np.asarray(image), 16 if image.mode == "I;16" else 8
    rows = values.astype(f">u{depth // 8}").view(np.uint8)  # [h, bytes]
    filtered = np.full((image.height, rows.shape[1] + 1), 2, np.uint8)  # the filter "up" before each row
    filtered[0, 1:], filtered[1:, 1:] = rows[0], rows[1:] - rows[:-1]
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", image.width, image.height, depth, 0, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": packer.compress(filtered.data) + packer.flush(), b"IEND": b""}
    parts = (struct.pack(">I", len(data)) + kind + data for kind, data in chunks.items())
    ends = (struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(part + end for part, end in zip(parts, ends, strict=True))
