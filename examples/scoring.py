"""The rows that examples/evaluate.py scores: predicted, measured against their labels, counted pixel by pixel.

Shape alphabet: h w pixels of a label.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import pvl_adapter as pvl
from pvl_adapter.data import Sample, SegmentationDataset
from pvl_adapter.images import prepare_masks
from pvl_adapter.metrics import (
    Calibration,
    RiskCoverage,
    UncertaintyHistogram,
    calibration,
    dice,
    iou,
    released_surface_dice,
    risk_coverage,
    surface_dice,
    uncertainty_histogram,
)


@dataclass(frozen=True)
class Line:
    """A row of a dataset, scored: a line of per_image.csv."""

    dataset: str
    prompts: str
    image: str
    text: str
    mask: str
    dsc: float
    nsd: float
    nsd_released: float
    iou: float
    positive: bool
    area_fraction: float
    predicted_fraction: float
    mean_uncertainty: float
    review_score: float
    max_probability: float
    num_samples: int
    standard_error: float | None


@dataclass(frozen=True)
class Test:
    """What is scored together: a dataset under one prompt design.

    Attributes:
        data: Its rows.
        prompts: The design.
    """

    data: SegmentationDataset
    prompts: str

    @property
    def title(self) -> str:
        return f"{self.data.name}, {self.prompts}"


@dataclass(frozen=True)
class Result:
    """A test's lines, and what was counted of all its pixels."""

    test: Test
    lines: list[Line]
    calibration: Calibration
    pixels: UncertaintyHistogram
    seconds: float

    @property
    def rows(self) -> RiskCoverage:
        """Of rows, ranked by review score."""
        return risk_coverage([line.review_score for line in self.lines], [1.0 - line.dsc for line in self.lines])


def score(model: pvl.MedCLIPSeg, test: Test, args: argparse.Namespace, bar: tqdm) -> Result:
    """Score a test; maps are counted and forgotten."""
    started = time.perf_counter()
    lines: list[Line] = []
    probabilities: Calibration | None = None
    pixels: UncertaintyHistogram | None = None
    batches = DataLoader(test.data, batch_size=args.batch_size, collate_fn=list, num_workers=args.workers)
    for samples in batches:
        prediction = predict(model, samples, args)
        for index, (sample, summary) in enumerate(zip(samples, prediction.to_dict(), strict=True)):
            row, truth = test.data.rows[len(lines)], sample.mask
            mask = prepare_masks(prediction.mask[index].cpu(), size=truth.shape)[0].numpy()  # [h, w]
            lines.append(
                Line(
                    dataset=test.data.name,
                    prompts=test.prompts,
                    image=row.image,
                    text=row.text,
                    mask=row.mask,
                    dsc=dice(mask, truth),
                    nsd=surface_dice(mask, truth, tolerance=args.tolerance),
                    nsd_released=released_surface_dice(mask, truth),
                    iou=iou(mask, truth),
                    positive=bool(truth.any()),
                    area_fraction=float(truth.mean()),
                    predicted_fraction=float(mask.mean()),
                    mean_uncertainty=summary["mean_uncertainty_nats"],
                    review_score=summary["review_score"],
                    max_probability=prediction.probability[index].max().item(),
                    num_samples=summary["num_samples"],
                    standard_error=summary["largest_standard_error"],
                )
            )
            counted = calibration(enlarged(prediction.probability[index], truth.shape), truth)
            doubted = uncertainty_histogram(enlarged(prediction.uncertainty[index], truth.shape), mask != truth)
            probabilities = counted if probabilities is None else probabilities + counted
            pixels = doubted if pixels is None else pixels + doubted
            bar.update()
    if probabilities is None or pixels is None:
        raise ValueError(f"{test.title} has no rows; expected one or more")
    return Result(test, lines, probabilities, pixels, seconds=time.perf_counter() - started)


def predict(model: pvl.MedCLIPSeg, samples: Sequence[Sample], args: argparse.Namespace) -> pvl.Prediction:
    return model.predict(
        [sample.image for sample in samples],
        [sample.text for sample in samples],
        num_samples=args.num_samples,
        threshold=args.threshold,
        seed=args.seed,
    )


def enlarged(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """A map at the label's size, bilinearly as `Prediction.at_original_size` has it: [h, w]."""
    return F.interpolate(values[None, None].float().cpu(), size=size, mode="bilinear", align_corners=False)[0, 0]
