"""Broken datasets: a faulty table is an error at once, the check finds every broken file, and each says where."""

from __future__ import annotations

import gzip
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from test_data_reading import save, save_dicom, save_nifti
from test_data_tables import RELEASED, write, write_workbook

from pvl_adapter.data import DatasetError, DatasetIssue, SegmentationDataset, check_datasets, one_of_each_kind

SIZE = (24, 32)
ROWS = 4  # of each split
BOOK, IMAGE, MASK = "Prompts_Folder/Train_text.xlsx", "Train_Folder/img/1.png", "Train_Folder/label/1.png"
Damage = Callable[[Path], object]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8)


def mask() -> np.ndarray:
    levels = np.zeros(SIZE, np.uint8)
    levels[4:12, 6:20] = 255
    return levels


def write_dataset(folder: Path) -> Path:
    """A sound dataset in the official layout; row n of a split, in line n + 2, is about n.png."""
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


@pytest.fixture
def polyps(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "POLYPS")


def check(folder: Path) -> list[DatasetIssue]:
    datasets = [SegmentationDataset(folder, split) for split in ("train", "val", "test")]
    return check_datasets(datasets, progress=False)


def assert_told(issue: object, facts: str) -> None:
    assert [fact for fact in facts.split("|") if fact not in str(issue)] == [], str(issue)


def test_a_sound_dataset_has_no_issues(polyps, capsys):
    assert check(polyps) == []
    assert capsys.readouterr().err == ""
    check_datasets([SegmentationDataset(polyps)])
    assert "4/4" in capsys.readouterr().err


# ---- kinds of damage ------------------------------------------------------------------------------------------------


def rows(*changed: tuple[object, ...], header: tuple[object, ...] = RELEASED) -> Damage:
    """Another training workbook, whose lines 2 and 3 are sound."""
    sound = [(f"{row}.png", "one polyp at the left", f"{row}.png") for row in (2, 3)]
    return lambda folder: write_workbook(folder / BOOK, header, *sound, *changed)


def table(name: str, content: str | bytes) -> Damage:
    """A training table of another kind instead of the workbook."""
    return lambda folder: ((folder / BOOK).unlink(), write(folder / f"Prompts_Folder/Train_text{name}", content))


def content(file: str, new: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(new)


def cut(file: str) -> Damage:
    return lambda folder: _cut(folder / file, 0.6)


def _cut(path: Path, keep: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    return path


def array(levels: np.ndarray) -> Damage:
    return lambda folder: save(folder / MASK, levels)


def new(name: str, make: Damage, *, role: str = "img") -> Damage:
    """Line 5 of the training workbook gets another image or mask, and what `make` makes of it."""

    def damage(folder: Path) -> None:
        make(folder / "Train_Folder" / role / name.partition("#")[0])
        rows(("0.png", "one", "0.png"), (name, "one", "1.png") if role == "img" else ("1.png", "one", name))(folder)

    return damage


def named(name: str) -> Damage:
    return rows((name, "one polyp", "1.png"))


def remove(path: str) -> Damage:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def rename(old: str, new: str) -> Damage:
    return lambda folder: (folder / old).rename(folder / new)


def link(target: str) -> Damage:
    return lambda folder: ((folder / IMAGE).unlink(), (folder / IMAGE).symlink_to(target))


def mangled_workbook(folder: Path) -> None:
    with zipfile.ZipFile(folder / BOOK) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    parts["xl/worksheets/sheet1.xml"] = parts["xl/worksheets/sheet1.xml"][:-60]
    with zipfile.ZipFile(folder / BOOK, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


def pages(path: Path) -> None:
    Image.fromarray(picture(1)).save(path, save_all=True, append_images=[Image.fromarray(picture(2))])


def volume(shape: tuple[int, ...] = (32, 24, 5), *, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 100, shape).astype(dtype)


def nifti(voxels: np.ndarray, *, keep: float = 1.0) -> Damage:
    return lambda path: _cut(save_nifti(path, voxels), keep)


def dicom(stored: np.ndarray, *, keep: float = 1.0) -> Damage:
    return lambda path: _cut(save_dicom(path, stored), keep)


def with_nan() -> np.ndarray:
    voxels = volume()
    voxels[3, 4, 0] = np.nan
    return voxels


def singular(path: Path) -> None:
    image = nibabel.Nifti1Image(volume(), None)
    image.header["sform_code"] = 1
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = 0
    image.to_filename(path)


def broken_gzip(path: Path) -> None:
    data = bytearray(save_nifti(path, volume()).read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def without_pixels(path: Path) -> None:
    data = pydicom.dcmread(save_dicom(path, picture(1)))
    for name in ("PixelData", "Rows", "Columns"):
        delattr(data, name)
    data.Modality = "SR"
    data.save_as(path)


# ---- tables: an error when the dataset is made ----------------------------------------------------------------------

ENCRYPTED = bytes.fromhex("d0cf11e0a1b11ae1") + b"\0" * 600
FRAMES = np.stack([picture(1)] * 3)
TABLES: dict[str, tuple[Damage, str]] = {  # how it is broken, and what the error must say, between bars
    "folder missing": (remove("."), "table is missing|give the dataset's own folder"),
    "layout missing": (rename("Prompts_Folder", "prompts_folder"), "table is missing|there is prompts_folder"),
    "missing": (remove(BOOK), "table is missing|Train_text.xlsx|Test_text_original.xlsx, Val_text.xlsx"),
    "other case": (rename(BOOK, "Prompts_Folder/train_text.xlsx"), "there is train_text.xlsx"),
    "twice": (lambda folder: write(folder / BOOK.replace("xlsx", "csv"), "a"), "Train_text.xlsx, Train_text.csv"),
    "0 bytes": (content(BOOK, b""), "Train_text.xlsx|0 bytes"),
    "truncated": (cut(BOOK), "Train_text.xlsx|damaged"),
    "no workbook": (content(BOOK, b"PK\5\6" + b"\0" * 18), "Train_text.xlsx|damaged"),
    "sheet mangled": (mangled_workbook, "Train_text.xlsx|damaged"),
    "encrypted": (content(BOOK, ENCRYPTED), "Train_text.xlsx|without a password"),
    "web page": (content(BOOK, b"<html><table><tr><td>Image"), "Train_text.xlsx|damaged"),
    "without rows": (lambda folder: write_workbook(folder / BOOK, RELEASED), "table is empty"),
    "headers unknown": (rows(header=("Picture", "Words", "Truth")), "got Picture, Words, Truth|image, img, file"),
    "no header": (rows(header=("1.png", "one polyp", "1.png")), "columns are missing|got 1.png, one polyp"),
    "no column of text": (rows(header=("Image", "Note", "Mask")), "description, text"),
    "header twice": (rows(header=("Image", "image", "text")), "ambiguous|'Image'|rename"),
    "masks under an unknown header": (rows(header=("Image", "Text", "Annotated")), "'Annotated'|file names"),
    "image cell empty": (rows((None, "one polyp", "1.png")), "line 4|image cell|empty"),
    "text empty": (rows(("1.png", " \n", "1.png")), "line 4|text cell|empty"),
    "mask cell empty": (rows(("1.png", "one polyp", None)), "line 4|mask cell|empty"),
    "number for text": (rows(("1.png", 3.5, "1.png")), "line 4|float 3.5|expected text"),
    "number for a name": (rows((1, "one polyp", "1.png")), "line 4|int 1|expected text"),
    "spreadsheet error": (rows(("1.png", "#NAME?", "1.png")), "line 4|#NAME?|formula"),
    "no words": (rows(("1.png", "---", "1.png")), "line 4|'---'|expected words"),
    "beyond the header": (rows(("1.png", "one polyp", "1.png", "more")), "line 4|too many cells|got 4"),
    "comma": (table(".csv", "Image,Text,Mask\n0.png,one small, round polyp,0.png\n"), "line 2|too many cells|quote"),
    "latin-1": (table(".csv", "Image,Text\n1.png,für\n".encode("latin-1")), "Train_text.csv|CSV UTF-8"),
    "utf-16": (table(".csv", "Image,Text\n".encode("utf-16")), "Train_text.csv|CSV UTF-8"),
    "open quotation": (table(".csv", 'Image,Text\n0.png,fine\n1.png,"one\n2.png,two\n'), "from line 3|quotation mark"),
    "json broken": (table(".jsonl", '{"image": "0.png", "text": "one"}\n{"image": "1.png",\n'), "line 2|JSON object"),
    "json list": (table(".jsonl", '["0.png", "one polyp"]\n'), "line 1|not a JSON object"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_faulty_table_is_an_error_when_the_dataset_is_made(polyps, kind):
    damage, facts = TABLES[kind]
    damage(polyps)
    with pytest.raises(DatasetError) as caught:
        SegmentationDataset(polyps)
    (issue,) = [issue for issue in caught.value.issues if issue.fatal]
    assert issue.location.startswith("POLYPS/train")
    assert_told(issue, facts)


# ---- files: an issue of the check -----------------------------------------------------------------------------------

FILES: dict[str, tuple[Damage, str]] = {  # how it is broken, and what the one issue must say, between bars
    "image missing": (remove(IMAGE), "line 3 (1.png): image is missing|img/1.png"),
    "mask missing": (remove(MASK), "line 3 (1.png): mask is missing|label/1.png"),
    "other extension": (rename(IMAGE, "Train_Folder/img/1.jpg"), "image is missing|there is 1.jpg"),
    "other case": (rename(IMAGE, "Train_Folder/img/1.PNG"), "image is missing|there is 1.PNG"),
    "images missing": (remove("Train_Folder/img"), "image folder is missing"),
    "other folder": (rename("Train_Folder/label", "Train_Folder/labels"), "mask folder|there is labels"),
    "leads out": (named("../../Test_Folder/img/1.png"), "line 4|outside of its folder"),
    "absolute": (named("/etc/passwd"), "outside of its folder"),
    "leads out as on Windows": (named(r"..\1.png"), "outside of its folder"),
    "drive letter": (named(r"C:\scans\1.png"), "outside of its folder"),
    "label of an image": (named("1.png#label=1"), "line 4|got a label"),
    "link to nowhere": (link("/nowhere/1.png"), "image is missing|1.png"),
    "links in a circle": (link("1.png"), "image|1.png"),
    "a folder": (lambda folder: ((folder / IMAGE).unlink(), (folder / IMAGE).mkdir()), "1.png is a folder"),
    "image of 0 bytes": (content(IMAGE, b""), "image cannot be read|img/1.png|0 bytes"),
    "mask of 0 bytes": (content(MASK, b""), "mask cannot be read|label/1.png|0 bytes"),
    "web page": (content(IMAGE, b"<html>not found</html>"), "img/1.png|not an image"),
    "png truncated": (cut(IMAGE), "img/1.png|damaged"),
    "mask truncated": (cut(MASK), "label/1.png|damaged"),
    "jpeg truncated": (new("1.jpg", lambda path: _cut(save(path, picture(1)), 0.7)), "line 5|img/1.jpg|damaged"),
    "tiff truncated": (new("1.tif", lambda path: _cut(save(path, picture(1)), 0.7)), "img/1.tif|damaged"),
    "bmp truncated": (new("1.bmp", lambda path: _cut(save(path, picture(1)), 0.7)), "img/1.bmp|damaged"),
    "gif truncated": (new("1.gif", lambda path: _cut(save(path, picture(1)), 0.7)), "img/1.gif|damaged"),
    "pages": (new("1.tif", pages), "img/1.tif|2 pages|#frame=0"),
    "slice of an image": (new("4.png#z=2", lambda path: save(path, picture(4))), "4.png|z=2"),
    "float with nan": (new("1.tif", lambda path: save(path, np.full(SIZE, np.nan, np.float32))), "768 pixels|NaN"),
    "sizes differ": (array(np.zeros((24, 33), np.uint8)), "sizes differ|32 x 24|33 x 24"),
    "mask turned": (array(np.ascontiguousarray(mask().T)), "sizes differ|24 x 32|turned"),
    "grey levels": (array(picture(3) // 2), "label/1.png|not binary|and 119 more|#label=2"),
    "labels": (array(mask() // 85), "not binary|0, 3|#label=2"),
    "colours": (array(np.stack([mask(), 0 * mask(), 0 * mask()], 2)), "label/1.png|colours"),
    "volume with nan": (new("1.nii#z=2", nifti(with_nan())), "1.nii|1 voxels|NaN"),
    "no slice": (new("1.nii.gz", nifti(volume())), "1.nii.gz|(32, 24, 5)|1.nii.gz#z=2"),
    "slice beyond": (new("1.nii.gz#z=5", nifti(volume())), "got z=5|expected z=0 to 4"),
    "slice unknown": (new("1.nii#slice=2", nifti(volume())), "#slice=2|#z=40"),
    "frame of a volume": (new("1.nii#frame=2", nifti(volume())), "got frame|1.nii#z=2"),
    "series": (new("1.nii#z=2", nifti(volume((32, 24, 5, 3)))), "(32, 24, 5, 3)|3-D"),
    "complex": (new("1.nii#z=2", nifti(volume().astype(np.complex64))), "complex64|plain numbers"),
    "nifti truncated": (new("1.nii#z=2", nifti(volume(), keep=0.5)), "1.nii|not NIfTI"),
    "nifti.gz truncated": (new("1.nii.gz#z=2", nifti(volume(), keep=0.5)), "1.nii.gz|not NIfTI"),
    "gzip broken": (new("1.nii.gz#z=2", broken_gzip), "not NIfTI"),
    "other gzip": (new("1.nii.gz#z=2", lambda path: path.write_bytes(gzip.compress(b"hello" * 99))), "not NIfTI"),
    "affine singular": (new("1.nii#z=2", singular), "1.nii|affine"),
    "labels of a volume": (new("1.nii", nifti(volume((32, 24, 1), dtype=np.int16)), role="label"), "label/1.nii|0, 1"),
    "nan in a mask": (new("1.nii#z=2", nifti(with_nan()), role="label"), "label/1.nii|NaN"),
    "dicom truncated": (new("1.dcm", dicom(picture(1), keep=0.7)), "1.dcm|cannot be decoded"),
    "dicom header truncated": (new("1.dcm", dicom(picture(1), keep=0.2)), "1.dcm|without an image"),
    "not dicom": (new("1.dcm", lambda path: path.write_bytes(b"hello" * 99)), "1.dcm|not DICOM"),
    "dicom without an image": (new("1.dcm", without_pixels), "without an image|SR"),
    "dicom of frames": (new("1.dcm", dicom(FRAMES)), "1.dcm|3 frames|#frame=0 to #frame=2"),
    "frame beyond": (new("1.dcm#frame=3", dicom(FRAMES)), "got frame=3|#frame=0 to #frame=2"),
    "slice of a dicom": (new("1.dcm#z=0", dicom(picture(1))), "got z=0|#frame=0"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_is_found_by_the_check_and_raises_when_it_is_read(polyps, kind):
    damage, facts = FILES[kind]
    damage(polyps)
    (issue,) = check(polyps)  # nothing else, and other splits are none the worse
    assert issue.fatal
    assert issue.location.startswith("POLYPS/train")
    assert_told(issue, facts)
    assert str(issue) in str(DatasetError([issue]))
    dataset, raised = SegmentationDataset(polyps), list[DatasetIssue]()
    for index in range(len(dataset)):
        try:
            assert dataset[index]["mask"].shape == SIZE
        except DatasetError as error:
            raised += error.issues
    assert len(raised) == len(dataset) if "folder is missing" in issue.kind else raised == [issue]


def test_everything_at_once(polyps):
    for split in ("Train", "Val", "Test"):
        (polyps / f"{split}_Folder/img/0.png").unlink()
        (polyps / f"{split}_Folder/label/0.png").write_bytes(b"")
        _cut(polyps / f"{split}_Folder/img/2.png", 0.5)
    assert str(DatasetError(check(polyps))).startswith("9 issues")


# ---- warnings -------------------------------------------------------------------------------------------------------


def leak(folder: Path) -> None:
    shutil.copy(folder / IMAGE, folder / "Test_Folder/img/2.png")


WARNINGS: dict[str, tuple[Damage, str]] = {
    "empty mask": (array(0 * mask()), "line 3 (1.png)|mask is empty|'one polyp at the left'"),
    "two splits": (leak, "POLYPS/test (original) line 4 (2.png)|two splits|POLYPS/train line 3 (1.png)"),
    "row repeated": (rows(("2.png", "one polyp at the left\n", "2.png")), "line 4|2.png|line 2"),
    "unused column": (rows(header=(*RELEASED, "Age")), "not used|'Age'"),
    "no validation": (lambda folder: write_workbook(folder / "Prompts_Folder/Val_text.xlsx"), "POLYPS/val|is empty"),
}


@pytest.mark.filterwarnings("ignore:POLYPS")
@pytest.mark.parametrize("kind", WARNINGS)
def test_a_warning_is_no_error(polyps, kind):
    damage, facts = WARNINGS[kind]
    damage(polyps)
    (issue,) = check(polyps)
    assert not issue.fatal
    assert_told(issue, facts)


@pytest.mark.parametrize("text", ["No tumor in the image.", "a colon without polyps", "Normal mucosa"])
def test_an_empty_mask_may_be_right(polyps, text):
    save(polyps / MASK, 0 * mask())
    rows(("1.png", text, "1.png"))(polyps)
    assert check(polyps) == []


def test_the_same_test_images_with_other_words_are_no_leak(polyps):
    workbook = polyps / "Prompts_Folder/Test_text_original.xlsx"
    workbook.with_name("Test_text_contradictory.xlsx").write_bytes(workbook.read_bytes())
    datasets = [SegmentationDataset(polyps, "test", prompts=prompts) for prompts in ("original", "contradictory")]
    assert check_datasets(datasets, progress=False) == []


@pytest.mark.parametrize(("package", "name"), [("nibabel", "1.nii#z=2"), ("pydicom", "1.dcm"), ("openpyxl", "")])
def test_packages_that_are_not_installed(polyps, monkeypatch, package, name):
    if name:
        new(name, nifti(volume()) if package == "nibabel" else dicom(picture(1)))(polyps)
    monkeypatch.setitem(sys.modules, package, None)
    try:
        told = str(check(polyps)[0])
    except DatasetError as error:
        told = str(error)
    assert_told(told, f'{package}|pip install "pvl-adapter[data]"')


# ---- issues as an error ---------------------------------------------------------------------------------------------


def test_the_error_groups_issues_of_a_kind():
    issues = [DatasetIssue(f"X line {n}", "image is missing", f"img/{n}.png; put it there") for n in range(20)]
    issues += [DatasetIssue("X line 99", "sizes differ", "3 x 4, 5 x 6"), DatasetIssue("Y", "odd", "look", False)]
    error = DatasetError(issues)
    assert_told(error, "21 issues|X line 2: image is missing: img/2.png; put it there|17 more of this kind|X line 99")
    assert "Y" not in str(error)
    assert len(str(error).splitlines()) == 6
    assert one_of_each_kind(issues)[1:] == ["X line 99: sizes differ: 3 x 4, 5 x 6", "Y: odd: look"]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.issues) == (str(error), error.issues)
