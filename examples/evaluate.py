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
import csv
import dataclasses
import hashlib
import io
import json
import math
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import pvl_adapter as pvl
from pvl_adapter.data import DatasetError, Sample, SegmentationDataset, check_datasets, find_dataset
from pvl_adapter.metrics import (
    Calibration,
    RiskCoverage,
    UncertaintyHistogram,
    bootstrap_interval,
    calibration,
    detection_auroc,
    dice,
    iou,
    released_surface_dice,
    risk_coverage,
    surface_dice,
    uncertainty_histogram,
)
from pvl_adapter.preprocessing import prepare_masks
from pvl_adapter.serialization import write_atomically

HERE = Path(__file__).parent
PROMPTS = ("original", "contradictory", "missing_location", "overdescriptive", "underdescriptive")
SUMMARY = "summary.json"
SCORES = ("dsc", "nsd", "nsd_released", "iou")

# ---- scoring --------------------------------------------------------------------------------------------------------


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

    def summary(self) -> dict[str, Any]:
        positive = [line for line in self.lines if line.positive]
        absent = [not line.positive for line in self.lines]
        doubts = {
            "one_minus_max_probability": [1.0 - line.max_probability for line in self.lines],
            "mean_uncertainty": [line.mean_uncertainty for line in self.lines],
            "review_score": [line.review_score for line in self.lines],
        }
        errors = [line.standard_error for line in self.lines if line.standard_error is not None]
        return {
            "dataset": self.test.data.name,
            "prompts": self.test.prompts,
            "n": len(self.lines),
            "n_positive": len(positive),
            "metrics": {**{name: mean(self.lines, name) for name in SCORES}, "dsc_positive": mean(positive, "dsc")},
            "calibration": {
                "ece": self.calibration.expected_error,
                "largest_error": self.calibration.largest_error,
                "brier": self.calibration.brier,
                "pixels": self.calibration.count.tolist(),
                "probability": finite(self.calibration.probability),
                "frequency": finite(self.calibration.frequency),
            },
            "risk_coverage": {"rows": areas(self.rows), "pixels": areas(self.pixels.curve)},
            "absent_auroc": {name: finite(detection_auroc(values, absent)) for name, values in doubts.items()},
            "mean_num_samples": float(np.mean([line.num_samples for line in self.lines])),
            "mean_standard_error": float(np.mean(errors)) if errors else None,
            "seconds": round(self.seconds, 2),
        }


def mean(lines: Sequence[Line], name: str) -> dict[str, float | None]:
    """Of a score, with its interval."""
    if not lines:
        return {"mean": None, "low": None, "high": None}
    values = [getattr(line, name) for line in lines]
    low, high = bootstrap_interval(values, groups=[line.image for line in lines])
    return {"mean": float(np.mean(values)), "low": low, "high": high}


def areas(curve: RiskCoverage) -> dict[str, float]:
    return {
        "aurc": curve.aurc,
        "optimal_aurc": curve.optimal_aurc,
        "excess_aurc": curve.excess_aurc,
        "random_aurc": curve.random_aurc,
    }


def finite(values: Any) -> Any:
    """As JSON takes it, None for NaN."""
    if isinstance(values, np.ndarray):
        return [finite(value) for value in values.tolist()]
    return None if math.isnan(values) else values


def evaluate(model: pvl.MedCLIPSeg, test: Test, args: argparse.Namespace, bar: tqdm) -> Result:
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
    """A map at the label's size, bilinearly as `Prediction.in_picture` has it: [h, w]."""
    return F.interpolate(values[None, None].float().cpu(), size=size, mode="bilinear", align_corners=False)[0, 0]


# ---- report ---------------------------------------------------------------------------------------------------------


def write_all(model: pvl.MedCLIPSeg, results: list[Result], head: dict[str, Any], args: argparse.Namespace) -> str:
    """Everything; the summary last, so that where it is, all of it is."""
    figures = {
        "reliability.png": draw_reliability(results),
        "risk_coverage.png": draw_risk_coverage(results),
        **{
            f"examples_{result.test.data.name}_{result.test.prompts}.png": draw_examples(model, result, args)
            for result in results
        },
    }
    content = {
        **head,
        "results": [result.summary() for result in results],
        "seconds": round(sum(result.seconds for result in results), 2),
    }
    text = report(content)
    (args.output / SUMMARY).unlink(missing_ok=True)
    write_text(args.output / "per_image.csv", per_image(results))
    write_text(args.output / "summary.md", text)
    for name, figure in figures.items():
        write_atomically(args.output / name, saving(figure))
    write_text(args.output / SUMMARY, json.dumps(content, indent=2) + "\n")
    return text


def per_image(results: list[Result]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(Line)])
    writer.writerows(dataclasses.astuple(line) for result in results for line in result.lines)
    return buffer.getvalue()


def report(content: dict[str, Any]) -> str:
    """The summary as Markdown."""
    heads = ["dataset", "prompts", "rows", "positive", "DSC", "DSC positive", "NSD", "NSD released", "IoU"]
    heads += ["ECE", "Brier", "AURC rows (best)", "AURC pixels (best)", "absent AUROC"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for result in content["results"]:
        metrics, curves = result["metrics"], result["risk_coverage"]
        scores = [percent(metrics[name]) for name in ("dsc", "dsc_positive", "nsd", "nsd_released", "iou")]
        ranked = [f"{curves[of]['aurc']:.4f} ({curves[of]['optimal_aurc']:.4f})" for of in ("rows", "pixels")]
        auroc = result["absent_auroc"]["one_minus_max_probability"]
        calibrated = [f"{result['calibration'][name]:.4f}" for name in ("ece", "brier")]
        cells = [result["dataset"], result["prompts"], result["n"], result["n_positive"], *scores, *calibrated, *ranked]
        lines.append([*map(str, cells), "-" if auroc is None else f"{auroc:.3f}"])
    settings = content["settings"]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return (
        f"# {settings['model']}\n\n{table}\n"
        "Scores in percent with 95% intervals (bootstrap over pictures). NSD at a tolerance of "
        f"{settings['tolerance']:g} pixels; NSD released is the paper's figure, at 2 pixels, and compares areas. AURC: "
        "lower is better, in brackets that of a perfect ranking. Absent AUROC: of 1 - largest probability.\n\n"
        f"{settings['num_samples']} samples, threshold {settings['threshold']:g}, seed {settings['seed']}; "
        f"{content['device']}, {content['seconds']:.0f} s; commit {content['commit']}\n"
    )


def percent(score: dict[str, float | None]) -> str:
    if score["mean"] is None:
        return "-"
    middle, low, high = (100.0 * (score[name] or 0.0) for name in ("mean", "low", "high"))
    return f"{middle:.2f} ({low:.1f} to {high:.1f})"


def draw_reliability(results: list[Result]) -> Figure:
    """How often a pixel is foreground, over the probability it was given; below, how many such pixels there are."""
    figure = Figure(figsize=(5.5, 6.0), layout="constrained")
    curve, amount = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve.plot([0, 1], [0, 1], color="gray", linestyle=":")
    for result in results:
        bins = result.calibration
        label = f"{result.test.title}: ECE {bins.expected_error:.4f}"
        filled = bins.count > 0
        curve.plot(bins.probability[filled], bins.frequency[filled], marker=".", label=label)
        amount.plot(bins.probability[filled], bins.count[filled] / bins.count.sum(), marker=".")
    curve.set(ylabel="foreground", xlim=(0, 1), ylim=(0, 1))
    curve.legend(fontsize=7)
    amount.set(xlabel="probability", ylabel="pixels", yscale="log")
    return figure


def draw_risk_coverage(results: list[Result]) -> Figure:
    """What is left wrong when only the surest are kept."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    rows, pixels = figure.subplots(1, 2)
    for result in results:
        for axis, curve in ((rows, result.rows), (pixels, result.pixels.curve)):
            label = f"{result.test.title}: AURC {curve.aurc:.4f}, best {curve.optimal_aurc:.4f}"
            axis.plot(curve.coverage, curve.risk, marker="." if len(curve.risk) == 1 else "", label=label)
    rows.set(title="rows by review score", xlabel="kept", ylabel="1 - DSC", xlim=(0, 1), ylim=(0, None))
    pixels.set(title="pixels by uncertainty", xlabel="kept", ylabel="wrong pixels", xlim=(0, 1), ylim=(0, None))
    for axis in (rows, pixels):
        axis.legend(fontsize=7)
    return figure


def draw_examples(model: pvl.MedCLIPSeg, result: Result, args: argparse.Namespace) -> Figure:
    """Best, median and worst row, of those with something to find if there are any; predicted once more."""
    places = [place for place, line in enumerate(result.lines) if line.positive] or list(range(len(result.lines)))
    places.sort(key=lambda place: -result.lines[place].dsc)
    chosen = {"best": places[0], "median": places[len(places) // 2], "worst": places[-1]}
    figure = Figure(figsize=(8.8, 7.6), layout="constrained")
    axes = figure.subplots(3, 4)
    for (name, place), row in zip(chosen.items(), axes, strict=True):
        sample, line = result.test.data[place], result.lines[place]
        prediction = predict(model, [sample], args)
        size = sample.mask.shape
        mask = prepare_masks(prediction.mask[0].cpu(), size=size)[0].numpy()
        row[0].imshow(sample.image, cmap="gray", vmin=0, vmax=255)
        row[1].imshow(sample.mask, cmap="gray", vmin=0, vmax=1)
        if mask.any() and not mask.all():
            row[1].contour(mask, levels=[0.5], colors="red", linewidths=0.8)
        shown = [
            row[2].imshow(enlarged(prediction.probability[0], size), cmap="viridis", vmin=0.0, vmax=1.0),
            row[3].imshow(enlarged(prediction.uncertainty[0], size), cmap="magma", vmin=0.0, vmax=math.log(2.0)),
        ]
        row[0].set_title(textwrap.fill(line.text, 38, max_lines=3, placeholder=" ..."), fontsize=7)
        row[0].set_ylabel(f"{name}: DSC {line.dsc:.3f}", fontsize=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0, 1:], ("label, mask in red", "probability", "uncertainty (nats)"), strict=True):
        axis.set_title(title, fontsize=8)
    for column, image in zip(axes[:, 2:].T, shown, strict=True):
        figure.colorbar(image, ax=column, orientation="horizontal", shrink=0.9)
    figure.suptitle(result.test.title)
    return figure


def saving(figure: Figure) -> Callable[[Path], None]:
    return lambda path: figure.savefig(path, dpi=100, format="png")


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ---- command line ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    try:
        tests = find_tests(args)
        model = load(args)
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
            results.append(evaluate(model, test, args, bar))
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


def load(args: argparse.Namespace) -> pvl.MedCLIPSeg:
    return pvl.from_pretrained(
        args.model,
        checkpoint=args.checkpoint,
        fraction=args.fraction,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=args.dtype and getattr(torch, args.dtype),
    )


def check(tests: list[Test]) -> list[str]:
    """Read all data and end with every fatal fault; what is only doubtful is printed, and all of it returned."""
    faults = check_datasets([test.data for test in tests])
    if any(fault.fatal for fault in faults):
        raise SystemExit(str(DatasetError(faults)))
    if empty := [test.title for test in tests if not len(test.data)]:
        hint = f"{'; '.join(empty)}: no rows; expected one or more, so leave it out or fill its table"
        raise SystemExit("\n".join([hint, *map(str, faults)]))
    kinds = Counter(fault.problem.partition(":")[0] for fault in faults)
    for kind, count in kinds.items():
        first = next(fault for fault in faults if fault.problem.startswith(kind))
        print(f"warning: {first}" + (f" (and {count - 1} more of this kind)" if count > 1 else ""), file=sys.stderr)
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


def hash_of(model: pvl.MedCLIPSeg) -> str:
    """Of all weights, and of how pictures reach them."""
    hashed = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


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
        "origin": model.origin,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "cpu_threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "versions": versions(packages),
        "commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    try:
        return {name: version(name) for name in packages}
    except PackageNotFoundError as error:
        raise SystemExit(f'{error.name} is not installed: pip install "pvl-adapter[examples]"') from error


def git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, .pth file or hub repository")
    add("--output", type=Path, default=Path("results"), help="folder for all results (%(default)s)")
    add("--overwrite", action="store_true", help="evaluate again what is done")
    data = parser.add_argument_group("data").add_argument
    data("--data", nargs="+", help="datasets by name or folder, in the released layout")
    data("--data-folder", type=Path, default=Path("data"), help="where named datasets are (%(default)s)")
    data("--prompts", nargs="+", choices=PROMPTS, default=["original"], help="of the test split (%(default)s)")
    data("--split", choices=("train", "val", "test"), default="test", help="(%(default)s)")
    data("--table", type=Path, help="instead of --data: your own .csv, .jsonl or .xlsx with image, text, mask")
    data("--images", type=Path, help="folder of its pictures (the table's)")
    data("--masks", type=Path, help="folder of its masks (the table's)")
    data("--window", type=float, nargs=2, metavar=("CENTER", "WIDTH"), help="grey levels shown of deep pictures")
    data("--limit", type=int, help="score the first so many rows of each only")
    model = parser.add_argument_group("model").add_argument
    model("--checkpoint", help="of the published ones: the dataset it was trained on")
    model("--fraction", type=int, default=100, help="of the published ones: percent of the training data (%(default)s)")
    model("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    model("--dtype", choices=("float32", "bfloat16", "float16"), help="of the frozen CLIP (as stored)")
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
