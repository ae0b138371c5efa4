"""Figures of scorecard.py that need no split into halves, and what it writes: JSON, a table and two images."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure

from pvl_adapter.trust.calibration import UNLIKE, Calibration
from pvl_adapter.trust.scores import bootstrap_interval, detection_auroc, risk_coverage

if TYPE_CHECKING:
    from scorecard import Kept

PROMISED = ("outer: share missed", "inner: share wrong", "area: outside the interval")


def write_all(content: dict[str, Any], kept: dict[str, Kept], promise: Calibration, output: Path) -> None:
    (output / "trust.json").write_text(json.dumps(strict(content), indent=2, allow_nan=False) + "\n")
    (output / "trust.md").write_text(report(content))
    draw(content, kept).savefig(output / "trust.png", dpi=110)
    draw_masks(kept, promise).savefig(output / "trust_masks.png", dpi=110)


# ---- what is written -------------------------------------------------------------------------------------------------


def study_orders(kept: Kept, args: argparse.Namespace) -> dict[str, Any]:
    """Scores that need no split: how well absence is told, what orders allow, what a temperature gains."""
    cases, extra = kept.cases, kept.extra
    told = {"presence score": cases.presence, "expected area": extra["mean"], "largest probability": extra["largest"]}
    drawn = {"statistic": detection_auroc, "groups": cases.subjects, "resamples": 2000}
    orders = {"learned risk": cases.risk, "review score": extra["review_score"], "perfect": cases.loss}
    errors, pixels = cases.pixel_errors.mean(axis=0), cases.pixels_kept.mean(axis=0)
    allowed = pixels[errors <= args.pixel_limit * pixels]
    wrong = float(errors[0])
    return {
        "presence AUROC": {
            name: {
                "value": detection_auroc(score, cases.present),
                "interval_95": bootstrap_interval(score, cases.present, **drawn),
            }
            for name, score in told.items()
        },
        "mean loss": float(cases.loss.mean()),
        "pairs kept at most, by order": {
            **{name: most_kept(order, cases.loss, args.loss_limit) for name, order in orders.items()},
            "random": float(cases.loss.mean() <= args.loss_limit),
        },
        "wrong pixels": wrong,
        "pixels kept at most, by order": {
            "uncertainty": float(allowed.max(initial=0.0)),
            "perfect": min(1.0, (1.0 - wrong) / (1.0 - args.pixel_limit)),
            "random": float(wrong <= args.pixel_limit),
        },
        **{
            f"{name} {which}": getattr(bins, of)
            for which, bins in zip(("before", "after"), kept.bins, strict=True)
            for name, of in (("ECE", "expected_error"), ("NLL", "nll"))
        },
    }


def most_kept(order: np.ndarray, loss: np.ndarray, limit: float) -> float:
    """The largest share of cases, first in this order, whose mean loss is within the limit."""
    risk = np.cumsum(loss[np.argsort(order, kind="stable")]) / np.arange(1, len(loss) + 1)
    return float((np.flatnonzero(risk <= limit) + 1).max(initial=0) / len(loss))


def setting() -> dict[str, Any]:
    """Hardware, versions and commit; the figures depend on none of them, but for rounding."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    processors = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    command = ["git", "rev-parse", "HEAD"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "processor": processors[0] if processors else platform.processor(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("pvl-adapter", "torch", "numpy", "scipy", "mapie")},
        "commit": git.stdout.strip() or None,
    }


def strict(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {name: strict(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value if value is None or isinstance(value, (int, str)) else str(value)


def report(content: dict[str, Any]) -> str:
    lines = [heading(content)]
    for alpha, found in content["in domain"]["splits"].items():
        lines += header(f"In domain, alpha {alpha}", "figure|promised|measured|se|se of splits|holds|plain threshold")
        for name, each in found.items():
            if not name.startswith("plain"):
                share = each.get("share_of_splits")
                held = {True: "yes", False: "NO"}.get(each.get("holds"), "")
                if share is not None:
                    held = f"in {share:.0%} of splits; in {each['nothing_kept']:.0%} nothing is kept"
                numbers = (each.get("promised"), each["value"], each["se"], each.get("se_of_splits"))
                plain = number(found.get(f"plain {name}", {}).get("value"))
                lines.append(f"| {name} | {' | '.join(map(number, numbers))} | {held} | {plain} |")
    lines += header("In domain, without splits", "figure|value")
    for name, value in content["in domain"]["orders"].items():
        for of, each in (value if isinstance(value, dict) else {"": value}).items():
            low, high = each["interval_95"] if isinstance(each, dict) else (None, None)
            text = f"{number(each['value'])} ({number(low)} to {number(high)})" if low else number(each)
            lines.append(f"| {name} {of} | {text} |")
    for dataset, found in content["elsewhere"].items():
        title = (
            f"{dataset}: {found['flagged']} of {found['rows']} rows are flagged, {found['unlike']} of them as unlike"
        )
        lines += header(title, "figure|promised|all rows|not flagged|rows not flagged|verdict")
        for name, each in found["figures"].items():
            parts = each["all"], each["not flagged"]
            both = " | ".join(f"{number(part['value'])} ± {number(part['se'])}" for part in parts)
            promised, verdict = number(each.get("promised")), each.get("verdict", "")
            lines.append(f"| {name} | {promised} | {both} | {parts[1]['rows']} | {verdict} |")
    return "\n".join(lines) + "\n"


def header(title: str, columns: str) -> list[str]:
    return ["", title, "", f"| {columns.replace('|', ' | ')} |", "|---" * (columns.count("|") + 1) + "|"]


def heading(content: dict[str, Any]) -> str:
    home, settings = content["in domain"], content["settings"]
    return (
        f"{settings['model']} ({settings['note']}), {settings['num_samples']} samples; {home['dataset']}: "
        f"{home['rows']} rows of {home['subjects']} subjects, {settings['splits']} splits; scores learned on others."
    )


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def draw(content: dict[str, Any], kept: dict[str, Kept]) -> Figure:
    figure = Figure(figsize=(13.5, 8.2), layout="constrained")
    (promises, outer, inner), (areas, pairs, elsewhere) = figure.subplots(2, 3)
    splits, orders = content["in domain"]["splits"], content["in domain"]["orders"]
    alphas = [float(alpha) for alpha in splits]
    places = np.arange(len(alphas))
    promises.axline((0, 0), slope=1, color="gray", linestyle=":")
    for shift, name in zip((-0.002, 0.0, 0.002), PROMISED, strict=True):
        found = [by_name[name] for by_name in splits.values()]
        values = np.array([each["value"] for each in found])
        low, high = np.array([each["range_90"] for each in found]).T
        bars = np.abs(np.array([values - low, high - values]))
        promises.errorbar(np.array(alphas) + shift, values, bars, fmt="o", capsize=3, label=name)
    promises.set(title="Promises in domain (bars: 90% of splits)", xlabel="promised at most", ylabel="measured")
    promises.legend(fontsize=8)
    sizes = (
        (outer, "outer area / truth", "plain outer area / truth", "Outer mask: area over the truth's"),
        (inner, "inner: share of truth found", "plain inner: share of truth found", "Inner mask: share of the truth"),
        (areas, "interval width / truth", "constant interval: width / truth", "Area interval: width over the truth"),
    )
    for axis, *names, title in sizes:
        other = "constant width" if axis is areas else "plain threshold"
        for offset, name, way in zip((-0.2, 0.2), names, ("learned", other), strict=True):
            values = [by_name[name]["value"] for by_name in splits.values()]
            axis.bar_label(axis.bar(places + offset, values, 0.38, label=way), fmt="%.3g", fontsize=8)
        axis.set(title=title, xlabel="alpha", xticks=places, xticklabels=alphas)
        axis.legend(fontsize=8)
    if max(by_name["plain outer area / truth"]["value"] for by_name in splits.values()) > 10:
        outer.set_yscale("log")
    cases, extra = kept[content["in domain"]["dataset"]].cases, kept[content["in domain"]["dataset"]].extra
    orders_of_pairs = {"learned risk": cases.risk, "review score": extra["review_score"], "perfect": cases.loss}
    for name, order in orders_of_pairs.items():
        curve = risk_coverage(order, cases.loss)
        pairs.plot(curve.coverage, curve.risk, label=f"{name}: AURC {curve.aurc:.3f}")
    pairs.axhline(orders["mean loss"], color="gray", label="random")
    pairs.axhline(content["settings"]["loss_limit"], color="black", linestyle=":", label="promised at most")
    pairs.set(title="Abstention: loss of pairs that are kept", xlabel="share of pairs kept", ylabel="mean of 1 - Dice")
    pairs.legend(fontsize=8)
    for place, (dataset, found) in enumerate(content["elsewhere"].items()):
        judged = {name: each for name, each in found["figures"].items() if "promised" in each}
        rows = np.arange(len(judged)) + 0.25 * place
        for part, fill in (("all", "full"), ("not flagged", "none")):
            ratios = [each[part]["value"] / each["promised"] for each in judged.values()]
            label = f"{dataset}, {part} ({found['rows'] - (part != 'all') * found['flagged']} rows)"
            elsewhere.plot(ratios, rows, "o", fillstyle=fill, color=f"C{place}", label=label)
        elsewhere.set(yticks=np.arange(len(judged)), yticklabels=list(judged))
    elsewhere.axvline(1.0, color="black", linestyle=":")
    elsewhere.set(title="Elsewhere: times what is promised", xlim=(0, None))
    elsewhere.invert_yaxis()
    if content["elsewhere"]:
        elsewhere.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.2, -0.08), ncols=2)
    return figure


def draw_masks(kept: dict[str, Kept], promise: Calibration) -> Figure:
    """Of each dataset the first rows with something to find, of 1% of the image at least."""
    columns = 4
    figure = Figure(figsize=(3.1 * columns, 3.5 * len(kept)), layout="constrained")
    for (dataset, each), axes in zip(kept.items(), figure.subplots(len(kept), columns, squeeze=False), strict=True):
        prediction, truth, _, texts = each.shown
        familiarity = promise.familiarity(prediction)
        masks = {"outer": promise.outer_mask(prediction), "inner": promise.inner_mask(prediction)}
        first = [index for index in range(len(truth)) if truth[index].float().mean() >= 0.01]
        for axis in axes:
            axis.set_axis_off()
        for axis, index in zip(axes, first, strict=False):
            height, width = truth[index].shape
            axis.imshow(prediction.images[index], cmap="gray", extent=(0, width, height, 0))
            for name, color in (("outer", "tab:orange"), ("inner", "tab:green"), ("truth", "white")):
                mask = truth if name == "truth" else masks[name]
                if mask is not None and mask[index].any():
                    y, x = np.arange(height) + 0.5, np.arange(width) + 0.5
                    axis.contour(x, y, mask[index].numpy(), [0.5], colors=color, linewidths=1.2)
            flagged = familiarity[index] <= UNLIKE or each.extra["unseen"][index]
            state = "flagged" if flagged else "not flagged"
            axis.set_title(textwrap.fill(f"{dataset}, {state}: {texts[index]}", 42), fontsize=7)
    figure.suptitle(f"White: truth. Orange: outer mask. Green: inner mask. alpha {promise.alpha}", fontsize=9)
    return figure
