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
    "outer_missed": "of the structure outside outer_mask",
    "inner_wrong": "of inner_mask not of the structure",
    "called_present": "of absent structures called present",
    "called_absent": "of present structures called absent",
    "outside_interval": "of areas outside area_interval",
    "kept_loss": "1 - Dice of cases not abstained from",
    "kept_pixels_wrong": "of pixels not abstained from wrong",
    "abstained": "of cases abstained from",
    "flagged": "of cases flagged as unlike the calibration's",
}
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
            found[name] = {"at_most": limit, "mean": values.mean(), "low": low, "high": high, "rows": len(judged)}
    return found


def areas(curve: RiskCoverage) -> dict[str, float]:
    return {name: getattr(curve, name) for name in ("aurc", "optimal_aurc", "excess_aurc", "random_aurc")}


def report(content: dict[str, Any]) -> str:
    """The summary as Markdown."""
    heads = ["dataset", "prompts", "rows", "positive", "DSC", "DSC positive", "NSD", "NSD released", "IoU"]
    heads += ["ECE", "ACE", "Brier", "NLL", "AURC rows (excess)", "AURC pixels (excess)", "absent AUROC"]
    lines, kept = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]], list[list[str]]()
    for result in content["results"]:
        metrics, curves = result["metrics"], result["risk_coverage"]
        scores = [percent(metrics[name]) for name in ("dsc", "dsc_positive", "nsd", "nsd_released", "iou")]
        ranked = [f"{curves[of]['aurc']:.4f} ({curves[of]['excess_aurc']:.4f})" for of in ("rows", "pixels")]
        auroc = result["absent_auroc"]["one_minus_max_probability"]
        calibrated = [f"{result['calibration'][name]:.4f}" for name in ("ece", "ace", "brier", "nll")]
        cells = [result["dataset"], result["prompts"], result["n"], result["n_positive"], *scores, *calibrated, *ranked]
        lines.append([*map(str, cells), "-" if auroc is None else f"{auroc:.3f}"])
        for name, each in (result["promises"] or {}).items():
            most = "" if each["at_most"] is None else f"{100.0 * each['at_most']:.4g}"
            seen = f"**{percent(each)}**" if most and each["low"] > each["at_most"] else percent(each)
            kept.append([result["dataset"], result["prompts"], PROMISES[name], most, seen, str(each["rows"])])
    settings = content["settings"]
    failed = len(content["failed"])
    incomplete = f"**Incomplete: {failed} rows could not be predicted** and are left out.\n\n" if failed else ""
    told = [["dataset", "prompts", "share of", "promised at most", "seen", "rows"], ["---"] * 3 + ["---:"] * 3, *kept]
    judged = (
        f"Promises of the calibration, in percent, means over subjects with 95% intervals; what was broken is bold.\n\n"
        f"{markdown(told)}\n"
    )
    return (
        f"# {settings['model']}\n\n{markdown(lines)}\n"
        f"{incomplete}Scores in percent with 95% intervals (bootstrap over subjects, or images). NSD at a tolerance of "
        f"{settings['tolerance']:g} pixels; NSD released is the paper's score, at 2 pixels, and compares areas. "
        "ECE, ACE, Brier score and NLL (nats) are of all pixels together. AURC: lower is better, in brackets what a "
        "perfect ranking would take off. Absent AUROC: of 1 - largest probability.\n\n"
        f"{judged * bool(kept)}"
        f"{settings['num_samples']} samples, threshold {settings['threshold']:g}, seed {settings['seed']}; "
        f"{content['device']}, {content['seconds']:.0f} s; pvl-adapter {content['versions']['pvl-adapter']}\n"
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
