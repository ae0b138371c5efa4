"""The published checkpoints, with the scores that are known."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from pvl_adapter.hub.catalogue import CHECKPOINTS, OFFICIAL_REPO, list_checkpoints

    if args.json:
        known = [{**asdict(each.dataset), **each.provenance, "repo": OFFICIAL_REPO} for each in CHECKPOINTS]
        print(json.dumps(known, indent=2))
    else:
        list_checkpoints()
    return 0
