"""The published checkpoints, with the scores that are known."""

from __future__ import annotations

import argparse
import json

from pvl_adapter.hub.catalogue import CHECKPOINTS, OFFICIAL_REPO, list_checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.json:
        known = []
        for each in CHECKPOINTS:
            data, count = each.dataset, each.dataset.train_images.get(each.fraction)
            counts = {"train_images": count, "test_images": data.test_images}
            known.append({"repo": OFFICIAL_REPO, **each.provenance, "modality": data.modality, **counts})
        print(json.dumps(known, indent=2))
    else:
        list_checkpoints()
    return 0
