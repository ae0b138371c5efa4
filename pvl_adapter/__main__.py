"""`python -m pvl_adapter`: list the published checkpoints, or convert one into a folder that needs no network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pvl_adapter.hub import from_pretrained, list_checkpoints
from pvl_adapter.hub.released import RELEASED_TOKENIZER


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pvl_adapter", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the published checkpoints, with the scores that are known")
    convert = commands.add_parser("convert", help="a released .pth file into a self-contained folder")
    convert.add_argument("checkpoint", type=Path, help="the released .pth file")
    convert.add_argument("folder", type=Path, help="to write: safetensors, configuration, tokenizer and model card")
    convert.add_argument(
        "--tokenizer",
        default=RELEASED_TOKENIZER,
        help="folder or hub name of BiomedBERT's tokenizer, for machines without a network (%(default)s)",
    )
    args = parser.parse_args(argv)
    if args.command == "list":
        list_checkpoints()
        return
    try:
        if not args.checkpoint.is_file():
            raise FileNotFoundError(f"there is no file {args.checkpoint}")
        model = from_pretrained(args.checkpoint, tokenizer=args.tokenizer)
        model.save_pretrained(args.folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f'{args.folder} is complete: pvl_adapter.from_pretrained("{args.folder}") needs no network')


if __name__ == "__main__":
    main()
