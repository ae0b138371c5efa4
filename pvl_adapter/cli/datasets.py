"""The rows that `evaluate` and `calibrate` read: options, tables found, and files checked before hours are spent."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pvl_adapter.cli.options import stop

if TYPE_CHECKING:
    from pvl_adapter.data import SegmentationDataset


class EvalSplit(NamedTuple):
    """What is scored together: the rows of a dataset under one prompt design."""

    data: SegmentationDataset
    prompts: str

    @property
    def title(self) -> str:
        return f"{self.data.name}, {self.prompts}"


def add_data_options(parser: argparse.ArgumentParser, *, split: str) -> None:
    """`split` is the one that is taken unless told otherwise."""
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", help="datasets by name or folder, in the released layout")
    add("--data-folder", type=Path, default=Path("data"), help="where named datasets are (%(default)s)")
    designs = "original, contradictory, missing_location, overdescriptive, underdescriptive"
    add("--prompts", nargs="+", default=["original"], metavar="DESIGN", help=f"of the test split: {designs} (original)")
    add("--split", choices=("train", "val", "test"), default=split, help="whose rows, of --data (%(default)s)")
    add("--table", type=Path, help="instead of --data: your own .csv, .tsv, .jsonl or .xlsx with image, text, mask")
    add("--images", type=Path, help="folder of its images (the table's)")
    add("--masks", type=Path, help="folder of its masks (the table's)")
    add("--window", type=float, nargs=2, metavar=("CENTER", "WIDTH"), help="grey levels of images of more than 8 bits")
    add("--limit", type=int, help="take only the first so many rows of each")


def check_data_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if bool(args.table) == bool(args.data):
        parser.error("expected --data, or --table with your own; got " + ("both" if args.data else "neither"))
    if args.data and (args.images or args.masks):
        parser.error("--images and --masks are for --table; datasets of the released layout have their own folders")
    if (args.table or args.split != "test") and args.prompts != ["original"]:
        parser.error("--prompts is for the test split; leave it out with --table and --split train or val")
    if len(set(args.prompts)) < len(args.prompts):
        parser.error(f"--prompts is {' '.join(args.prompts)}, expected each design once")


def find_splits(args: argparse.Namespace) -> list[EvalSplit]:
    """The datasets and prompt designs of a command line; ends with everything that is wrong with their tables."""
    from pvl_adapter.data import DatasetError, DatasetIssue, SegmentationDataset, find_dataset

    window = tuple(args.window) if args.window else None
    splits: list[EvalSplit] = []
    issues: list[DatasetIssue] = []
    folders = [find_dataset(name, data=args.data_folder) for name in args.data or ()]
    if len({folder.name for folder in folders}) < len(folders):
        stop(f"--data names {args.data}, expected datasets of different names: results are filed by them")
    for folder in folders or (None,):
        for design in args.prompts:
            try:
                with warnings.catch_warnings(action="ignore"):  # `check_rows` prints them
                    if folder is None:
                        own = {"images": args.images, "masks": args.masks}
                        made = SegmentationDataset.from_table(args.table, **own, window=window)
                    else:
                        made = SegmentationDataset(folder, args.split, prompts=design, window=window)
            except DatasetError as error:
                issues += error.issues
            else:
                del made.rows[args.limit or len(made) :]
                splits.append(EvalSplit(made, design))
    if issues:
        stop(DatasetError(issues))
    return splits


def check_rows(splits: Sequence[EvalSplit]) -> list[str]:
    """Read all data and end with every fatal issue; warnings are printed, one of each kind, and all returned."""
    from pvl_adapter.data import DatasetError, check_datasets, one_of_each_kind

    issues = check_datasets([split.data for split in splits])
    if any(issue.fatal for issue in issues):
        stop(DatasetError(issues))
    for line in one_of_each_kind(issues):
        print(f"warning: {line}", file=sys.stderr)
    return [str(issue) for issue in issues]
