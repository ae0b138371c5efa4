"""Opening image files: which slice, frame or label of a file is meant, and errors that name the file.

A path may end in the part that is meant, counted from 0: `scan.nii.gz#z=40`, `cine.dcm#frame=3`, `stack.tif#frame=3`;
and in the foreground value of a label map: `atlas.nii.gz#z=40&label=17`, `labels.png#label=2`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
VOLUME_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".dicom")

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "JPEG2000", "PPM")  # some others of Pillow's run programs
_REFERENCE = re.compile(r"(?P<file>.+)#(?P<parts>[a-z]+=[^/#]*)", re.DOTALL)


@dataclass(frozen=True)
class SliceRef:
    """A path, split into the file and what is meant of it.

    Attributes:
        file: The file itself.
        part: "x", "y", "z" or "frame", and its number from 0; None if the path names none.
        label: The value of a label map that is foreground; None if the path names none.
    """

    file: Path
    part: tuple[str, int] | None = None
    label: int | None = None

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> SliceRef:
        """Split a path.

        Raises:
            ValueError: If the part behind # is not understood.
        """
        match = _REFERENCE.fullmatch(os.fspath(path))
        if match is None or Path(path).exists():  # a real file name may contain '#'
            return cls(Path(path))
        found: dict[str, int] = {}
        for piece in match["parts"].split("&"):
            name, _, number = piece.partition("=")
            known = re.fullmatch(r"\d+", number) and name in ("x", "y", "z", "frame", "label")
            if not known or name in found or (name != "label" and found.keys() - {"label"}):
                raise ValueError(
                    f"{path}: got the part #{match['parts']}, expected one slice or frame and at most one label, as "
                    "#z=40 (or x, y), #frame=3, #label=2 or #z=40&label=2"
                )
            found[name] = int(number)
        label = found.pop("label", None)
        return cls(Path(match["file"]), next(iter(found.items()), None), label)

    def __str__(self) -> str:
        parts = [*([self.part] if self.part else []), *([("label", self.label)] if self.label is not None else [])]
        return str(self.file) + "#" * bool(parts) + "&".join(f"{name}={number}" for name, number in parts)

    def kind(self) -> str:
        """ "nifti" or "image" by the name, "dicom" by name or content; the file must exist and hold something.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is a folder or has 0 bytes.
        """
        if not self.file.exists():
            raise FileNotFoundError(f"{self.file} does not exist; correct the path, or put the file there")
        if self.file.is_dir():
            raise ValueError(f"{self.file} is a folder, expected a file; give one of its files")
        if not self.file.stat().st_size:
            raise ValueError(f"{self.file} is empty (0 bytes), expected an image; download or save it again")
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
def reading(ref: SliceRef, what: str, *, fix: str = "download or save it again") -> Iterator[None]:
    """Turn whatever a library raises about the content of a file into a ValueError that names the file."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{ref} has more pixels than Pillow opens ({reason(error)}); save it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except (
        Exception
    ) as error:  # damaged files make libraries raise almost anything, SyntaxError and zlib.error included
        if isinstance(error, OSError) and error.errno is not None:  # from the file system, with the path
            raise
        raise ValueError(f"{ref} is damaged or not {what} ({reason(error)}); {fix}") from error


def reason(error: BaseException, *, most: int = 300) -> str:
    """The message of another library's exception, in one line."""
    text = " ".join(str(error).split())
    return (text[:most] + "..." if len(text) > most else text) or type(error).__name__


def open_image(ref: SliceRef) -> tuple[Image.Image, bool]:
    """One image or frame of a PNG, JPEG, BMP, TIFF, GIF or WebP file, upright, and whether lossy compression is likely.

    Raises:
        ValueError: If the file is damaged or not an image, holds several images of which none is named, or not the one
            that is named.
    """
    with reading(ref, "an image"), Image.open(ref.file, formats=_FORMATS) as opened:
        # other images of an MPO are previews or depth maps of the first, which is what every viewer shows
        count = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
        name, number = ref.part or ("frame", 0)
        complaint = ""
        if name != "frame":
            complaint = f"got {name}={number} of a file without slices, expected a path without #{name}="
        elif ref.part is None and count > 1:
            complaint = f"got a file with {count} pages or frames, expected one; name it, as {ref.file}#frame=0"
        elif number >= count:
            complaint = f"got frame={number}, expected frame=0 to frame={count - 1}"
        else:
            if number:
                opened.seek(number)
            opened.load()
            return upright(opened), opened.format in ("JPEG", "MPO")
    raise ValueError(f"{ref}: {complaint}")


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says; the same object, without a copy, if it is upright already."""
    image.load()  # of some formats this turns it
    return image if image.getexif().get(0x0112, 1) == 1 else ImageOps.exif_transpose(image)


def is_high_bit_depth(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits per value; Pillow's conversion would cut everything off at 255."""
    return image.mode.startswith(("I", "F"))
