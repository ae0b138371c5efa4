"""Segmentation datasets: images with a sentence about each, and a mask of what the sentence means.

The official layout, of which {NAME} is the dataset's folder:

{NAME}/Prompts_Folder/    Train_text, Train_text_10, _25, _50, Val_text likewise, Test_text_original and the other
                          prompt designs; .xlsx, or .csv, .tsv, .jsonl
{NAME}/Train_Folder/      img/ and label/; likewise Val_Folder and Test_Folder
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

from pvl_adapter.data.download import EUS_IS_ELSEWHERE, HUB_DATASETS
from pvl_adapter.data.folders import Folder, others_like
from pvl_adapter.data.issues import DatasetError, DatasetIssue, listed
from pvl_adapter.data.reading import read_image, read_mask
from pvl_adapter.data.tables import TABLE_SUFFIXES, Row, scan_table
from pvl_adapter.hub.catalogue import FRACTIONS
from pvl_adapter.image_files import reason
from pvl_adapter.resizing import resize_image, resize_mask

SPLITS = ("train", "val", "test")
PROMPT_DESIGNS = ("original", "contradictory", "missing_location", "overdescriptive", "underdescriptive")


class Sample(TypedDict):
    """A row, read: a plain dict. Arrays are tensors if the dataset has a size."""

    image: np.ndarray | Tensor  # uint8, [H, W] or, in RGB, [H, W, 3]; as a tensor [3, H, W] in RGB
    text: str  # what is to be found
    mask: np.ndarray | Tensor  # bool, [H, W]
    name: str  # of the image, as the table has it


class SegmentationDataset(Dataset[Any]):
    """A split of a dataset in the official layout; `from_table` reads one's own tables.

    With a size it goes from DataLoader to loss by the default collate:

        criterion = pvl.SegmentationLoss()
        dataset = SegmentationDataset("data/BUSI", size=model.image_size, resize=model.config.resize)
        for batch in DataLoader(dataset, batch_size=16, shuffle=True, num_workers=4):
            out = model(model.prepare(batch["image"]), batch["text"])
            mask = batch["mask"].to(model.device)
            loss = criterion(out.logits, mask, patch_tokens=out.patch_tokens, text_embeds=out.text_embeds)
            loss.total.backward()

    Without a size, images keep their own sizes: use batch_size=1 or your own collate_fn, since the default collate says
    "stack expects each tensor to be equal size".

    Attributes:
        name: Of the dataset, as "BUSI".
        split: "train", "val" or "test"; None if a table does not say.
        table: The file that the rows are from.
        location: What issues call the dataset, as "BUSI/train".
        rows: Of the table, in its order.
        issues: Warnings about the table. What is wrong with files is found by reading them, or by `check_datasets`.
    """

    split: str | None
    rows: list[Row]
    issues: list[DatasetIssue]

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
        for name, value, allowed in (
            ("split", split, SPLITS),
            ("fraction", fraction, FRACTIONS),
            ("prompts", prompts, PROMPT_DESIGNS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {allowed}")
        folder = Path(folder)
        stem, variant = f"{split.capitalize()}_text", ""
        if split == "test":
            stem, variant = f"{stem}_{prompts}", f" ({prompts})"
        elif fraction != 100:
            stem, variant = f"{stem}_{int(fraction)}", f" ({int(fraction)}%)"
        self.name, self.split = folder.resolve().name, split
        self.location = f"{self.name}/{split}{variant}"
        files, table = folder / f"{split.capitalize()}_Folder", self._find_table(folder, stem)
        options: dict[str, Any] = {"size": size, "resize": resize, "window": window, "transform": transform}
        self._open(table, images=files / "img", masks=files / "label", **options)

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
        """Rows of one's own table; see `read_table`.

        Args:
            table: With columns Image, Description and Ground Truth, or what `HEADERS` lists. Without the last, masks
                have the names of the images, with any extension.
            images: Folder of the images; None means the table's own.
            masks: Folder of the masks, likewise.
            name: Of the dataset; None means the table's.
            split: What it is for, "train", "val" or "test", if that is to be known.
            options: size, resize, window and transform, as for a dataset in the official layout.

        Raises:
            ValueError: If the split is none of those.
            DatasetError: If the table cannot be read or is faulty, or is empty and not of "val".
        """
        if split not in (None, *SPLITS):
            raise ValueError(f"split is {split!r}, expected one of {SPLITS} or None")
        self, table = cls.__new__(cls), Path(table)
        self.name, self.split = name or table.stem, split
        self.location = self.name if split is None else f"{self.name}/{split}"
        self._open(table, images=Path(images or table.parent), masks=Path(masks or table.parent), **options)
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Read a row, resize it and apply the transform.

        Raises:
            DatasetError: If a file is missing, cannot be read, or does not fit the other.
        """
        sample = self.read(index)
        if self._size is not None:
            image = Image.fromarray(np.asarray(sample["image"])).convert("RGB")
            sample["image"] = resize_image(image, self._size, resize=self._resize)
            sample["mask"] = resize_mask(np.asarray(sample["mask"]), self._size)
        return sample if self._transform is None else self._transform(sample)

    def read(self, index: int) -> Sample:
        """A row as its files have it; errors as for `dataset[index]`."""
        row, issues, arrays = self.rows[index], list[DatasetIssue](), dict[str, np.ndarray]()
        for role in ("image", "mask"):
            try:
                if role == "image":
                    arrays[role] = read_image(str(self._images.find(row.image)), window=self._window)
                else:
                    arrays[role] = read_mask(str(self._find_mask(row)))
            except FileNotFoundError as error:
                issues.append(DatasetIssue(self.locate(index), f"{role} is missing", str(error)))
            except (OSError, ValueError) as error:
                issues.append(DatasetIssue(self.locate(index), f"{role} cannot be read", reason(error)))
        if not issues and arrays["image"].shape[:2] != arrays["mask"].shape:
            sizes = [f"{array.shape[1]} x {array.shape[0]}" for array in (arrays["image"], arrays["mask"])]
            turned = " (turned?)" if arrays["image"].shape[1::-1] == arrays["mask"].shape else ""
            detail = f"the image is {sizes[0]}, the mask {sizes[1]} pixels{turned}; export both in the same size"
            issues.append(DatasetIssue(self.locate(index), "sizes differ", detail))
        if issues:
            raise DatasetError(issues)
        return {"image": arrays["image"], "text": row.text, "mask": arrays["mask"], "name": row.image}

    def locate(self, index: int) -> str:
        """What issues call a row."""
        return f"{self.location} line {self.rows[index].line} ({self.rows[index].image})"

    def missing_folders(self) -> list[DatasetIssue]:
        """The folders of images and masks that do not exist."""
        detail = "{0} does not exist{1}; put it there, or correct its name"
        return [
            DatasetIssue(self.location, f"{role} folder is missing", detail.format(path, others_like(path)))
            for role, path in (("image", self._images.path), ("mask", self._masks.path))
            if not path.is_dir()
        ]

    def _open(
        self,
        table: Path,
        *,
        images: Path,
        masks: Path,
        size: tuple[int, int] | None = None,
        resize: str = "bicubic",
        window: tuple[float, float] | None = None,
        transform: Callable[[Sample], Any] | None = None,
    ) -> None:
        self.table, self._images, self._masks = table, Folder(images), Folder(masks)
        self._size, self._resize, self._window, self._transform = size, resize, window, transform
        self.rows, self.issues = scan_table(table, location=self.location)
        if not self.rows and not any(issue.fatal for issue in self.issues):
            detail = f"{table} has no rows; fill it" + " or go on without validation" * (self.split == "val")
            self.issues.append(DatasetIssue(self.location, "table is empty", detail, fatal=self.split != "val"))
        if any(issue.fatal for issue in self.issues):
            raise DatasetError(self.issues)
        for issue in self.issues:
            warnings.warn(str(issue), stacklevel=3)

    def _find_table(self, folder: Path, stem: str) -> Path:
        prompts = folder / "Prompts_Folder"
        found = [path for suffix in TABLE_SUFFIXES if (path := prompts / f"{stem}{suffix}").is_file()]
        if len(found) == 1:
            return found[0]
        wanted = prompts / f"{stem}.xlsx"
        kind, detail = "table is ambiguous", f"got {listed([path.name for path in found])} in {prompts}; keep one"
        if not found:
            there = sorted(path.name for path in prompts.iterdir()) if prompts.is_dir() else []
            near = others_like(wanted if prompts.is_dir() else prompts)
            kind, detail = "table is missing", f"{wanted} (or .csv, .tsv, .jsonl) does not exist{near}; "
            detail += f"put it there, beside {listed(there, most=14)}" if there else "give the dataset's own folder"
        raise DatasetError([DatasetIssue(self.location, kind, detail)])

    def _find_mask(self, row: Row) -> Any:
        image = self._images.path / row.image
        if not row.mask:
            return self._masks.find_alike(row.image, other_than=image)
        found = self._masks.find(row.mask)
        if found.file == image:
            raise ValueError(f"{found} is the image itself; name the mask's own file")
        return found


def find_dataset(name_or_folder: str | os.PathLike[str], *, data: str | os.PathLike[str] = "data") -> Path:
    """The folder of a dataset: one that exists, or the one of that name in `data`, where datasets are kept.

    Raises:
        FileNotFoundError: If there is none; the message says how to get a published dataset, or what there is.
    """
    parent, name = Path(data), os.fspath(name_or_folder)
    for folder in (Path(name), parent / name):
        if folder.is_dir():
            return folder
    there = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    fix = f"there are {listed(there, most=20) or 'none'}{others_like(parent / name)}; give a folder, or data=..."
    published = next((known for known in HUB_DATASETS if known.casefold() == name.casefold()), None)
    if published and published not in there:
        fix = f"download it: python -m pvl_adapter download {published} --data-folder {parent}"
    if name.casefold() == "eus":
        fix = EUS_IS_ELSEWHERE
    raise FileNotFoundError(f"there is no dataset {name!r} in {parent}; {fix}")
