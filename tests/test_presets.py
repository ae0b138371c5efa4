"""Presets: labels from sentences or from a table, with errors that name the row."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import openpyxl
import pytest

from pvl_adapter.data.label_files import legend
from pvl_adapter.data.presets import Code, Label, labels_of, palette_color, read_preset

BRAIN = Path(__file__).parents[1] / "examples" / "presets" / "brain.csv"
LIVER = Label(
    value=5,
    name="liver",
    sentence="the liver, large",
    color=(221, 130, 101),
    category=Code("123037004", "SCT", "Anatomical Structure"),
    kind=Code("10200004", "SCT", "Liver"),
)
SPLEEN = Label(value=1000, name="spleen", sentence="one spleen", color=(255, 165, 0))
COLUMNS = {
    "Name": ["liver", "spleen"],
    "Prompt": ["the liver, large", "one spleen"],
    "COLOUR": ["#dd8265", "orange"],
    "Label value": [5, 1000],
    "category_value": ["123037004", ""],
    "category_scheme": ["SCT", ""],
    "category_meaning": ["Anatomical Structure", ""],
    "Type Value": ["10200004", ""],
    "Type Scheme": ["SCT", ""],
    "Type Meaning": ["Liver", ""],
}
ROWS = [dict(zip(COLUMNS, cells, strict=True)) for cells in zip(*COLUMNS.values(), strict=True)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """Rows as the kind of file that the path says."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    if path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for line in table:
            book.active.append(line)
        book.save(path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(table)
    else:
        lines = "\n".join(map(json.dumps, rows))
        path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "xlsx", "json", "jsonl"])
def test_a_preset_is_read_from_any_kind_of_table(suffix, tmp_path):
    assert read_preset(write(tmp_path / f"organs.{suffix}", ROWS)) == (LIVER, SPLEEN)


def test_only_sentences_are_needed(tmp_path):
    labels = read_preset(write(tmp_path / "organs.csv", [{"sentence": "the liver"}, {"sentence": "a kidney"}]))
    assert labels == (
        Label(1, "the liver", "the liver", palette_color(0)),
        Label(2, "a kidney", "a kidney", palette_color(1)),
    )


def test_a_legend_is_a_preset(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"labels": legend([LIVER, SPLEEN]), "overlaps": []}))
    assert read_preset(tmp_path / "map.json") == (LIVER, SPLEEN)


@pytest.mark.parametrize(
    ("text", "color"),
    [("255 128 0", (255, 128, 0)), ("255,128,0", (255, 128, 0)), ("#0f8", (0, 255, 136)), ("Teal", (0, 128, 128))],
)
def test_colours_are_written_in_many_ways(text, color, tmp_path):
    assert read_preset(write(tmp_path / "one.csv", [{"sentence": "a", "color": text}]))[0].color == color
    assert read_preset(write(tmp_path / "one.json", [{"sentence": "a", "color": list(color)}]))[0].color == color


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Name": "liver"}, "row 3, column name: got 'liver' as in row 2, expected each once"),
        ({"Prompt": "the liver, large"}, "row 3, column sentence: got 'the liver, large' as in row 2"),
        ({"Label value": 5}, "row 3, column value: got 5 as in row 2"),
        ({"Label value": 0}, "row 3, column value: got '0', expected an integer from 1 to 65535"),
        ({"Label value": 65536}, "row 3, column value: got '65536'"),
        ({"Label value": "two"}, "row 3, column value: got 'two'"),
        ({"Label value": ""}, "row 3, column value: got ''"),
        ({"Label value": "²"}, "row 3, column value: got '²'"),
        ({"Prompt": " "}, "row 3, column sentence: got nothing"),
        ({"COLOUR": "reddish"}, "row 3, column color: got 'reddish', expected #rrggbb"),
        ({"COLOUR": "0 0 256"}, "row 3, column color: got '0 0 256'"),
        ({"Type Value": "78961009"}, "row 3, columns type: got .*'78961009', '', ''.*fill in all or none"),
    ],
)
def test_a_faulty_row_is_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=rf"organs\.csv: {message}"):
        read_preset(write(tmp_path / "organs.csv", [ROWS[0], {**ROWS[1], **change}]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "name,color\nliver,red\n", "got the columns name, color, expected sentence among them"),
        ("a.csv", "sentence,colr\nliver,red\n", "got the columns colr, expected some of name, sentence, color"),
        ("a.csv", "sentence,text\nliver,red\n", "got the columns sentence, text, expected one of them"),
        ("a.csv", "sentence\n", "got no labels"),
        ("a.csv", "", "is empty"),
        ("a.csv", "sentence\nthe liver, large\n", "line 2: got 2 cells, expected 1"),
        ("a.json", "{", "not a JSON list of labels"),
        ("a.json", "[]", "got no labels"),
        ("a.json", '["liver"]', "not a JSON list of labels"),
        ("a.txt", "liver", "not a table"),
    ],
)
def test_a_file_that_is_no_preset_says_why_in_one_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        read_preset(tmp_path / name)
    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).count(str(tmp_path / name)) == 1
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        read_preset(tmp_path / "missing.json")


def test_a_second_sheet_is_told_of(tmp_path):
    path = write(tmp_path / "organs.xlsx", ROWS)
    book = openpyxl.load_workbook(path)
    book.create_sheet("more").append(["sentence"])
    book.save(path)
    with pytest.warns(UserWarning, match="only the first is read"):
        assert read_preset(path) == (LIVER, SPLEEN)


def test_labels_of_sentences_do_not_depend_on_their_order():
    labels = labels_of(["b", "c", "a", "b"])
    assert labels == labels_of(["c", "b", "a"])
    assert [(label.value, label.name, label.sentence) for label in labels] == [
        (1, "a", "a"),
        (2, "b", "b"),
        (3, "c", "c"),
    ]


def test_colours_of_the_palette_are_fixed_and_no_two_are_close():
    assert [palette_color(index) for index in (0, 1, 39)] == [(238, 17, 68), (187, 255, 0), (238, 170, 221)]
    colors = [palette_color(index) for index in range(40)]
    apart = [max(abs(one - two) for one, two in zip(a, b, strict=True)) for a in colors for b in colors if a != b]
    assert min(apart) >= 34
    assert len({palette_color(index) for index in range(500)}) > 450
    assert all(0 <= part <= 255 for index in range(500) for part in palette_color(index))


def test_the_example_has_colours_sides_and_codes_that_the_dictionary_knows():
    codes = pytest.importorskip("pydicom.sr.codedict").codes
    labels = read_preset(BRAIN)
    assert len(labels) == 24
    assert sum(label.kind is not None for label in labels) == 16
    for label in labels:
        assert label.name in label.sentence
        for code in filter(None, (label.category, label.kind)):
            known = getattr(codes.SCT, code.meaning.replace(" ", ""))
            assert (known.value, known.scheme_designator, known.meaning) == code
