"""What examples/predict.py is given: pictures, NIfTI volumes, DICOM, and folders and tables of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom

from pvl_adapter.data import read_table
from pvl_adapter.data.dicom import is_dicom
from pvl_adapter.data.issues import reason
from pvl_adapter.data.pictures import DICOM_SUFFIXES, PICTURE_SUFFIXES, VOLUME_SUFFIXES, Address
from pvl_adapter.data.tables import TABLE_SUFFIXES

KINDS = {"picture": PICTURE_SUFFIXES, "nifti": VOLUME_SUFFIXES, "dicom": DICOM_SUFFIXES, "table": TABLE_SUFFIXES}
ENDINGS = [suffix for suffixes in KINDS.values() for suffix in suffixes]
HEADERS = ["Modality", "Rows", "Columns", "NumberOfFrames", "PixelSpacing", "SeriesInstanceUID", "SeriesNumber"]
HEADERS += ["ImagePositionPatient", "ImageOrientationPatient"]


@dataclass(frozen=True)
class Source:
    """An input.

    Attributes:
        files: One, or those of a DICOM series.
        kind: "picture", "nifti" or "dicom".
        name: Of the output files: with subfolders, without ending.
        place: What it is called in review.csv.
        part: Of a single slice or frame: its axis ("x", "y", "z" or "frame") and number.
        texts: Sentences of a table; empty means those of --text.
    """

    files: tuple[Path, ...]
    kind: str | None
    name: str
    place: str
    part: tuple[str, int] | None = None
    texts: tuple[str, ...] = ()


def find_sources(inputs: Iterable[str], *, output: Path) -> Iterator[Source]:
    """Everything to be predicted; `output` is a folder to be left out."""
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            yield from sources_of_folder(path, output=output.resolve())
        elif kind_of(path) == "table":
            yield from sources_of_table(path)
        else:
            yield source_of_file(Address.of(given))


def kind_of(path: Path) -> str | None:
    """By the ending; DICOM often has none."""
    name = path.name.lower()
    if kind := next((kind for kind, suffixes in KINDS.items() if name.endswith(suffixes)), None):
        return kind
    return "dicom" if path.is_file() and name != "dicomdir" and is_dicom(path) else None


def source_of_file(address: Address, *, root: Path | None = None) -> Source:
    """A single file; `root` is the folder from which its name starts."""
    if address.label is not None:
        raise ValueError(f"#label={address.label} is for masks; leave it out of {address.file}")
    path, part = address.file, address.part
    name, place = path.relative_to(root or path.parent).as_posix(), str(path.resolve())
    longest = max((suffix for suffix in ENDINGS if name.lower().endswith(suffix)), key=len, default="")
    name = name[: len(name) - len(longest)] or name
    if part:
        name, place = f"{name}_{part[0]}{part[1]}", f"{place}#{part[0]}={part[1]}"
    return Source((path,), kind_of(path), name, place, part)


def sources_of_table(table: Path) -> Iterator[Source]:
    texts: dict[str, dict[str, None]] = {}
    for row in read_table(table):
        texts.setdefault(row.image, {})[row.text] = None
    for image, sentences in texts.items():
        yield dataclasses.replace(source_of_file(Address.of(table.parent / image)), texts=tuple(sentences))


def sources_of_folder(folder: Path, *, output: Path) -> Iterator[Source]:
    """Its files and those of its subfolders; DICOM slices of one subfolder and series together."""
    groups: dict[tuple[Path, str, str], list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or output in path.resolve().parents:
            continue
        key, kind = (path, "", ""), kind_of(path)
        if kind in (None, "table"):
            continue
        if kind == "dicom":
            try:
                header = read_header(path, tags=HEADERS)
            except ValueError:  # which is told when it is opened
                header = None
            if header and (not header.get("Rows") or header.get("Modality") in ("SEG", "RTDOSE")):
                continue  # folders hold reports, plans and segmentations too
            if header and header.get("ImagePositionPatient") and header.get("ImageOrientationPatient"):
                key = (path.parent, str(header.get("SeriesInstanceUID")), str(header.get("SeriesNumber") or ""))
        groups.setdefault(key, []).append(path)
    parents = [parent for parent, _, _ in groups]
    for (parent, uid, number), files in groups.items():
        if len(files) == 1:
            yield source_of_file(Address(files[0]), root=folder)
            continue
        name = folder.resolve().name if parent == folder else parent.relative_to(folder).as_posix()
        if parents.count(parent) > 1:
            name += f"/series{number}"
        yield Source(tuple(files), "dicom", name, f"{parent.resolve()}#series={uid}")


def read_header(file: Path, *, tags: list[str] | None = None) -> pydicom.Dataset:
    """A DICOM file without its pixels, or only some tags of it."""
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        for name in HEADERS:
            header.get(name)  # pydicom looks at a value when it is asked for
        int(header.get("NumberOfFrames") or 1)
    except Exception as error:  # pydicom raises whatever a damaged file makes it stumble on
        raise ValueError(f"{file} is damaged or no DICOM ({reason(error)}); fetch or export it again") from error
    return header
