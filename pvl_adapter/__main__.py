"""`python -m pvl_adapter`: list the published checkpoints, convert one into a folder that needs no network, or download
a published dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pvl_adapter", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the published checkpoints, with the scores that are known")
    convert = commands.add_parser("convert", help="an official .pth file into a self-contained folder")
    convert.add_argument("checkpoint", type=Path, help="the official .pth file")
    convert.add_argument("folder", type=Path, help="to write: safetensors, configuration, tokenizer and model card")
    convert.add_argument(
        "--tokenizer",
        help="folder or hub name of BiomedBERT's tokenizer, for machines without a network "
        "(microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract)",
    )
    download = commands.add_parser("download", help="published datasets, for the examples")
    download.add_argument("dataset", nargs="+", help="BUSI, Kvasir, ...")
    download.add_argument("--data-folder", type=Path, default=Path("data"), help="where to (%(default)s)")
    args = parser.parse_args(argv)
    try:
        {"list": _list, "convert": _convert, "download": _download}[args.command](args)
    except (OSError, ValueError, TypeError) as error:
        if type(error) is TypeError:  # a bug; UnsupportedModelError is one for the user
            raise
        raise SystemExit(f"error: {error}") from error


# Each command imports what it needs: torch takes seconds.


def _list(args: argparse.Namespace) -> None:
    from pvl_adapter.hub.catalogue import list_checkpoints

    list_checkpoints()


def _convert(args: argparse.Namespace) -> None:
    if not args.checkpoint.is_file():
        raise FileNotFoundError(f"there is no file {args.checkpoint}")
    from pvl_adapter.hub.loading import from_pretrained

    from_pretrained(args.checkpoint, tokenizer=args.tokenizer).save_pretrained(args.folder)
    print(f'{args.folder} is complete: pvl_adapter.from_pretrained("{args.folder}") needs no network')


def _download(args: argparse.Namespace) -> None:
    from pvl_adapter.data import download_dataset

    for name in args.dataset:
        print(download_dataset(name, args.data_folder))


if __name__ == "__main__":
    main()
