"""Files by the names that tables give them, with suggestions where a name is nearly right."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from pvl_adapter.data.issues import listed
from pvl_adapter.image_files import DICOM_SUFFIXES, IMAGE_SUFFIXES, VOLUME_SUFFIXES, SliceRef

_SUFFIXES = (*VOLUME_SUFFIXES, *DICOM_SUFFIXES, *IMAGE_SUFFIXES)


class Folder:
    """A folder of images or masks; its files are listed once, and only when one is missing.

    Attributes:
        path: Of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def find(self, name: str) -> SliceRef:
        """The file of a name, which may also be written as on Windows.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it would be outside of the folder.
        """
        ref = self._within(name)
        if not ref.file.exists():
            raise self._missing(ref.file)
        return ref

    def find_alike(self, name: str, *, other_than: Path) -> SliceRef:
        """The one file with an image's name and any known extension; of a volume the same slice.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If there are several.
        """
        image = self._within(name)
        folder, stem = image.file.parent, _stem(image.file.name)
        found = [folder / each for each in self._listing(folder).get(stem, []) if folder / each != other_than]
        if not found:
            raise self._missing(image.file)
        if len(found) > 1:
            raise ValueError(f"{name}: got {listed([each.name for each in found])}, expected one; name it in the table")
        return SliceRef(found[0], None if found[0].name.lower().endswith(IMAGE_SUFFIXES) else image.part)

    def _within(self, name: str) -> SliceRef:
        plain = name.replace("\\", "/")
        path = self.path / plain
        outside = {self.path.absolute(), self.path.resolve()}.isdisjoint(path.absolute().parents)
        if outside or ".." in Path(plain).parts or plain[1:2] == ":" or "\0" in plain:
            raise ValueError(f"{name} is outside of its folder, which is refused; give a name within {self.path}")
        return SliceRef.parse(path)

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """The files of a folder with a known extension, by their names in lower case without it."""
        if folder not in self._listings:
            listing = self._listings.setdefault(folder, {})
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.name.lower().endswith(_SUFFIXES):
                    listing.setdefault(_stem(path.name), []).append(path.name)
        return self._listings[folder]

    def _missing(self, file: Path) -> FileNotFoundError:
        near = self._listing(file.parent).get(_stem(file.name), [])
        fix = f"there is {listed(near, most=2)}, correct the table if that is meant" if near else "put it there"
        return FileNotFoundError(f"{file} does not exist; {fix}, or remove the row")


def others_like(path: Path) -> str:
    """What a missing file or folder may be called instead, for a message."""
    there = {each.name.lower(): each.name for each in path.parent.iterdir()} if path.parent.is_dir() else {}
    near = get_close_matches(path.name.lower(), there, n=1, cutoff=0.75)
    return f" (there is {there[near[0]]})" if near else ""


def _stem(name: str) -> str:
    name = name.lower()
    return name.removesuffix(max((suffix for suffix in _SUFFIXES if name.endswith(suffix)), key=len, default=""))
