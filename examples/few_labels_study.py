"""`study.py few-labels`: makes data, pretrains a CLIP, runs few_labels.py for every way, number of subjects and seed.

What they have scored it writes as tables, tests over subjects and a figure.
"""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from scipy.stats import wilcoxon

if TYPE_CHECKING:
    from study import Study

Scores = dict[tuple[str, int], list[dict[str, Any]]]  # by way and labelled subjects: scores.json of each seed

HERE = Path(__file__).parent
LABELLED = (1, 3, 10, 25, 50, 100)  # subjects, of 100
RANDOM = "small-patch-16"
WAYS = {  # method and backbone; None is the CLIP that is pretrained here
    "adapters": ("adapters", None),
    "adapters, random CLIP": ("adapters", RANDOM),
    "unet": ("unet", RANDOM),
    "unet-text": ("unet-text", None),
    "lora": ("lora", None),
    "head": ("head", None),
    "deterministic": ("deterministic", None),
    "one-way": ("one-way", None),
    "no-contrastive": ("no-contrastive", None),
    "hard-targets": ("hard-targets", None),
}
PLACES = ("in domain", "out of domain")
COLUMNS = {"dsc": "DSC", "nsd": "NSD", "ece": "ECE", "aurc": "AURC", "absent_auroc": "absent AUROC"}
PAPER = {  # what each takes off the harmonic mean of DSC in and out of distribution, 83.76 (arXiv 2602.20423)
    "deterministic": 10.36,
    "head": 18.01,
    "one-way": 0.91,
    "no-contrastive": 1.92,
    "hard-targets": 1.11,
}


def run(study: Study) -> str:
    """Run what is missing and report all that is there; the seed is the outermost loop, so a part says something."""
    args = study.args
    clip, home = args.output / "clip", args.data_folder / "Colin27_subjects"
    make = [sys.executable, HERE / "make_brains.py", "--output", args.data_folder]
    if not home.is_dir():
        study.run([*make, "Colin27", "--subjects", "400", "--captions", "1000"])
    if not (args.data_folder / "INIA19_subjects").is_dir():
        study.run([*make, "MNI152", "INIA19", "--subjects", "40"])
    if any(WAYS[way][1] is None for way in args.ways) and not (clip / "scores.json").is_file():
        command = [sys.executable, HERE / "pretrain_clip.py", "--data", args.data_folder / "Colin27_captions"]
        resume = ["--resume"] * (clip / "checkpoint.pt").is_file()
        study.run([*command, "--output", clip, *shlex.split(args.clip_args), *resume])
    for seed, labelled, way in product(study.seeds, args.labelled, args.ways):
        (method, backbone), output = WAYS[way], folder_of(args.output, way) / f"{labelled}-seed{seed}"
        if not (output / "scores.json").is_file():
            command = [sys.executable, HERE / "few_labels.py", method, "--labelled", labelled, "--data", home]
            command += ["--recipe", "few_labels", "--backbone", backbone or clip, "--seed", seed]
            resume = ["--resume"] * any((output / "checkpoints").glob("[0-9]*"))
            study.run([*command, "--output", output, *shlex.split(args.train_args), *resume])
    return report(finished(args.output), args.output, seconds=study.seconds)


def folder_of(output: Path, way: str) -> Path:
    return output / "few-labels" / way.replace(",", "").replace(" ", "-")


def finished(output: Path) -> Scores:
    """What has been scored so far, by this call and those before."""
    scores = Scores()
    for way in WAYS:
        found = [json.loads(path.read_text()) for path in sorted(folder_of(output, way).glob("*/scores.json"))]
        for run in sorted(found, key=lambda run: (run["labelled"], run["seed"])):
            scores.setdefault((way, run["labelled"]), []).append(run)
    return scores


def figures(runs: Sequence[dict[str, Any]], column: str, place: str) -> list[float]:
    """A figure of each run, in domain or as the mean over the test sets that are not."""
    values = []
    for run in runs:
        home, *others = (test[column] for test in run["tests"].values())
        values.append(home if place == PLACES[0] else fmean(others))
    return values


def error(values: Sequence[float]) -> float:
    """Standard error of the mean over seeds."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def mean_and_error(values: Sequence[float], *, percent: bool) -> str:
    if not values:
        return ""
    factor, digits = (100.0, 1) if percent else (1.0, 3)
    text = f"{factor * fmean(values):.{digits}f}"
    return text + (f" ± {factor * error(values):.{digits}f}" if len(values) > 1 else "")


def dsc_of_subjects(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean over seeds by brain and subject; a fault of the scan shows the same subjects again and does not count."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, test in run["tests"].items():
            for subject, dsc in test["subjects"].items() if name.endswith("_subjects") else ():
                found.setdefault(f"{name}/{subject}", []).append(dsc)
    return {subject: fmean(values) for subject, values in found.items()}


def compare(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean difference of DSC over subjects, of the seeds that both have, and Wilcoxon's signed-rank test of it."""
    seeds = {run["seed"] for run in one} & {run["seed"] for run in other}
    first, second = (dsc_of_subjects([run for run in runs if run["seed"] in seeds]) for runs in (one, other))
    differences = [first[subject] - second[subject] for subject in first.keys() & second.keys()]
    p = float(wilcoxon(differences).pvalue) if any(differences) else 1.0
    return {"difference": fmean(differences), "subjects": len(differences), "seeds": len(seeds), "p": p}


def report(scores: Scores, folder: Path, *, seconds: float) -> str:
    """Write few-labels.md, .csv, .json and .png; returns the first."""
    ways, numbers = list(dict.fromkeys(way for way, _ in scores)), sorted({number for _, number in scores})
    tables = []
    for column, title in COLUMNS.items():
        for place in PLACES:
            lines = [[f"{title}, {place}; labelled subjects:", *map(str, numbers)]]
            for way in ways:
                cells = [figures(scores.get((way, number), []), column, place) for number in numbers]
                lines.append([way, *(mean_and_error(each, percent=column in ("dsc", "nsd")) for each in cells)])
            tables.append(markdown(lines))
    first, tests = ways[0], {}
    lines = [[f"{first}, less", "labelled", "DSC, points", "subjects", "p (Wilcoxon)", "paper"]]
    for way, number in scores:
        known = scores.get((first, number), []) if way != first else []
        if {run["seed"] for run in known} & {run["seed"] for run in scores[way, number]}:
            test = compare(known, scores[way, number])
            tests[f"{way}, {number}"] = test
            paper = f"{PAPER[way]:+.2f}" if way in PAPER else ""
            points = f"{100.0 * test['difference']:+.1f}"
            lines.append([way, str(number), points, str(test["subjects"]), f"{test['p']:.2g}", paper])
    text = "\n".join([*tables, markdown(lines)])
    (folder / "few-labels.md").write_text(text, encoding="utf-8")
    runs = [{"way": way, **run} for (way, _), each in scores.items() for run in each]
    content = {"study": "few-labels", "tests": tests, "runs": runs, "seconds_of_this_call": round(seconds, 1)}
    (folder / "few-labels.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with (folder / "few-labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["way", "labelled", "seed", "test", *COLUMNS])
        for run in runs:
            for test, values in run["tests"].items():
                cells = [round(values[column], 5) for column in COLUMNS]
                writer.writerow([run["way"], run["labelled"], run["seed"], test, *cells])
    draw(scores, ways, numbers, folder / "few-labels.png")
    return text


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head."""
    head, *rows = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *rows])


def draw(scores: Scores, ways: Sequence[str], numbers: Sequence[int], path: Path) -> None:
    """DSC against the number of labelled subjects, in and out of domain."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, place in zip(axes, PLACES, strict=True):
        for rank, way in enumerate(ways):
            at = [number for number in numbers if (way, number) in scores]
            values = [[100.0 * each for each in figures(scores[way, number], "dsc", place)] for number in at]
            style = ("o-", "s--", "x:")[min(rank // 3, 2)]
            axis.errorbar(at, list(map(fmean, values)), list(map(error, values)), fmt=style, label=way, capsize=2)
        axis.set(xscale="log", xlabel="labelled subjects", title=place)
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("DSC (%) where there is something to find")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=100)
