"""Run one of the paper's four studies, or one of two of our own: everything that is missing, then table and figure.

    python examples/make_brains.py                                     # once, for the brains
    python examples/study.py domain-generalization                     # on the brains, no download
    python examples/study.py data-efficiency --suite paper --launch "accelerate launch --num_processes 4"

Studies: data-efficiency (10, 25, 50 and 100% of the training rows), domain-generalization (train on the first dataset
of a group, test on all of it), prompt-designs (the same, asked in five ways), backbones (the same, with other CLIPs).
Not in the paper: semi-supervised (10% of the labels, with and without the other pictures), and few-labels (ten ways to
train on 1 to 100 subjects, in and out of domain, on a CLIP that is pretrained here: few_labels_study.py). `all` is one
after the other.
Suites: "brains" trains a small random CLIP on Colin27; "paper" is the published one, with its figures beside ours. Or
your own: --group TRAINED,OTHER,... and --recipe.

Every training and evaluation is a command of its own (examples/train.py, pvl-adapter evaluate), printed before it runs.
What is finished is not run again, what was killed is resumed: run the same command again. Studies share what they can:
the middle three need one training, and the first one's 100% is the same.

Writes to --output (runs/studies): runs/ and evaluations/, and of each study NAME.md, NAME.csv, NAME.json, NAME.png.

Cost and score: see docs/studies.md. The paper's suite is 24 trainings for the first study and 7 to 16 for the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, harmonic_mean, stdev
from typing import Any

import few_labels_study

HERE = Path(__file__).parent
FRACTIONS = (10, 25, 50, 100)
PROMPTS = ("original", "overdescriptive", "missing_location", "contradictory", "underdescriptive")


@dataclass(frozen=True)
class Suite:
    """Datasets and backbones of the studies."""

    recipe: str
    seed: int  # of the first training
    data_efficiency: tuple[str, ...]  # datasets that are trained on by parts and tested on
    groups: dict[str, tuple[str, ...]]  # by name: the dataset that is trained on, then others that are only tested on
    backbones: tuple[str, ...]  # the first is that of the recipe
    published: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # DSC in % by study, row, column
    epochs: dict[str, int] = field(default_factory=dict)  # of single datasets, where other than the recipe's


PAPER = Suite(
    recipe="released",
    seed=666,
    data_efficiency=("BUSI", "BTMRI", "ISIC", "Kvasir", "Covid19", "EUS"),
    groups={
        "BUS": ("BUSI", "BUSBRA", "BUSUC", "BUID", "UDIAT"),
        "ENDO": ("Kvasir", "ColonDB", "ClinicDB", "CVC300", "BKAI"),
        "DERM": ("ISIC", "UWaterlooSkinCancer"),
        "BRAIN": ("BTMRI", "BRISC"),
    },
    backbones=("UniMedCLIP", "BiomedCLIP", "CLIP", "PubMedCLIP"),
    published={  # arXiv 2602.20423
        "data-efficiency": {
            "10%": {"mean": 81.10},
            "25%": {"mean": 85.08},
            "50%": {"mean": 87.18},
            "100%": {"mean": 88.66},
        },
        "domain-generalization": {"all": {"ID": 89.11, "OOD": 79.02, "HM": 83.76}},
        "prompt-designs": {
            "original": {"HM": 83.76},
            "overdescriptive": {"HM": 78.48},
            "contradictory": {"HM": 65.79},
            "underdescriptive": {"HM": 56.82},
        },
        "backbones": {
            "UniMedCLIP": {"HM": 83.76},
            "BiomedCLIP": {"HM": 82.48},
            "CLIP": {"HM": 81.07},
            "PubMedCLIP": {"HM": 79.28},
        },
    },
    epochs={"EUS": 10},
)

BRAINS = Suite(
    recipe="brains",
    seed=0,
    data_efficiency=("Colin27",),
    groups={"brains": ("Colin27", "MNI152", "INIA19")},
    backbones=("small-patch-16", "small-patch-8"),
)


@dataclass(frozen=True)
class Training:
    """A training of a study."""

    data: str
    fraction: int
    backbone: str | None
    seed: int
    consistency: float | None = None  # of train_semi.py; None is train.py

    @property
    def name(self) -> str:
        fraction = "" if self.fraction == 100 else f"_{self.fraction}"
        semi = "" if self.consistency is None else f"-consistency{self.consistency:g}"
        name = f"{Path(self.data).name}{fraction}-{self.backbone or 'recipe'}{semi}-seed{self.seed}"
        return name.replace("/", "_")


class Table(dict[str, dict[str, list[float]]]):
    """By row and column, a figure in percent for each seed."""

    def add(self, row: str, figures: dict[str, float]) -> None:
        for column, value in figures.items():
            self.setdefault(row, {}).setdefault(column, []).append(value)


class Study:
    """Runs what is missing and reads what is there."""

    def __init__(self, suite: Suite, args: argparse.Namespace) -> None:
        self.suite, self.args, self.seconds = suite, args, 0.0
        self.seeds = range(suite.seed, suite.seed + args.seeds)

    def data_efficiency(self) -> Table:
        """Rows are parts of the training rows, columns datasets."""
        table = Table()
        for fraction in FRACTIONS:
            for seed in self.seeds:
                scores = self.score_each(Training("", fraction, None, seed))
                table.add(f"{fraction}%", {**scores, "mean": fmean(scores.values())})
        return table

    def semi_supervised(self) -> Table:
        """Rows are trainings with 10% of the labels, columns datasets."""
        table = Table()
        for way, consistency in {"labels alone": 0.0, "and unlabelled images": self.args.consistency}.items():
            for seed in self.seeds:
                table.add(way, self.score_each(Training("", 10, None, seed, consistency)))
        return table

    def domain_generalization(self) -> Table:
        """Rows are datasets and all of them, columns in distribution, out of it, and the harmonic mean of both."""
        table = Table()
        for seed in self.seeds:
            scores = self.generalization(None, "original", seed)
            for column, figures in scores.items():
                for name, value in figures.items():
                    table.add(name, {column: value})
            table.add("all", summary(scores))
        return table

    def prompt_designs(self) -> Table:
        """Rows are designs, columns as above."""
        return self.compare({design: (None, design) for design in PROMPTS})

    def backbones(self) -> Table:
        """Rows are backbones, columns as above."""
        first, *others = self.suite.backbones
        return self.compare({first: (None, "original"), **{name: (name, "original") for name in others}})

    def compare(self, ways: dict[str, tuple[str | None, str]]) -> Table:
        table = Table()
        for way, (backbone, design) in ways.items():
            for seed in self.seeds:
                table.add(way, summary(self.generalization(backbone, design, seed)))
        return table

    def generalization(self, backbone: str | None, design: str, seed: int) -> dict[str, dict[str, float]]:
        """DSC of every dataset, in ("ID") and out of ("OOD") distribution."""
        scores: dict[str, dict[str, float]] = {"ID": {}, "OOD": {}}
        for tested in self.suite.groups.values():
            for name, dsc in self.score(Training(tested[0], 100, backbone, seed), tested, design).items():
                scores["ID" if name == tested[0] else "OOD"][name] = dsc
        return scores

    def score_each(self, training: Training) -> dict[str, float]:
        """DSC of every dataset of the data-efficiency study, trained on itself."""
        scores: dict[str, float] = {}
        for name in self.suite.data_efficiency:
            scores |= self.score(replace(training, data=name), [name], "original")
        return scores

    def score(self, training: Training, tested: Sequence[str], prompts: str) -> dict[str, float]:
        """Mean DSC in percent of each dataset, from a model that is trained first if need be."""
        run = self.args.output / "runs" / training.name
        self.train(training, run)
        names = "+".join(Path(name).name for name in tested)
        summary = self.args.output / "evaluations" / f"{training.name}-on-{names}-{prompts}" / "summary.json"
        if not summary.is_file():
            command = [sys.executable, "-m", "pvl_adapter", "evaluate", str(run / "last")]
            command += ["--prompts", prompts, "--data", *map(self.folder, tested), "--output", str(summary.parent)]
            self.run([*command, *shlex.split(self.args.evaluate_args)])
        results = json.loads(summary.read_text())["results"]  # in the order of --data
        return {name: 100.0 * each["metrics"]["dsc"]["mean"] for name, each in zip(tested, results, strict=True)}

    def train(self, training: Training, run: Path) -> None:
        if (run / "scores.json").is_file():
            return
        semi = training.consistency is not None
        command = [*(shlex.split(self.args.launch) or [sys.executable]), str(HERE / f"train{'_semi' * semi}.py")]
        command += ["--data", self.folder(training.data), "--recipe", self.suite.recipe, "--seed", str(training.seed)]
        options = {"--fraction": training.fraction, "--consistency": training.consistency}
        options |= {"--backbone": training.backbone, "--epochs": self.suite.epochs.get(training.data)}
        for name, value in options.items():
            command += [] if value is None or (name, value) == ("--fraction", 100) else [name, str(value)]
        command += shlex.split(self.args.semi_args) if semi else []
        command += ["--output", str(run), *shlex.split(self.args.train_args)]
        self.run(command + ["--resume"] * any((run / "checkpoints").glob("[0-9]*")))

    def folder(self, name: str) -> str:
        return name if "/" in name else str(self.args.data_folder / name)

    def run(self, command: Sequence[object]) -> None:
        command = list(map(str, command))
        print(f"$ {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        code = subprocess.run(command, check=False).returncode
        self.seconds += time.perf_counter() - started
        if code:
            raise SystemExit(f"the command above ended with code {code}; fix its cause and run this again to continue")


def summary(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over datasets, and their harmonic mean."""
    means = {column: fmean(figures.values()) for column, figures in scores.items()}
    return {**means, "HM": harmonic_mean(means.values())}


def report(name: str, table: Table, study: Study) -> None:
    """Print the table, and write it and its figure."""
    published, folder = study.suite.published.get(name, {}), study.args.output
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    theirs = [column for column in columns if any(column in row for row in published.values())]
    lines = [["", *columns, *(f"{column} (paper)" for column in theirs)]]
    for row, figures in table.items():
        ours = [mean_and_deviation(figures.get(column, [])) for column in columns]
        paper = [[value] if (value := published.get(row, {}).get(column)) else [] for column in theirs]
        lines.append([row, *ours, *map(mean_and_deviation, paper)])
    text = few_labels_study.markdown(lines)
    content = {
        "study": name,
        "unit": "DSC in percent, mean over rows; of several seeds mean and standard deviation",
        "recipe": study.suite.recipe,
        "seeds": list(study.seeds),
        "table": table,
        "published": published,
        "seconds_of_this_call": round(study.seconds, 1),
    }
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    draw(name, table, published, folder / f"{name}.png")
    print(f"\n{text}\n{name}.md, .csv, .json and .png are in {folder}")


def mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def draw(name: str, table: Table, published: dict[str, dict[str, float]], path: Path) -> None:
    """A bar per row and column; what the paper has as a line across."""
    from matplotlib.figure import Figure  # takes a second, which --help need not wait for

    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    figure = Figure(figsize=(max(5.0, 1.3 * len(table)), 3.6), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(columns)
    for number, column in enumerate(columns):
        shift = (number - (len(columns) - 1) / 2) * width
        bars = {row: at + shift for at, row in enumerate(table) if column in table[row]}
        values = [table[row][column] for row in bars]
        errors = [stdev(each) if len(each) > 1 else 0.0 for each in values]
        axis.bar(bars.values(), [fmean(each) for each in values], width, yerr=errors, label=column)
        for row, at in bars.items():
            if (value := published.get(row, {}).get(column)) is not None:
                axis.plot([at - width / 2, at + width / 2], [value, value], color="black")
    axis.set(title=name, ylabel="DSC (%)", ylim=(0, 100), xticks=range(len(table)))
    axis.set_xticklabels(list(table), rotation=20 if len(table) > 4 else 0)
    axis.legend()
    figure.savefig(path, dpi=100)


STUDIES = {
    "data-efficiency": Study.data_efficiency,
    "domain-generalization": Study.domain_generalization,
    "prompt-designs": Study.prompt_designs,
    "backbones": Study.backbones,
    "semi-supervised": Study.semi_supervised,
}
FEW_LABELS = "few-labels"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    study = Study(args.suite, args)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in (*STUDIES, FEW_LABELS) if args.study == "all" else (args.study,):
        if name == FEW_LABELS:
            print(few_labels_study.run(study))
        else:
            report(name, STUDIES[name](study), study)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("study", choices=(*STUDIES, FEW_LABELS, "all"))
    add("--suite", choices=("brains", "paper"), default="brains", help="(%(default)s)")
    add("--group", action="append", help="your own datasets, instead: TRAINED,TESTED,... (may be repeated)")
    add("--recipe", help="instead of the suite's")
    add("--backbones", nargs="+", help="instead of the suite's; the first is that of the recipe")
    add("--seeds", type=int, default=1, help="trainings of each kind (%(default)s)")
    add("--data-folder", type=Path, default=Path("data"), help="where the datasets are (%(default)s)")
    add("--launch", default="", help='instead of python: "accelerate launch --num_processes 4"')
    add("--consistency", type=float, default=1.0, help="of the semi-supervised study (%(default)s)")
    labelled, ways = few_labels_study.LABELLED, few_labels_study.WAYS
    add("--labelled", type=int, nargs="+", default=labelled, help="subjects, for few-labels (%(default)s)")
    add("--ways", nargs="+", choices=ways, default=[*ways], metavar="WAY", help=f"for few-labels: {', '.join(ways)}")
    add("--clip-args", default="", help='more for examples/pretrain_clip.py: "--steps 8000"')
    add("--semi-args", default="", help='more for examples/train_semi.py: "--epochs 80"')
    add("--train-args", default="", help='more for examples/train.py: "--mixed-precision bf16"')
    add("--evaluate-args", default="", help='more for pvl-adapter evaluate: "--num-samples auto"')
    add("--output", type=Path, default=Path("runs/studies"), help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}, expected 1 or more")
    suite = PAPER if args.suite == "paper" else BRAINS
    changes: dict[str, Any] = {}
    if args.group:
        groups = {each: tuple(each.split(",")) for each in args.group}
        if alone := [name for name, group in groups.items() if len(group) < 2]:
            parser.error(f"--group {alone[0]} names one dataset, expected the one to train on and one more or several")
        trained = tuple(group[0] for group in groups.values())
        changes |= {"groups": groups, "data_efficiency": trained, "published": {}, "epochs": {}}
    changes |= {"recipe": args.recipe} if args.recipe else {}
    changes |= {"backbones": tuple(args.backbones)} if args.backbones else {}
    args.suite = replace(suite, **changes)
    return args


if __name__ == "__main__":
    main()
