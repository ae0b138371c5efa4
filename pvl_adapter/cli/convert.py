"""Make an official .pth file into a folder that needs no network: safetensors, configuration, tokenizer, model card."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="FILE", type=Path, help="the official .pth file")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="to write")
    parser.add_argument(
        "--tokenizer",
        help="folder or hub name of BiomedBERT's tokenizer, for machines without a network "
        "(microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract)",
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not args.checkpoint.is_file():
        raise FileNotFoundError(f"there is no file {args.checkpoint}")
    from pvl_adapter.hub.loading import from_pretrained

    from_pretrained(args.checkpoint, tokenizer=args.tokenizer).save_pretrained(args.folder)
    print(f'{args.folder} is complete: pvl_adapter.from_pretrained("{args.folder}") needs no network')
    return 0
