"""Datasets in the released layout and from anybody's own table: which rows, which files, which name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_faults import SIZE, mask, picture, write_dataset
from test_data_pictures import save, save_nifti
from test_data_tables import RELEASED, WORKBOOKS, write, write_workbook

from pvl_adapter.data import DatasetError, SegmentationDataset, check_datasets, find_dataset


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with pictures and one with masks of the same names."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for number in range(3):
        save(tmp_path / "images" / f"{number}.png", picture(number))
        save(tmp_path / "masks" / f"{number}.png", mask())
    return tmp_path


def from_table(folder: Path, *lines: str, **options: object) -> SegmentationDataset:
    table = write(folder / "mine.csv", "\n".join(lines))
    return SegmentationDataset.from_table(table, images=folder / "images", masks=folder / "masks", **options)


def test_splits_fractions_and_prompts_of_the_released_layout(tmp_path):
    folder = write_dataset(tmp_path / "POLYPS")
    prompts = folder / "Prompts_Folder"
    for number, stem in enumerate(("Train_text_10", "Val_text_50", "Test_text_contradictory")):
        write_workbook(prompts / f"{stem}.xlsx", RELEASED, (f"{number}.png", stem, f"{number}.png"))

    def texts(*args: object, **options: object) -> set[str]:
        return {row.text for row in SegmentationDataset(folder, *args, **options).rows}

    assert texts() == texts("test") == {"one polyp at the left"}
    assert texts(fraction=10) == {"Train_text_10"}
    assert texts("val", fraction=50) == {"Val_text_50"}
    assert texts("test", prompts="contradictory", fraction=10) == {"Test_text_contradictory"}
    np.testing.assert_array_equal(SegmentationDataset(folder, "val")[0].image, picture(10))
    dataset = SegmentationDataset(folder, "test", prompts="contradictory")
    assert (dataset.name, dataset.split, dataset.place) == ("POLYPS", "test", "POLYPS/test (contradictory)")
    assert dataset.table == prompts / "Test_text_contradictory.xlsx"


def test_tables_of_other_kinds_are_as_good(tmp_path):
    folder = write_dataset(tmp_path / "POLYPS")
    for suffix, content in {
        ".csv": "Image;Description;Ground Truth\n2.png;two, or three polyps;2.png\n",
        ".tsv": "Image\tDescription\tGround Truth\n2.png\ttwo, or three polyps\t2.png\n",
        ".jsonl": '{"image": "2.png", "text": "two, or three polyps", "mask": "2.png"}\n',
    }.items():
        for old in (folder / "Prompts_Folder").glob("Train_text.*"):
            old.unlink()
        write(folder / "Prompts_Folder" / f"Train_text{suffix}", content)
        dataset = SegmentationDataset(folder)
        assert dataset.faults == []
        assert dataset[0].text == "two, or three polyps"


def test_real_workbooks_keep_their_order(tmp_path):
    dataset = SegmentationDataset(WORKBOOKS / "BUSI", "test", prompts="contradictory")
    assert dataset.name == "BUSI"
    assert [row.image for row in dataset.rows[:2]] == ["411_benign.png", "169_malignant.png"]
    assert len(dataset) == 78
    assert [fault.problem.partition(":")[0] for fault in dataset.faults] == [
        "image folder is missing",
        "mask folder is missing",
    ]
    faults = check_datasets([dataset], progress=False)
    assert faults == dataset.faults  # and not 156 files besides


def test_masks_may_have_other_names(tmp_path):
    folder = write_dataset(tmp_path / "ISIC")
    (folder / "Train_Folder/label/1.png").rename(folder / "Train_Folder/label/1_Segmentation.png")
    write_workbook(folder / "Prompts_Folder/Train_text.xlsx", RELEASED, ("1.png", "a melanoma", "1_Segmentation.png"))
    assert check_datasets([SegmentationDataset(folder)], progress=False) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "training"}, "'train', 'val', 'test'"),
        ({"fraction": 20}, "10, 25, 50, 100"),
        ({"prompts": "short"}, "'original', 'contradictory'"),
    ],
)
def test_what_there_is_not(tmp_path, options, words):
    with pytest.raises(ValueError, match=f"expected .*{words}"):
        SegmentationDataset(write_dataset(tmp_path / "POLYPS"), **options)


def test_a_fraction_that_is_lacking_names_those_that_are_not(tmp_path):
    dataset = SegmentationDataset(write_dataset(tmp_path / "POLYPS"), fraction=25)
    assert len(dataset) == 0
    assert str(dataset.faults[0]).startswith("POLYPS/train (25%): table is missing")
    assert "Train_text_25.xlsx" in str(dataset.faults[0])
    assert "there are Test_text_original.xlsx, Train_text.xlsx, Val_text.xlsx" in str(dataset.faults[0])


def test_own_tables(own):
    dataset = from_table(own, "image,text,mask", "0.png,one polyp,1.png", name="mine own", split="train")
    assert (dataset.name, dataset.split, dataset.place) == ("mine own", "train", "mine own/train")
    assert from_table(own, "image,text").name == "mine"
    np.testing.assert_array_equal(dataset[0].image, picture(0))
    with pytest.raises(ValueError, match="expected one of"):
        from_table(own, "image,text", split="training")


def test_folders_default_to_the_table_s_own(own):
    table = write(own / "mine.csv", "image,text,mask\nimages/0.png,one polyp,masks\\0.png\n")  # as on Windows
    dataset = SegmentationDataset.from_table(table)
    assert check_datasets([dataset], progress=False) == []
    absolute = write(own / "mine.csv", f"image,text,mask\n{own / 'images/0.png'},one polyp,{own / 'masks/0.png'}\n")
    assert check_datasets([SegmentationDataset.from_table(absolute)], progress=False) == []


def test_a_table_without_masks_takes_those_of_the_same_name(own):
    (own / "masks/1.png").rename(own / "masks/1.BMP")
    save(own / "masks/2.tif", mask())
    dataset = from_table(own, "image,text", "0.png,one polyp", "1.png,one polyp", "2.png,one polyp", "3.png,one polyp")
    save(own / "images/3.png", picture(3))
    np.testing.assert_array_equal(dataset[0].mask, mask() > 0)
    np.testing.assert_array_equal(dataset[1].mask, mask() > 0)
    told = [str(fault) for fault in check_datasets([dataset], progress=False)]
    assert len(told) == 2
    assert "line 4 (2.png): mask is ambiguous: masks/2.png: 2.png, 2.tif all fit; add a column" in told[0]
    assert "line 5 (3.png): mask is missing: masks/3.png" in told[1]


def test_masks_beside_their_images(own):
    save(own / "images/0.tif", mask())
    for name in ("0.tif", ""):
        column = ",mask" if name else ""
        table = write(own / "mine.csv", f"image,text{column}\n0.png,one polyp,{name}\n")
        dataset = SegmentationDataset.from_table(table, images=own / "images", masks=own / "images")
        np.testing.assert_array_equal(dataset[0].mask, mask() > 0)
    table = write(own / "mine.csv", "image,text,mask\n1.png,one polyp,1.png\n")
    dataset = SegmentationDataset.from_table(table, images=own / "images", masks=own / "images")
    with pytest.raises(DatasetError, match=r"mask is the image itself: images/1.png: .*name the mask's own file"):
        dataset[0]
    table = write(own / "mine.csv", "image,text\n1.png,one polyp\n")
    dataset = SegmentationDataset.from_table(table, images=own / "images", masks=own / "images")
    with pytest.raises(DatasetError, match="mask is missing"):
        dataset[0]


def test_slices_of_volumes(own):
    scan = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)
    labels = np.zeros(scan.shape, np.uint8)
    labels[1, 2, 3], labels[1, 2, 4] = 17, 18
    save_nifti(own / "images/scan.nii.gz", scan)
    save_nifti(own / "masks/scan.nii.gz", labels)
    save_nifti(own / "masks/binary.nii", (labels > 0).astype(np.uint8))
    dataset = from_table(
        own,
        "image,text,mask",
        "scan.nii.gz#z=3,the thalamus,scan.nii.gz#z=3&label=17",
        "scan.nii.gz#y=2,both,binary.nii#y=2",
        window=(0, 4),
    )
    assert check_datasets([dataset], progress=False) == []
    assert dataset[0].mask.shape == dataset[0].image.shape == (9, 8)
    assert np.argwhere(dataset[0].mask).tolist() == [[9 - 1 - 2, 8 - 1 - 1]]
    assert dataset[1].mask.sum() == 2
    save_nifti(own / "masks/scan.nii", (labels > 0).astype(np.uint8))
    (own / "masks/scan.nii.gz").unlink()
    assert from_table(own, "image,text", "scan.nii.gz#z=4,both")[0].mask.sum() == 1


def test_the_window_is_heeded(own):
    deep = picture(0).astype(np.uint16) * 100
    save(own / "images/0.png", deep)
    dataset = from_table(own, "image,text", "0.png,one polyp", window=(5000, 10000))
    expected = np.rint(np.clip(deep / 10000, 0, 1) * 255)
    np.testing.assert_array_equal(dataset[0].image, expected.astype(np.uint8))


def test_numbered_names_suggest_no_neighbour(own):
    told = str(check_datasets([from_table(own, "image,text,mask", "7.png,one polyp,0.png")], progress=False)[0])
    assert "put it into" in told
    for stem in ("polyp_case_08", "polyp_case_09"):
        save(own / "images" / f"{stem}.png", picture(8))
    told = str(check_datasets([from_table(own, "image,text,mask", "polyp_case_07.png,one,0.png")], progress=False)[0])
    assert "put it into" in told
    told = str(check_datasets([from_table(own, "image,text,mask", "polypcase_08.png,one,0.png")], progress=False)[0])
    assert "there is polyp_case_08.png" in told


def test_many_missing_files_take_no_time(own):
    for number in range(1500):
        (own / "images" / f"picture_of_a_polyp_{number}.png").touch()
    lines = [f"picture_of_a_polip_{number}.jpg,one polyp,0.png" for number in range(300)]
    faults = check_datasets([from_table(own, "image,text,mask", *lines)], progress=False)
    assert len(faults) == 300
    assert "there is picture_of_a_polyp_299.png" in str(faults[-1])


def test_a_loader_with_workers(tmp_path):
    dataset = SegmentationDataset(write_dataset(tmp_path / "POLYPS"))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=list)
    samples = [sample for batch in loader for sample in batch]
    assert [sample.name for sample in samples] == [f"{number}.png" for number in range(4)]
    assert samples[3].image.shape == SIZE
    dataset.table.parent.parent.joinpath("Train_Folder/img/2.png").unlink()
    with pytest.raises(RuntimeError, match=r"POLYPS/train line 4 \(2.png\): image is missing"):
        list(loader)


def test_the_same_test_pictures_with_other_words_are_no_leak(tmp_path):
    folder = write_dataset(tmp_path / "POLYPS")
    workbook = folder / "Prompts_Folder/Test_text_original.xlsx"
    workbook.with_name("Test_text_contradictory.xlsx").write_bytes(workbook.read_bytes())
    datasets = [SegmentationDataset(folder, "test", prompts=prompts) for prompts in ("original", "contradictory")]
    assert check_datasets(datasets, progress=False) == []


# ---- by name --------------------------------------------------------------------------------------------------------


def test_find_dataset(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "data" / "POLYPS")
    assert find_dataset(folder) == find_dataset("POLYPS", data=tmp_path / "data") == folder
    monkeypatch.chdir(tmp_path)
    assert find_dataset("POLYPS") == Path("data/POLYPS")
    with pytest.raises(FileNotFoundError, match="python -m pvl_adapter download Kvasir --data-folder data"):
        find_dataset("kvasir")
    with pytest.raises(FileNotFoundError, match="EUS is not on the hub"):
        find_dataset("EUS")
    with pytest.raises(FileNotFoundError, match="data has POLYPS; did you mean 'POLYPS'"):
        find_dataset("POLYP")
    with pytest.raises(FileNotFoundError, match="nowhere has no datasets"):
        find_dataset("mine", data="nowhere")


def test_importing_needs_none_of_the_heavy_packages():
    heavy = ("openpyxl", "nibabel", "pydicom", "matplotlib", "monai", "torchmetrics")
    code = f"""if True:
        import sys, pvl_adapter
        assert "pvl_adapter.data" not in sys.modules
        import pvl_adapter.data
        print([name for name in {heavy} if name in sys.modules])"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
