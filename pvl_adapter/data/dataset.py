"""Segmentation datasets: images with a sentence about each, and a mask of what the sentence means.

The official layout, in a folder with the name of the dataset:

Prompts_Folder/    Train_text, Train_text_10, _25, _50, Val_text likewise, Test_text_original and the other prompt
                   designs; .xlsx, or .csv, .tsv, .jsonl
Train_Folder/      img/ and label/; likewise Val_Folder and Test_Folder
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pvl_adapter.config import require
from pvl_adapter.data.download import HUB_DATASETS
from pvl_adapter.data.folders import contents, find, find_alike
from pvl_adapter.data.issues import DatasetError, DatasetIssue, listed
from pvl_adapter.data.reading import read_image, read_mask
from pvl_adapter.data.tables import TABLE_SUFFIXES, Row, scan_table
from pvl_adapter.hub.catalogue import FRACTIONS
from pvl_adapter.image_files import reason
from pvl_adapter.resizing import resize_image, resize_mask

SPLITS = ("train", "val", "test")
PROMPT_DESIGNS = ("original", "contradictory", "missing_location", "overdescriptive", "underdescriptive")


class Sample(TypedDict):
    """A row as a plain dict; of a dataset with a size, image and mask are tensors."""

    image: np.ndarray | Tensor  # uint8, [H, W] or, in RGB, [H, W, 3]; as a tensor [3, H, W] in RGB
    text: str  # what is to be found
    mask: np.ndarray | Tensor  # bool, [H, W]
    name: str  # of the image, as the table has it
    subject: str  # empty if the table does not say


class SegmentationDataset(Dataset[Any]):
    """A split of a dataset in the official layout; `from_table` reads one's own tables.

    With a size it goes from DataLoader to loss by the default collate::

        criterion = pvl.SegmentationLoss()
        dataset = SegmentationDataset("data/BUSI", size=model.image_size, resize=model.config.resize)
        for batch in DataLoader(dataset, batch_size=16, shuffle=True, num_workers=4):
            out = model(model.prepare(batch["image"]), batch["text"])
            mask = batch["mask"].to(model.device)
            loss = criterion(out.logits, mask, patch_tokens=out.patch_tokens, text_embeds=out.text_embeds)
            loss.total.backward()

    Without a size, images keep their own sizes: use batch_size=1 or your own collate_fn.

    Attributes:
        name: Of the dataset, as "BUSI".
        split: "train", "val" or "test"; None if that is not known.
        table: The file of the rows.
        location: What issues call the dataset, as "BUSI/train".
        rows: Of the table, in its order.
        issues: Warnings about the table; `check_datasets` finds what is wrong with images and masks.
    """

    split: str | None

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        fraction: int = 100,
        prompts: str = "original",
        size: tuple[int, int] | None = None,
        resize: str = "bicubic",
        window: tuple[float, float] | None = None,
        transform: Callable[[Sample], Any] | None = None,
    ) -> None:
        """Find and read the table of a split; images and masks are read by `dataset[index]`.

        Args:
            folder: Of the dataset.
            split: "train", "val" or "test".
            fraction: Of train and val: the percentage of the rows, 10, 25, 50 or 100.
            prompts: Of test: how the sentences are written, one of `PROMPT_DESIGNS`.
            size: Height and width that every image and mask is resized to; None leaves them as they are.
            resize: The rule for images, as in `prepare_images`; `model.config.resize` for training a model.
            window: Of `read_image`.
            transform: Called on every sample.

        Raises:
            ValueError: If an argument is none of those.
            DatasetError: If the table is missing, cannot be read or is faulty, or is empty and not of "val".
        """
        require(split in SPLITS, "split", split, f"one of {SPLITS}")
        require(fraction in FRACTIONS, "fraction", fraction, f"one of {FRACTIONS}")
        require(prompts in PROMPT_DESIGNS, "prompts", prompts, f"one of {PROMPT_DESIGNS}")
        folder = Path(folder)
        variant = prompts if split == "test" else "" if fraction == 100 else str(int(fraction))
        stem, files = f"{split.capitalize()}_text", folder / f"{split.capitalize()}_Folder"
        self.name, self.split = folder.resolve().name, split
        self.location = f"{self.name}/{split}" + f" ({variant})" * bool(variant)
        self.table = self._find_table(folder, f"{stem}_{variant}" if variant else stem)
        self._images, self._masks = files / "img", files / "label"
        self._open(size, resize, window, transform)

    @classmethod
    def from_table(
        cls,
        table: str | os.PathLike[str],
        *,
        images: str | os.PathLike[str] | None = None,
        masks: str | os.PathLike[str] | None = None,
        name: str | None = None,
        split: str | None = None,
        **options: Any,
    ) -> SegmentationDataset:
        """Rows of one's own table; errors as for a dataset in the official layout.

        Args:
            table: As for `read_table`, with columns Image, Description and Ground Truth, or what `HEADERS` lists.
                Without the last, masks have the names of the images, with any extension.
            images: Folder of the images; None means the table's own.
            masks: Folder of the masks, likewise.
            name: Of the dataset; None means the table's.
            split: What it is for, "train", "val" or "test", if that is to be known.
            options: size, resize, window and transform, as for a dataset in the official layout.
        """
        require(split in (None, *SPLITS), "split", split, f"one of {SPLITS}, or None")
        self = cls.__new__(cls)
        self.table, self.split = Path(table), split
        self.name = name or self.table.stem
        self.location = self.name if split is None else f"{self.name}/{split}"
        self._images, self._masks = Path(images or self.table.parent), Path(masks or self.table.parent)
        self._open(**options)
        return self

    def _open(self, size: Any = None, resize: str = "bicubic", window: Any = None, transform: Any = None) -> None:
        self._size, self._resize, self._window, self._transform = size, resize, window, transform
        self.rows, self.issues = scan_table(self.table, location=self.location)
        if not self.rows and not any(issue.fatal for issue in self.issues):
            detail = f"{self.table} has no rows; fill it" + ", or go on without validation" * (self.split == "val")
            self.issues.append(DatasetIssue(self.location, "table is empty", detail, fatal=self.split != "val"))
        if any(issue.fatal for issue in self.issues):
            raise DatasetError(self.issues)
        for issue in self.issues:
            warnings.warn(str(issue), stacklevel=3)

    def _find_table(self, folder: Path, stem: str) -> Path:
        files = [folder / "Prompts_Folder" / f"{stem}{suffix}" for suffix in TABLE_SUFFIXES]
        found = [file for file in files if file.is_file()]
        if len(found) == 1:
            return found[0]
        there = contents(folder / "Prompts_Folder") if (folder / "Prompts_Folder").is_dir() else contents(folder)
        detail = f"got {listed(found) or 'none'}, expected one table {files[0]} (or .csv, .tsv, .jsonl); {there}"
        raise DatasetError([DatasetIssue(self.location, "table is missing or ambiguous", detail)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """A row, resized and transformed; DatasetError if a file is missing, cannot be read, or does not fit."""
        sample = self.read(index)
        if self._size is not None:
            image = Image.fromarray(np.asarray(sample["image"])).convert("RGB")
            sample["image"] = resize_image(image, self._size, resize=self._resize)
            sample["mask"] = resize_mask(np.asarray(sample["mask"]), self._size)
        return sample if self._transform is None else self._transform(sample)

    def read(self, index: int) -> Sample:
        """A row as its files have it; errors as for `dataset[index]`."""
        row, issues, arrays = self.rows[index], list[DatasetIssue](), dict[str, np.ndarray]()
        for role, read in (("image", self._read_image), ("mask", self._read_mask)):
            try:
                arrays[role] = read(row)
            except (OSError, ValueError) as error:
                kind = f"{role} is missing" if isinstance(error, FileNotFoundError) else f"{role} cannot be read"
                issues.append(DatasetIssue(self.locate(index), kind, reason(error)))
        if not issues and arrays["image"].shape[:2] != arrays["mask"].shape:
            image, mask = (f"{array.shape[1]} x {array.shape[0]}" for array in arrays.values())
            detail = f"the image is {image}, the mask {mask} pixels; export both in the same size, turned alike"
            issues.append(DatasetIssue(self.locate(index), "sizes differ", detail))
        if issues:
            raise DatasetError(issues)
        return Sample(image=arrays["image"], mask=arrays["mask"], text=row.text, name=row.image, subject=row.subject)

    def locate(self, index: int) -> str:
        """What issues call a row."""
        return f"{self.location} line {self.rows[index].line} ({self.rows[index].image})"

    def _read_image(self, row: Row) -> np.ndarray:
        return read_image(str(find(self._images, row.image)), window=self._window)

    def _read_mask(self, row: Row) -> np.ndarray:
        image = self._images / row.image
        if not row.mask:
            return read_mask(str(find_alike(self._masks, row.image, other_than=image)))
        found = find(self._masks, row.mask)
        if found.file == image:
            raise ValueError(f"{found} is the image itself; name the mask's own file")
        return read_mask(str(found))


def find_dataset(name_or_folder: str | os.PathLike[str], *, data: str | os.PathLike[str] = "data") -> Path:
    """The folder of a dataset: one that exists, or the one of that name in `data`, where datasets are kept.

    Raises:
        FileNotFoundError: If there is none; the message says how to get a published dataset, or what there is.
    """
    name = os.fspath(name_or_folder)
    for folder in (Path(name), Path(data, name)):
        if folder.is_dir():
            return folder
    fix = f"{contents(Path(data))}; give a folder, or where datasets are (data=..., --data-folder)"
    for known in HUB_DATASETS:
        if known.casefold() == name.casefold() and not Path(data, known).is_dir():
            fix = f"download it: python -m pvl_adapter download {known} --data-folder {data}"
    raise FileNotFoundError(f"there is no dataset {name!r} in {data}; {fix}")
