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
from typing import Any, cast

import numpy as np
from matplotlib.figure import Figure

import pvl_adapter as pvl
from pvl_adapter.atomic import write_atomically
from pvl_adapter.cli.scoring import Scored, calibration_of, finite, predict
from pvl_adapter.trust import Calibration
from pvl_adapter.trust.conformal import subject_means
from pvl_adapter.trust.scores import RiskCoverage, bootstrap_interval, detection_auroc

SUMMARY, INCOMPLETE = "summary.json", "incomplete.json"
PROMISES = {
    "outer_missed": "structure outside outer_mask",
    "inner_wrong": "inner_mask outside the structure",
    "called_present": "absent, called present",
    "called_absent": "present, called absent",
    "outside_interval": "area outside area_interval",
    "kept_loss": "1 - Dice of cases kept",
    "kept_pixels_wrong": "wrong pixels of those kept",
    "abstained": "cases abstained from",
    "flagged": "cases flagged as unlike",
}
FEWEST_SUBJECTS = 10  # intervals of fewer are too narrow to call a promise broken
SCORES = ("dsc", "nsd", "nsd_released", "iou", "ece", "ace", "brier", "nll")


def write_all(model: pvl.MedCLIPSeg, results: list[Scored], head: dict[str, Any], args: argparse.Namespace) -> str:
    """Everything; the summary last, so that where it is, all of it is."""
    figures = draw_curves(results)
    for result in results:
        name = f"examples_{result.split.data.name}_{result.split.prompts}.png"
        figures[name] = draw_examples(model, result, args)
    lines = [line for result in results for line in result.lines]
    failed = [line for line in lines if line["error"]]
    content = {**head, "failed": failed, "results": [summarize(result, model.calibration) for result in results]}
    content["seconds"] = round(sum(result.seconds for result in results), 2)
    text, table = report(content), io.StringIO()
    writer = csv.DictWriter(table, results[0].rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    for name in (SUMMARY, INCOMPLETE):
        (args.output / name).unlink(missing_ok=True)
    write_text(args.output / "per_image.csv", table.getvalue())
    write_text(args.output / "summary.md", text)
    for name, figure in figures.items():
        write_atomically(args.output / name, partial(figure.savefig, dpi=100, format="png"))
    summary = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_text(args.output / (INCOMPLETE if failed else SUMMARY), summary)
    return text


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ---- summary --------------------------------------------------------------------------------------------------------


def summarize(result: Scored, calibration: Calibration | None) -> dict[str, Any]:
    """A split's part of the summary."""
    rows, bins = result.rows, result.calibration
    positive = [row for row in rows if row["positive"]]
    absent = [not row["positive"] for row in rows]
    doubts = {name: [row[name] for row in rows] for name in ("mean_uncertainty", "review_score")}
    doubts["one_minus_max_probability"] = [1.0 - row["max_probability"] for row in rows]
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
            "probability": list(map(finite, bins.mean_value.tolist())),
            "frequency": list(map(finite, bins.frequency.tolist())),
        },
        "promises": calibration and promises(rows, calibration),
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


def promises(rows: Sequence[dict[str, Any]], calibration: Calibration) -> dict[str, dict[str, Any]]:
    """How much of each promise may be wrong and how much was, as a mean over subjects; of those that were made."""
    limits = dict.fromkeys(PROMISES, calibration.alpha)
    limits |= {"kept_loss": calibration.loss_limit, "kept_pixels_wrong": calibration.pixel_limit}
    found = {}
    for name in PROMISES:
        if judged := [row for row in rows if row.get(name) is not None]:
            subjects = [row["subject"] or row["image"] for row in judged]
            values = subject_means(np.array([row[name] for row in judged]), subjects)
            low, high = bootstrap_interval(values)
            limit = None if name in ("abstained", "flagged") else limits[name]
            counts = {"rows": len(judged), "subjects": len(values)}
            found[name] = {"at_most": limit, "mean": values.mean(), "low": low, "high": high, **counts}
    return found


def areas(curve: RiskCoverage) -> dict[str, float]:
    return {name: getattr(curve, name) for name in ("aurc", "optimal_aurc", "excess_aurc", "random_aurc")}


def report(content: dict[str, Any]) -> str:
    """The summary as Markdown, with a column for each dataset and prompt design."""
    columns = [cells(result) for result in content["results"]]
    names = dict.fromkeys(name for column in columns for name in column)
    heads = [f"{result['dataset']}, {result['prompts']}" for result in content["results"]]
    lines = [["", *heads], ["---", *["---:"] * len(heads)]]
    lines += [[name, *(column.get(name, "-") for column in columns)] for name in names]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    settings, failed = content["settings"], len(content["failed"])
    incomplete = f"**Incomplete: {failed} rows could not be predicted** and are left out.\n\n" if failed else ""
    return (
        f"# {settings['model']}\n\n{table}\n{incomplete}"
        "Scores and shares in percent with 95% intervals (bootstrap over subjects, or images). NSD at a tolerance of "
        f"{settings['tolerance']:g} pixels; NSD as released is the paper's, at 2 pixels, and compares areas. ECE, ACE, "
        "Brier score and NLL (nats) are of all pixels together. AURC: lower is better, in brackets what a perfect "
        "ranking would take off. Absent AUROC: of 1 - largest probability. Promises are of the model's calibration; "
        f"bold is what was broken, if {FEWEST_SUBJECTS} subjects or more tell.\n\n"
        f"{settings['num_samples']} samples, threshold {settings['threshold']:g}, seed {settings['seed']}; "
        f"{content['device']}, {content['seconds']:.0f} s; pvl-adapter {content['versions']['pvl-adapter']}\n"
    )


def cells(result: dict[str, Any]) -> dict[str, str]:
    """A column of the report."""
    metrics, bins, curves = result["metrics"], result["calibration"], result["risk_coverage"]
    shown = {"rows": f"{result['n']}, {result['n_positive']} positive", "DSC": percent(metrics["dsc"])}
    shown |= {"DSC of positive rows": percent(metrics["dsc_positive"]), "NSD": percent(metrics["nsd"])}
    shown |= {"NSD as released": percent(metrics["nsd_released"]), "IoU": percent(metrics["iou"])}
    shown |= {name: f"{bins[name.lower()]:.4f}" for name in ("ECE", "ACE", "Brier", "NLL")}
    shown |= {
        f"AURC of {of} (excess)": f"{each['aurc']:.4f} ({each['excess_aurc']:.4f})" for of, each in curves.items()
    }
    auroc = result["absent_auroc"]["one_minus_max_probability"]
    shown["absent AUROC"] = "-" if auroc is None else f"{auroc:.3f}"
    for name, seen in (result["promises"] or {}).items():
        most, text = seen["at_most"], percent(seen)
        promised = "" if most is None else f", promised at most {100.0 * most:.4g}"
        broken = most is not None and seen["low"] > most and seen["subjects"] >= FEWEST_SUBJECTS
        shown[PROMISES[name] + promised] = f"**{text}**" if broken else text
    return shown


def percent(score: dict[str, float | None]) -> str:
    if score["mean"] is None:
        return "-"
    middle, low, high = (100.0 * (score[name] or 0.0) for name in ("mean", "low", "high"))
    return f"{middle:.2f} ({low:.1f} to {high:.1f})"


# ---- figures --------------------------------------------------------------------------------------------------------


def draw_curves(results: list[Scored]) -> dict[str, Figure]:
    """How often a pixel is foreground, over its probability; and what is left wrong when only the surest are kept."""
    reliability, kept = (Figure(figsize=size, layout="constrained") for size in ((5.5, 5.0), (9.0, 4.0)))
    calibrated, (rows, pixels) = reliability.subplots(), kept.subplots(1, 2)
    calibrated.plot([0, 1], [0, 1], color="gray", linestyle=":")
    for result in results:
        bins, filled = result.calibration, result.calibration.count > 0
        label = f"{result.split.title}: ECE {bins.expected_error:.4f}"
        calibrated.plot(bins.mean_value[filled], bins.frequency[filled], marker=".", label=label)
        for axis, curve in ((rows, result.curve), (pixels, result.pixels.curve)):
            label = f"{result.split.title}: AURC {curve.aurc:.4f}, best {curve.optimal_aurc:.4f}"
            axis.plot(curve.coverage, curve.risk, marker="." if len(curve.risk) == 1 else "", label=label)
    calibrated.set(xlabel="probability", ylabel="foreground", xlim=(0, 1), ylim=(0, 1))
    rows.set(title="rows by review score", xlabel="kept", ylabel="1 - DSC", xlim=(0, 1), ylim=(0, None))
    pixels.set(title="pixels by uncertainty", xlabel="kept", ylabel="wrong pixels", xlim=(0, 1), ylim=(0, None))
    for axis in (calibrated, rows, pixels):
        axis.legend(fontsize=7)
    return {"reliability.png": reliability, "risk_coverage.png": kept}


def draw_examples(model: pvl.MedCLIPSeg, result: Scored, args: argparse.Namespace) -> Figure:
    """Best, median and worst row, of those with something to find if there are any; predicted once more."""
    scored = [(line, place) for place, line in enumerate(result.lines) if not line["error"]]
    order = sorted([each for each in scored if each[0]["positive"]] or scored, key=lambda each: -each[0]["dsc"])
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    figure = Figure(figsize=(8.8, 7.2), layout="constrained")
    axes = figure.subplots(3, 4, subplot_kw={"xticks": [], "yticks": []})
    for (name, (line, place)), row in zip(chosen.items(), axes, strict=True):
        sample = result.split.data[place]
        ((_, predicted),) = predict(model, [sample], args)
        maps = cast(pvl.Prediction, predicted).at_original_size(0)
        row[0].imshow(sample["image"], cmap="gray", vmin=0, vmax=255)
        row[1].imshow(np.stack([maps["mask"], sample["mask"], sample["mask"]], axis=-1).astype(float))
        row[2].imshow(maps["probability"], cmap="viridis", vmin=0.0, vmax=1.0)
        row[3].imshow(maps["uncertainty"], cmap="magma", vmin=0.0, vmax=math.log(2.0))
        row[0].set_title(textwrap.fill(line["text"], 38, max_lines=3, placeholder=" ..."), fontsize=7)
        row[0].set_ylabel(f"{name}: DSC {line['dsc']:.3f}", fontsize=8)
    titles = ("missed cyan, wrong red, right white", "probability, 0 to 1", "uncertainty, 0 to ln 2 nats")
    for axis, title in zip(axes[0, 1:], titles, strict=True):
        axis.set_title(title, fontsize=8)
    figure.suptitle(result.split.title)
    return figure
