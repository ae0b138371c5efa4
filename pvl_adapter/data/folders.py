"""Files by the names that tables give them, with suggestions where a name is nearly right."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from pvl_adapter.data.issues import ReadError, listed
from pvl_adapter.data.pictures import DICOM_SUFFIXES, PICTURE_SUFFIXES, VOLUME_SUFFIXES, Address

_SEARCHED = 2000  # names at most, for one that is misspelt
_SUFFIXES = (*VOLUME_SUFFIXES, *DICOM_SUFFIXES, *PICTURE_SUFFIXES)


class Folder:
    """A folder of pictures or masks; what lies in it is listed once, and only if something is missing.

    Attributes:
        path: Of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def within(self, name: str) -> Path:
        """Where a file would be; names written on Windows are good too.

        Raises:
            ReadError: If that is outside of the folder.
        """
        plain = name.replace("\\", "/")
        path = Path(plain)
        outside = ".." in path.parts or plain[1:2] == ":" or "\0" in plain
        if path.is_absolute() and not outside:
            outside = self.path.absolute() not in path.parents and self.path.resolve() not in path.parents
        if outside:
            raise ReadError("is outside of its folder: that is refused", f"give a name within {self.path}")
        return self.path / path

    def find(self, name: str) -> Path:
        """Where a file is, with what its name says of slices and labels.

        Raises:
            ReadError: If it is not there, or outside of the folder.
        """
        path = self.within(name)
        if not (file := Address.of(path).file).exists():
            raise self._missing(file)
        return path

    def find_alike(self, name: str, *, other_than: Path) -> Path:
        """Where the one file is that has a picture's name, whatever its extension; of a volume the same slice.

        Raises:
            ReadError: If there is none, or several.
        """
        address = Address.of(self.within(name))
        listing = self._listing(address.file.parent)
        stem = _stem(address.file.name)
        names = [each for each in listing.get(stem, []) if each.lower() != stem]
        found = [path for each in names if (path := address.file.parent / each) != Address.of(other_than).file]
        if not found:
            raise self._missing(address.file)
        if len(found) > 1:
            names = [path.name for path in found]
            raise ReadError(f"is ambiguous: {listed(names)} all fit", "add a column Ground Truth with the file names")
        if address.part is None or found[0].name.lower().endswith(PICTURE_SUFFIXES):
            return found[0]
        return found[0].with_name("{}#{}={}".format(found[0].name, *address.part))

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """The files of a folder by their names in lower case without extension."""
        if folder not in self._listings:
            listing = self._listings.setdefault(folder, {})
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                listing.setdefault(_stem(path.name), []).append(path.name)
        return self._listings[folder]

    def _missing(self, file: Path) -> ReadError:
        listing = self._listing(file.parent)
        stem = _stem(file.name)
        near = listing.get(stem, [])
        if not near and len(listing) <= _SEARCHED:
            likely = [key for key in listing if _digits(key) == _digits(stem)]  # case_08 is no misspelt case_07
            near = [listing[key][0] for key in get_close_matches(stem, likely, n=1, cutoff=0.8)]
        fix = f"put it into {file.parent}, or remove the row"
        if near:
            fix = f"there is {listed(near, most=2)}: correct the name in the table if that is meant"
        return ReadError("is missing: there is no such file", fix)


def others_like(path: Path) -> str:
    """What a missing file or folder may be called instead, for a message."""
    if not path.parent.is_dir():
        return ""
    lower = {each.name.lower(): each.name for each in path.parent.iterdir()}
    near = get_close_matches(path.name.lower(), lower, n=1, cutoff=0.75)
    return f" (there is {lower[near[0]]})" if near else ""


def _digits(name: str) -> str:
    return "".join(letter for letter in name if letter.isdigit())


def _stem(name: str) -> str:
    """A name in lower case without an extension that is known."""
    name = name.lower()
    suffix = max((suffix for suffix in _SUFFIXES if name.endswith(suffix)), key=len, default="")
    return name.removesuffix(suffix)
