"""Datasets in the official layout and from one's own table: which rows, which files, and the way to the loss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import BY_NAME
from PIL import Image
from support import injected
from test_data_checking import SIZE, mask, picture, write_dataset
from test_data_reading import WORKBOOKS, save, save_nifti
from test_data_tables import RELEASED, write, write_workbook
from torch.utils.data import DataLoader

import pvl_adapter as pvl
from pvl_adapter.data import DatasetError, SegmentationDataset, check_datasets, find_dataset, read_image
from pvl_adapter.images import prepare_images, prepare_masks


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with images and one with masks of the same names."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for number in range(3):
        save(tmp_path / "images" / f"{number}.png", picture(number))
        save(tmp_path / "masks" / f"{number}.png", mask())
    return tmp_path


def from_table(folder: Path, *lines: str, **options: object) -> SegmentationDataset:
    table = write(folder / "mine.csv", "\n".join(lines))
    return SegmentationDataset.from_table(table, **{"images": folder / "images", "masks": folder / "masks", **options})


def test_splits_fractions_and_prompts_of_the_official_layout(tmp_path):
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
    np.testing.assert_array_equal(SegmentationDataset(folder, "val")[0]["image"], picture(10))
    dataset = SegmentationDataset(folder, "test", prompts="contradictory")
    assert (dataset.name, dataset.split, dataset.location) == ("POLYPS", "test", "POLYPS/test (contradictory)")
    assert dataset.table == prompts / "Test_text_contradictory.xlsx"


def test_real_workbooks():
    dataset = SegmentationDataset(WORKBOOKS / "BUSI", "test", prompts="contradictory")
    assert [row.image for row in dataset.rows[:2]] == ["411_benign.png", "169_malignant.png"]
    assert len(check_datasets([dataset], progress=False)) == 2 * 78  # neither image nor mask is there
    with pytest.warns(UserWarning, match="CVC300/val: table is empty"):
        dataset = SegmentationDataset(WORKBOOKS / "CVC300", "val")
    assert len(dataset) == 0
    assert [issue.fatal for issue in check_datasets([dataset], progress=False)] == [False]


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"split": "training"}, "'train', 'val', 'test'"),
        ({"fraction": 20}, "10, 25, 50, 100"),
        ({"prompts": "short"}, "'original', 'contradictory'"),
        ({"fraction": 25}, r"POLYPS/train \(25\): table is missing.*Train_text_25.xlsx.*Train_text.xlsx"),
    ],
)
def test_what_there_is_not(tmp_path, options, facts):
    with pytest.raises(ValueError, match=facts):
        SegmentationDataset(write_dataset(tmp_path / "POLYPS"), **options)


def test_own_tables(own):
    dataset = from_table(own, "image,text,mask", "0.png,one polyp,1.png", name="mine own", split="train")
    assert (dataset.name, dataset.split, dataset.location) == ("mine own", "train", "mine own/train")
    np.testing.assert_array_equal(dataset[0]["image"], picture(0))
    with pytest.raises(ValueError, match="expected one of"):
        from_table(own, "image,text", split="training")
    with pytest.raises(DatasetError, match=r"absent\.csv does not exist"):
        SegmentationDataset.from_table(own / "absent.csv", split="val")


def test_folders_default_to_the_table_s_own(own):
    rows = r"images/0.png,one polyp,masks\0.png", f"{own}/images/0.png,one polyp,{own}/masks/0.png"  # \ as on Windows
    for row in rows:
        dataset = from_table(own, "image,text,mask", row, images=None, masks=None)
        assert check_datasets([dataset], progress=False) == []


def test_a_table_without_masks_takes_those_of_the_same_name(own):
    (own / "masks/1.png").rename(own / "masks/1.BMP")
    Image.fromarray(mask()).save(own / "masks/0.gif")
    (own / "masks/0.png").unlink()
    save(own / "masks/2.webp", mask(), lossless=True)  # beside 2.png
    save(own / "images/3.png", picture(3))
    dataset = from_table(own, "image,text", *(f"{number}.png,one polyp" for number in range(4)))
    for number in range(2):
        np.testing.assert_array_equal(dataset[number]["mask"], mask() > 0)
    told = [str(issue) for issue in check_datasets([dataset], progress=False)]
    assert len(told) == 2
    assert "line 4 (2.png)" in told[0]
    assert "2.png, 2.webp, expected one" in told[0]
    assert "line 5 (3.png): mask is missing" in told[1]


def test_masks_beside_their_images(own):
    save(own / "images/0.tif", mask())
    for lines in (("image,text,mask", "0.png,one polyp,0.tif"), ("image,text", "0.png,one polyp")):
        dataset = from_table(own, *lines, masks=own / "images")
        np.testing.assert_array_equal(dataset[0]["mask"], mask() > 0)
    with pytest.raises(DatasetError, match=r"images/1.png is the image itself; name the mask's own file"):
        from_table(own, "image,text,mask", "1.png,one polyp,1.png", masks=own / "images")[0]
    with pytest.raises(DatasetError, match="mask is missing"):
        from_table(own, "image,text", "1.png,one polyp", masks=own / "images")[0]


def test_slices_of_volumes(own):
    scan = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)
    labels = np.zeros(scan.shape, np.uint8)
    labels[1, 2, 3], labels[1, 2, 4] = 17, 18
    save_nifti(own / "images/scan.nii.gz", scan)
    save_nifti(own / "masks/scan.nii.gz", labels)
    save_nifti(own / "masks/binary.nii", (labels > 0).astype(np.uint8))
    lines = ("scan.nii.gz#z=3,the thalamus,scan.nii.gz#z=3&label=17", "scan.nii.gz#y=2,both,binary.nii#y=2")
    dataset = from_table(own, "image,text,mask", *lines, window=(0, 4))
    assert check_datasets([dataset], progress=False) == []
    assert dataset[0]["mask"].shape == dataset[0]["image"].shape == (9, 8)
    assert np.argwhere(dataset[0]["mask"]).tolist() == [[9 - 1 - 2, 8 - 1 - 1]]
    assert dataset[1]["mask"].sum() == 2
    windowed = read_image(own / "images/scan.nii.gz#z=3", window=(0, 4))
    np.testing.assert_array_equal(dataset[0]["image"], windowed)
    save_nifti(own / "masks/scan.nii", (labels > 0).astype(np.uint8))
    (own / "masks/scan.nii.gz").unlink()
    assert from_table(own, "image,text", "scan.nii.gz#z=4,both")[0]["mask"].sum() == 1


# ---- to the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["bicubic", "opencv_bilinear"])
def test_a_dataset_with_a_size_gives_what_prepare_images_and_masks_would(own, resize):
    dataset = from_table(own, "image,text", "1.png,one polyp", size=(15, 20), resize=resize, transform=dict)
    sample = dataset[0]
    assert (sample["image"].dtype, sample["mask"].dtype) == (torch.uint8, torch.bool)
    settings = {"size": (15, 20), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "resize": resize}
    again = prepare_images(sample["image"][None], **settings)
    assert torch.equal(again, prepare_images(own / "images/1.png", **settings))
    assert torch.equal(sample["mask"], prepare_masks(own / "masks/1.png", size=(15, 20))[0])


def test_from_dataset_to_loss_by_the_default_collate(tmp_path):
    """The loop of the docstring."""
    host = injected(BY_NAME["open_clip-inlined_text"])
    model = pvl.MedCLIPSeg(host, tokenizer=lambda texts: torch.ones(len(texts), 12, dtype=torch.int64))
    folder = write_dataset(tmp_path / "POLYPS")
    save(folder / "Train_Folder/img/1.png", np.stack([picture(1).T] * 3, axis=2))  # another size, in colour
    save(folder / "Train_Folder/label/1.png", mask().T.copy())
    dataset = SegmentationDataset(folder, size=model.image_size, resize=model.config.resize)
    criterion, names = pvl.SegmentationLoss(), []
    for batch in DataLoader(dataset, batch_size=4, num_workers=2):
        out = model(model.prepare(batch["image"]), batch["text"])
        target = batch["mask"].to(model.device)
        loss = criterion(out.logits, target, patch_tokens=out.patch_tokens, text_embeds=out.text_embeds)
        loss.total.backward()
        names += batch["name"]
    assert names == [f"{number}.png" for number in range(4)]
    assert torch.isfinite(loss.total)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_row_that_cannot_be_read_says_so_from_a_worker(tmp_path):
    folder = write_dataset(tmp_path / "POLYPS")
    dataset = SegmentationDataset(folder)
    (folder / "Train_Folder/img/2.png").unlink()
    assert dataset[0]["image"].shape == SIZE
    with pytest.raises(IndexError):
        dataset[4]
    with pytest.raises(DatasetError, match=r"POLYPS/train line 4 \(2.png\): image is missing"):
        list(DataLoader(dataset, num_workers=1))


# ---- by name --------------------------------------------------------------------------------------------------------


def test_find_dataset(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "data" / "POLYPS")
    assert find_dataset(folder) == find_dataset("POLYPS", data=tmp_path / "data") == folder
    monkeypatch.chdir(tmp_path)
    assert find_dataset("POLYPS") == Path("data/POLYPS")
    with pytest.raises(FileNotFoundError, match="python -m pvl_adapter download Kvasir --data-folder data"):
        find_dataset("kvasir")
    with pytest.raises(FileNotFoundError, match="data holds POLYPS"):
        find_dataset("POLYP")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_dataset("mine", data="nowhere")


def test_importing_needs_none_of_the_heavy_packages(tmp_path):
    """Nor does reading an image through the library alone."""
    heavy = ("openpyxl", "nibabel", "pydicom", "matplotlib", "monai", "torchmetrics")
    image = save(tmp_path / "a.png", picture(0))
    code = f"""if True:
        import sys, pvl_adapter
        pvl_adapter.prepare_images({str(image)!r}, size=(4, 4), mean=[0] * 3, std=[1] * 3)
        assert "pvl_adapter.data" not in sys.modules
        import pvl_adapter.data
        print([name for name in {heavy} if name in sys.modules])"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
