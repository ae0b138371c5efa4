"""Broken datasets: a faulty table is an error at once, a broken file is found by the check, each with what and where."""

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
import pytest
from PIL import Image
from test_data_reading import save, save_dicom, save_nifti
from test_data_tables import RELEASED, write, write_workbook

from pvl_adapter.data import DatasetError, DatasetIssue, SegmentationDataset, check_datasets, one_of_each_kind

SIZE = (24, 32)
ROWS = 4  # of each split
TABLE, IMAGE, MASK = "Prompts_Folder/Train_text", "Train_Folder/img/1.png", "Train_Folder/label/1.png"
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


def check(folder: Path) -> list[DatasetIssue]:
    datasets = [SegmentationDataset(folder, split) for split in ("train", "val", "test")]
    return check_datasets(datasets, progress=False)


def test_a_sound_dataset_has_no_issues(tmp_path, capsys):
    assert check(write_dataset(tmp_path / "POLYPS")) == []
    assert capsys.readouterr().err == ""
    check_datasets([SegmentationDataset(tmp_path / "POLYPS")])
    assert "4/4" in capsys.readouterr().err


# ---- kinds of damage ------------------------------------------------------------------------------------------------


def rows(*changed: tuple[object, ...], header: tuple[object, ...] = RELEASED) -> Damage:
    """Another training workbook, whose lines 2 and 3 are sound."""
    sound = [(f"{row}.png", "one polyp at the left", f"{row}.png") for row in (2, 3)]
    return lambda folder: write_workbook(folder / f"{TABLE}.xlsx", header, *sound, *changed)


def table(suffix: str, content: str | bytes) -> Damage:
    """A training table of another kind instead of the workbook."""
    return lambda folder: ((folder / f"{TABLE}.xlsx").unlink(), write(folder / f"{TABLE}{suffix}", content))


def content(file: str, new: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(new)


def cut(file: str, keep: float = 0.6) -> Damage:
    return lambda folder: _cut(folder / file, keep)


def _cut(path: Path, keep: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    return path


def array(file: str, levels: np.ndarray) -> Damage:
    return lambda folder: save(folder / file, levels)


def instead(name: str, make: Damage, *, part: str = "", role: str = "img") -> Damage:
    """Line 5 of the training workbook gets another image, or another mask."""

    def damage(folder: Path) -> None:
        make(folder / "Train_Folder" / role / name)
        names = (name + part, "1.png") if role == "img" else ("1.png", name + part)
        rows(("0.png", "one polyp", "0.png"), (names[0], "one polyp", names[1]))(folder)

    return damage


def remove(path: str) -> Damage:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def rename(old: str, new: str) -> Damage:
    return lambda folder: (folder / old).rename(folder / new)


def link(target: str) -> Damage:
    return lambda folder: ((folder / IMAGE).unlink(), (folder / IMAGE).symlink_to(target))


def not_a_workbook(folder: Path) -> None:
    with zipfile.ZipFile(folder / f"{TABLE}.xlsx", "w") as archive:
        archive.writestr("hello.txt", "not a workbook")


def mangled_workbook(folder: Path) -> None:
    path = folder / f"{TABLE}.xlsx"
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


def nifti(voxels: np.ndarray) -> Damage:
    return lambda path: save_nifti(path, voxels)


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
    import pydicom

    data = pydicom.dcmread(save_dicom(path, picture(1)))
    for name in ("PixelData", "Rows", "Columns"):
        delattr(data, name)
    data.Modality = "SR"
    data.save_as(path)


def frames(path: Path) -> None:
    save_dicom(path, np.stack([picture(1)] * 3))


# ---- tables: an error when the dataset is made ----------------------------------------------------------------------

ENCRYPTED = bytes.fromhex("d0cf11e0a1b11ae1") + b"\0" * 600
TABLES: dict[str, tuple[Damage, tuple[str, ...]]] = {  # how it is broken, and what the error must say
    "folder missing": (remove("."), ("table is missing", "give the dataset's own folder")),
    "layout missing": (rename("Prompts_Folder", "prompts_folder"), ("table is missing", "there is prompts_folder")),
    "table missing": (
        remove(f"{TABLE}.xlsx"),
        ("table is missing", "Train_text.xlsx", "Test_text_original.xlsx, Val_text.xlsx"),
    ),
    "other case": (rename(f"{TABLE}.xlsx", "Prompts_Folder/train_text.xlsx"), ("there is train_text.xlsx",)),
    "table twice": (
        lambda folder: write(folder / f"{TABLE}.csv", "image,text\n"),
        ("ambiguous", "Train_text.xlsx, Train_text.csv"),
    ),
    "0 bytes": (content(f"{TABLE}.xlsx", b""), ("Train_text.xlsx", "0 bytes")),
    "truncated": (cut(f"{TABLE}.xlsx"), ("Train_text.xlsx", "damaged")),
    "zip that is no workbook": (not_a_workbook, ("Train_text.xlsx", "damaged")),
    "sheet mangled": (mangled_workbook, ("Train_text.xlsx", "damaged")),
    "encrypted": (content(f"{TABLE}.xlsx", ENCRYPTED), ("Train_text.xlsx", "without a password")),
    "web page": (content(f"{TABLE}.xlsx", b"<html><table><tr><td>Image"), ("Train_text.xlsx", "damaged")),
    "without rows": (lambda folder: write_workbook(folder / f"{TABLE}.xlsx", RELEASED), ("table is empty",)),
    "headers unknown": (
        rows(header=("Picture", "Words", "Truth")),
        ("got Picture, Words, Truth", "image, img, file", "name them Image"),
    ),
    "no header": (rows(header=("1.png", "one polyp", "1.png")), ("columns are missing", "got 1.png, one polyp")),
    "no column of text": (rows(header=("Image", "Note", "Mask")), ("description, text",)),
    "header twice": (rows(header=("Image", "image", "text")), ("ambiguous", "'Image'", "rename")),
    "masks under an unknown header": (rows(header=("Image", "Text", "Annotated")), ("'Annotated'", "file names")),
    "image cell empty": (rows((None, "one polyp", "1.png")), ("line 4", "image cell", "empty")),
    "text empty": (rows(("1.png", " \n", "1.png")), ("line 4", "text cell", "empty")),
    "mask cell empty": (rows(("1.png", "one polyp", None)), ("line 4", "mask cell", "empty")),
    "number for text": (rows(("1.png", 3.5, "1.png")), ("line 4", "float 3.5", "expected text")),
    "number for a name": (rows((1, "one polyp", "1.png")), ("line 4", "int 1", "expected text")),
    "spreadsheet error": (rows(("1.png", "#NAME?", "1.png")), ("line 4", "#NAME?", "formula")),
    "no words": (rows(("1.png", "---", "1.png")), ("line 4", "'---'", "expected words")),
    "beyond the header": (rows(("1.png", "one polyp", "1.png", "more")), ("line 4", "too many cells: got 4")),
    "comma in a sentence": (
        table(".csv", "Image,Description,Mask\n0.png,one small, round polyp,0.png\n"),
        ("line 2", "too many cells", "quote sentences"),
    ),
    "latin-1": (
        table(".csv", "Image,Description\n1.png,für\n".encode("latin-1")),
        ("Train_text.csv", "not a table in UTF-8", "CSV UTF-8"),
    ),
    "utf-16": (table(".csv", "Image,Description\n".encode("utf-16")), ("Train_text.csv", "CSV UTF-8")),
    "quotation mark open": (
        table(".csv", 'Image,Description\n0.png,fine\n1.png,"one polyp\n2.png,two\n'),
        ("from line 3", "quotation mark"),
    ),
    "json broken": (
        table(".jsonl", '{"image": "0.png", "text": "one", "mask": "0.png"}\n{"image": "1.png",\n'),
        ("line 2", "not a JSON object"),
    ),
    "json list": (table(".jsonl", '["0.png", "one polyp"]\n'), ("line 1", "not a JSON object")),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_faulty_table_is_an_error_when_the_dataset_is_made(tmp_path, kind):
    damage, facts = TABLES[kind]
    folder = write_dataset(tmp_path / "POLYPS")
    damage(folder)
    with pytest.raises(DatasetError) as caught:
        SegmentationDataset(folder)
    assert str(caught.value).startswith("1 issue")
    (issue,) = [str(issue) for issue in caught.value.issues if issue.fatal]
    assert issue.startswith("POLYPS/train")
    assert [fact for fact in facts if fact not in issue] == [], issue


# ---- files: an issue of the check -----------------------------------------------------------------------------------

FILES: dict[str, tuple[Damage, tuple[str, ...]]] = {  # how it is broken, and what the one issue must say
    "image missing": (remove(IMAGE), ("line 3 (1.png): image is missing", "img/1.png")),
    "mask missing": (remove(MASK), ("line 3 (1.png): mask is missing", "label/1.png")),
    "other extension": (rename(IMAGE, "Train_Folder/img/1.jpg"), ("image is missing", "there is 1.jpg")),
    "other case": (rename(IMAGE, "Train_Folder/img/1.PNG"), ("image is missing", "there is 1.PNG")),
    "images missing": (remove("Train_Folder/img"), ("image folder is missing",)),
    "other folder": (rename("Train_Folder/label", "Train_Folder/labels"), ("mask folder", "there is labels")),
    "leads out": (rows(("../../Test_Folder/img/1.png", "one polyp", "1.png")), ("outside of its folder",)),
    "absolute": (rows(("/etc/passwd", "one polyp", "1.png")), ("outside of its folder",)),
    "leads out as on Windows": (rows((r"..\1.png", "one polyp", "1.png")), ("outside of its folder",)),
    "drive letter": (rows((r"C:\scans\1.png", "one polyp", "1.png")), ("outside of its folder",)),
    "link to nowhere": (link("/nowhere/1.png"), ("image is missing", "1.png")),
    "links in a circle": (link("1.png"), ("image", "1.png")),
    "a folder": (lambda folder: ((folder / IMAGE).unlink(), (folder / IMAGE).mkdir()), ("1.png is a folder",)),
    "image of 0 bytes": (content(IMAGE, b""), ("image cannot be read", "img/1.png", "0 bytes")),
    "mask of 0 bytes": (content(MASK, b""), ("mask cannot be read", "label/1.png", "0 bytes")),
    "web page": (content(IMAGE, b"<html>not found</html>"), ("img/1.png", "not an image")),
    "png truncated": (cut(IMAGE), ("img/1.png", "damaged")),
    "mask truncated": (cut(MASK), ("label/1.png", "damaged")),
    **{
        f"{suffix} truncated": (
            instead(f"1.{suffix}", lambda path: _cut(save(path, picture(1)), 0.7)),
            ("line 5", f"img/1.{suffix}", "damaged"),
        )
        for suffix in ("jpg", "tif", "bmp", "gif")
    },
    "pages": (instead("1.tif", several_pages), ("img/1.tif", "2 pages", "#frame=0")),
    "sizes differ": (array(MASK, np.zeros((24, 33), np.uint8)), ("sizes differ", "32 x 24", "33 x 24")),
    "mask turned": (array(MASK, np.ascontiguousarray(mask().T)), ("sizes differ", "24 x 32", "turned")),
    "grey levels": (array(MASK, picture(3) // 2), ("label/1.png", "not binary", "and 119 more", "#label=2")),
    "labels": (array(MASK, mask() // 85), ("not binary", "0, 3", "#label=2")),
    "mask in colours": (array(MASK, np.stack([mask(), 0 * mask(), 0 * mask()], 2)), ("label/1.png", "colours")),
    "mask is the image": (
        lambda folder: (
            shutil.rmtree(folder / "Train_Folder/label"),
            (folder / "Train_Folder/label").symlink_to(folder / "Train_Folder/img"),
        ),
        ("label/0.png",),
    ),
    "float with nan": (
        instead("1.tif", lambda path: save(path, np.full(SIZE, np.nan, np.float32))),
        ("img/1.tif", "768 pixels", "NaN"),
    ),
    "volume with nan": (instead("1.nii", nifti(with_nan()), part="#z=2"), ("1.nii", "1 voxels", "NaN")),
    "no slice": (instead("1.nii.gz", nifti(volume())), ("1.nii.gz", "(32, 24, 5)", "1.nii.gz#z=2")),
    "slice beyond": (instead("1.nii.gz", nifti(volume()), part="#z=5"), ("got z=5", "expected z=0 to 4")),
    "slice unknown": (instead("1.nii", nifti(volume()), part="#slice=2"), ("#slice=2", "#z=40")),
    "slice of an image": (instead("4.png", lambda path: save(path, picture(4)), part="#z=2"), ("4.png", "z=2")),
    "frame of a volume": (instead("1.nii", nifti(volume()), part="#frame=2"), ("frame of a NIfTI", "as #z=2")),
    "label of an image": (rows(("1.png#label=1", "one polyp", "1.png")), ("line 4", "got a label")),
    "series": (instead("1.nii", nifti(volume((32, 24, 5, 3))), part="#z=2"), ("(32, 24, 5, 3)", "3-D")),
    "complex": (instead("1.nii", nifti(volume().astype(np.complex64)), part="#z=2"), ("complex64", "plain numbers")),
    **{
        f"{suffix} truncated": (
            instead(f"1.{suffix}", lambda path: _cut(save_nifti(path, volume()), 0.5), part="#z=2"),
            (f"1.{suffix}", "damaged or not NIfTI"),
        )
        for suffix in ("nii", "nii.gz")
    },
    "gzip broken": (instead("1.nii.gz", broken_gzip, part="#z=2"), ("damaged or not NIfTI",)),
    "gzip of something else": (
        instead("1.nii.gz", lambda path: path.write_bytes(gzip.compress(b"hello" * 99)), part="#z=2"),
        ("damaged or not NIfTI",),
    ),
    "affine singular": (instead("1.nii", singular, part="#z=2"), ("1.nii", "affine")),
    "labels of a volume": (
        instead("1.nii", nifti(volume((32, 24, 1), dtype=np.int16)), role="label"),
        ("label/1.nii", "not binary", "0, 1, 2"),
    ),
    "nan in a mask": (instead("1.nii", nifti(with_nan()), part="#z=2", role="label"), ("label/1.nii", "NaN")),
    "dicom truncated": (
        instead("1.dcm", lambda path: _cut(save_dicom(path, picture(1)), 0.7)),
        ("1.dcm", "cannot be decoded"),
    ),
    "dicom header truncated": (
        instead("1.dcm", lambda path: _cut(save_dicom(path, picture(1)), 0.2)),
        ("1.dcm", "without an image"),
    ),
    "not dicom": (instead("1.dcm", lambda path: path.write_bytes(b"hello" * 99)), ("1.dcm", "not DICOM")),
    "dicom without an image": (instead("1.dcm", without_pixels), ("without an image", "SR")),
    "dicom of frames": (instead("1.dcm", frames), ("1.dcm", "3 frames", "#frame=0 to #frame=2")),
    "frame beyond": (instead("1.dcm", frames, part="#frame=3"), ("got frame=3", "#frame=0 to #frame=2")),
    "slice of a dicom": (
        instead("1.dcm", lambda path: save_dicom(path, picture(1)), part="#z=0"),
        ("got z=0", "#frame=0"),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_is_found_by_the_check_and_raises_when_it_is_read(tmp_path, kind):
    damage, facts = FILES[kind]
    folder = write_dataset(tmp_path / "POLYPS")
    damage(folder)
    issues = check(folder)
    fatal = [issue for issue in issues if issue.fatal]
    assert len(fatal) == len(issues)  # nothing else, and other splits are none the worse
    assert len(fatal) == (ROWS if kind == "mask is the image" else 1), issues
    assert fatal[0].location.startswith("POLYPS/train")
    assert [fact for fact in facts if fact not in str(fatal[0])] == [], str(fatal[0])
    assert str(fatal[0]) in str(DatasetError(issues))
    dataset = SegmentationDataset(folder)
    raised = []
    for index in range(len(dataset)):
        try:
            assert dataset[index]["mask"].shape == SIZE
        except DatasetError as error:
            raised += error.issues
    assert len(raised) == len(dataset) if "folder" in fatal[0].kind else raised == fatal


def test_everything_at_once(tmp_path):
    folder = write_dataset(tmp_path / "POLYPS")
    for split in ("Train", "Val", "Test"):
        (folder / f"{split}_Folder/img/0.png").unlink()
        (folder / f"{split}_Folder/label/0.png").write_bytes(b"")
        _cut(folder / f"{split}_Folder/img/2.png", 0.5)
    issues = check(folder)
    assert len(issues) == 9
    assert str(DatasetError(issues)).startswith("9 issues")


# ---- warnings -------------------------------------------------------------------------------------------------------

WARNINGS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty mask": (array(MASK, 0 * mask()), ("line 3 (1.png)", "mask is empty", "'one polyp at the left'")),
    "train and test": (
        lambda folder: shutil.copy(folder / IMAGE, folder / "Test_Folder/img/2.png"),
        ("POLYPS/test (original) line 4 (2.png)", "two splits", "POLYPS/train line 3 (1.png)"),
    ),
    "row repeated": (rows(("2.png", "one polyp at the left\n", "2.png")), ("line 4", "2.png", "line 2")),
    "unused column": (rows(header=(*RELEASED, "Age")), ("not used", "'Age'")),
    "empty validation": (
        lambda folder: write_workbook(folder / "Prompts_Folder/Val_text.xlsx"),
        ("POLYPS/val", "table is empty", "without validation"),
    ),
}


@pytest.mark.filterwarnings("ignore:POLYPS")
@pytest.mark.parametrize("kind", WARNINGS)
def test_a_warning_is_no_error(tmp_path, kind):
    damage, facts = WARNINGS[kind]
    folder = write_dataset(tmp_path / "POLYPS")
    damage(folder)
    (issue,) = check(folder)
    assert not issue.fatal
    assert [fact for fact in facts if fact not in str(issue)] == [], str(issue)


@pytest.mark.parametrize(
    "text", ["No tumor in the breast ultrasound image.", "a colon without polyps", "Normal mucosa"]
)
def test_an_empty_mask_may_be_right(tmp_path, text):
    folder = write_dataset(tmp_path / "POLYPS")
    save(folder / MASK, 0 * mask())
    rows(("1.png", text, "1.png"))(folder)
    assert check(folder) == []


def test_the_same_test_images_with_other_words_are_no_leak(tmp_path):
    folder = write_dataset(tmp_path / "POLYPS")
    workbook = folder / "Prompts_Folder/Test_text_original.xlsx"
    workbook.with_name("Test_text_contradictory.xlsx").write_bytes(workbook.read_bytes())
    datasets = [SegmentationDataset(folder, "test", prompts=prompts) for prompts in ("original", "contradictory")]
    assert check_datasets(datasets, progress=False) == []


@pytest.mark.parametrize(("package", "name", "part"), [("nibabel", "1.nii", "#z=2"), ("pydicom", "1.dcm", "")])
def test_packages_that_are_not_installed(tmp_path, monkeypatch, package, name, part):
    folder = write_dataset(tmp_path / "POLYPS")
    make = nifti(volume()) if package == "nibabel" else lambda path: save_dicom(path, picture(1))
    instead(name, make, part=part)(folder)
    monkeypatch.setitem(sys.modules, package, None)
    (issue,) = check(folder)
    assert package in str(issue)
    assert 'pip install "pvl-adapter[data]"' in str(issue)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DatasetError, match=r'openpyxl.*pip install "pvl-adapter\[data\]"'):
        SegmentationDataset(folder)


# ---- issues as an error ---------------------------------------------------------------------------------------------


def test_the_error_groups_issues_of_a_kind():
    issues = [DatasetIssue(f"X line {n}", "image is missing", f"img/{n}.png; put it there") for n in range(20)]
    issues += [DatasetIssue("X line 99", "sizes differ", "3 x 4, 5 x 6"), DatasetIssue("Y", "odd", "look", False)]
    message = str(DatasetError(issues))
    assert message.startswith("21 issues")
    assert "X line 2: image is missing: img/2.png; put it there" in message
    assert "17 more of this kind" in message
    assert "X line 99" in message
    assert "Y" not in message
    assert len(message.splitlines()) == 6
    assert one_of_each_kind(issues)[1:] == ["X line 99: sizes differ: 3 x 4, 5 x 6", "Y: odd: look"]


def test_an_error_survives_a_process():
    error = DatasetError([DatasetIssue("X", "image is missing", "a; put it there")])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.issues) == (str(error), error.issues)
