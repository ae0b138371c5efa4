"""Tables: real workbooks with their blemishes, and the tables that people write themselves."""

from __future__ import annotations

import json
from pathlib import Path

import openpyxl
import pytest

from pvl_adapter.data import DatasetError, DatasetIssue, Row, SegmentationDataset, check_datasets, read_table
from pvl_adapter.data.tables import HEADERS

WORKBOOKS = Path(__file__).parent / "goldens" / "prompts"
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
def test_released_workbooks(workbook, count):
    rows = read_table(WORKBOOKS / workbook)
    assert len(rows) == count
    assert [row.line for row in rows] == list(range(2, count + 2))
    for row in rows:
        assert row.text == row.text.strip() != ""
        assert row.image.endswith(".png")
        assert row.mask.endswith(".png")


def test_masks_may_be_called_otherwise_and_newlines_go():
    raw = next(openpyxl.load_workbook(WORKBOOKS / "ISIC/Prompts_Folder/Train_text_10.xlsx").active.iter_rows(min_row=2))
    assert raw[1].value.endswith("\n")
    row = read_table(WORKBOOKS / "ISIC/Prompts_Folder/Train_text_10.xlsx")[0]
    assert row == Row("ISIC_0000372.png", raw[1].value.strip(), "ISIC_0000372_Segmentation.png", 2)


def test_empty_sheets_are_empty_tables(tmp_path):
    assert read_table(write_workbook(tmp_path / "a.xlsx")) == []
    assert read_table(write_workbook(tmp_path / "b.xlsx", ("Image", "Description", "Mask"))) == []
    assert read_table(write_workbook(tmp_path / "c.xlsx", ("Nobody", "knows"))) == []
    assert read_table(write(tmp_path / "d.csv", "Image,Description\n")) == []
    assert read_table(write(tmp_path / "e.csv", "\n\n")) == []
    assert read_table(write(tmp_path / "f.jsonl", "\n")) == []


@pytest.mark.parametrize("image", HEADERS["image"])
@pytest.mark.parametrize("text", HEADERS["text"])
@pytest.mark.parametrize("mask", HEADERS["mask"])
def test_headers(tmp_path, image, text, mask):
    header = f"{text.upper()},{mask.title().replace(' ', '_')}, {image} ,note"
    rows = read_table(write(tmp_path / "a.csv", f"{header}\none polyp,m.png,a.png,whatever\n"))
    assert rows == [Row("a.png", "one polyp", "m.png", 2)]


def test_of_several_names_the_released_one_counts(tmp_path):
    table = write(tmp_path / "a.csv", "label,image,mask,caption,description\nbenign,a.png,m.png,no,yes\n")
    assert read_table(table) == [Row("a.png", "yes", "m.png", 2)]


def test_a_mask_column_may_lack(tmp_path):
    assert read_table(write(tmp_path / "a.csv", "image,text\na.png,one polyp\n")) == [Row("a.png", "one polyp", "", 2)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
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


def test_an_image_may_be_listed_twice_but_not_a_row(tmp_path):
    rows = [("a.png", "one polyp", "a.png"), ("a.png", "two polyps", "b.png"), ("a.png", "one polyp\n", "a.png")]
    book = write_workbook(tmp_path / "a.xlsx", RELEASED, *rows)
    assert [row.line for row in read_table(book)] == [2, 3]
    dataset = SegmentationDataset.from_table(book, images=tmp_path, masks=tmp_path)
    assert [str(fault) for fault in dataset.faults] == [
        "a line 4 (a.png): row is repeated: line 2 is the same; it counts once; remove one of them"
    ]
    assert not dataset.faults[0].fatal


def test_faults_of_rows_are_told_all_at_once(tmp_path):
    rows = [
        ("a.png", "one polyp", "a.png"),
        (None, "one polyp", "a.png"),
        ("b.png", 17, "b.png"),
        ("c.png", "  \n", None),
        ("d.png", "...", "d.png"),
        ("e.png", "#REF!", "e.png"),
        (3, "one polyp", "f.png"),
        ("g.png", "one polyp", "g.png", None, "more"),
    ]
    book = write_workbook(tmp_path / "rows.xlsx", RELEASED, *rows)
    with pytest.raises(DatasetError) as caught:
        read_table(book)
    told = [str(fault) for fault in caught.value.faults]
    expected = [
        ("rows.xlsx line 3:", "image is missing"),
        ("rows.xlsx line 4 (b.png)", "text is no text: int 17"),
        ("rows.xlsx line 5 (c.png)", "text is missing"),
        ("rows.xlsx line 5 (c.png)", "mask is missing"),
        ("rows.xlsx line 6 (d.png)", "text has no words"),
        ("rows.xlsx line 7 (e.png)", "#REF!"),
        ("rows.xlsx line 8:", "image is no text: int 3"),
        ("rows.xlsx line 9 (g.png)", "too many cells: 5 in this row, the header has 3"),
    ]
    assert len(told) == len(expected)
    for line, (place, words) in zip(told, expected, strict=True):
        assert line.startswith(place)
        assert words in line
    dataset = SegmentationDataset.from_table(book)
    assert len(dataset) == 1
    assert len(dataset.faults) == len(expected)


def test_other_sheets_are_not_forgotten_silently(tmp_path):
    book = openpyxl.Workbook()
    book.create_sheet("rows").append(("image", "text"))
    book["rows"].append(("a.png", "one polyp"))
    book.create_sheet("notes").append(("do not forget",))
    book.save(tmp_path / "a.xlsx")  # its first sheet has nothing in it
    assert [row.image for row in read_table(tmp_path / "a.xlsx")] == ["a.png"]
    faults = SegmentationDataset.from_table(tmp_path / "a.xlsx", images=tmp_path).faults
    assert "only 'rows' is read, not notes" in str(faults[0])
    assert not faults[0].fatal


def test_a_wrong_size_in_a_workbook_loses_no_rows(tmp_path):
    import zipfile

    book = write_workbook(tmp_path / "a.xlsx", ("image", "text"), *((f"{n}.png", "one polyp") for n in range(9)))
    with zipfile.ZipFile(book) as old, zipfile.ZipFile(tmp_path / "b.xlsx", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'<dimension ref="A1:B10"', b'<dimension ref="A1"'))
    assert b'ref="A1"' in zipfile.ZipFile(tmp_path / "b.xlsx").read("xl/worksheets/sheet1.xml")
    assert len(read_table(tmp_path / "b.xlsx")) == 9


def test_the_error_groups_faults_of_a_kind():
    faults = [DatasetIssue(f"X line {n}", f"image is missing: img/{n}.png", "put it there") for n in range(20)]
    faults += [
        DatasetIssue("X line 99", "size mismatch: 3 x 4, 5 x 6", "export again"),
        DatasetIssue("Y", "odd: so", "look", False),
    ]
    message = str(DatasetError(faults))
    assert message.startswith("21 faults must be mended first")
    assert "X line 2: image is missing: img/2.png; put it there" in message
    assert "... and 17 more of this kind" in message
    assert "X line 99" in message
    assert "Y" not in message
    assert len(message.splitlines()) == 6


def test_an_error_survives_a_process(tmp_path):
    import pickle

    error = DatasetError([DatasetIssue("X", "image is missing: a", "put it there")])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.faults) == (str(error), error.faults)


def test_tables_with_no_rows_are_fatal_but_for_validation(tmp_path):
    table = write(tmp_path / "a.csv", "image,text\n")
    for split, fatal in {"train": True, "test": True, None: True, "val": False}.items():
        (fault,) = check_datasets([SegmentationDataset.from_table(table, split=split)], progress=False)
        assert "table has no rows" in fault.problem
        assert str(table) in fault.problem
        assert fault.fatal == fatal
    book = openpyxl.Workbook()
    book.active.append(("image", "text"))
    book.create_sheet("notes").append(("do not forget",))
    book.save(tmp_path / "a.xlsx")
    faults = check_datasets([SegmentationDataset.from_table(tmp_path / "a.xlsx", split="train")], progress=False)
    assert [(fault.problem.partition(":")[0], fault.fatal) for fault in faults] == [
        ("workbook has several sheets", False),
        ("table has no rows", True),
    ]
