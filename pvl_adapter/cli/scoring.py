"""How `pvl-adapter evaluate` scores its rows: data and settings are checked, rows predicted, and pixels counted.

Shape alphabet: h w pixels of a label.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import pvl_adapter as pvl
from pvl_adapter.cli.options import hash_of, load_model, stop
from pvl_adapter.data import (
    DatasetError,
    DatasetIssue,
    Sample,
    SegmentationDataset,
    check_datasets,
    find_dataset,
    one_of_each_kind,
)
from pvl_adapter.image_files import reason
from pvl_adapter.images import prepare_masks
from pvl_adapter.trust import scores

PACKAGES = ("pvl-adapter", "torch", "open_clip_torch", "transformers", "monai", "scipy")


@dataclass(frozen=True)
class EvalSplit:
    """What is scored together: the rows of a dataset under one prompt design."""

    data: SegmentationDataset
    prompts: str

    @property
    def title(self) -> str:
        return f"{self.data.name}, {self.prompts}"


@dataclass(frozen=True)
class Scored:
    """The scores of a split.

    Attributes:
        rows: Lines of per_image.csv.
        indices: Their positions in the data.
        failed: Lines of rows that could not be predicted, with the reason as "error".
        calibration: Of all pixels.
        pixels: All pixels by uncertainty.
    """

    split: EvalSplit
    rows: list[dict[str, Any]]
    indices: list[int]
    failed: list[dict[str, Any]]
    calibration: scores.PixelBins
    pixels: scores.PixelBins
    seconds: float

    @property
    def curve(self) -> scores.RiskCoverage:
        """Of rows, ranked by review score."""
        return scores.risk_coverage([row["review_score"] for row in self.rows], [1.0 - row["dsc"] for row in self.rows])


def run(args: argparse.Namespace) -> int:
    """Score everything that a command line asks for; returns the exit code."""
    from pvl_adapter.cli.evaluation_report import SUMMARY, write_all

    splits = find_splits(args)
    model = load_model(args)
    settings = settings_of(args, splits, model)
    if not args.overwrite and is_finished(args.output / SUMMARY, settings):
        print((args.output / "summary.md").read_text(encoding="utf-8"))
        print(f"this was evaluated before; the results are in {args.output}, --overwrite repeats it")
        return 0
    head = {"settings": settings, **environment(model, args), "warnings": check(splits)}
    with tqdm(total=sum(len(split.data) for split in splits), unit="row") as bar:
        results = [score(model, split, args, bar) for split in splits]
    try:
        print(write_all(model, results, head, args))
    except OSError as error:
        stop(
            f"the results cannot be written ({error}); {args.output} has no summary now, so the same command repeats it"
        )
    failed = [row for result in results for row in result.failed]
    for row in failed:
        print(f"failed: {row['dataset']}, {row['prompts']}, {row['image']}: {row['error']}", file=sys.stderr)
    print(f"scores, summary and figures are in {args.output}" + f"; {len(failed)} rows failed" * bool(failed))
    return int(bool(failed))


def find_splits(args: argparse.Namespace) -> list[EvalSplit]:
    """The datasets and prompt designs of a command line; ends with everything that is wrong with their tables."""
    window = tuple(args.window) if args.window else None
    splits: list[EvalSplit] = []
    issues: list[DatasetIssue] = []
    try:
        folders = [find_dataset(name, data=args.data_folder) for name in args.data or ()]
        if len({folder.name for folder in folders}) < len(folders):
            stop(f"--data names {args.data}, expected datasets of different names: results are filed by them")
        for folder, design in [(folder, design) for folder in folders or [None] for design in args.prompts]:
            try:
                if folder is None:
                    made = SegmentationDataset.from_table(
                        args.table, images=args.images, masks=args.masks, window=window
                    )
                else:
                    made = SegmentationDataset(folder, args.split, prompts=design, window=window)
            except DatasetError as error:
                issues += error.issues
            else:
                splits.append(EvalSplit(made, design))
    except (OSError, ValueError) as error:
        stop(error)
    if issues:
        stop(DatasetError(issues))
    for split in splits:
        del split.data.rows[args.limit or len(split.data) :]
    return splits


def check(splits: Sequence[EvalSplit]) -> list[str]:
    """Read all data and end with every fatal issue; warnings are printed, one of each kind, and all returned."""
    issues = check_datasets([split.data for split in splits])
    if any(issue.fatal for issue in issues):
        stop(DatasetError(issues))
    for line in one_of_each_kind(issues):
        print(f"warning: {line}", file=sys.stderr)
    return [str(issue) for issue in issues]


def settings_of(args: argparse.Namespace, splits: Sequence[EvalSplit], model: pvl.MedCLIPSeg) -> dict[str, Any]:
    """What decides the scores; device and batch size do not, but for rounding."""
    names = ("checkpoint", "fraction", "split", "threshold", "seed", "tolerance", "window", "limit")
    rows = [[[row.image, row.text, row.mask] for row in split.data.rows] for split in splits]
    hashes = [hashlib.sha256(json.dumps(each).encode()).hexdigest() for each in rows]
    return {
        "model": str(args.model),
        "weights": hash_of(model),
        "dtype": str(next(model.clip.parameters()).dtype).removeprefix("torch."),
        "num_samples": args.num_samples if isinstance(args.num_samples, int) else "auto",
        **{name: getattr(args, name) for name in names},
        "data": [
            {"dataset": split.data.name, "prompts": split.prompts, "rows": len(split.data), "sha256": hashed}
            for split, hashed in zip(splits, hashes, strict=True)
        ],
    }


def is_finished(path: Path, settings: dict[str, Any]) -> bool:
    """Whether this very evaluation is there; another one is not overwritten unasked."""
    if not path.is_file():
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        stop(f"{path} is no summary of an evaluation ({error!r}); choose another --output")
    differing = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if differing:
        names = ", ".join(differing)
        stop(f"{path} is of another evaluation (other {names}); choose another --output, or replace it by --overwrite")
    return True


def environment(model: pvl.MedCLIPSeg, args: argparse.Namespace) -> dict[str, Any]:
    device = model.device
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        ran = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        commit = ran.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "provenance": model.provenance,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "cpu_threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def score(model: pvl.MedCLIPSeg, split: EvalSplit, args: argparse.Namespace, bar: tqdm) -> Scored:
    """Score a split; of maps only the counts of their pixels are kept."""
    started, index = time.perf_counter(), 0
    rows, indices, failed = [], [], []
    nothing = np.zeros((0, 0))
    calibrated = scores.calibration(nothing, nothing > 0)
    ranked = scores.uncertainty_histogram(nothing, nothing > 0)
    bar.set_description(split.title)
    for samples in DataLoader(split.data, batch_size=args.batch_size, collate_fn=list, num_workers=args.workers):
        for sample, predicted in zip(samples, predict(model, samples, args), strict=True):
            row = split.data.rows[index]
            head = {"dataset": split.data.name, "prompts": split.prompts, "image": row.image, "text": row.text}
            head |= {"mask": row.mask, "subject": row.subject}
            if isinstance(predicted, str):
                failed.append({**head, "error": predicted})
            else:
                truth = sample["mask"]
                mask, probability, uncertainty = at_label_size(*predicted, truth.shape)
                bins = scores.calibration(probability, truth)
                rows.append({**head, **scores_of(mask, truth, args), **calibration_of(bins), **summary_of(*predicted)})
                indices.append(index)
                calibrated += bins
                ranked += scores.uncertainty_histogram(uncertainty, mask != truth)
            index += 1
            bar.update()
    if not rows:
        stop(f"{split.title}: none of {index} rows could be predicted: {failed[0]['error'] if failed else 'no rows'}")
    return Scored(split, rows, indices, failed, calibrated, ranked, seconds=time.perf_counter() - started)


def predict(
    model: pvl.MedCLIPSeg, samples: Sequence[Sample], args: argparse.Namespace
) -> Iterator[tuple[pvl.Prediction, int] | str]:
    """For each sample a prediction and the place in it, or why there is none; a batch that fails is taken apart."""
    images, texts = [sample["image"] for sample in samples], [sample["text"] for sample in samples]
    sampling = {name: getattr(args, name) for name in ("num_samples", "threshold", "seed")}
    try:
        prediction = model.predict(images, texts, **sampling)
    except ValueError as error:
        failure = reason(error)
    else:
        yield from ((prediction, index) for index in range(len(samples)))
        return
    if len(samples) == 1:
        yield failure
    else:
        for sample in samples:
            yield from predict(model, [sample], args)


def at_label_size(prediction: pvl.Prediction, index: int, size: tuple[int, int]) -> tuple[np.ndarray, Tensor, Tensor]:
    """Mask, probability and uncertainty: [h, w]."""
    mask = prepare_masks(prediction.mask[index].cpu(), size=size)[0].numpy()
    maps = torch.stack([prediction.probability[index], prediction.uncertainty[index]]).float().cpu()
    enlarged = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]  # [2, h, w]
    return mask, enlarged[0], enlarged[1]


def scores_of(mask: np.ndarray, truth: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dsc": scores.dice(mask, truth),
        "nsd": scores.surface_dice(mask, truth, tolerance=args.tolerance),
        "nsd_released": scores.released_surface_dice(mask, truth),
        "iou": scores.iou(mask, truth),
        "positive": bool(truth.any()),
        "area_fraction": float(truth.mean()),
        "predicted_fraction": float(mask.mean()),
    }


def calibration_of(bins: scores.PixelBins) -> dict[str, float]:
    return {"ece": bins.expected_error, "ace": bins.average_error, "brier": bins.brier, "nll": bins.nll}


def summary_of(prediction: pvl.Prediction, index: int) -> dict[str, Any]:
    summary = prediction.to_dict()[index]
    return {
        "mean_uncertainty": summary["mean_uncertainty_nats"],
        "review_score": summary["review_score"],
        "max_probability": prediction.probability[index].max().item(),
        "num_samples": summary["num_samples"],
        "standard_error": summary["largest_standard_error"],
    }
