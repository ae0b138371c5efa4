"""Tables of images, sentences and masks: workbooks, CSV and JSON lines, with the blemishes that real ones have.

Columns are found by their headers, in any spelling near to one of `HEADERS`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pvl_adapter.data.issues import DatasetError, DatasetIssue, listed
from pvl_adapter.image_files import DICOM_SUFFIXES, IMAGE_SUFFIXES, VOLUME_SUFFIXES, SliceRef, reading, reason

HEADERS: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "file"),
    "text": ("description", "text", "prompt", "sentence", "caption"),
    "mask": ("groundtruth", "mask", "segmentation", "gt", "label"),
}
"""What columns may be called, without case, blanks and punctuation; the first that a table has counts."""
TABLE_SUFFIXES = (".xlsx", ".csv", ".tsv", ".jsonl")

_MOST_EMPTY = 10_000  # empty rows of a workbook in a row; a small file may hold a million
_SPREADSHEET_ERROR = re.compile(r"#(REF!|N/A|NAME\?|VALUE!|DIV/0!|NULL!|NUM!)")
_FILE_NAME = re.compile(rf".+({'|'.join(map(re.escape, IMAGE_SUFFIXES + VOLUME_SUFFIXES + DICOM_SUFFIXES))})(#.*)?")

Lines = list[tuple[int, Sequence[object]]]  # line numbers and cells; the first is the header
Report = Callable[[int, str, str, bool], None]  # line or 0, kind, detail, fatal


@dataclass(frozen=True)
class Row:
    """One image with a sentence about it and the mask of what the sentence means.

    Attributes:
        image: File name as the table has it, perhaps with a slice: "scan.nii.gz#z=40".
        text: The sentence, without white space around it.
        mask: File name; empty if the table has no such column.
        line: Of the table, counted from 1.
    """

    image: str
    text: str
    mask: str
    line: int


def read_table(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a table, in its order; a row that is repeated exactly counts once.

    Args:
        path: A .xlsx (its first sheet with anything in it), .csv or .tsv (UTF-8; comma, semicolon or tab), or .jsonl
            (one object per line). The mask column may be missing. An empty sheet is an empty table.

    Raises:
        DatasetError: If there is no such file, it cannot be read, or rows are faulty; all issues are listed.
    """
    rows, issues = scan_table(Path(path), location=Path(path).name)
    if any(issue.fatal for issue in issues):
        raise DatasetError(issues)
    return rows


def scan_table(path: Path, *, location: str) -> tuple[list[Row], list[DatasetIssue]]:
    """The sound rows of a table, and what is wrong with it; `location` is how issues call the table."""
    issues: list[DatasetIssue] = []

    def report(line: int, kind: str, detail: str, fatal: bool = True) -> None:
        issues.append(DatasetIssue(location + f" line {line}" * bool(line), kind, detail, fatal))

    try:
        lines = [(line, cells) for line, cells in _read(path, report) if not all(map(_blank, cells))]
    except (OSError, ValueError) as error:
        report(0, "table cannot be read", reason(error))
        return [], issues
    if len(lines) < 2:
        return [], issues
    header, columns, rows = lines[0][1], _columns(lines, report), list[Row]()
    first: dict[tuple[str, str, str], int] = {}
    for line, cells in lines[1:] if columns else []:
        before = len(issues)
        if not all(map(_blank, cells[len(header) :])):
            detail = f"got {len(cells)}, the header has {len(header)}; quote sentences that hold the separator"
            report(line, "too many cells", detail)
        row = Row(**{role: _cell(role, cells, columns.get(role), line, report) for role in HEADERS}, line=line)
        if first.setdefault((row.image, row.text, row.mask), line) != line and len(issues) == before:
            detail = f"{row.image} as in line {first[row.image, row.text, row.mask]}; it counts once, remove one"
            report(line, "row is repeated", detail, False)
        if len(issues) == before:
            rows.append(row)
    return rows, issues


def _cell(role: str, cells: Sequence[object], column: int | None, line: int, report: Report) -> str:
    if column is None:
        return ""
    cell = cells[column] if column < len(cells) else None
    detail = ""
    if _blank(cell):
        detail = "its cell is empty; fill it in (a formula must have been computed and saved), or remove the row"
    elif not isinstance(cell, str):
        detail = f"got the {type(cell).__name__} {cell!r}, expected text; format the cell as text"
    elif _SPREADSHEET_ERROR.fullmatch(cell.strip()):
        detail = f"got the spreadsheet error {cell.strip()}; correct the formula"
    elif role == "text" and not any(letter.isalpha() for letter in cell):
        detail = f"got {cell.strip()!r}, expected words"
    if detail:
        report(line, f"{role} cell is not usable", detail, True)
    return "" if detail else str(cell).strip()


def _columns(lines: Lines, report: Report) -> dict[str, int]:
    """The column of each role; empty if image or text cannot be found."""
    line, header = lines[0]
    names = {index: _squeeze(cell) for index, cell in enumerate(header) if not _blank(cell)}
    columns: dict[str, int] = {}
    for guess in (lambda name, known: name if name in known else None, _near):  # exact names first
        for role, known in HEADERS.items():
            found = {index: guess(name, known) for index, name in names.items() if index not in columns.values()}
            ranked = sorted((index for index in found if found[index]), key=lambda index: known.index(found[index]))
            if role in columns or not ranked:
                continue
            if len(ranked) > 1 and names[ranked[0]] == names[ranked[1]]:
                report(line, "columns are ambiguous", f"{header[ranked[0]]!r} is there twice; rename one", True)
            columns[role] = ranked[0]
    unused = [index for index in names if index not in columns.values()]
    if missing := [f"{role} (one of {', '.join(HEADERS[role])})" for role in ("image", "text") if role not in columns]:
        detail = f"got {listed([header[index] for index in names])}, expected {' and '.join(missing)}"
        report(line, "columns are missing", f"{detail}; name them Image, Description and Ground Truth", True)
        return {}
    for index in unused if "mask" not in columns else []:
        cells = [cells[index] for _, cells in lines[1:] if index < len(cells) and not _blank(cells[index])]
        if cells and all(_FILE_NAME.fullmatch(str(cell).strip().lower()) for cell in cells):
            detail = f"{header[index]!r} holds file names and none is the mask's; name it Ground Truth, or remove it"
            report(line, "column is unknown", detail, True)
    if unused:
        report(line, "columns are not used", listed([repr(header[index]) for index in unused]), False)
    return columns


def _squeeze(cell: object) -> str:
    """A header for comparison: "Ground_Truth " is "groundtruth"."""
    return re.sub(r"[\W_]+", "", str(cell)).casefold()


def _near(name: str, known: Sequence[str]) -> str | None:
    """The header that is meant, if a name is near one: "Mask file", "Masks" and "Ground Thruth" are masks."""
    while name not in known and (shorter := re.sub(r"(names?|paths?|files?|s)$", "", name)) not in ("", name):
        name = shorter
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.8)), None)


def _blank(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip("\ufeff\u200b \t\r\n\xa0"))


# ---- formats --------------------------------------------------------------------------------------------------------


def _read(path: Path, report: Report) -> Lines:
    ref, suffix = SliceRef(path), path.suffix.lower()
    ref.kind()  # refuses a missing or empty file, and a folder
    if suffix == ".xlsx":
        return _read_workbook(ref, report)
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path} is not a table that can be read; save it as one of {', '.join(TABLE_SUFFIXES)}")
    with reading(ref, "a table in UTF-8", fix="save it as UTF-8 (in a spreadsheet: CSV UTF-8)"):
        text = path.read_bytes().decode("utf-8-sig")
    return _read_json_lines(path, text) if suffix == ".jsonl" else _read_separated(path, text)


def _read_workbook(ref: SliceRef, report: Report) -> Lines:
    try:
        import openpyxl  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(
            f'{ref} needs openpyxl, which is not installed; pip install "pvl-adapter[data]", or save it as .csv'
        ) from error
    sheets: dict[str, Lines] = {}
    fix = "save it again as .xlsx without a password, or as .csv"
    with reading(ref, "a workbook (.xlsx)", fix=fix), ref.file.open("rb") as file:
        for sheet in openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets:
            sheet.reset_dimensions()  # some programs write a wrong size, and rows would be lost
            lines, last = Lines(), 0
            for line, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
                if not all(map(_blank, cells)):
                    last = line
                    lines.append((line, cells))
                elif line - last > _MOST_EMPTY:
                    detail = f"{_MOST_EMPTY} rows after line {last} are empty, what follows is not read; remove them"
                    report(last, "workbook is mostly empty", detail, False)
                    break
            if lines:
                sheets[sheet.title] = lines
    if len(sheets) > 1:
        used, *others = sheets
        report(0, "workbook has several sheets", f"{used!r} is read, not {listed(others)}; remove the others", False)
    return next(iter(sheets.values()), Lines())


def _read_separated(path: Path, text: str) -> Lines:
    heading = next((line for line in text.splitlines() if not _blank(line)), "")
    known = {name for names in HEADERS.values() for name in names}

    def score(separator: str) -> tuple[int, int]:  # told by the header: sentences hold commas
        cells = next(csv.reader([heading], delimiter=separator), [])
        return sum(_squeeze(cell) in known for cell in cells), len(cells)

    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=score), strict=True)
    lines, line = Lines(), 1
    try:
        for cells in reader:
            lines.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path} is malformed from line {line} on ({error}); close every quotation mark") from error
    return lines


def _read_json_lines(path: Path, text: str) -> Lines:
    objects: list[tuple[int, dict[str, object]]] = []
    for line, content in enumerate(text.split("\n"), start=1):
        try:
            value = {} if _blank(content) else json.loads(content)
            objects.append((line, dict(value.items())))
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} line {line} is not a JSON object ({reason(error)}); write one per line, as "
                '{"image": "a.png", "text": "...", "mask": "a.png"}'
            ) from error
    header = list(dict.fromkeys(key for _, value in objects for key in value))
    return [(1, header), *((line, [value.get(key) for key in header]) for line, value in objects)]
