"""Datasets: the released layout, and anybody's own tables.

{NAME}/Prompts_Folder/    Train_text, Train_text_10, _25, _50, Val_text likewise, Test_text_original and the other
                          prompt designs; .xlsx, or .csv, .tsv, .jsonl
{NAME}/Train_Folder/      img/ and label/; likewise Val_Folder and Test_Folder
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from pvl_adapter.data.download import ALL_DATASETS, EUS_IS_ELSEWHERE
from pvl_adapter.data.folders import Folder, others_like
from pvl_adapter.data.issues import DatasetError, DatasetIssue, ReadError, listed, reason
from pvl_adapter.data.pictures import read_mask, read_picture
from pvl_adapter.data.tables import TABLE_SUFFIXES, Row, scan_table
from pvl_adapter.hub.catalogue import FRACTIONS

SPLITS = ("train", "val", "test")
PROMPT_DESIGNS = ("original", "contradictory", "missing_location", "overdescriptive", "underdescriptive")


@dataclass(frozen=True)
class Sample:
    """A row, read.

    Attributes:
        name: The picture's, as the table has it.
        image: uint8, [H, W] or, in the order red, green, blue, [H, W, 3].
        text: What is to be found.
        mask: Bool, [H, W], of the same size.
    """

    name: str
    image: np.ndarray
    text: str
    mask: np.ndarray


class SegmentationDataset(Dataset[Sample]):
    """Pictures with a sentence about each, and a mask of what the sentence means.

    Attributes:
        name: Of the dataset, as "BUSI".
        split: "train", "val" or "test"; None if a table does not say.
        table: The file that the rows are from.
        place: What faults call it, as "BUSI/train".
        rows: What is sound of the table, in its order.
        faults: What else is wrong with the table or the layout; see also `check_datasets`.
    """

    name: str
    split: str | None
    table: Path
    place: str
    rows: list[Row]
    faults: list[DatasetIssue]

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        fraction: int = 100,
        prompts: str = "original",
        window: tuple[float, float] | None = None,
    ) -> None:
        """A split of a dataset in the released layout. What is wrong with its files is no error yet; see `faults`.

        Args:
            folder: Of the dataset.
            split: "train", "val" or "test".
            fraction: Of train and val: the percentage of the rows, 10, 25, 50 or 100.
            prompts: Of test: how the sentences are written, one of `PROMPT_DESIGNS`.
            window: Of `read_picture`.

        Raises:
            ValueError: If split, fraction or prompts are not one of those.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
        if fraction not in FRACTIONS:
            raise ValueError(f"fraction is {fraction!r}, expected a percentage of the rows, one of {FRACTIONS}")
        if prompts not in PROMPT_DESIGNS:
            raise ValueError(f"prompts is {prompts!r}, expected one of {PROMPT_DESIGNS}")
        folder = Path(folder)
        self.name, self.split = folder.resolve().name, split
        self.place = f"{self.name}/{split}"
        if split == "test":
            stem, self.place = f"Test_text_{prompts}", f"{self.place} ({prompts})"
        else:
            stem = f"{split.capitalize()}_text"
            if fraction != 100:
                stem, self.place = f"{stem}_{int(fraction)}", f"{self.place} ({int(fraction)}%)"
        pictures = folder / f"{split.capitalize()}_Folder"
        self.faults = []
        self.rows = []
        self.table = self._find_table(folder, stem)
        self._open(images=pictures / "img", masks=pictures / "label", window=window)

    @classmethod
    def from_table(
        cls,
        table: str | os.PathLike[str],
        *,
        images: str | os.PathLike[str] | None = None,
        masks: str | os.PathLike[str] | None = None,
        name: str | None = None,
        split: str | None = None,
        window: tuple[float, float] | None = None,
    ) -> SegmentationDataset:
        """Rows of anybody's own table; see `read_table`.

        Args:
            table: Its columns are called Image, Description and Ground Truth, or as `HEADERS` lists. Without the last,
                masks are called as the pictures, whatever their extension.
            images: Folder of the pictures; None means the table's own.
            masks: Folder of the masks, likewise.
            name: Of the dataset; None means the table's.
            split: What it is for, "train", "val" or "test", if that is to be known.
            window: Of `read_picture`.

        Raises:
            ValueError: If the split is not one of those.
        """
        if split is not None and split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {SPLITS} or None")
        self = cls.__new__(cls)
        self.table = Path(table)
        self.name, self.split = name or self.table.stem, split
        self.place = self.name if split is None else f"{self.name}/{split}"
        self.faults = []
        self.rows = []
        beside = self.table.parent
        self._open(images=Path(images or beside), masks=Path(masks or beside), window=window)
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Read a row.

        Raises:
            DatasetError: If that cannot be done.
        """
        sample, faults = self.read(index)
        if sample is None:
            raise DatasetError(faults or self.faults)
        return sample

    def read(self, index: int) -> tuple[Sample | None, list[DatasetIssue]]:
        """A row, None if it cannot be read, and what is wrong with it (but for `faults`)."""
        row, faults = self.rows[index], []
        arrays: dict[str, np.ndarray] = {}
        for role in ("image", "mask"):
            if self._folders[role].path.is_dir():  # or else that is among the faults already
                try:
                    path = self._path(row, role)
                    arrays[role] = read_picture(path, window=self._window) if role == "image" else read_mask(path)
                except ReadError as error:
                    kind, _, particulars = error.problem.partition(": ")
                    kind = kind if kind.startswith(role) else f"{role} {kind}"
                    faults.append(self._fault(row, f"{kind}: {self._name(row, role)}: {particulars}", error.fix))
                except OSError as error:
                    problem = f"{role} cannot be read: {self._name(row, role)}: {error.strerror or reason(error)}"
                    faults.append(self._fault(row, problem, "see that the file can be read, and the disk is sound"))
        if len(arrays) < 2:
            return None, faults
        image, mask = arrays["image"], arrays["mask"]
        if image.shape[:2] != mask.shape:
            turned = image.shape[1::-1] == mask.shape
            sizes = [f"{array.shape[1]} x {array.shape[0]}" for array in (image, mask)]
            fix = "turn one of them (an EXIF orientation is heeded)" if turned else "export both in the same size"
            problem = f"size mismatch: the image {self._name(row, 'image')} is {sizes[0]}, the mask {sizes[1]} pixels"
            return None, [*faults, self._fault(row, problem, fix)]
        return Sample(row.image, image, row.text, mask), faults

    def place_of(self, index: int) -> str:
        """What faults call a row."""
        return f"{self.place} line {self.rows[index].line} ({self.rows[index].image})"

    def _open(self, *, images: Path, masks: Path, window: tuple[float, float] | None) -> None:
        self._window = window
        self._folders = {"image": Folder(images), "mask": Folder(masks)}
        if self.faults:  # there is no one table
            return
        self.rows, faults = scan_table(self.table, place=self.place)
        if self.split == "val" and not self.table.exists():
            faults = [DatasetIssue(each.place, each.problem, each.fix, fatal=False) for each in faults]
        self.faults += faults
        if self.rows:
            for role, folder in {"image": images, "mask": masks}.items():
                if not folder.is_dir():
                    fix = f"put the {role}s there, or correct its name{others_like(folder)}"
                    self.faults.append(DatasetIssue(self.place, f"{role} folder is missing: {folder}", fix))

    def _find_table(self, folder: Path, stem: str) -> Path:
        prompts = folder / "Prompts_Folder"
        found = [path for suffix in TABLE_SUFFIXES if (path := prompts / f"{stem}{suffix}").is_file()]
        if len(found) > 1:
            names = listed([path.name for path in found])
            self.faults.append(
                DatasetIssue(self.place, f"table is ambiguous: {names} are all in {prompts}", "keep one of them")
            )
        elif not found:
            there = prompts if prompts.is_dir() else folder
            fix = f"put it there (or .csv, .tsv, .jsonl){others_like(prompts / f'{stem}.xlsx')}"
            if not folder.is_dir():
                fix = "give the dataset's folder"
            elif not prompts.is_dir():
                fix = f"give the dataset's own folder, in which Prompts_Folder lies{others_like(prompts)}"
            else:
                tables = sorted(path.name for path in there.iterdir() if path.suffix.lower() in TABLE_SUFFIXES)
                fix += f"; there are {listed(tables, most=14) or 'no tables'}"
            problem = f"table is missing: {prompts / stem}.xlsx"
            self.faults.append(
                DatasetIssue(self.place, problem, fix, fatal=self.split != "val" or not prompts.is_dir())
            )
        return found[0] if found else prompts / f"{stem}.xlsx"

    def _fault(self, row: Row, problem: str, fix: str) -> DatasetIssue:
        return DatasetIssue(f"{self.place} line {row.line} ({row.image})", problem, fix)

    def _name(self, row: Row, role: str) -> str:
        """Of a file, for messages: with its folder's, for images and masks often have the same name."""
        return f"{self._folders[role].path.name}/{getattr(row, role) or row.image}"

    def _path(self, row: Row, role: str) -> Path:
        """Where a file of a row is.

        Raises:
            ReadError: If it is not there, or would be elsewhere than in its folder.
        """
        folder = self._folders[role]
        if role == "image":
            return folder.find(row.image)
        if not row.mask:
            return folder.find_alike(row.image, other_than=self._folders["image"].path / row.image)
        path = folder.find(row.mask)
        if path == self._folders["image"].path / row.image:
            raise ReadError("is the image itself: the table gives one file for both", "name the mask's own file")
        return path


def find_dataset(name_or_folder: str | os.PathLike[str], *, data: str | os.PathLike[str] = "data") -> Path:
    """The folder of a dataset.

    Args:
        name_or_folder: A folder that exists, or the name of one in `data`.
        data: Where datasets are kept.

    Raises:
        FileNotFoundError: If there is none; the message says how a published dataset is got, or what there is.
    """
    for folder in (Path(name_or_folder), Path(data) / name_or_folder):
        if folder.is_dir():
            return folder
    name = os.fspath(name_or_folder)
    published = next((known for known in ALL_DATASETS if known.casefold() == name.casefold()), None)
    parent = Path(data)
    there = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    if published == "EUS":
        raise FileNotFoundError(f"the dataset EUS is not in {parent}; {EUS_IS_ELSEWHERE}")
    if published is not None and published.casefold() not in [each.casefold() for each in there]:
        raise FileNotFoundError(
            f"the dataset {published} is not in {parent}; download it: "
            f"python -m pvl_adapter download {published} --data-folder {parent}"
        )
    within = f"{parent} has {listed(there, most=20)}" if there else f"{parent} has no datasets"
    near = get_close_matches(name, there, n=1, cutoff=0.6) if there else []
    raise FileNotFoundError(
        f"there is no dataset {name!r}: no such folder, and {within}"
        + (f"; did you mean {near[0]!r}?" if near else "; give its folder, or the folder of datasets as data=...")
    )
