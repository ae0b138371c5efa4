"""The inputs of `pvl-adapter predict`: images, NIfTI volumes and DICOM, in folders and tables too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pydicom

from pvl_adapter.data import read_table
from pvl_adapter.data.tables import TABLE_SUFFIXES
from pvl_adapter.image_files import DICOM_SUFFIXES, IMAGE_SUFFIXES, VOLUME_SUFFIXES, SliceRef, is_dicom, reason

KINDS = {"image": IMAGE_SUFFIXES, "nifti": VOLUME_SUFFIXES, "dicom": DICOM_SUFFIXES, "table": TABLE_SUFFIXES}
KNOWN = [suffix for suffixes in KINDS.values() for suffix in suffixes]
HEADERS = ["Modality", "Rows", "Columns", "NumberOfFrames", "PixelSpacing", "SeriesInstanceUID", "SeriesNumber"]
HEADERS += ["ImagePositionPatient", "ImageOrientationPatient"]


@dataclass(frozen=True)
class Source:
    """An input.

    Attributes:
        files: One, or those of a DICOM series.
        kind: "image", "nifti" or "dicom"; None if unknown.
        name: Of the output files: with subfolders, without suffix.
        location: What it is called in review.csv.
        part: Of a single slice or frame: its axis ("x", "y", "z" or "frame") and number.
        texts: Sentences of a table; empty means those of --text.
    """

    files: tuple[Path, ...]
    kind: str | None
    name: str
    location: str
    part: tuple[str, int] | None = None
    texts: tuple[str, ...] = ()


def find_sources(inputs: Iterable[str], *, output: Path) -> tuple[list[Source], list[Path]]:
    """All inputs, and the files of folders that are none; `output` is left out without a word."""
    sources: list[Source] = []
    skipped: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            sources += sources_of_folder(path, output=output.resolve(), skipped=skipped)
        elif kind_of(path) == "table":
            sources += sources_of_table(path)
        else:
            sources.append(source_of_file(SliceRef.parse(given)))
    return sources, skipped


def kind_of(path: Path) -> str | None:
    """By the suffix; DICOM files often have none."""
    name = path.name.lower()
    if kind := next((kind for kind, suffixes in KINDS.items() if name.endswith(suffixes)), None):
        return kind
    return "dicom" if path.is_file() and name != "dicomdir" and is_dicom(path) else None


def source_of_file(ref: SliceRef, *, root: Path | None = None) -> Source:
    """A single file; `root` is the folder from which its name starts."""
    if ref.label is not None:
        raise ValueError(f"#label={ref.label} is for masks; leave it out of {ref.file}")
    path, part = ref.file, ref.part
    name = path.relative_to(root or path.parent).as_posix()
    longest = max((suffix for suffix in KNOWN if name.lower().endswith(suffix)), key=len, default="")
    name = name[: len(name) - len(longest)] or name
    name += f"_{part[0]}{part[1]}" if part else ""
    return Source((path,), kind_of(path), name, str(SliceRef(path.resolve(), part)), part)


def sources_of_table(table: Path) -> list[Source]:
    texts: dict[str, dict[str, None]] = {}
    for row in read_table(table):
        texts.setdefault(row.image, {})[row.text] = None
    return [
        dataclasses.replace(source_of_file(SliceRef.parse(table.parent / image)), texts=tuple(sentences))
        for image, sentences in texts.items()
    ]


def sources_of_folder(folder: Path, *, output: Path, skipped: list[Path]) -> list[Source]:
    """Its files and those of its subfolders; DICOM slices of one subfolder and series together."""
    groups: dict[tuple[Path, str, str], list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or output in path.resolve().parents:
            continue
        key, kind = (path, "", ""), kind_of(path)
        header = header_of(path) if kind == "dicom" else None
        # folders hold reports, plans and segmentations too
        no_image = header is not None and (not header.get("Rows") or header.get("Modality") in ("SEG", "RTDOSE"))
        if kind in (None, "table") or no_image:
            skipped.append(path)
            continue
        if header and header.get("ImagePositionPatient") and header.get("ImageOrientationPatient"):
            key = (path.parent, str(header.get("SeriesInstanceUID")), str(header.get("SeriesNumber") or ""))
        groups.setdefault(key, []).append(path)
    parents = [parent for parent, _, _ in groups]
    sources = []
    for (parent, uid, number), files in groups.items():
        if len(files) == 1:
            sources.append(source_of_file(SliceRef(files[0]), root=folder))
            continue
        name = folder.resolve().name if parent == folder else parent.relative_to(folder).as_posix()
        name += f"/series{number}" if parents.count(parent) > 1 else ""
        sources.append(Source(tuple(files), "dicom", name, f"{parent.resolve()}#series={uid}"))
    return sources


def header_of(file: Path) -> pydicom.Dataset | None:
    """None if the file is damaged, which is reported when it is opened."""
    try:
        return read_header(file, tags=HEADERS)
    except ValueError:
        return None


def read_header(file: Path, *, tags: list[str] | None = None) -> pydicom.Dataset:
    """A DICOM file without its pixels, or only some tags of it."""
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        for name in HEADERS:
            header.get(name)  # pydicom reads a value when it is asked for
        int(header.get("NumberOfFrames") or 1)
    except Exception as error:  # pydicom raises whatever a damaged file makes it stumble on
        raise ValueError(f"{file} is damaged or no DICOM ({reason(error)}); fetch or export it again") from error
    return header
