"""Tables of pictures, sentences and masks: workbooks, CSV and JSON lines, with the blemishes that real ones have.

The columns are found by their headers, in any case of letters: the released Image, Description and Ground Truth, and
what others call them (`HEADERS`).
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pvl_adapter.data.issues import DatasetError, DatasetIssue, ReadError, listed, one_line, reason

HEADERS: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "file"),
    "text": ("description", "text", "prompt", "sentence", "caption"),
    "mask": ("ground truth", "mask", "segmentation", "gt", "label"),
}
"""What the columns may be called; the first of them that a table has counts."""

_SPREADSHEET_ERROR = re.compile(r"#(REF!|N/A|NAME\?|VALUE!|DIV/0!|NULL!|NUM!)")
_OLD_OFFICE = bytes.fromhex("d0cf11e0")  # how .xls and encrypted workbooks begin


@dataclass(frozen=True)
class Row:
    """One picture with a sentence about it and the mask of what the sentence means.

    Attributes:
        image: File name as the table has it, perhaps with a slice: "scan.nii.gz#z=40".
        text: The sentence, without blanks around it.
        mask: File name; empty if the table has no such column.
        line: Of the table, counted from 1.
    """

    image: str
    text: str
    mask: str
    line: int


@dataclass
class _Sheet:
    """Cells as a file has them.

    Attributes:
        header: None if there is no line with anything in it.
        lines: Line number and cells.
        faults: Line number, problem, fix and whether it is fatal.
    """

    header: list[object] | None = None
    lines: list[tuple[int, Sequence[object]]] = field(default_factory=list)
    faults: list[tuple[int, str, str, bool]] = field(default_factory=list)


def read_table(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a table, in its order; a row that is repeated exactly counts once.

    Args:
        path: A .xlsx (its first sheet with anything in it), .csv or .tsv (UTF-8; comma, semicolon or tab), or .jsonl
            (one object a line). A column for the mask may be lacking. An empty sheet is an empty table.

    Raises:
        DatasetError: If there is no such file, it cannot be read, or rows are faulty; all of them are named.
    """
    rows, faults = scan_table(Path(path), place=Path(path).name)
    if any(fault.fatal for fault in faults):
        raise DatasetError(faults)
    return rows


def scan_table(path: Path, *, place: str) -> tuple[list[Row], list[DatasetIssue]]:
    """The sound rows of a table, and what is wrong with it.

    Args:
        path: As for `read_table`.
        place: What the faults call the table.
    """
    try:
        sheet = _read(path)
        columns = _columns(sheet)
    except ReadError as error:
        return [], [DatasetIssue(place if path.name in place else f"{place} ({path.name})", error.problem, error.fix)]
    faults = [DatasetIssue(_place(place, line), problem, fix, fatal) for line, problem, fix, fatal in sheet.faults]
    rows: list[Row] = []
    lines: dict[tuple[str, str, str], int] = {}
    for line, cells in sheet.lines:
        row, problems = _row(line, cells, columns=columns, width=len(sheet.header or ()))
        where = _place(place, line, row.image)
        faults += [DatasetIssue(where, problem, fix) for problem, fix in problems]
        if problems:
            continue
        first = lines.setdefault((row.image, row.text, row.mask), line)
        if first == line:
            rows.append(row)
        else:
            problem = f"row is repeated: line {first} is the same"
            faults.append(DatasetIssue(where, problem, "it counts once; remove one of them", fatal=False))
    return rows, faults


def _place(place: str, line: int, image: str = "") -> str:
    return f"{place} line {line}" + (f" ({image})" if image else "")


def _row(
    line: int, cells: Sequence[object], *, columns: dict[str, int], width: int
) -> tuple[Row, list[tuple[str, str]]]:
    values: dict[str, str] = {"image": "", "text": "", "mask": ""}
    problems: list[tuple[str, str]] = []
    if not all(_blank(cell) for cell in cells[width:]):
        problem = f"too many cells: {len(cells)} in this row, the header has {width}"
        problems.append((problem, "put sentences that hold the separator in quotation marks"))
    for role, column in columns.items():
        cell = cells[column] if column < len(cells) else None
        if _blank(cell):
            problem = f"{role} is missing: its cell is empty"
            problems.append((problem, "fill it in (a formula must have been computed and saved), or remove the row"))
        elif not isinstance(cell, str):
            problem = f"{role} is no text: {type(cell).__name__} {cell!r}"
            what = "a sentence" if role == "text" else "a file name with its extension"
            problems.append((problem, f"write {what}, in a cell that is formatted as text"))
        elif _SPREADSHEET_ERROR.fullmatch(cell.strip()):
            problems.append((f"{role} is an error of the spreadsheet: {cell.strip()}", "mend the formula"))
        elif role == "text" and not any(letter.isalpha() for letter in cell):
            problem = f"text has no words: {cell.strip()!r}"
            problems.append((problem, "describe what is to be found in the picture"))
        else:
            values[role] = cell.strip()
    return Row(**values, line=line), problems


def _columns(sheet: _Sheet) -> dict[str, int]:
    """Which column holds what."""
    if sheet.header is None or not sheet.lines:
        return {}
    found = [_plain(cell) for cell in sheet.header]
    columns: dict[str, int] = {}
    for role, names in HEADERS.items():
        name = next((name for name in names if name in found), None)
        if name is None:
            continue
        if found.count(name) > 1:
            raise ReadError(f"header is ambiguous: {name!r} is there {found.count(name)} times", "rename one of them")
        columns[role] = found.index(name)
    lacking = [role for role in ("image", "text") if role not in columns]
    if lacking:
        headers = [str(cell) for cell in sheet.header if not _blank(cell)]
        expected = " and ".join(f"one of {list(HEADERS[role])}" for role in lacking)
        raise ReadError(
            f"header is unknown: found {listed(headers) or 'nothing'}, expected {expected}",
            f"name the columns Image, Description and Ground Truth in the first line (no {' and no '.join(lacking)})",
        )
    return columns


def _plain(cell: object) -> str:
    """A header for comparison: "Ground_Truth " is "ground truth"."""
    return re.sub(r"[\s_-]+", " ", str(cell)).strip().casefold()


def _blank(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip("\ufeff\u200b \t\r\n\xa0"))


# ---- formats --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> _Sheet:
    if path.is_dir():
        raise ReadError(f"table is a folder: {path}", "give the file")
    if not path.is_file():
        raise ReadError(f"table is missing: {path}", "put it there, or correct the name")
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ReadError(f"table is of an unknown kind: {path.name}", f"save it as one of {', '.join(_READERS)}")
    try:
        if not path.stat().st_size:
            raise ReadError("table is an empty file: 0 bytes", "save or fetch it again")
        return read(path)
    except OSError as error:
        raise ReadError(f"table cannot be read: {reason(error)}", "make it readable") from error


def _read_xlsx(path: Path) -> _Sheet:
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(_OLD_OFFICE):
            raise ReadError(
                "table is no .xlsx: it is encrypted, or an old .xls", "save it as .xlsx without a password, or as .csv"
            )
        if not start.startswith(b"PK"):
            raise ReadError(f"table is no .xlsx: it begins with {start[:20]!r}", "save it as .xlsx, or as .csv")
        try:
            import openpyxl  # type: ignore[import-untyped]
        except ImportError as error:
            raise ReadError(
                "table is an .xlsx: openpyxl is not installed", 'pip install "pvl-adapter[data]", or save it as .csv'
            ) from error
        try:
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            sheets = {}
            for sheet in book.worksheets:
                sheet.reset_dimensions()  # some programs write a wrong size, and rows would be lost
                rows = list(enumerate(sheet.iter_rows(values_only=True), start=1))
                sheets[sheet.title] = [(line, cells) for line, cells in rows if not all(map(_blank, cells))]
        except Exception as error:  # of damaged files openpyxl says anything from KeyError to zlib.error
            raise ReadError(
                f"table is damaged or no .xlsx: {reason(error)}", "save or fetch it again, or save it as .csv"
            ) from error
    filled = [title for title, lines in sheets.items() if lines]
    result = _sheet([] if not filled else sheets[filled[0]])
    if len(filled) > 1:
        problem = f"workbook has several sheets: only {filled[0]!r} is read, not {listed(filled[1:])}"
        result.faults.append((1, problem, "save the others as workbooks of their own, or remove them", False))
    return result


def _read_separated(path: Path) -> _Sheet:
    text = _text(path)
    best: list[tuple[int, Sequence[object]]] | None = None
    known = {name for names in HEADERS.values() for name in names}
    heading = next((line for line in text.splitlines() if line.strip()), "")
    scores = {
        separator: (sum(_plain(cell) in known for cell in cells), len(cells))
        for separator in ("\t,;" if path.suffix.lower() == ".tsv" else ",;\t")
        for cells in csv.reader([heading], delimiter=separator)
    }
    separator = max(scores, key=lambda each: scores[each]) if scores else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    best, line = [], 1
    try:
        for cells in reader:
            if not all(map(_blank, cells)):
                best.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        _refuse_quotes(line, error)
    return _sheet(best)


def _refuse_quotes(line: int, error: csv.Error) -> NoReturn:
    raise ReadError(
        f"table is malformed from line {line} on: {reason(error)}",
        "close every quotation mark, and double those within a quoted sentence",
    ) from error


def _read_json_lines(path: Path) -> _Sheet:
    header: dict[str, int] = {}
    objects: list[tuple[int, dict[str, object]]] = []
    sheet = _Sheet()
    for line, content in enumerate(_text(path).split("\n"), start=1):
        if _blank(content):
            continue
        try:
            value = json.loads(content.strip("\ufeff"))
        except (ValueError, RecursionError) as error:
            fix = 'write one object a line: {"image": "a.png", "text": "...", "mask": "a.png"}'
            sheet.faults.append((line, f"line is no JSON: {reason(error)}", fix, True))
            continue
        if not isinstance(value, dict):
            problem = f"line is no JSON object: {one_line(content)[:40]}"
            sheet.faults.append((line, problem, 'write {"image": "a.png", "text": "...", "mask": "a.png"}', True))
            continue
        for key in value:
            header.setdefault(key, len(header))
        objects.append((line, value))
    sheet.header = list(header)
    sheet.lines = [(line, [value.get(key) for key in header]) for line, value in objects]
    return sheet


def _sheet(lines: list[tuple[int, Sequence[object]]]) -> _Sheet:
    return _Sheet(header=list(lines[0][1]), lines=lines[1:]) if lines else _Sheet()


def _text(path: Path) -> str:
    content = path.read_bytes()
    fix = "save it as UTF-8 (in a spreadsheet: CSV UTF-8)"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ReadError("table is not UTF-8: it is UTF-16", fix)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ReadError(
            f"table is not UTF-8: byte {content[error.start : error.start + 1]!r} in line {line}, as in Latin-1", fix
        ) from error
    if "\0" in text:
        raise ReadError("table is no text: it holds null bytes", fix)
    return text


_READERS: dict[str, Callable[[Path], _Sheet]] = {
    ".xlsx": _read_xlsx,
    ".csv": _read_separated,
    ".tsv": _read_separated,
    ".jsonl": _read_json_lines,
}
TABLE_SUFFIXES = tuple(_READERS)
