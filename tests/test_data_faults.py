"""Broken datasets: every fault is found before the first step and named with its place and fix, and nothing crashes."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from test_data_pictures import save, save_dicom, save_nifti
from test_data_tables import RELEASED, write, write_workbook

from pvl_adapter.data import DatasetError, DatasetIssue, Sample, SegmentationDataset, check_datasets

SIZE = (24, 32)
ROWS = 4  # of each split
TRAIN = "Prompts_Folder/Train_text"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8)


def mask() -> np.ndarray:
    levels = np.zeros(SIZE, np.uint8)
    levels[4:12, 6:20] = 255
    return levels


def write_dataset(folder: Path) -> Path:
    """A sound dataset in the released layout; row n of a split, in line n + 2, is about n.png."""
    (folder / "Prompts_Folder").mkdir(parents=True)
    for seed, split in enumerate(("Train", "Val", "Test")):
        for part in ("img", "label"):
            (folder / f"{split}_Folder" / part).mkdir(parents=True)
        for row in range(ROWS):
            save(folder / f"{split}_Folder" / "img" / f"{row}.png", picture(10 * seed + row))
            save(folder / f"{split}_Folder" / "label" / f"{row}.png", mask())
        rows = [(f"{row}.png", "one polyp at the left\n", f"{row}.png") for row in range(ROWS)]
        name = f"{split}_text" + ("_original" if split == "Test" else "")
        write_workbook(folder / "Prompts_Folder" / f"{name}.xlsx", RELEASED, *rows)
    return folder


def check(folder: Path) -> tuple[list[DatasetIssue], list[tuple[int, int, Sample]]]:
    datasets = [SegmentationDataset(folder, split) for split in ("train", "val", "test")]
    seen: list[tuple[int, int, Sample]] = []
    faults = check_datasets(datasets, progress=False, visit=lambda *row: seen.append(row))
    for number, index, sample in seen:  # what was visited can be had again
        np.testing.assert_array_equal(datasets[number][index].image, sample.image)
    return faults, seen


def test_a_sound_dataset(tmp_path):
    faults, seen = check(write_dataset(tmp_path / "POLYPS"))
    assert faults == []
    assert [(number, index) for number, index, _ in seen] == [(n, i) for n in range(3) for i in range(ROWS)]
    _, _, sample = seen[1]
    assert (sample.name, sample.text) == ("1.png", "one polyp at the left")
    np.testing.assert_array_equal(sample.image, picture(1))
    np.testing.assert_array_equal(sample.mask, mask() > 0)


# ---- what may be broken ---------------------------------------------------------------------------------------------

IMAGE, MASK = "Train_Folder/img/1.png", "Train_Folder/label/1.png"


def rows(*changed: tuple[object, ...], header: tuple[object, ...] = RELEASED) -> Callable[[Path], object]:
    """Another training workbook, whose rows 2 and 3 are as before."""
    sound = [(f"{row}.png", "one polyp at the left", f"{row}.png") for row in (2, 3)]
    return lambda folder: write_workbook(folder / f"{TRAIN}.xlsx", header, *sound, *changed)


def table(suffix: str, content: str | bytes) -> Callable[[Path], object]:
    """A training table of another kind instead of the workbook."""

    def damage(folder: Path) -> None:
        (folder / f"{TRAIN}.xlsx").unlink()
        write(folder / f"{TRAIN}{suffix}", content)

    return damage


def content(file: str, new: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(new)


def cut(file: str, keep: float = 0.6) -> Callable[[Path], object]:
    return lambda folder: _cut(folder / file, keep)


def _cut(path: Path, keep: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    return path


def array(file: str, levels: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: save(folder / file, levels)


def instead(
    name: str, make: Callable[[Path], object], *, part: str = "", role: str = "img"
) -> Callable[[Path], object]:
    """Row 1 of the training workbook gets another picture, or another mask."""

    def damage(folder: Path) -> None:
        make(folder / "Train_Folder" / role / name)
        names = (name + part, "1.png") if role == "img" else ("1.png", name + part)
        rows(("0.png", "one polyp", "0.png"), (names[0], "one polyp", names[1]))(folder)

    return damage


def not_a_workbook(folder: Path) -> None:
    with zipfile.ZipFile(folder / f"{TRAIN}.xlsx", "w") as archive:
        archive.writestr("hello.txt", "no workbook")


def mangled_workbook(folder: Path) -> None:
    path = folder / f"{TRAIN}.xlsx"
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    parts["xl/worksheets/sheet1.xml"] = parts["xl/worksheets/sheet1.xml"][:-60]
    with zipfile.ZipFile(path, "w") as new:
        for name, part in parts.items():
            new.writestr(name, part)


def several_pages(path: Path) -> None:
    Image.fromarray(picture(1)).save(path, save_all=True, append_images=[Image.fromarray(picture(2))])


def volume(shape: tuple[int, ...] = (32, 24, 5), *, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 100, shape).astype(dtype)


def with_nan(path: Path) -> None:
    voxels = volume()
    voxels[3, 4, 0] = np.nan
    save_nifti(path, voxels)


def singular(path: Path) -> None:
    image = nibabel.Nifti1Image(volume(), None)
    image.header["sform_code"] = 1
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = 0
    image.to_filename(path)


def broken_gzip(path: Path) -> None:
    save_nifti(path, volume())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def no_picture(path: Path) -> None:
    import pydicom

    data = pydicom.dcmread(save_dicom(path, picture(1)))
    for name in ("PixelData", "Rows", "Columns"):
        delattr(data, name)
    data.Modality = "SR"
    data.save_as(path)


def remove(path: str) -> Callable[[Path], object]:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def copy_into_test(folder: Path) -> None:
    shutil.copy(folder / IMAGE, folder / "Test_Folder/img/2.png")


def link_to_nowhere(folder: Path) -> None:
    (folder / IMAGE).unlink()
    (folder / IMAGE).symlink_to("/nowhere/1.png")


def loop_of_links(folder: Path) -> None:
    (folder / IMAGE).unlink()
    (folder / IMAGE).symlink_to("1.png")


ANY = "line 4"  # of a changed workbook: the first row after the two sound ones
ROW = "POLYPS/train line 3 (1.png)"
TABLE = "POLYPS/train (Train_text.xlsx)"
BROKEN: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    # kind: how it is broken, how many training rows stay sound, what the fault must say (place, problem, fix)
    "folder missing": (remove("."), 0, ("POLYPS/train:", "table is missing", "give the dataset's folder")),
    "layout missing": (
        rename("Prompts_Folder", "prompts_folder"),
        0,
        ("POLYPS/train:", "table is missing", "there is prompts_folder"),
    ),
    "table missing": (
        remove(f"{TRAIN}.xlsx"),
        0,
        (
            "POLYPS/train",
            "table is missing",
            "Train_text.xlsx",
            "put it there",
            "there are Test_text_original.xlsx, Val_text.xlsx",
        ),
    ),
    "table in other case": (
        rename(f"{TRAIN}.xlsx", "Prompts_Folder/train_text.xlsx"),
        0,
        ("table is missing", "there is train_text.xlsx"),
    ),
    "table twice": (
        lambda folder: write(folder / f"{TRAIN}.csv", "image,text\n"),
        0,
        ("POLYPS/train", "table is ambiguous", "Train_text.xlsx, Train_text.csv", "keep one"),
    ),
    "table of 0 bytes": (content(f"{TRAIN}.xlsx", b""), 0, (TABLE, "empty file", "save or fetch it again")),
    "workbook truncated": (cut(f"{TRAIN}.xlsx"), 0, (TABLE, "damaged", "zip", "save or fetch it again")),
    "zip that is no workbook": (not_a_workbook, 0, (TABLE, "no .xlsx", "save or fetch it again")),
    "sheet mangled": (mangled_workbook, 0, (TABLE, "damaged", "save or fetch it again")),
    "workbook encrypted": (
        content(f"{TRAIN}.xlsx", bytes.fromhex("d0cf11e0a1b11ae1") + b"\0" * 600),
        0,
        (TABLE, "encrypted", "without a password"),
    ),
    "page called workbook": (
        content(f"{TRAIN}.xlsx", b"<html><table><tr><td>Image"),
        0,
        (TABLE, "begins with b'<html>", "save it as .xlsx"),
    ),
    "workbook unreadable": (
        lambda folder: ((folder / f"{TRAIN}.xlsx").unlink(), (folder / f"{TRAIN}.xlsx").mkdir()),
        0,
        ("table is missing", "Train_text.xlsx"),
    ),
    "headers unknown": (
        rows(header=("Picture", "Words", "Truth")),
        0,
        (TABLE, "found Picture, Words, Truth", "expected one of ['image', 'img', 'file']", "name the columns Image"),
    ),
    "no header": (
        rows(header=("1.png", "one polyp", "1.png")),
        0,
        (TABLE, "header is unknown", "found 1.png, one polyp", "in the first line"),
    ),
    "no column of text": (rows(header=("Image", "Note", "Mask")), 0, (TABLE, "'description'", "no text")),
    "header twice": (rows(header=("Image", "image", "text")), 0, (TABLE, "header is ambiguous", "2 times", "rename")),
    "image cell empty": (
        rows((None, "one polyp", "1.png")),
        2,
        ("POLYPS/train line 4:", "image is missing", "fill it in"),
    ),
    "text empty": (rows(("1.png", " \n", "1.png")), 2, (ANY, "(1.png)", "text is missing", "fill it in")),
    "mask cell empty": (rows(("1.png", "one polyp", None)), 2, (ANY, "mask is missing", "fill it in")),
    "number for text": (rows(("1.png", 3.5, "1.png")), 2, (ANY, "float 3.5", "write a sentence")),
    "number for name": (rows((1, "one polyp", "1.png")), 2, (ANY, "int 1", "file name with its extension")),
    "error of the spreadsheet": (rows(("1.png", "#NAME?", "1.png")), 2, (ANY, "#NAME?", "mend the formula")),
    "text without words": (rows(("1.png", "---", "1.png")), 2, (ANY, "no words", "describe")),
    "cells beyond the header": (
        rows(("1.png", "one polyp", "1.png", "and more")),
        2,
        (ANY, "too many cells: 4", "quotation marks"),
    ),
    "comma in a sentence": (
        table(".csv", "Image,Description,Mask\n0.png,one small, round polyp,0.png\n"),
        0,
        ("line 2", "too many cells", "quotation marks"),
    ),
    "latin-1": (
        table(".csv", "Image,Description\n0.png,ein Tumor\n1.png,für\n".encode("latin-1")),
        0,
        ("Train_text.csv", "not UTF-8", "line 3", "CSV UTF-8"),
    ),
    "utf-16": (table(".csv", "Image,Description\n".encode("utf-16")), 0, ("Train_text.csv", "UTF-16", "CSV UTF-8")),
    "null bytes": (table(".csv", b"Image,Description\n\0\0\0\0"), 0, ("Train_text.csv", "null bytes", "save it as")),
    "quotation mark open": (
        table(".csv", 'Image,Description\n0.png,fine\n1.png,"one polyp\n2.png,two\n'),
        0,
        ("malformed from line 3", "close every quotation mark"),
    ),
    "json broken": (
        table(".jsonl", '{"image": "0.png", "text": "one polyp", "mask": "0.png"}\n{"image": "1.png",\n'),
        1,
        ("POLYPS/train line 2", "no JSON", "one object a line"),
    ),
    "json no object": (table(".jsonl", '["0.png", "one polyp"]\n'), 0, ("line 1", "no JSON object", "write {")),
    "image missing": (remove(IMAGE), 3, (ROW, "image is missing: img/1.png", "put it into", "or remove the row")),
    "mask missing": (remove(MASK), 3, (ROW, "mask is missing: label/1.png", "put it into")),
    "image of another extension": (
        rename(IMAGE, "Train_Folder/img/1.jpg"),
        3,
        (ROW, "image is missing", "there is 1.jpg"),
    ),
    "image in other case": (rename(IMAGE, "Train_Folder/img/1.PNG"), 3, (ROW, "image is missing", "there is 1.PNG")),
    "images missing": (
        remove("Train_Folder/img"),
        0,
        ("POLYPS/train:", "image folder is missing", "put the images there"),
    ),
    "masks in another folder": (
        rename("Train_Folder/label", "Train_Folder/labels"),
        0,
        ("POLYPS/train:", "mask folder is missing", "there is labels"),
    ),
    "name that leads out": (
        rows(("../../Test_Folder/img/1.png", "one polyp", "1.png")),
        2,
        (ANY, "outside of its folder", "give a name within"),
    ),
    "absolute name": (
        rows(("/etc/passwd", "one polyp", "1.png")),
        2,
        (ANY, "outside of its folder", "give a name within"),
    ),
    "name of Windows that leads out": (
        rows((r"..\1.png", "one polyp", "1.png")),
        2,
        (ANY, "outside of its folder", "give a name within"),
    ),
    "drive letter": (
        rows((r"C:\scans\1.png", "one polyp", "1.png")),
        2,
        (ANY, "outside of its folder", "give a name within"),
    ),
    "link to nowhere": (link_to_nowhere, 3, (ROW, "image is missing", "1.png")),
    "links in a circle": (loop_of_links, 3, (ROW, "image", "1.png")),
    "image is a folder": (
        lambda folder: ((folder / IMAGE).unlink(), (folder / IMAGE).mkdir()),
        3,
        (ROW, "file is a folder", "give one of its files"),
    ),
    "image of 0 bytes": (content(IMAGE, b""), 3, (ROW, "image file is empty: img/1.png", "fetch or save it again")),
    "mask of 0 bytes": (content(MASK, b""), 3, (ROW, "mask file is empty: label/1.png", "fetch or save it again")),
    "image that is no picture": (
        content(IMAGE, b"<html>not found</html>"),
        3,
        (ROW, "damaged or no picture", "PNG, JPEG, BMP or TIFF", "fetch or save it again"),
    ),
    "png truncated": (cut(IMAGE), 3, (ROW, "image file is damaged", "img/1.png", "fetch or save it again")),
    "mask truncated": (cut(MASK), 3, (ROW, "mask file is damaged", "label/1.png", "fetch or save it again")),
    "jpeg truncated": (
        instead("1.jpg", lambda path: _cut(save(path, picture(1)), 0.7)),
        3,
        ("line 5 (1.jpg)", "damaged", "fetch or save it again"),
    ),
    "tiff truncated": (
        instead("1.tif", lambda path: _cut(save(path, picture(1)), 0.7)),
        3,
        ("line 5 (1.tif)", "damaged", "fetch or save it again"),
    ),
    "bmp truncated": (
        instead("1.bmp", lambda path: _cut(save(path, picture(1)), 0.7)),
        3,
        ("line 5 (1.bmp)", "damaged", "fetch or save it again"),
    ),
    "tiff of pages": (
        instead("1.tif", several_pages),
        3,
        ("line 5 (1.tif)", "several pages", "has 2", "save each page"),
    ),
    "sizes differ": (
        array(MASK, np.zeros((24, 33), np.uint8)),
        3,
        (ROW, "size mismatch", "32 x 24", "33 x 24", "export both"),
    ),
    "mask turned": (
        array(MASK, np.ascontiguousarray(mask().T)),
        3,
        (ROW, "size mismatch", "24 x 32", "turn one of them"),
    ),
    "mask of grey levels": (
        array(MASK, picture(3) // 2),
        3,
        (ROW, "mask is not binary: label/1.png", "and 119 more", "#label=2"),
    ),
    "mask of labels": (array(MASK, mask() // 85), 3, (ROW, "not binary", "levels are 0, 3", "#label=2")),
    "mask in colours": (
        array(MASK, np.stack([mask(), 0 * mask(), 0 * mask()], 2)),
        3,
        (ROW, "mask has colours", "255 levels", "save it in grey"),
    ),
    "float with nan": (
        instead("1.tif", lambda path: save(path, np.full(SIZE, np.nan, np.float32))),
        3,
        ("line 5 (1.tif)", "not finite", "768 pixels", "replace them"),
    ),
    "volume with nan": (
        instead("1.nii", with_nan, part="#z=2"),
        3,
        ("line 5 (1.nii#z=2)", "not finite", "1 voxels", "nan_to_num"),
    ),
    "volume without slice": (
        instead("1.nii.gz", lambda path: save_nifti(path, volume())),
        3,
        ("line 5 (1.nii.gz)", "volume where a slice is needed", "(32, 24, 5)", "#z=0 to #z=4"),
    ),
    "slice out of range": (
        instead("1.nii.gz", lambda path: save_nifti(path, volume()), part="#z=5"),
        3,
        ("1.nii.gz#z=5", "slice does not exist", "has 5 along z", "give z=0 to z=4"),
    ),
    "slice not understood": (
        instead("1.nii", lambda path: save_nifti(path, volume()), part="#slice=2"),
        3,
        ("1.nii#slice=2", "not understood", "write #z=40"),
    ),
    "slice of a picture": (
        instead("4.png", lambda path: save(path, picture(4)), part="#z=2"),
        3,
        ("4.png#z=2", "has no slices", "remove #z="),
    ),
    "frame of a volume": (
        instead("1.nii", lambda path: save_nifti(path, volume()), part="#frame=2"),
        3,
        ("1.nii#frame=2", "NIfTI has no frames", "name a slice"),
    ),
    "label of a picture": (
        rows(("1.png#label=1", "one polyp", "1.png")),
        2,
        (ANY, "label where a picture is needed", "remove label="),
    ),
    "series": (
        instead("1.nii", lambda path: save_nifti(path, volume((32, 24, 5, 3))), part="#z=2"),
        3,
        ("1.nii#z=2", "not 3-D", "(32, 24, 5, 3)", "one volume a file"),
    ),
    "complex volume": (
        instead("1.nii", lambda path: save_nifti(path, volume().astype(np.complex64)), part="#z=2"),
        3,
        ("1.nii#z=2", "plain numbers", "complex64", "one grey value"),
    ),
    "nifti truncated": (
        instead("1.nii", lambda path: _cut(save_nifti(path, volume()) and path, 0.5), part="#z=2"),
        3,
        ("1.nii#z=2", "damaged or no NIfTI", "fetch or convert it again"),
    ),
    "nifti.gz truncated": (
        instead("1.nii.gz", lambda path: _cut(save_nifti(path, volume()), 0.5), part="#z=2"),
        3,
        ("1.nii.gz#z=2", "damaged or no NIfTI", "fetch or convert it again"),
    ),
    "nifti.gz broken": (
        instead("1.nii.gz", broken_gzip, part="#z=2"),
        3,
        ("1.nii.gz#z=2", "damaged or no NIfTI", "fetch or convert it again"),
    ),
    "gzip of something else": (
        instead("1.nii.gz", lambda path: path.write_bytes(gzip.compress(b"hello" * 99)), part="#z=2"),
        3,
        ("1.nii.gz#z=2", "damaged or no NIfTI", "fetch"),
    ),
    "affine singular": (instead("1.nii", singular, part="#z=2"), 3, ("1.nii#z=2", "affine", "valid affine")),
    "labels of a volume": (
        instead("1.nii", lambda path: save_nifti(path, volume((32, 24, 1), dtype=np.int16)), role="label"),
        3,
        ("line 5 (1.png)", "not binary: label/1.nii", "0, 1, 2", "#label=2"),
    ),
    "nan in a mask": (
        instead("1.nii", with_nan, part="#z=2", role="label"),
        3,
        ("line 5 (1.png)", "mask values are not finite: label/1.nii", "nan_to_num"),
    ),
    "dicom truncated": (
        instead("1.dcm", lambda path: _cut(save_dicom(path, picture(1)), 0.7)),
        3,
        ("line 5 (1.dcm)", "DICOM pixels cannot be decoded", "fetch it again"),
    ),
    "dicom header truncated": (
        instead("1.dcm", lambda path: _cut(save_dicom(path, picture(1)), 0.2)),
        3,
        ("line 5 (1.dcm)", "DICOM file holds no picture", "fetch it again if it was cut off"),
    ),
    "no dicom": (
        instead("1.dcm", lambda path: path.write_bytes(b"hello" * 99)),
        3,
        ("line 5 (1.dcm)", "damaged or no DICOM", "fetch or export it again"),
    ),
    "dicom without picture": (
        instead("1.dcm", no_picture),
        3,
        ("line 5 (1.dcm)", "holds no picture", "SR", "give files that hold pictures"),
    ),
    "dicom of frames": (
        instead("1.dcm", lambda path: save_dicom(path, np.stack([picture(1)] * 3))),
        3,
        ("line 5 (1.dcm)", "several frames", "has 3", "#frame=0 to #frame=2"),
    ),
    "frame out of range": (
        instead("1.dcm", lambda path: save_dicom(path, np.stack([picture(1)] * 3)), part="#frame=3"),
        3,
        ("1.dcm#frame=3", "frame does not exist", "frame=0 to frame=2"),
    ),
    "slice of a dicom": (
        instead("1.dcm", lambda path: save_dicom(path, picture(1)), part="#z=0"),
        3,
        ("1.dcm#z=0", "DICOM files have frames", "#frame=3"),
    ),
    "workbook without rows": (
        lambda folder: write_workbook(folder / f"{TRAIN}.xlsx", RELEASED),
        0,
        ("POLYPS/train", "no rows", "Train_text.xlsx", "fill it"),
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken(tmp_path, kind):
    damage, sound, words = BROKEN[kind]
    folder = write_dataset(tmp_path / "POLYPS")
    damage(folder)
    faults, seen = check(folder)
    own = [fault for fault in faults if fault.place.startswith("POLYPS/train")]
    told = [str(fault) for fault in own if all(word in str(fault) for word in words)]
    assert len(told) == 1, [str(fault) for fault in own]
    assert len(own) == 1 or kind == "latin-1", [str(fault) for fault in own]
    assert own[0].fatal
    assert "\n" not in told[0]
    assert told[0] in str(DatasetError(faults))
    assert [number for number, *_ in seen].count(0) == sound
    if kind not in ("folder missing", "layout missing"):  # other splits are none the worse
        assert faults == own
        assert len(seen) == sound + 2 * ROWS


DOUBTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "empty mask": (array(MASK, 0 * mask()), (ROW, "mask is empty", "'one polyp at the left'", "see whether")),
    "picture in train and test": (
        copy_into_test,
        ("POLYPS/test (original) line 4 (2.png)", "two splits", "also as " + ROW, "remove it from one"),
    ),
    "row repeated": (
        rows(("2.png", "one polyp at the left\n", "2.png")),
        (ANY, "(2.png)", "row is repeated", "line 2 is the same", "remove one"),
    ),
    "validation without rows": (
        lambda folder: write_workbook(folder / "Prompts_Folder/Val_text.xlsx"),
        ("POLYPS/val", "no rows", "go on without validation"),
    ),
    "no validation table": (remove("Prompts_Folder/Val_text.xlsx"), ("POLYPS/val", "table is missing", "put it there")),
}


@pytest.mark.parametrize("kind", DOUBTS)
def test_worth_a_look(tmp_path, kind):
    damage, words = DOUBTS[kind]
    folder = write_dataset(tmp_path / "POLYPS")
    damage(folder)
    faults, _ = check(folder)
    assert len(faults) == 1, [str(fault) for fault in faults]
    assert not faults[0].fatal
    for word in words:
        assert word in str(faults[0])


@pytest.mark.parametrize(
    "text", ["No tumor in the breast ultrasound image.", "a colon without polyps", "Normal mucosa"]
)
def test_an_empty_mask_may_be_right(tmp_path, text):
    folder = write_dataset(tmp_path / "POLYPS")
    save(folder / MASK, 0 * mask())
    rows(("1.png", text, "1.png"))(folder)
    assert check(folder)[0] == []


def test_everything_at_once(tmp_path):
    folder = write_dataset(tmp_path / "POLYPS")
    for split in ("Train", "Val", "Test"):
        (folder / f"{split}_Folder/img/0.png").unlink()
        (folder / f"{split}_Folder/label/0.png").write_bytes(b"")
        _cut(folder / f"{split}_Folder/img/2.png", 0.5)
    faults, seen = check(folder)
    assert len(faults) == 9
    assert len(seen) == 3 * (ROWS - 2)
    with pytest.raises(DatasetError, match="9 faults must be mended first"):
        raise DatasetError(faults)


def test_a_row_alone_says_what_is_wrong(tmp_path):
    folder = write_dataset(tmp_path / "POLYPS")
    (folder / IMAGE).unlink()
    dataset = SegmentationDataset(folder)
    assert dataset[0].mask.sum() == 8 * 14
    with pytest.raises(DatasetError, match=r"POLYPS/train line 3 \(1.png\): image is missing: img/1.png"):
        dataset[1]
    with pytest.raises(IndexError):
        dataset[ROWS]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path):
    folder = write_dataset(tmp_path / "POLYPS")
    (folder / IMAGE).chmod(0)
    faults, _ = check(folder)
    assert "Permission denied" in str(faults[0])


@pytest.mark.parametrize("package", ["openpyxl", "nibabel", "pydicom"])
def test_packages_that_are_not_installed(tmp_path, monkeypatch, package):
    import sys

    folder = write_dataset(tmp_path / "POLYPS")
    instead("1.nii", lambda path: save_nifti(path, volume()), part="#z=2")(folder)
    if package == "pydicom":
        instead("1.dcm", lambda path: save_dicom(path, picture(1)))(folder)
    monkeypatch.setitem(sys.modules, package, None)
    faults, _ = check(folder)
    assert package in str(faults[0])
    assert 'pip install "pvl-adapter[data]"' in str(faults[0])


def test_training_data_is_read_once(tmp_path, monkeypatch):
    from pvl_adapter.data import dataset as module

    folder = write_dataset(tmp_path / "POLYPS")
    read, count = module.read_picture, []
    monkeypatch.setattr(module, "read_picture", lambda *args, **options: count.append(1) or read(*args, **options))
    check_datasets([SegmentationDataset(folder, split) for split in ("train", "val", "test")], progress=False)
    assert len(count) == 3 * ROWS


def test_progress_can_be_seen(tmp_path, capsys):
    dataset = SegmentationDataset(write_dataset(tmp_path / "POLYPS"))
    check_datasets([dataset], progress=False)
    assert capsys.readouterr().err == ""
    check_datasets([dataset])
    assert "4/4" in capsys.readouterr().err


def test_json_and_csv_are_as_good_as_workbooks(tmp_path):
    folder = write_dataset(tmp_path / "POLYPS")
    expected = SegmentationDataset(folder).rows
    lines = [{"image": row.image, "text": row.text, "mask": row.mask} for row in expected]
    table(".jsonl", "\n" + "\n".join(map(json.dumps, lines)))(folder)
    assert SegmentationDataset(folder).rows == expected
