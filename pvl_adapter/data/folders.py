"""Files by the names that tables give them."""

from __future__ import annotations

from pathlib import Path

from pvl_adapter.data.issues import listed
from pvl_adapter.image_files import DICOM_SUFFIXES, IMAGE_SUFFIXES, VOLUME_SUFFIXES, SliceRef

_SUFFIXES = (*VOLUME_SUFFIXES, *DICOM_SUFFIXES, *IMAGE_SUFFIXES)


def find(folder: Path, name: str) -> SliceRef:
    """The file of a name in a folder; the name may also be written as on Windows.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it would be outside of the folder.
    """
    ref = _within(folder, name)
    if not ref.file.exists():
        raise _missing(ref.file)
    return ref


def find_alike(folder: Path, name: str, *, other_than: Path) -> SliceRef:
    """The one file with an image's name and any known extension; of a volume the same slice.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several.
    """
    image = _within(folder, name)
    found = [file for file in _alike(image.file) if file != other_than]
    if not found:
        raise _missing(image.file)
    if len(found) > 1:
        raise ValueError(f"{name}: got {listed([file.name for file in found])}, expected one; name it in the table")
    return SliceRef(found[0], None if found[0].name.lower().endswith(IMAGE_SUFFIXES) else image.part)


def contents(folder: Path) -> str:
    """What a folder holds, for a message."""
    if not folder.is_dir():
        return f"{folder} does not exist"
    return f"{folder} holds {listed(sorted(path.name for path in folder.iterdir()), most=14) or 'nothing'}"


def _within(folder: Path, name: str) -> SliceRef:
    plain = name.replace("\\", "/")
    outside = {folder.absolute(), folder.resolve()}.isdisjoint((folder / plain).absolute().parents)
    if outside or ".." in Path(plain).parts or plain[1:2] == ":" or "\0" in plain:
        raise ValueError(f"{name} is outside of its folder, which is refused; give a name within {folder}")
    return SliceRef.parse(folder / plain)


def _alike(file: Path) -> list[Path]:
    """The files of the same name with any known extension, in small or capital letters."""
    known = [suffix for suffix in _SUFFIXES if file.name.lower().endswith(suffix)]
    stem = file.name[: -len(known[0])] if known else file.name
    files = [file.with_name(stem + each) for suffix in _SUFFIXES for each in (suffix, suffix.upper())]
    return list({path.stat().st_ino: path for path in files if path.exists()}.values())  # both cases may be one file


def _missing(file: Path) -> FileNotFoundError:
    if not file.parent.is_dir():
        return FileNotFoundError(f"{file} does not exist: {contents(file.parent.parent)}; put its folder there")
    alike = listed([other.name for other in _alike(file)])
    fix = f"there is {alike}, correct the table if that is meant" if alike else "put it there"
    return FileNotFoundError(f"{file} does not exist; {fix}, or remove the row")
