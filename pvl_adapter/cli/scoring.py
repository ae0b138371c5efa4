"""How `pvl-adapter evaluate` scores its rows: data and settings are checked, rows predicted, and pixels counted.

Shape alphabet: B rows, H W pixels of the network, h w pixels of a label.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import pvl_adapter as pvl
from pvl_adapter.cli.datasets import EvalSplit, check_rows, find_splits
from pvl_adapter.cli.info import versions
from pvl_adapter.cli.options import hash_of, load_model, stop
from pvl_adapter.data import Sample
from pvl_adapter.image_files import reason
from pvl_adapter.images import prepare_masks
from pvl_adapter.trust import scores
from pvl_adapter.trust.cases import dice_losses

Measured = tuple[dict[str, Any], scores.PixelBins, scores.PixelBins]
PACKAGES = ("pvl-adapter", "torch", "open_clip_torch", "transformers", "monai", "scipy")


@dataclass(frozen=True)
class Scored:
    """The scores of a split.

    Attributes:
        lines: Of per_image.csv, one for each row; those of rows that could not be predicted have an "error".
        calibration: Of all pixels.
        pixels: All pixels by uncertainty.
    """

    split: EvalSplit
    lines: list[dict[str, Any]]
    calibration: scores.PixelBins
    pixels: scores.PixelBins
    seconds: float

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if not line["error"]]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["error"]]

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
    device = model.device
    head = {
        "settings": settings,
        "provenance": model.provenance,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "cpu_threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "versions": versions(PACKAGES),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "warnings": check_rows(splits),
    }
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


def settings_of(args: argparse.Namespace, splits: Sequence[EvalSplit], model: pvl.MedCLIPSeg) -> dict[str, Any]:
    """What decides the scores; device and batch size do not, but for rounding."""
    names = ("checkpoint", "fraction", "split", "threshold", "seed", "tolerance", "window", "limit")
    rows = [json.dumps([[row.image, row.text, row.mask] for row in split.data.rows]) for split in splits]
    hashes = [hashlib.sha256(each.encode()).hexdigest() for each in rows]
    return {
        "model": str(args.model),
        "weights": hash_of(model),
        "calibration": model.calibration and hashlib.sha256(repr(model.calibration.to_dict()).encode()).hexdigest(),
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
    if differing := sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name)):
        names = ", ".join(differing)
        stop(f"{path} is of another evaluation (other {names}); choose another --output, or replace it by --overwrite")
    return True


def score(model: pvl.MedCLIPSeg, split: EvalSplit, args: argparse.Namespace, bar: tqdm) -> Scored:
    """Score a split; of maps only the counts of their pixels are kept."""
    started, lines, why = time.perf_counter(), list[dict[str, Any]](), ""
    nothing = np.zeros((0, 0))
    calibrated, ranked = scores.calibration(nothing, nothing > 0), scores.uncertainty_histogram(nothing, nothing > 0)
    bar.set_description(split.title)
    loader = DataLoader(split.data, batch_size=args.batch_size, collate_fn=list, num_workers=args.workers)
    for samples, predicted in (found for batch in loader for found in predict(model, batch, args)):
        kept = () if isinstance(predicted, str) else judge(model, predicted, samples)
        for index, sample in enumerate(samples):
            line = {"dataset": split.data.name, "prompts": split.prompts, **vars(split.data.rows[len(lines)])}
            if isinstance(predicted, str):
                line["error"] = predicted
            else:
                row, by_probability, by_uncertainty = measure(predicted, index, np.asarray(sample["mask"]), args)
                calibrated, ranked = calibrated + by_probability, ranked + by_uncertainty
                line |= {**row, **kept[index], "error": ""}
                why = predicted.no_promise if predicted.calibration is None else ""
            lines.append(line)
            bar.update()
    if all(line["error"] for line in lines):
        stop(f"{split.title}: none of {len(lines)} rows could be predicted: {lines[0]['error']}")
    if model.calibration and why:
        tqdm.write(f"no promise is judged: {why}", file=sys.stderr)
    return Scored(split, lines, calibrated, ranked, seconds=time.perf_counter() - started)


def predict(
    model: pvl.MedCLIPSeg, samples: Sequence[Sample], args: argparse.Namespace
) -> Iterator[tuple[Sequence[Sample], pvl.Prediction | str]]:
    """Predictions, and why there is none of a sample; a batch that fails is taken apart."""
    how = {name: getattr(args, name) for name in ("num_samples", "threshold", "seed")}
    try:
        images, texts = [np.asarray(sample["image"]) for sample in samples], [sample["text"] for sample in samples]
        yield samples, model.predict(images, texts, **how)
    except ValueError as error:
        if len(samples) == 1:
            yield samples, reason(error)
        else:
            for sample in samples:
                yield from predict(model, [sample], args)


def judge(model: pvl.MedCLIPSeg, prediction: pvl.Prediction, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """What came true of each row's promises, None of those that it has not; without a calibration nothing."""
    if (promised := prediction.calibration) is None:
        return [{}] * len(samples)
    names = ("outer_mask", "inner_mask", "area_interval", "presence", "abstained", "abstained_pixels")
    outer, inner, interval, presence, abstained, doubtful = (getattr(promised, name)(prediction) for name in names)
    masks, nan = [np.asarray(sample["mask"]) for sample in samples], torch.full((len(samples),), math.nan)  # [B]
    truth, mask = prepare_masks(masks, size=model.image_size), prediction.mask.cpu()  # [B, H, W]
    present, area = truth.flatten(1).any(dim=1), truth.float().mean(dim=(1, 2))  # [B]
    verdicts = {
        word: nan if presence is None else torch.tensor([float(each == word) for each in presence.verdict])
        for word in ("present", "absent")
    }
    columns = {
        "outer_missed": nan if outer is None else share(~outer, truth),
        "inner_wrong": nan if inner is None else share(~truth, inner).nan_to_num(),
        "called_present": verdicts["present"].masked_fill(present, math.nan),
        "called_absent": verdicts["absent"].masked_fill(~present, math.nan),
        "outside_interval": nan if interval is None else (area < interval[:, 0]) | (area > interval[:, 1]),
        "kept_loss": nan if abstained is None else dice_losses(mask, truth).masked_fill(abstained, math.nan),
        "kept_pixels_wrong": nan if doubtful is None else share(mask != truth, ~doubtful.cpu()),
        "abstained": nan if abstained is None else abstained,
        "flagged": promised.flagged(prediction),
    }
    lines = zip(*(column.double().tolist() for column in columns.values()), strict=True)
    return [{name: finite(value) for name, value in zip(columns, line, strict=True)} for line in lines]


def share(part: Tensor, of: Tensor) -> Tensor:
    """Of the pixels of each mask [B, H, W] the share in another one, [B]; NaN of an empty mask."""
    return (part & of).sum(dim=(1, 2)) / of.sum(dim=(1, 2))


def measure(prediction: pvl.Prediction, index: int, truth: np.ndarray, args: argparse.Namespace) -> Measured:
    """A row's scores, and its pixels by probability and by uncertainty; the label is bool [h, w]."""
    maps = prediction.at_original_size(index, names=("mask", "probability", "uncertainty"))
    mask, bins = maps["mask"], scores.calibration(maps["probability"], truth)
    row = {
        "dsc": scores.dice(mask, truth),
        "nsd": scores.surface_dice(mask, truth, tolerance=args.tolerance),
        "nsd_released": scores.released_surface_dice(mask, truth),
        "iou": scores.iou(mask, truth),
        "positive": bool(truth.any()),
        "area_fraction": float(truth.mean()),
        "predicted_fraction": float(mask.mean()),
        **calibration_of(bins),
        "mean_uncertainty": prediction.uncertainty[index].mean().item(),
        "review_score": prediction.review_score[index].item(),
        "max_probability": prediction.probability[index].max().item(),
        "num_samples": int(prediction.num_samples[index]),
        "standard_error": finite(prediction.standard_error[index].max().item()),
    }
    return row, bins, scores.uncertainty_histogram(maps["uncertainty"], mask != truth)


def calibration_of(bins: scores.PixelBins) -> dict[str, float]:
    return {"ece": bins.expected_error, "ace": bins.average_error, "brier": bins.brier, "nll": bins.nll}


def finite(value: float) -> float | None:
    """As JSON takes it, None for NaN."""
    return None if math.isnan(value) else value
