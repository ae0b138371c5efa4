"""Tables of images, sentences and masks: workbooks, CSV and JSON lines, with the blemishes that real ones have."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path

from pvl_adapter.data.issues import DatasetError, DatasetIssue, listed
from pvl_adapter.image_files import DICOM_SUFFIXES, IMAGE_SUFFIXES, VOLUME_SUFFIXES, SliceRef, reading, reason

HEADERS: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "file"),
    "text": ("description", "text", "prompt", "sentence", "caption"),
    "mask": ("groundtruth", "mask", "segmentation", "gt", "label"),
    "subject": ("subject", "subjectid", "patient", "patientid", "case", "caseid"),
}
"""What columns may be called, in this or a near spelling (subjects: as here); the first that a table has counts."""
TABLE_SUFFIXES = (".xlsx", ".csv", ".tsv", ".jsonl")

_MOST_EMPTY = 10_000  # empty rows of a workbook in a row; a small file may hold a million
_SPREADSHEET_ERROR = re.compile(r"#(REF!|N/A|NAME\?|VALUE!|DIV/0!|NULL!|NUM!)")
_FILE_NAME = re.compile(rf".+({'|'.join(map(re.escape, IMAGE_SUFFIXES + VOLUME_SUFFIXES + DICOM_SUFFIXES))})(#.*)?")

Lines = list[tuple[int, Sequence[object]]]  # line numbers and cells; the first is the header
Rows = list[tuple[int, dict[str, object]]]  # line numbers and cells by their headers


@dataclass(frozen=True)
class Row:
    """One image with a sentence about it and the mask of what the sentence means."""

    image: str  # file name as the table has it, perhaps with a slice: "scan.nii.gz#z=40"
    text: str
    mask: str  # file name; empty if the table has no such column
    line: int  # of the table, counted from 1
    subject: str = ""  # whom the image is of; empty if the table does not say


def read_table(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a table, in its order; a row that is repeated exactly counts once.

    Args:
        path: A .xlsx (its first sheet with anything in it), .csv or .tsv (UTF-8; comma, semicolon or tab), or .jsonl
            (one object per line). The columns of masks and subjects may be missing. An empty sheet is an empty table.

    Raises:
        DatasetError: If there is no such file, it cannot be read, or rows are faulty; all issues are listed.
    """
    rows, issues = scan_table(Path(path), location=Path(path).name)
    if any(issue.fatal for issue in issues):
        raise DatasetError(issues)
    return rows


def scan_table(path: Path, *, location: str) -> tuple[list[Row], list[DatasetIssue]]:
    """The sound rows of a table, and what is wrong with it; `location` is how issues call the table."""
    notes: list[str] = []
    try:
        table = read_rows(SliceRef(path), notes)
        columns = _columns(table, notes)
    except (OSError, ValueError) as error:
        return [], [DatasetIssue(location, "table cannot be read", reason(error))]
    issues = [DatasetIssue(location, "not all of the table is used", note, fatal=False) for note in notes]
    first: dict[tuple[str, str, str, str], int] = {}  # the line in which a row is for the first time
    for number, cells in table:
        line, faulty = f"{location} line {number}", False
        for role, column in columns.items():
            if detail := _fault(cells.get(column), role):
                issues.append(DatasetIssue(line, f"{role} cell is not usable", detail))
                faulty = True
        filled = {role: str(cells[name]).strip() for role, name in columns.items() if not is_blank(cells.get(name))}
        image, text, mask, subject = (filled.get(role, "") for role in HEADERS)
        if not faulty and first.setdefault((image, text, mask, subject), number) != number:
            detail = f"{image} as in line {first[image, text, mask, subject]}; it counts once, remove one"
            issues.append(DatasetIssue(line, "row is repeated", detail, fatal=False))
    return [Row(image, text, mask, line, subject) for (image, text, mask, subject), line in first.items()], issues


def _fault(cell: object, role: str) -> str:
    """What is wrong with a cell; empty if nothing is."""
    filled = isinstance(cell, str) and not is_blank(cell) and not _SPREADSHEET_ERROR.fullmatch(cell.strip())
    if role == "subject" and (is_blank(cell) or not isinstance(cell, str)):  # not known, or a number
        return ""
    if filled and (role != "text" or any(map(str.isalpha, str(cell)))):
        return ""
    expected = {"text": "words", "subject": "a name"}.get(role, "a file name")
    got = "nothing" if is_blank(cell) else repr(cell)
    return f"got {got}, expected {expected} as text (of a formula, its saved value); correct it, or remove the row"


def _columns(table: Rows, notes: list[str]) -> dict[str, str]:
    """The header of each role that has a column."""
    headers = list(dict.fromkeys(header for _, cells in table for header in cells))
    columns: dict[str, str] = {}
    for role, known in HEADERS.items():
        if meant := [header for header in headers if _meaning(header) in known]:
            columns[role] = min(meant, key=lambda name: (squeeze(name) not in known, known.index(_meaning(name))))
        elif table and role in ("image", "text"):
            expected = f"expected one of {role}s; call it one of {', '.join(known)}"
            raise ValueError(f"got the columns {listed(headers)}, {expected}")
    unused = [header for header in headers if header not in columns.values()]
    for header in unused if "mask" not in columns else ():
        names = [str(cells[header]).strip().lower() for _, cells in table if not is_blank(cells.get(header))]
        if names and all(map(_FILE_NAME.fullmatch, names)):
            fix = "call it Ground Truth if these are the masks, or remove it"
            raise ValueError(f"the column {header!r} holds file names, and none is the masks'; {fix}")
    if unused:
        notes.append(f"no meaning is known of the columns {listed(unused)}")
    return columns


def squeeze(header: str) -> str:
    return re.sub(r"[\W_]+", "", header).casefold()  # "Ground_Truth " is "groundtruth"


def _meaning(header: str) -> str:
    """The known header that is meant, if one is near: "mask" of "Mask file", "Masks" and "Maks"."""
    if (squeezed := squeeze(header)) in HEADERS["subject"]:  # none that is near: "patient age" is another matter
        return squeezed
    names = [name for role, names in HEADERS.items() if role != "subject" for name in names]
    stem = re.sub(r"(?<=.)(names?|paths?|files?|s)+$", "", squeezed)
    return next(iter(get_close_matches(stem, names, n=1, cutoff=0.8)), "")


def is_blank(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip("\ufeff\u200b \t\r\n\xa0"))


# ---- formats --------------------------------------------------------------------------------------------------------


def read_rows(ref: SliceRef, notes: list[str]) -> Rows:
    """Cells of a table by their headers, without its empty rows; `notes` gets what of it was not read."""
    ref.kind()  # refuses a missing or empty file, and a folder
    suffix = ref.file.suffix.lower()
    if suffix == ".xlsx":
        lines = _read_workbook(ref, notes)
    elif suffix in TABLE_SUFFIXES:
        with reading(ref, "a table in UTF-8", fix="save it as UTF-8 (in a spreadsheet: CSV UTF-8)"):
            text = ref.file.read_bytes().decode("utf-8-sig")
        lines = _read_json_lines(ref, text) if suffix == ".jsonl" else _read_separated(ref, text)
    else:
        raise ValueError(f"{ref} is not a table that can be read; save it as one of {', '.join(TABLE_SUFFIXES)}")
    filled = [(line, cells) for line, cells in lines if not all(map(is_blank, cells))]
    headers = ["" if is_blank(cell) else str(cell).strip() for cell in filled[0][1]] if filled else []
    names = [squeeze(header) for header in headers if header]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"got several columns {twice[0]!r}, expected one; rename the others")
    for line, cells in filled[1:]:
        if not all(map(is_blank, cells[len(headers) :])):
            expected = f"expected {len(headers)} as in the header; quote sentences that hold the separator"
            raise ValueError(f"line {line}: got {len(cells)} cells, {expected}")
    return [(line, {name: cell for name, cell in zip_longest(headers, cells) if name}) for line, cells in filled[1:]]


def _read_workbook(ref: SliceRef, notes: list[str]) -> Lines:
    sheets: dict[str, Lines] = {}
    fix = "save it again as .xlsx without a password, or as .csv"
    with reading(ref, "a workbook (.xlsx)", fix=fix), ref.file.open("rb") as file:
        import openpyxl  # type: ignore[import-untyped]

        for sheet in openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets:
            sheet.reset_dimensions()  # some programs write a wrong size, and rows would be lost
            last = 0
            for line, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
                if not all(map(is_blank, cells)):
                    last = line
                    sheets.setdefault(sheet.title, []).append((line, cells))
                elif line - last > _MOST_EMPTY:
                    notes.append(f"{_MOST_EMPTY} rows after line {last} are empty, what follows is not read")
                    break
    if len(sheets) > 1:
        notes.append(f"of the sheets {listed(list(sheets))} only the first is read")
    return next(iter(sheets.values()), [])


def _read_separated(ref: SliceRef, text: str) -> Lines:
    heading = next((line for line in text.splitlines() if not is_blank(line)), "")
    separator = max(",;\t", key=heading.count)  # told by the header: sentences hold commas
    reader, lines, line = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), Lines(), 1
    try:
        for cells in reader:
            lines.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{ref} is malformed from line {line} on ({error}); close every quotation mark") from error
    return lines


def _read_json_lines(ref: SliceRef, text: str) -> Lines:
    rows, fix = Rows(), 'write one per line, as {"image": "a.png", "text": "...", "mask": "a.png"}'
    for line, content in enumerate(text.split("\n"), start=1):
        with reading(f"{ref} line {line}", "a JSON object", fix=fix):
            rows.append((line, {} if is_blank(content) else dict(json.loads(content))))
    headers = list(dict.fromkeys(header for _, cells in rows for header in cells))
    return [(0, headers), *((line, [cells.get(header) for header in headers]) for line, cells in rows)]
