"""Score a trained model: overlap, surfaces, calibration, and how well its uncertainty ranks its errors.

    pvl-adapter evaluate runs/MNI152-mni152-seed0/best --data MNI152 --output results
    pvl-adapter evaluate TahaKoleilat/MedCLIPSeg --checkpoint BUSI --data BUSI --prompts original contradictory
    pvl-adapter evaluate MODEL --table test.csv --images img --masks label      # your own

MODEL is what `pvl_adapter.from_pretrained` takes. All data is checked before anything is computed. As in the released
evaluation a mask is made at the network's size and enlarged to the label's by nearest neighbour. An empty mask for an
empty label scores 1, so the Dice of positive rows (with something to find) is given too.

Writes to --output (results), all at the end:

    per_image.csv      a line for each row, in the tables' order: scores and calibration at the label's size;
                       uncertainty (nats), largest probability and largest standard error at the network's.
                       nsd_released is the paper's, always at 2 pixels; nsd is the true surface Dice, at --tolerance
    summary.json       for each dataset and prompt design: means over rows with 95% intervals (bootstrap over subjects,
                       or images where the table names none), calibration over all pixels (ECE, ACE, Brier, NLL), area
                       under the risk-coverage curve (AURC) of pixels and of rows, how well an absent target is told
                       from one that is there (AUROC); what a calibrated model promised (docs/trust.md) and what came
                       true, at the network's size, over subjects; settings, versions
    summary.md         the same as a table
    reliability.png, risk_coverage.png, examples_DATASET_PROMPTS.png (best, median and worst row)

Rows that cannot be predicted (a network that gives NaN) are listed with the reason and make the exit code 1; the
summary of the other rows is then called incomplete.json, so that nothing takes it for finished. A finished evaluation
is not repeated: model (by its weights), rows (by names and sentences) and settings are compared.

Cost: with the published model and 30 samples, as released, a row takes 15 s on 2 CPU cores (docs/inference.md). With
--num-samples 4 it takes 2 s and is as near to the mean.
"""

from __future__ import annotations

import argparse
import math

from pvl_adapter.cli.datasets import add_data_options, check_data_options
from pvl_adapter.cli.options import add_options, check_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, batch="rows")
    add_data_options(parser, split="test")
    add = parser.add_argument_group("scores").add_argument
    add("--tolerance", type=float, default=2.0, help="of the true surface Dice, in pixels of the label (%(default)s)")
    add("--workers", type=int, default=0, help="processes that read rows ahead; 0 reads in between (%(default)s)")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    check_data_options(parser, args)
    if not 0.0 <= args.tolerance < math.inf:
        parser.error(f"--tolerance is {args.tolerance}, expected 0 or more")
    check_options(parser, args)
    from pvl_adapter.cli.scoring import run  # takes seconds to import, which a wrong option need not wait for

    return run(args)
