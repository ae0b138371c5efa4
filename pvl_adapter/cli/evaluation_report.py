"""What `pvl-adapter evaluate` writes about its scored rows: summary, tables and figures."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import pvl_adapter as pvl
from pvl_adapter.atomic import write_atomically
from pvl_adapter.cli.scoring import Scored, at_label_size, calibration_of, predict
from pvl_adapter.trust.scores import RiskCoverage, bootstrap_interval, detection_auroc

SUMMARY, INCOMPLETE = "summary.json", "incomplete.json"
SCORES = ("dsc", "nsd", "nsd_released", "iou", "ece", "ace", "brier", "nll")


def write_all(model: pvl.MedCLIPSeg, results: list[Scored], head: dict[str, Any], args: argparse.Namespace) -> str:
    """Everything; the summary last, so that where it is, all of it is."""
    figures = {
        "reliability.png": draw_reliability(results),
        "risk_coverage.png": draw_risk_coverage(results),
        **{
            f"examples_{result.split.data.name}_{result.split.prompts}.png": draw_examples(model, result, args)
            for result in results
        },
    }
    failed = [row for result in results for row in result.failed]
    content = {
        **head,
        "failed": failed,
        "results": [summarize(result) for result in results],
        "seconds": round(sum(result.seconds for result in results), 2),
    }
    text = report(content)
    for name in (SUMMARY, INCOMPLETE):
        (args.output / name).unlink(missing_ok=True)
    write_text(args.output / "per_image.csv", per_image(results))
    write_text(args.output / "summary.md", text)
    for name, figure in figures.items():
        write_atomically(args.output / name, partial(figure.savefig, dpi=100, format="png"))
    summary = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_text(args.output / (INCOMPLETE if failed else SUMMARY), summary)
    return text


def per_image(results: list[Scored]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*results[0].rows[0], "error"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for result in results for row in [*result.rows, *result.failed])
    return buffer.getvalue()


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ---- summary --------------------------------------------------------------------------------------------------------


def summarize(result: Scored) -> dict[str, Any]:
    """A split's part of the summary."""
    rows, bins = result.rows, result.calibration
    positive = [row for row in rows if row["positive"]]
    absent = [not row["positive"] for row in rows]
    doubts = {
        "one_minus_max_probability": [1.0 - row["max_probability"] for row in rows],
        "mean_uncertainty": [row["mean_uncertainty"] for row in rows],
        "review_score": [row["review_score"] for row in rows],
    }
    errors = [row["standard_error"] for row in rows if row["standard_error"] is not None]
    return {
        "dataset": result.split.data.name,
        "prompts": result.split.prompts,
        "n": len(rows),
        "n_positive": len(positive),
        "n_failed": len(result.failed),
        "metrics": {**{name: mean(rows, name) for name in SCORES}, "dsc_positive": mean(positive, "dsc")},
        "calibration": {
            **calibration_of(bins),
            "largest_error": bins.largest_error,
            "pixels": bins.count.tolist(),
            "probability": finite(bins.mean_value),
            "frequency": finite(bins.frequency),
        },
        "risk_coverage": {"rows": areas(result.curve), "pixels": areas(result.pixels.curve)},
        "absent_auroc": {name: finite(detection_auroc(values, absent)) for name, values in doubts.items()},
        "mean_num_samples": float(np.mean([row["num_samples"] for row in rows])),
        "mean_standard_error": float(np.mean(errors)) if errors else None,
        "seconds": round(result.seconds, 2),
    }


def mean(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float | None]:
    """Of a score, with its interval over subjects, or over images where the table names none."""
    if not rows:
        return {"mean": None, "low": None, "high": None}
    values = [row[name] for row in rows]
    low, high = bootstrap_interval(values, groups=[row["subject"] or row["image"] for row in rows])
    return {"mean": float(np.mean(values)), "low": low, "high": high}


def areas(curve: RiskCoverage) -> dict[str, float]:
    return {name: getattr(curve, name) for name in ("aurc", "optimal_aurc", "excess_aurc", "random_aurc")}


def finite(values: Any) -> Any:
    """As JSON takes it, None for NaN."""
    if isinstance(values, np.ndarray):
        return [finite(value) for value in values.tolist()]
    return None if math.isnan(values) else values


def report(content: dict[str, Any]) -> str:
    """The summary as Markdown."""
    heads = ["dataset", "prompts", "rows", "positive", "DSC", "DSC positive", "NSD", "NSD released", "IoU"]
    heads += ["ECE", "ACE", "Brier", "NLL", "AURC rows (excess)", "AURC pixels (excess)", "absent AUROC"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for result in content["results"]:
        metrics, curves = result["metrics"], result["risk_coverage"]
        scores = [percent(metrics[name]) for name in ("dsc", "dsc_positive", "nsd", "nsd_released", "iou")]
        ranked = [f"{curves[of]['aurc']:.4f} ({curves[of]['excess_aurc']:.4f})" for of in ("rows", "pixels")]
        auroc = result["absent_auroc"]["one_minus_max_probability"]
        calibrated = [f"{result['calibration'][name]:.4f}" for name in ("ece", "ace", "brier", "nll")]
        cells = [result["dataset"], result["prompts"], result["n"], result["n_positive"], *scores, *calibrated, *ranked]
        lines.append([*map(str, cells), "-" if auroc is None else f"{auroc:.3f}"])
    settings = content["settings"]
    failed = len(content["failed"])
    incomplete = f"**Incomplete: {failed} rows could not be predicted** and are left out.\n\n" if failed else ""
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return (
        f"# {settings['model']}\n\n{table}\n"
        f"{incomplete}Scores in percent with 95% intervals (bootstrap over subjects, or images). NSD at a tolerance of "
        f"{settings['tolerance']:g} pixels; NSD released is the paper's score, at 2 pixels, and compares areas. "
        "ECE, ACE, Brier score and NLL (nats) are of all pixels together. AURC: lower is better, in brackets what a "
        "perfect ranking would take off. Absent AUROC: of 1 - largest probability.\n\n"
        f"{settings['num_samples']} samples, threshold {settings['threshold']:g}, seed {settings['seed']}; "
        f"{content['device']}, {content['seconds']:.0f} s; commit {content['commit']}\n"
    )


def percent(score: dict[str, float | None]) -> str:
    if score["mean"] is None:
        return "-"
    middle, low, high = (100.0 * (score[name] or 0.0) for name in ("mean", "low", "high"))
    return f"{middle:.2f} ({low:.1f} to {high:.1f})"


# ---- figures --------------------------------------------------------------------------------------------------------


def draw_reliability(results: list[Scored]) -> Figure:
    """How often a pixel is foreground, over the probability it was given; below, how many such pixels there are."""
    figure = Figure(figsize=(5.5, 6.0), layout="constrained")
    curve, amount = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve.plot([0, 1], [0, 1], color="gray", linestyle=":")
    for result in results:
        bins = result.calibration
        label = f"{result.split.title}: ECE {bins.expected_error:.4f}"
        filled = bins.count > 0
        curve.plot(bins.mean_value[filled], bins.frequency[filled], marker=".", label=label)
        amount.plot(bins.mean_value[filled], bins.count[filled] / bins.count.sum(), marker=".")
    curve.set(ylabel="foreground", xlim=(0, 1), ylim=(0, 1))
    curve.legend(fontsize=7)
    amount.set(xlabel="probability", ylabel="pixels", yscale="log")
    return figure


def draw_risk_coverage(results: list[Scored]) -> Figure:
    """What is left wrong when only the surest are kept."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    rows, pixels = figure.subplots(1, 2)
    for result in results:
        for axis, curve in ((rows, result.curve), (pixels, result.pixels.curve)):
            label = f"{result.split.title}: AURC {curve.aurc:.4f}, best {curve.optimal_aurc:.4f}"
            axis.plot(curve.coverage, curve.risk, marker="." if len(curve.risk) == 1 else "", label=label)
    rows.set(title="rows by review score", xlabel="kept", ylabel="1 - DSC", xlim=(0, 1), ylim=(0, None))
    pixels.set(title="pixels by uncertainty", xlabel="kept", ylabel="wrong pixels", xlim=(0, 1), ylim=(0, None))
    for axis in (rows, pixels):
        axis.legend(fontsize=7)
    return figure


def draw_examples(model: pvl.MedCLIPSeg, result: Scored, args: argparse.Namespace) -> Figure:
    """Best, median and worst row, of those with something to find if there are any; predicted once more."""
    order = [place for place, row in enumerate(result.rows) if row["positive"]] or list(range(len(result.rows)))
    order.sort(key=lambda place: -result.rows[place]["dsc"])
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    figure = Figure(figsize=(8.8, 7.6), layout="constrained")
    axes = figure.subplots(3, 4)
    for (name, place), row in zip(chosen.items(), axes, strict=True):
        sample, scored = result.split.data[result.indices[place]], result.rows[place]
        (predicted,) = predict(model, [sample], args)
        mask, probability, uncertainty = at_label_size(*predicted, sample["mask"].shape)
        row[0].imshow(sample["image"], cmap="gray", vmin=0, vmax=255)
        row[1].imshow(sample["mask"], cmap="gray", vmin=0, vmax=1)
        if mask.any() and not mask.all():
            row[1].contour(mask, levels=[0.5], colors="red", linewidths=0.8)
        shown = [
            row[2].imshow(probability, cmap="viridis", vmin=0.0, vmax=1.0),
            row[3].imshow(uncertainty, cmap="magma", vmin=0.0, vmax=math.log(2.0)),
        ]
        row[0].set_title(textwrap.fill(scored["text"], 38, max_lines=3, placeholder=" ..."), fontsize=7)
        row[0].set_ylabel(f"{name}: DSC {scored['dsc']:.3f}", fontsize=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0, 1:], ("label, mask in red", "probability", "uncertainty (nats)"), strict=True):
        axis.set_title(title, fontsize=8)
    for column, image in zip(axes[:, 2:].T, shown, strict=True):
        figure.colorbar(image, ax=column, orientation="horizontal", shrink=0.9)
    figure.suptitle(result.split.title)
    return figure
