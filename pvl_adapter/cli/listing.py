"""The published checkpoints, with the scores that are known."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from pvl_adapter.hub.catalogue import list_checkpoints

    list_checkpoints()
    return 0
