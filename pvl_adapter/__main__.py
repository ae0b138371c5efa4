"""`python -m pvl_adapter`: list the published checkpoints, convert one into a folder that needs no network, or download
a published dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pvl_adapter.hub import from_pretrained, list_checkpoints
from pvl_adapter.hub.official import OFFICIAL_TOKENIZER


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pvl_adapter", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the published checkpoints, with the scores that are known")
    convert = commands.add_parser("convert", help="a released .pth file into a self-contained folder")
    convert.add_argument("checkpoint", type=Path, help="the released .pth file")
    convert.add_argument("folder", type=Path, help="to write: safetensors, configuration, tokenizer and model card")
    convert.add_argument(
        "--tokenizer",
        default=OFFICIAL_TOKENIZER,
        help="folder or hub name of BiomedBERT's tokenizer, for machines without a network (%(default)s)",
    )
    download = commands.add_parser("download", help="published datasets, for the examples")
    download.add_argument("dataset", nargs="+", help="BUSI, Kvasir, ...")
    download.add_argument("--data-folder", type=Path, default=Path("data"), help="where to (%(default)s)")
    args = parser.parse_args(argv)
    try:
        {"list": lambda _: list_checkpoints(), "convert": _convert, "download": _download}[args.command](args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def _convert(args: argparse.Namespace) -> None:
    if not args.checkpoint.is_file():
        raise FileNotFoundError(f"there is no file {args.checkpoint}")
    model = from_pretrained(args.checkpoint, tokenizer=args.tokenizer)
    model.save_pretrained(args.folder)
    print(f'{args.folder} is complete: pvl_adapter.from_pretrained("{args.folder}") needs no network')


def _download(args: argparse.Namespace) -> None:
    from pvl_adapter.data import download_dataset

    for name in args.dataset:
        print(download_dataset(name, args.data_folder))


if __name__ == "__main__":
    main()
