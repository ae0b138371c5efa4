"""The labels of a label map: number, name, sentence, colour and codes, from sentences or from a preset file."""

from __future__ import annotations

import colorsys
import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from PIL import ImageColor

from pvl_adapter.data.issues import listed
from pvl_adapter.data.tables import Rows, is_blank, read_rows, squeeze
from pvl_adapter.image_files import SliceRef, reading

MOST = 65535  # labels are written as unsigned 16-bit integers

Color = tuple[int, int, int]

# Each the farthest from all before it in OKLab, with full sight and as protanopia and deuteranopia would see it; none
# is grey, as scans are.
_PALETTE = bytes.fromhex("""
    ee1144 bbff00 0000ff 44bbff 772288 ddaa66 008888 66ffee 990000 aa66dd ff88bb ffddaa ff00aa 4444bb 557700 cccc00
    dd7711 bbccff 774455 5555ff 4488ff cc8888 aa6666 77ee77 ffbbbb 8899dd 006677 55bbbb 6677bb 44cc88 7755cc aa2299
    99bb00 ff6666 11aa66 4400dd cc3300 aa0044 ff88ff eeaadd
""")


class Code(NamedTuple):
    """What a label is in a terminology, as `Code("10200004", "SCT", "Liver")`."""

    value: str
    scheme: str
    meaning: str


_KNOWN = {
    "name": "name",
    "sentence": "sentence",
    **dict.fromkeys(("text", "prompt", "description"), "sentence"),
    **dict.fromkeys(("color", "colour"), "color"),
    **dict.fromkeys(("value", "labelvalue"), "value"),
    **{f"{of}{part}": f"{of} {part}" for of in ("category", "type") for part in Code._fields},
}  # what columns mean; case, blanks and _ do not count


@dataclass(frozen=True)
class Label:
    """One label of a label map.

    Attributes:
        value: In the label map, from 1 to 65535; 0 is background.
        name: For legends.
        sentence: What the model is asked for.
        color: Red, green and blue, of 8 bits.
        category: What kind of thing it is, as Code("123037004", "SCT", "Anatomical Structure").
        kind: What it is.
    """

    value: int
    name: str
    sentence: str
    color: Color
    category: Code | None = None
    kind: Code | None = None


def labels_of(sentences: Iterable[str]) -> tuple[Label, ...]:
    """Labels of distinct sentences in alphabetical order, from 1 on, so that the order given does not matter."""
    distinct = sorted(set(sentences))
    return tuple(Label(at + 1, sentence, sentence, palette_color(at)) for at, sentence in enumerate(distinct))


def palette_color(index: int) -> Color:
    """The first 40 are far apart, also for the colour-blind; beyond, hues turn by the golden angle."""
    if rgb := tuple(_PALETTE[3 * index : 3 * index + 3]):
        return cast(Color, rgb)
    color = colorsys.hsv_to_rgb(index * 0.618034 % 1, *((0.9, 0.95), (0.45, 0.8), (0.7, 0.6))[index % 3])
    return cast(Color, tuple(round(255 * part) for part in color))


def read_preset(path: str | os.PathLike[str]) -> tuple[Label, ...]:
    """Labels of a preset file, in its order.

    Args:
        path: A .csv, .tsv, .xlsx, .jsonl or .json (a list of objects) with the column sentence, and if wanted name
            (else the sentence), color (#rrggbb, "255 128 0", or a CSS name; else of the palette), value (else counted
            from 1), and codes: "category value", "category scheme", "category meaning", likewise "type value", ...

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or a label is faulty; the message names row and column.
    """
    path = Path(path)
    try:
        return _labels(_rows(path))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _labels(rows: Rows) -> tuple[Label, ...]:
    headers = list(dict.fromkeys(header for _, cells in rows for header in cells))
    columns = {header: _KNOWN.get(squeeze(header), "") for header in headers}
    if unknown := [header for header, meaning in columns.items() if not meaning]:
        expected = f"expected some of {', '.join(dict.fromkeys(_KNOWN.values()))}"
        raise ValueError(f"got the columns {listed(unknown)}, {expected}; rename or remove them")
    if "sentence" not in columns.values():
        raise ValueError(f"got the columns {listed(headers) or 'none'}, expected sentence among them; add it")
    if twice := [header for header, meaning in columns.items() if [*columns.values()].count(meaning) > 1]:
        raise ValueError(f"got the columns {listed(twice)}, expected one of them; remove the others")
    labels: list[Label] = []
    seen: dict[tuple[str, object], int] = {}
    for at, (line, cells) in enumerate(rows):
        texts = {columns[header]: "" if is_blank(cell) else str(cell).strip() for header, cell in cells.items()}
        try:
            label = _label(at, texts, numbered="value" in columns.values())
            for column in ("name", "sentence", "value"):
                if (first := seen.setdefault((column, getattr(label, column)), line)) != line:
                    got = f"got {getattr(label, column)!r} as in row {first}"
                    raise ValueError(f"column {column}: {got}, expected each once; change one of them")
        except ValueError as error:
            raise ValueError(f"row {line}, {error}") from error
        labels.append(label)
    return tuple(labels)


def _label(at: int, texts: dict[str, str], *, numbered: bool) -> Label:
    if not (sentence := texts.get("sentence")):
        raise ValueError("column sentence: got nothing, expected what the model is asked for; write it, or remove it")
    value = texts.get("value", "") if numbered else str(at + 1)
    if not re.fullmatch(r"\d+(\.0)?", value) or not 0 < float(value) <= MOST:
        expected = f"expected an integer from 1 to {MOST} (0 is background)"
        raise ValueError(f"column value: got {value!r}, {expected}; correct it, or remove the column to count from 1")
    color = _color(texts["color"]) if texts.get("color") else palette_color(at)
    codes: list[Code | None] = []
    for of in ("category", "type"):
        code = Code(*(texts.get(f"{of} {part}", "") for part in Code._fields))
        if any(code) and not all(code):
            raise ValueError(
                f"columns {of}: got {tuple(code)}, expected value, scheme and meaning; fill in all or none"
            )
        codes.append(code if all(code) else None)
    return Label(int(float(value)), texts.get("name") or sentence, sentence, color, codes[0], codes[1])


def _color(text: str) -> Color:
    try:
        numbers = re.split(r"[\s,]+", text.strip("[]() "))
        if len(numbers) == 3 and all(number.isdecimal() and int(number) < 256 for number in numbers):
            return cast(Color, tuple(map(int, numbers)))
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        expected = 'expected #rrggbb, three numbers up to 255 as "255 128 0", or a CSS name as orange'
        raise ValueError(f"column color: got {text!r}, {expected}; correct it, or leave it empty") from None


def _rows(path: Path) -> Rows:
    if path.suffix.lower() != ".json":
        notes: list[str] = []
        rows = read_rows(SliceRef(path), notes)
        for note in notes:
            warnings.warn(f"{path}: {note}", stacklevel=4)
    else:
        fix = 'write a list, as [{"name": "liver", "sentence": "the liver", "color": "#dd8265"}]'
        with reading(str(path), "a JSON list of labels", fix=fix):
            found = json.loads(path.read_text("utf-8-sig"))
            found = found["labels"] if isinstance(found, dict) else found  # a legend
            rows = [(at, dict(each)) for at, each in enumerate(found, start=1)]
    if not rows:
        raise ValueError("got no labels, expected a row for each; add them")
    return rows
