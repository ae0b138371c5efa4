"""Score a trained model: overlap, surfaces, calibration, and what its uncertainty is worth.

    python examples/evaluate.py runs/MNI152-brains-seed0/best --data MNI152 --output results
    python examples/evaluate.py TahaKoleilat/MedCLIPSeg --checkpoint BUSI --data BUSI --prompts original contradictory
    python examples/evaluate.py MODEL --table test.csv --images img --masks label      # your own

MODEL is what `pvl_adapter.from_pretrained` takes. Everything is checked before anything is computed. As in the released
evaluation a mask is made at the network's size and enlarged to the label's by nearest neighbour; an empty mask for an
empty label scores 1, so there is the Dice of positive rows (with something to find) besides.

Writes to --output (results), all at the end:

    per_image.csv      a line for each row, in the tables' order: scores at the label's size; uncertainty (nats),
                       largest probability and largest standard error at the network's. nsd_released is the paper's
                       figure, always at 2 pixels; nsd is the true one, at --tolerance
    summary.json       of each dataset and prompt design: means with 95% intervals (bootstrap over pictures),
                       calibration over pixels, area under the risk-coverage curve (AURC) of pixels and of rows, how
                       well an absent target is told from one that is there (AUROC); settings, versions, commit
    summary.md         the same as a table
    reliability.png, risk_coverage.png, examples_DATASET_PROMPTS.png (best, median and worst row)

A finished evaluation is not repeated: model (by its weights), rows (by names and sentences) and settings are compared.

Cost: with a model of the size of the published one and 30 samples, as released, a row takes 15 s on 2 CPU cores
(docs/inference.md). With --num-samples 4 it takes 2 s and is as near to the mean, and with --dtype bfloat16 less.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from evaluation_report import SUMMARY, write_all
from model_options import add_model_options, hash_of, load_model
from scoring import Test, score
from surroundings import git_commit, versions
from tqdm import tqdm

import pvl_adapter as pvl
from pvl_adapter.data import DatasetError, SegmentationDataset, check_datasets, find_dataset
from pvl_adapter.data.dataset import PROMPT_DESIGNS
from pvl_adapter.data.issues import one_of_each_kind


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    try:
        tests = find_tests(args)
        model = load_model(args)
    except (OSError, ValueError, RuntimeError) as error:  # the last of a device that is not there
        raise SystemExit(str(error)) from error
    settings = settings_of(args, tests, model)
    if not args.overwrite and is_finished(args.output / SUMMARY, settings):
        print((args.output / "summary.md").read_text(encoding="utf-8"))
        print(f"this was evaluated before; the results are in {args.output}, --overwrite repeats it")
        return
    head = {"settings": settings, **surroundings(model, args), "doubts": check(tests)}
    with tqdm(total=sum(len(test.data) for test in tests), unit="row") as bar:
        results = []
        for test in tests:
            bar.set_description(test.title)
            results.append(score(model, test, args, bar))
    print(write_all(model, results, head, args))
    print(f"per_image.csv, summary.json, summary.md and figures are in {args.output}")


def find_tests(args: argparse.Namespace) -> list[Test]:
    """Datasets and prompt designs of a command line."""
    window = tuple(args.window) if args.window else None
    if args.table:
        table = SegmentationDataset.from_table(args.table, images=args.images, masks=args.masks, window=window)
        found = [(table, "original")]
    else:
        folders = [find_dataset(name, data=args.data_folder) for name in args.data]
        if len({folder.name for folder in folders}) < len(folders):
            raise ValueError(
                f"--data names {args.data}, expected datasets of different names: results are filed by them"
            )
        found = [
            (SegmentationDataset(folder, args.split, prompts=design, window=window), design)
            for folder in folders
            for design in args.prompts
        ]
    for data, _ in found:
        del data.rows[args.limit or len(data) :]
    return [Test(data, design) for data, design in found]


def check(tests: list[Test]) -> list[str]:
    """Read all data and end with every fatal fault; what is only doubtful is printed, and all of it returned."""
    faults = check_datasets([test.data for test in tests])
    if any(fault.fatal for fault in faults):
        raise SystemExit(str(DatasetError(faults)))
    if empty := [test.title for test in tests if not len(test.data)]:
        hint = f"{'; '.join(empty)}: no rows; expected one or more, so leave it out or fill its table"
        raise SystemExit("\n".join([hint, *map(str, faults)]))
    for line in one_of_each_kind(faults):
        print(f"warning: {line}", file=sys.stderr)
    return [str(fault) for fault in faults]


def settings_of(args: argparse.Namespace, tests: list[Test], model: pvl.MedCLIPSeg) -> dict[str, Any]:
    """What decides the figures; where they are computed and in which batches does not, but for rounding."""
    names = ("checkpoint", "fraction", "split", "num_samples", "threshold", "seed", "tolerance", "window", "limit")
    rows = [
        {
            "dataset": test.data.name,
            "prompts": test.prompts,
            "rows": len(test.data),
            "sha256": hashlib.sha256(
                json.dumps([[row.image, row.text, row.mask] for row in test.data.rows]).encode()
            ).hexdigest(),
        }
        for test in tests
    ]
    return {
        "model": str(args.model),
        "weights": hash_of(model),
        "dtype": str(next(model.clip.parameters()).dtype).removeprefix("torch."),
        **{name: getattr(args, name) for name in names},
        "data": rows,
    }


def is_finished(path: Path, settings: dict[str, Any]) -> bool:
    """Whether this very evaluation is there; another one is not overwritten unasked."""
    if not path.is_file():
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no summary of an evaluation ({error!r}); choose another --output") from error
    differing = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if differing:
        raise SystemExit(
            f"{path} is of another evaluation (other {', '.join(differing)}); choose another --output, or "
            "replace it by --overwrite"
        )
    return True


def surroundings(model: pvl.MedCLIPSeg, args: argparse.Namespace) -> dict[str, Any]:
    device = model.device
    packages = ("pvl-adapter", "torch", "open_clip_torch", "transformers", "monai", "torchmetrics", "scipy")
    return {
        "provenance": model.provenance,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "cpu_threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "versions": versions(packages),
        "commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, .pth file or hub repository")
    add("--output", type=Path, default=Path("results"), help="folder for all results (%(default)s)")
    add("--overwrite", action="store_true", help="evaluate again what is done")
    data = parser.add_argument_group("data").add_argument
    data("--data", nargs="+", help="datasets by name or folder, in the released layout")
    data("--data-folder", type=Path, default=Path("data"), help="where named datasets are (%(default)s)")
    data("--prompts", nargs="+", choices=PROMPT_DESIGNS, default=["original"], help="of the test split (%(default)s)")
    data("--split", choices=("train", "val", "test"), default="test", help="(%(default)s)")
    data("--table", type=Path, help="instead of --data: your own .csv, .jsonl or .xlsx with image, text, mask")
    data("--images", type=Path, help="folder of its pictures (the table's)")
    data("--masks", type=Path, help="folder of its masks (the table's)")
    data("--window", type=float, nargs=2, metavar=("CENTER", "WIDTH"), help="grey levels shown of deep pictures")
    data("--limit", type=int, help="score the first so many rows of each only")
    add_model_options(parser)
    how = parser.add_argument_group("prediction").add_argument
    how("--num-samples", default="30", help="a number, 0 for one pass without sampling, or auto (%(default)s)")
    how("--threshold", type=float, default=0.5, help="probability above which a pixel is found (%(default)s)")
    how("--seed", type=int, default=0, help="of the samples (%(default)s)")
    how("--tolerance", type=float, default=2.0, help="of the true NSD, in pixels of the label (%(default)s)")
    how("--batch-size", type=int, default=8, help="rows predicted at a time (%(default)s)")
    how("--workers", type=int, default=0, help="processes that read rows ahead; 0 reads in between (%(default)s)")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    line = parser()
    args = line.parse_args(argv)
    if bool(args.table) == bool(args.data):
        line.error("expected --data, or --table with your own; " + ("got both" if args.data else "got neither"))
    if args.data and (args.images or args.masks):
        line.error("--images and --masks are for --table; datasets of the released layout have their own folders")
    if (args.table or args.split != "test") and args.prompts != ["original"]:
        line.error(
            "--prompts chooses among the test split's tables; leave it out with --table and --split train or val"
        )
    if len(set(args.prompts)) < len(args.prompts):
        line.error(f"--prompts is {' '.join(args.prompts)}, expected each design once")
    if args.num_samples != "auto":
        if not args.num_samples.isdecimal():
            line.error(f"--num-samples is {args.num_samples}, expected a number, 0 or more, or auto")
        args.num_samples = int(args.num_samples)
    if not 0.0 <= args.threshold <= 1.0:
        line.error(f"--threshold is {args.threshold}, expected 0 to 1")
    if not 0.0 <= args.tolerance < math.inf:
        line.error(f"--tolerance is {args.tolerance}, expected 0 or more")
    for name, least in (("batch_size", 1), ("seed", 0), ("workers", 0), ("limit", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            line.error(f"--{name.replace('_', '-')} is {value}, expected {least} or more")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output):
            pass
    except OSError as error:
        line.error(f"--output {args.output} cannot be written to ({error.strerror}); choose another folder")
    return args


if __name__ == "__main__":
    main()
