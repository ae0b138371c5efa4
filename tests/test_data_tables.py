"""Tables: real workbooks with their blemishes, and the tables that people write themselves."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import openpyxl
import pytest
from test_data_reading import WORKBOOKS

from pvl_adapter.data import DatasetError, Row, SegmentationDataset, read_table
from pvl_adapter.data import tables as module

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
    for row in rows:
        assert row.text == row.text.strip() != ""
        assert row.image.endswith(".png")
        assert row.mask.endswith(".png")


def test_an_official_row_without_its_trailing_newline():
    raw = next(openpyxl.load_workbook(WORKBOOKS / "ISIC/Prompts_Folder/Train_text_10.xlsx").active.iter_rows(min_row=2))
    assert raw[1].value.endswith("\n")
    row = read_table(WORKBOOKS / "ISIC/Prompts_Folder/Train_text_10.xlsx")[0]
    assert row == Row("ISIC_0000372.png", raw[1].value.strip(), "ISIC_0000372_Segmentation.png", 2)


def test_empty_sheets_are_empty_tables_and_only_a_validation_may_be_one(tmp_path):
    empty = [
        write_workbook(tmp_path / "a.xlsx"),
        write_workbook(tmp_path / "b.xlsx", ("Image", "Description", "Mask")),
        write(tmp_path / "d.csv", "Image,Description\n"),
        write(tmp_path / "e.csv", "\n\n"),
        write(tmp_path / "f.jsonl", "\n"),
    ]
    for table in empty:
        assert read_table(table) == []
        for split in ("train", "test", None):
            with pytest.raises(DatasetError, match="table is empty"):
                SegmentationDataset.from_table(table, split=split)
        with pytest.warns(UserWarning, match="table is empty"):
            assert len(SegmentationDataset.from_table(table, split="val")) == 0


HEADERS = [  # image, text and mask
    ("image", "text", "mask"),
    ("IMG", "Prompt", "Ground_Truth "),
    ("file", "Caption", "segmentation"),
    ("Image name", "Sentence", "Mask file"),
    ("Images", "Descriptions", "Masks"),
    ("image_path", "description", "GroundTruth"),
    ("File name", "Text", "Label file"),
    ("Image", "Descripton", "Grund Truth"),
    ("img", "text", "gt"),
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_a_header_may_be_spelt_in_many_ways(tmp_path, header):
    image, text, mask = header
    rows = read_table(write(tmp_path / "a.csv", f"{text},{mask},{image},age\none polyp,m.png,a.png,61\n"))
    assert rows == [Row("a.png", "one polyp", "m.png", 2)]


def test_what_is_not_used_is_named_and_never_silently_the_mask(tmp_path):
    table = write(tmp_path / "a.csv", "label,image,mask,caption,description\nbenign,a.png,m.png,no,yes\n")
    with pytest.warns(UserWarning, match="not used: 'label', 'caption'"):
        (row,) = SegmentationDataset.from_table(table).rows
    assert row == Row("a.png", "yes", "m.png", 2)
    assert read_table(write(tmp_path / "b.csv", "image,text\na.png,one polyp\n"))[0].mask == ""  # taken by name
    unknown = write(tmp_path / "c.csv", "image,text,annotated\na.png,one polyp,m.png\n")
    with pytest.raises(DatasetError, match=r"'annotated' holds file names.*Ground Truth"):
        read_table(unknown)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(("bom", "end"), [(b"", "\n"), (b"\xef\xbb\xbf", "\r\n"), (b"", "\r")])
def test_separated_values(tmp_path, separator, suffix, bom, end):
    text = 'one small, round tumor; at the left, "benign" für immer'
    cells = [["Image", "Description", "Ground Truth"], ["a.png", '"' + text.replace('"', '""') + '"', "b.png"]]
    content = bom + end.join(separator.join(row) for row in [*cells, ["c.png", " plain ", "d.png"], [""], []]).encode()
    assert read_table(write(tmp_path / f"a{suffix}", content)) == [
        Row("a.png", text, "b.png", 2),
        Row("c.png", "plain", "d.png", 3),
    ]


def test_the_separator_is_told_by_the_header_not_by_the_sentences(tmp_path):
    rows = "".join(f"{n}.png;one, two, three, four, tumors, {n};{n}.png\n" for n in range(5))
    assert len(read_table(write(tmp_path / "a.csv", f"Image;Description;Ground Truth\n{rows}"))) == 5


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


def test_an_image_may_be_listed_twice_but_a_row_counts_once(tmp_path):
    rows = [("a.png", "one polyp", "a.png"), ("a.png", "two polyps", "b.png"), ("a.png", "one polyp\n", "a.png")]
    book = write_workbook(tmp_path / "a.xlsx", RELEASED, *rows)
    with pytest.warns(UserWarning, match="line 4: row is repeated: a.png as in line 2"):
        assert [row.line for row in SegmentationDataset.from_table(book).rows] == [2, 3]


def test_all_faulty_rows_are_listed_at_once(tmp_path):
    rows = [
        ("a.png", "one polyp", "a.png"),
        (None, "one polyp", "a.png"),
        ("c.png", "  \n", None),
        ("g.png", 17, "g.png", None, "more"),
    ]
    with pytest.raises(DatasetError) as caught:
        read_table(write_workbook(tmp_path / "rows.xlsx", RELEASED, *rows))
    assert [issue.location for issue in caught.value.issues] == [f"rows.xlsx line {line}" for line in (3, 4, 4, 5, 5)]


def test_other_sheets_are_not_forgotten_silently(tmp_path):
    book = openpyxl.Workbook()  # its first sheet has nothing in it
    book.create_sheet("rows").append(("image", "text"))
    book["rows"].append(("a.png", "one polyp"))
    book.create_sheet("notes").append(("do not forget",))
    book.save(tmp_path / "a.xlsx")
    with pytest.warns(UserWarning, match="'rows' is read, not notes"):
        assert [row.image for row in SegmentationDataset.from_table(tmp_path / "a.xlsx").rows] == ["a.png"]


def edited(book: Path, old: bytes, new: bytes) -> Path:
    """A workbook with another sheet XML."""
    with zipfile.ZipFile(book) as before, zipfile.ZipFile(book.with_name("edited.xlsx"), "w", 8) as after:
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, content.replace(old, new) if name.endswith("sheet1.xml") else content)
            assert not name.endswith("sheet1.xml") or old in content
    return book.with_name("edited.xlsx")


def test_a_wrong_size_in_a_workbook_loses_no_rows(tmp_path):
    book = write_workbook(tmp_path / "a.xlsx", ("image", "text"), *((f"{n}.png", "one polyp") for n in range(9)))
    assert len(read_table(edited(book, b'<dimension ref="A1:B10"', b'<dimension ref="A1"'))) == 9


@pytest.mark.parametrize("kind", ["rows that are there", "one cell far below", "a size alone"])
def test_a_million_empty_rows_are_not_read(tmp_path, monkeypatch, kind):
    """Some editors save a format for every row that there could be; the file is small, its rows are a million."""
    book = write_workbook(tmp_path / "a.xlsx", ("image", "text"), ("a.png", "one polyp"))
    if kind == "a size alone":
        book = edited(book, b'<dimension ref="A1:B2"', b'<dimension ref="A1:XFD1048576"')
    elif kind == "one cell far below":
        book = edited(book, b"</sheetData>", b'<row r="1048576"><c r="A1048576" s="0"/></row></sheetData>')
    else:
        empty = b"".join(b'<row r="%d"><c r="A%d" s="0"/></row>' % (n, n) for n in range(3, 40_003))
        book = edited(book, b"</sheetData>", empty + b"</sheetData>")
    looked_at = []
    blank = module._blank
    monkeypatch.setattr(module, "_blank", lambda cell: looked_at.append(1) or blank(cell))
    (row,) = read_table(book)
    assert row.image == "a.png"
    assert len(looked_at) < 50_000
    if kind != "a size alone":
        with pytest.warns(UserWarning, match="rows after line 2 are empty"):
            SegmentationDataset.from_table(book)
