"""Tables: real workbooks with their blemishes, and the tables that people write themselves."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import openpyxl
import pytest
from test_data_reading import WORKBOOKS

from pvl_adapter.data import DatasetError, Row, SegmentationDataset, read_table, tables

RELEASED = ("Image", "Description", "Ground Truth")


def write_workbook(path: Path, *rows: tuple[object, ...]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("workbook", "count"),
    [
        ("CVC300/Prompts_Folder/Train_text.xlsx", 20),
        ("CVC300/Prompts_Folder/Val_text.xlsx", 0),  # a sheet without anything, not even a header
        ("ISIC/Prompts_Folder/Train_text_10.xlsx", 80),
        ("BUSI/Prompts_Folder/Val_text_10.xlsx", 7),
        ("BUSI/Prompts_Folder/Test_text_contradictory.xlsx", 78),
    ],
)
def test_official_workbooks(workbook, count):
    rows = read_table(WORKBOOKS / workbook)
    assert [row.line for row in rows] == list(range(2, count + 2))
    raw = list(openpyxl.load_workbook(WORKBOOKS / workbook).active.iter_rows(min_row=2, values_only=True))
    for row, cells in zip(rows, raw, strict=True):
        assert (row.image, row.text, row.mask) == tuple(cell.strip() for cell in cells[:3])  # many end in a newline


@pytest.mark.parametrize("name", ["a.xlsx", "b.xlsx", "c.csv", "d.jsonl"])
def test_an_empty_sheet_is_an_empty_table_and_only_a_validation_may_be_one(tmp_path, name):
    table = tmp_path / name
    if name.endswith("xlsx"):
        write_workbook(table, *[RELEASED] * (name == "b.xlsx"))
    else:
        write(table, "Image,Description\n" if name == "c.csv" else "\n")
    assert read_table(table) == []
    for split in ("train", "test", None):
        with pytest.raises(DatasetError, match="table is empty"):
            SegmentationDataset.from_table(table, split=split)
    with pytest.warns(UserWarning, match="table is empty"):
        assert len(SegmentationDataset.from_table(table, split="val")) == 0


HEADERS = [  # image, text and mask
    ("IMG", "Prompt", "Ground_Truth "),
    ("file", "Caption", "segmentation"),
    ("Image name", "Sentence", "Mask file"),
    ("image_path", "descriptions", "Masks"),
    ("File name", "Text", "Label file"),
    ("Image", "Descripton", "Grund Truth"),
    ("img", "text", "gt"),
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_a_header_may_be_spelt_in_many_ways(tmp_path, header):
    image, text, mask = header
    table = write(tmp_path / "a.csv", f",{text},{mask},{image},age\n0,one polyp,m.png,a.png,61\n")  # as by pandas
    assert read_table(table) == [Row("a.png", "one polyp", "m.png", 2)]


@pytest.mark.parametrize("header", ["Subject", "patient", "Patient ID", "case_id"])
def test_subjects_are_read_if_the_table_has_them(tmp_path, header):
    table = write_workbook(
        tmp_path / "a.xlsx", (*RELEASED, header), ("a.png", "one", "m.png", 7), ("b.png", "two", "n")
    )
    assert [row.subject for row in read_table(table)] == ["7", ""]
    table = write_workbook(tmp_path / "b.xlsx", (*RELEASED, header), ("a.png", "one", "m.png", "#REF!"))
    with pytest.raises(DatasetError, match=r"subject cell is not usable.*expected a name"):
        read_table(table)


def test_only_a_plain_header_is_that_of_subjects(tmp_path):
    table = write(tmp_path / "a.csv", "image,text,mask,patient age,cause\na.png,one polyp,m.png,61,fall\n")
    with pytest.warns(UserWarning, match="patient age, cause"):
        dataset = SegmentationDataset.from_table(table)
    assert dataset.rows == [Row("a.png", "one polyp", "m.png", 2)]
    assert dataset.rows[0].subject == ""


def test_what_is_not_used_is_named_and_never_silently_the_mask(tmp_path):
    table = write(tmp_path / "a.csv", "label,image,mask,caption,description\nbenign,a.png,m.png,no,yes\n")
    with pytest.warns(UserWarning, match="label, caption"):
        (row,) = SegmentationDataset.from_table(table).rows
    assert row == Row("a.png", "yes", "m.png", 2)
    with pytest.raises(DatasetError, match="mask cell"):  # and not those of the same names
        read_table(write(tmp_path / "c.csv", "image,text,mask\na.png,one polyp\n"))
    unknown = write(tmp_path / "b.csv", "image,text,annotated\na.png,one polyp,m.png\n")
    with pytest.raises(DatasetError, match=r"'annotated' holds file names.*Ground Truth"):
        read_table(unknown)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(("bom", "end"), [(b"", "\n"), (b"\xef\xbb\xbf", "\r\n"), (b"", "\r")])
def test_separated_values(tmp_path, separator, bom, end):
    text = 'one, two, three, four small; round tumors, "benign" für immer'
    cells = [["Image", "Description", "Ground Truth"], ["a.png", '"' + text.replace('"', '""') + '"', "b.png"]]
    content = bom + end.join(separator.join(row) for row in [*cells, ["c.png", " plain ", "d.png"], [""], []]).encode()
    assert read_table(write(tmp_path / "a.csv", content)) == [
        Row("a.png", text, "b.png", 2),
        Row("c.png", "plain", "d.png", 3),
    ]


def test_lines_are_those_of_the_file(tmp_path):
    table = write(tmp_path / "a.csv", '\nimage,text\n\na.png,"one\npolyp"\n\nb.png,two\n')
    assert [(row.image, row.line) for row in read_table(table)] == [("a.png", 4), ("b.png", 7)]
    book = write_workbook(tmp_path / "a.xlsx", (None,), ("image", "text"), (None, " "), ("a.png", "one polyp"))
    assert [(row.image, row.line) for row in read_table(book)] == [("a.png", 4)]


def test_json_lines(tmp_path):
    lines = [
        {"Image": "a.png", "caption": "one polyp\n", "ground_truth": "b.png"},
        {"ground_truth": "c.png", "caption": "für \u2028 immer", "Image": "d"},
    ]
    content = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    expected = [Row("a.png", "one polyp", "b.png", 1), Row("d", "für \u2028 immer", "c.png", 3)]
    assert read_table(write(tmp_path / "a.jsonl", content)) == expected


def test_all_faulty_rows_are_listed_at_once(tmp_path):
    rows = [("a.png", "one polyp", "a.png"), (None, "one polyp", "a.png"), ("c.png", "  \n", None), ("g.png", 17, "#")]
    with pytest.raises(DatasetError) as caught:
        read_table(write_workbook(tmp_path / "rows.xlsx", RELEASED, *rows))
    assert [issue.location for issue in caught.value.issues] == [f"rows.xlsx line {line}" for line in (3, 4, 4, 5)]


def test_other_sheets_are_not_forgotten_silently(tmp_path):
    book = openpyxl.Workbook()  # its first sheet has nothing in it
    book.create_sheet("rows").append(("image", "text"))
    book["rows"].append(("a.png", "one polyp"))
    book.create_sheet("notes").append(("do not forget",))
    book.save(tmp_path / "a.xlsx")
    with pytest.warns(UserWarning, match="rows, notes"):
        assert [row.image for row in SegmentationDataset.from_table(tmp_path / "a.xlsx").rows] == ["a.png"]


def test_a_wrong_size_in_a_workbook_loses_no_rows(tmp_path):
    book = write_workbook(tmp_path / "a.xlsx", ("image", "text"), *((f"{n}.png", "one polyp") for n in range(9)))
    with zipfile.ZipFile(book) as before, zipfile.ZipFile(tmp_path / "edited.xlsx", "w", 8) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name).replace(b'<dimension ref="A1:B10"', b'<dimension ref="A1"'))
    assert len(read_table(tmp_path / "edited.xlsx")) == 9


def test_a_million_empty_rows_are_not_read(tmp_path, monkeypatch):
    """Some editors save a format for every row that there could be; the file is small, its rows are a million."""
    rows = [("image", "text"), ("a.png", "one polyp"), *[(" ",)] * 60, ("b.png", "far below")]
    book = write_workbook(tmp_path / "a.xlsx", *rows)
    assert len(read_table(book)) == 2
    monkeypatch.setattr(tables, "_MOST_EMPTY", 50)
    with pytest.warns(UserWarning, match="after line 2 are empty"):
        assert len(SegmentationDataset.from_table(book)) == 1
