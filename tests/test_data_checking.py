"""Broken datasets: a faulty table is an error at once, the check finds every broken file, and each says where."""

from __future__ import annotations

import pickle
import shutil
import sys
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


def masked(levels: np.ndarray) -> Damage:
    return lambda folder: save(folder / MASK, levels)


def new(name: str, make: Damage, *, role: str = "img") -> Damage:
    """Line 5 of the training workbook gets another image or mask, and what `make` makes of it."""

    def damage(folder: Path) -> None:
        make(folder / "Train_Folder" / role / name.partition("#")[0])
        rows(("0.png", "one", "0.png"), (name, "one", "1.png") if role == "img" else ("1.png", "one", name))(folder)

    return damage


def remove(path: str) -> Damage:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def rename(old: str, new: str) -> Damage:
    return lambda folder: (folder / old).rename(folder / new)


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
    image.header["sform_code"] = 1  # and its rows are 0
    image.to_filename(path)


def without_pixels(path: Path) -> None:
    data = pydicom.dcmread(save_dicom(path, picture(1), Modality="SR"))
    del data.PixelData, data.Rows, data.Columns
    data.save_as(path)


# ---- tables: an error when the dataset is made ----------------------------------------------------------------------

ENCRYPTED = bytes.fromhex("d0cf11e0a1b11ae1") + b"\0" * 600
FRAMES = np.stack([picture(1)] * 3)
TABLES: dict[str, tuple[Damage, str]] = {  # how it is broken, and what the error must say, between bars
    "folder missing": (remove("."), "table is missing|POLYPS does not exist"),
    "layout missing": (rename("Prompts_Folder", "prompts_folder"), "table is missing|prompts_folder"),
    "missing": (remove(BOOK), "table is missing|Train_text.xlsx|Test_text_original.xlsx, Val_text.xlsx"),
    "twice": (lambda folder: write(folder / BOOK.replace("xlsx", "csv"), "a"), "Train_text.xlsx|Train_text.csv"),
    "0 bytes": (content(BOOK, b""), "Train_text.xlsx|0 bytes"),
    "truncated": (cut(BOOK), "Train_text.xlsx|damaged"),
    "encrypted": (content(BOOK, ENCRYPTED), "Train_text.xlsx|without a password"),
    "without rows": (lambda folder: write_workbook(folder / BOOK, RELEASED), "table is empty"),
    "headers unknown": (rows(header=("Picture", "Words", "Truth")), "Picture, Words, Truth|image, img, file"),
    "header twice": (rows(header=("Image", "image", "text")), "'image'|rename"),
    "masks under an unknown header": (rows(header=("Image", "Text", "Annotated")), "'Annotated'|file names"),
    "image cell empty": (rows((None, "one polyp", "1.png")), "line 4|image cell|got nothing"),
    "mask cell empty": (rows(("1.png", "one polyp", None)), "line 4|mask cell|got nothing"),
    "number for text": (rows(("1.png", 3.5, "1.png")), "line 4|got 3.5|as text"),
    "spreadsheet error": (rows(("1.png", "#NAME?", "1.png")), "line 4|#NAME?|formula"),
    "no words": (rows(("1.png", "---", "1.png")), "line 4|'---'|expected words"),
    "comma": (table(".csv", "Image,Text,Mask\n0.png,one small, round polyp,0.png\n"), "line 2|got 4 cells|quote"),
    "latin-1": (table(".csv", "Image,Text\n1.png,für\n".encode("latin-1")), "Train_text.csv|CSV UTF-8"),
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
    "other case": (rename(IMAGE, "Train_Folder/img/1.PNG"), "image is missing|there is 1.PNG"),
    "folder of images missing": (remove("Train_Folder/img"), "image is missing|Train_Folder holds label"),
    "folder of another name": (
        rename("Train_Folder/label", "Train_Folder/labels"),
        "mask is missing|Train_Folder holds img, labels",
    ),
    "leads out": (rows(("../../Test_Folder/img/1.png", "one polyp", "1.png")), "line 4|outside of its folder"),
    "absolute": (rows(("/etc/passwd", "one polyp", "1.png")), "outside of its folder"),
    "no file": (lambda folder: ((folder / IMAGE).unlink(), (folder / IMAGE).mkdir()), "1.png is a folder"),
    "image of 0 bytes": (content(IMAGE, b""), "image cannot be read|img/1.png|0 bytes"),
    "web page": (content(IMAGE, b"<html>not found</html>"), "img/1.png|not an image"),
    "png truncated": (cut(IMAGE), "img/1.png|damaged"),
    "tiff truncated": (new("1.tif", lambda path: _cut(save(path, picture(1)), 0.7)), "img/1.tif|damaged"),
    "pages": (new("1.tif", pages), "img/1.tif|2 pages|#frame=0"),
    "slice of an image": (new("4.png#z=2", lambda path: save(path, picture(4))), "4.png|z=2"),
    "float with nan": (new("1.tif", lambda path: save(path, np.full(SIZE, np.nan, np.float32))), "768 pixels|NaN"),
    "sizes differ": (masked(np.zeros((24, 33), np.uint8)), "sizes differ|32 x 24|33 x 24"),
    "mask turned": (masked(np.ascontiguousarray(mask().T)), "sizes differ|24 x 32|turned"),
    "grey levels": (masked(picture(3) // 2), "label/1.png|not binary|and 119 more|#label=2"),
    "colours": (masked(np.stack([mask(), 0 * mask(), 0 * mask()], 2)), "label/1.png|colours"),
    "volume with nan": (new("1.nii#z=2", nifti(with_nan())), "1.nii|1 voxels|NaN"),
    "no slice": (new("1.nii.gz", nifti(volume())), "1.nii.gz|(32, 24, 5)|1.nii.gz#z=2"),
    "slice beyond": (new("1.nii.gz#z=5", nifti(volume())), "got z=5|(32, 24, 5)"),
    "series": (new("1.nii#z=2", nifti(volume((32, 24, 5, 3)))), "(32, 24, 5, 3)|3-D"),
    "nifti.gz truncated": (new("1.nii.gz#z=2", nifti(volume(), keep=0.5)), "1.nii.gz|not NIfTI"),
    "affine singular": (new("1.nii#z=2", singular), "1.nii|affine"),
    "nan in a mask": (new("1.nii#z=2", nifti(with_nan()), role="label"), "label/1.nii|NaN"),
    "dicom truncated": (new("1.dcm", dicom(picture(1), keep=0.7)), "1.dcm|damaged"),
    "not dicom": (new("1.dcm", lambda path: path.write_bytes(b"hello" * 99)), "1.dcm|not DICOM"),
    "dicom without an image": (new("1.dcm", without_pixels), "without an image|SR"),
    "dicom of frames": (new("1.dcm", dicom(FRAMES)), "1.dcm|3 frames|#frame=0"),
    "frame beyond": (new("1.dcm#frame=3", dicom(FRAMES)), "got frame=3|3 frames"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_is_found_by_the_check_and_raises_when_it_is_read(polyps, kind):
    damage, facts = FILES[kind]
    damage(polyps)
    found, raised = check(polyps), list[DatasetIssue]()
    assert len(found) == (ROWS if "folder" in kind else 1)  # nothing else, and other splits are none the worse
    assert all(issue.fatal and issue.location.startswith("POLYPS/train") for issue in found)
    assert_told(found[0], facts)
    dataset = SegmentationDataset(polyps)
    for index in range(len(dataset)):
        try:
            assert dataset[index]["mask"].shape == SIZE
        except DatasetError as error:
            raised += error.issues
    assert raised == found


# ---- warnings -------------------------------------------------------------------------------------------------------


def leak(folder: Path) -> None:
    shutil.copy(folder / IMAGE, folder / "Test_Folder/img/2.png")


WARNINGS: dict[str, tuple[Damage, str]] = {
    "empty mask": (masked(0 * mask()), "line 3 (1.png)|mask is empty|'one polyp at the left'"),
    "two splits": (leak, "POLYPS/test (original) line 4 (2.png)|two splits|POLYPS/train line 3 (1.png)"),
    "row repeated": (rows(("2.png", "one polyp at the left\n", "2.png")), "line 4|2.png|line 2"),
    "unused column": (rows(header=(*RELEASED, "Age")), "Age"),
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


def test_an_empty_mask_may_be_right(polyps):
    save(polyps / MASK, 0 * mask())
    rows(("1.png", "a colon without polyps", "1.png"))(polyps)
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
    with pytest.raises(DatasetError, match=rf'needs {package}.*pip install "pvl-adapter\[data\]"'):
        raise DatasetError(check(polyps))


def test_the_error_groups_issues_of_a_kind():
    issues = [DatasetIssue(f"X line {n}", "image is missing", f"img/{n}.png; put it there") for n in range(20)]
    issues += [DatasetIssue("X line 99", "sizes differ", "3 x 4, 5 x 6"), DatasetIssue("Y", "odd", "look", False)]
    error = DatasetError(issues)
    assert_told(error, "21 issues|X line 2: image is missing: img/2.png; put it there|17 more of this kind|X line 99")
    assert "X line 3" not in str(error)
    assert "Y" not in str(error)
    assert one_of_each_kind(issues)[1:] == ["X line 99: sizes differ: 3 x 4, 5 x 6", "Y: odd: look"]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.issues) == (str(error), error.issues)
