"""Download published datasets, with the sentences of their images."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", nargs="+", help="BUSI, Kvasir, ...")
    parser.add_argument("--data-folder", type=Path, default=Path("data"), help="where to (%(default)s)")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from pvl_adapter.data import download_dataset

    for name in args.dataset:
        print(download_dataset(name, args.data_folder))
    return 0
