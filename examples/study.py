"""Run one of the paper's four studies: everything that is missing, then its table and figure.

    python examples/make_brains.py                                     # once, for the brains
    python examples/study.py domain-generalization                     # on the brains, no download
    python examples/study.py data-efficiency --suite paper --launch "accelerate launch --num_processes 4"

Studies: data-efficiency (10, 25, 50 and 100% of the training rows), domain-generalization (train on the first dataset
of a group, test on all of it), prompt-designs (the same, asked in five ways), backbones (the same, with other CLIPs),
and semi-supervised (10% of the labels, with and without the other pictures; not in the paper).
Suites: "brains" trains a small random CLIP on Colin27; "paper" is the published one, with its figures beside ours. Or
your own: --group TRAINED,OTHER,... and --recipe.

Every training and evaluation is a command of its own (examples/train.py, examples/evaluate.py), printed before it runs.
What is finished is not run again, what was killed is resumed: run the same command again. Studies share what they can:
the middle three need one training, and the first one's 100% is the same.

Writes to --output (runs/studies): runs/ and evaluations/, and of each study NAME.md, NAME.csv, NAME.json, NAME.png.

Cost and score: see docs/studies.md. The paper's suite is 24 trainings for the first study and 7 to 16 for the others.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean, stdev
from typing import Any

from matplotlib.figure import Figure

from pvl_adapter.atomic import write_atomically

HERE = Path(__file__).parent
FRACTIONS = (10, 25, 50, 100)
PROMPTS = ("original", "overdescriptive", "missing_location", "contradictory", "underdescriptive")


@dataclass(frozen=True)
class Suite:
    """Datasets and backbones of the studies.

    Attributes:
        recipe: Of every training.
        model: Which of a run's models is scored, "best" or "last".
        seed: Of the first training.
        data_efficiency: Datasets that are trained on by parts and tested on.
        groups: By name: the dataset that is trained on, then others that are only tested on.
        backbones: The first is that of the recipe.
        published: The paper's DSC in percent, by study and row.
        epochs: Of single datasets, where other than the recipe's.
    """

    recipe: str
    model: str
    seed: int
    data_efficiency: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    backbones: tuple[str, ...]
    published: dict[str, dict[str, dict[str, float]]]
    epochs: dict[str, int]


PAPER = Suite(
    recipe="released",
    model="last",
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
    model="last",
    seed=0,
    data_efficiency=("Colin27",),
    groups={"brains": ("Colin27", "MNI152", "INIA19")},
    backbones=("small-patch-16", "small-patch-8"),
    published={},
    epochs={},
)


@dataclass(frozen=True)
class Trained:
    """A training of a study."""

    data: str
    fraction: int
    backbone: str | None
    seed: int
    consistency: float | None = None  # of a training by train_semi.py

    @property
    def name(self) -> str:
        fraction = "" if self.fraction == 100 else f"_{self.fraction}"
        semi = "" if self.consistency is None else f"-consistency{self.consistency:g}"
        name = f"{Path(self.data).name}{fraction}-{self.backbone or 'recipe'}{semi}-seed{self.seed}"
        return name.replace("/", "_")


Table = dict[str, dict[str, list[float]]]
"""By row and column, a figure in percent for each seed."""


class Study:
    """Runs what is missing and reads what is there.

    Args:
        suite: Of datasets.
        args: The command line.
    """

    def __init__(self, suite: Suite, args: argparse.Namespace) -> None:
        self.suite, self.args = suite, args
        self.seeds = range(suite.seed, suite.seed + args.seeds)
        self.seconds = 0.0

    def data_efficiency(self) -> Table:
        """Rows are parts of the training rows, columns datasets."""
        table: Table = {}
        for fraction in FRACTIONS:
            row = table.setdefault(f"{fraction}%", {})
            for seed in self.seeds:
                scores = []
                for name in self.suite.data_efficiency:
                    trained = Trained(name, fraction, None, seed)
                    scores.append(self.score(trained, tested=[name], prompts="original")[name])
                    row.setdefault(name, []).append(scores[-1])
                row.setdefault("mean", []).append(fmean(scores))
        return table

    def domain_generalization(self) -> Table:
        """Rows are datasets and all of them, columns in distribution, out of it, and the harmonic mean of both."""
        table: Table = {}
        for seed in self.seeds:
            within, outside = self._generalization(None, "original", seed)
            for name, value in within.items():
                table.setdefault(name, {}).setdefault("ID", []).append(value)
            for name, value in outside.items():
                table.setdefault(name, {}).setdefault("OOD", []).append(value)
            for column, value in _summary(within, outside).items():
                table.setdefault("all", {}).setdefault(column, []).append(value)
        return table

    def prompt_designs(self) -> Table:
        """Rows are designs, columns as above."""
        return self._compare({design: (None, design) for design in PROMPTS})

    def backbones(self) -> Table:
        """Rows are backbones, columns as above."""
        first, *others = self.suite.backbones
        return self._compare({first: (None, "original"), **{name: (name, "original") for name in others}})

    def semi_supervised(self) -> Table:
        """Rows are trainings with 10% of the labels, columns datasets."""
        table: Table = {}
        for way, consistency in {"labels alone": 0.0, "and unlabelled pictures": self.args.consistency}.items():
            for seed in self.seeds:
                for name in self.suite.data_efficiency:
                    trained = Trained(name, 10, None, seed, consistency=consistency)
                    scores = self.score(trained, tested=[name], prompts="original")
                    table.setdefault(way, {}).setdefault(name, []).append(scores[name])
        return table

    def _compare(self, ways: dict[str, tuple[str | None, str]]) -> Table:
        table: Table = {}
        for way, (backbone, design) in ways.items():
            for seed in self.seeds:
                for column, value in _summary(*self._generalization(backbone, design, seed)).items():
                    table.setdefault(way, {}).setdefault(column, []).append(value)
        return table

    def _generalization(
        self, backbone: str | None, design: str, seed: int
    ) -> tuple[dict[str, float], dict[str, float]]:
        """DSC of every dataset, in and out of distribution."""
        within: dict[str, float] = {}
        outside: dict[str, float] = {}
        for tested in self.suite.groups.values():
            scores = self.score(Trained(tested[0], 100, backbone, seed), tested=tested, prompts=design)
            within[tested[0]] = scores[tested[0]]
            outside |= {name: scores[name] for name in tested[1:]}
        return within, outside

    def score(self, trained: Trained, *, tested: Sequence[str], prompts: str) -> dict[str, float]:
        """Mean DSC in percent of each dataset, from a model that is trained first if need be."""
        run = self.args.output / "runs" / trained.name
        self._train(trained, run)
        names = "+".join(Path(name).name for name in tested)
        folder = self.args.output / "evaluations" / f"{trained.name}-on-{names}-{prompts}"
        if not (folder / "summary.json").is_file():
            command = [*_python("evaluate.py"), str(run / self.suite.model), "--prompts", prompts, "--data"]
            command += [self._data(name) for name in tested]
            self._run([*command, "--output", str(folder), *shlex.split(self.args.evaluate_args)])
        return dict(zip(tested, read_dsc(folder / "summary.json"), strict=True))

    def _train(self, trained: Trained, run: Path) -> None:
        if (run / "scores.json").is_file():
            return
        script = "train.py" if trained.consistency is None else "train_semi.py"
        command = [*shlex.split(self.args.launch), str(HERE / script)] if self.args.launch else _python(script)
        command += ["--data", self._data(trained.data), "--recipe", self.suite.recipe, "--seed", str(trained.seed)]
        if trained.fraction != 100:
            command += ["--fraction", str(trained.fraction)]
        if trained.consistency is not None:
            command += ["--consistency", str(trained.consistency), *shlex.split(self.args.semi_args)]
        if trained.backbone:
            command += ["--backbone", trained.backbone]
        if epochs := self.suite.epochs.get(trained.data):
            command += ["--epochs", str(epochs)]
        command += ["--output", str(run), *shlex.split(self.args.train_args)]
        self._run(command + ["--resume"] * (run / "checkpoint.pt").is_file())

    def _data(self, name: str) -> str:
        """The folder of a dataset."""
        return name if "/" in name else str(self.args.data_folder / name)

    def _run(self, command: list[str]) -> None:
        print(f"$ {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        code = subprocess.run(command, check=False).returncode
        self.seconds += time.perf_counter() - started
        if code:
            raise SystemExit(
                f"the command above ended with code {code}; mend that and run this again: it goes on there"
            )


def _python(script: str) -> list[str]:
    return [sys.executable, str(HERE / script)]


def _summary(within: dict[str, float], outside: dict[str, float]) -> dict[str, float]:
    """Means over datasets, and their harmonic mean."""
    both = {"ID": fmean(within.values()), "OOD": fmean(outside.values())}
    return {**both, "HM": harmonic_mean(both.values())}


def read_dsc(path: Path) -> list[float]:
    """Mean DSC in percent of each dataset of an evaluation, in the order they were named in."""
    return [100.0 * result["metrics"]["dsc"]["mean"] for result in json.loads(path.read_text())["results"]]


# ---- report ---------------------------------------------------------------------------------------------------------


def report(name: str, table: Table, study: Study) -> None:
    """Print the table, and write it and its figure."""
    published = study.suite.published.get(name, {})
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    with_published = [f"{column} (paper)" for column in columns if any(column in row for row in published.values())]
    lines = [["", *columns, *with_published]]
    for row, figures in table.items():
        cells = [_figure(figures.get(column, [])) for column in columns]
        theirs = [published.get(row, {}).get(column.removesuffix(" (paper)")) for column in with_published]
        lines.append([row, *cells, *("" if value is None else f"{value:.2f}" for value in theirs)])
    text = markdown(lines)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    folder = study.args.output
    content = {
        "study": name,
        "unit": "DSC in percent, mean over rows; of several seeds mean and standard deviation",
        "recipe": study.suite.recipe,
        "seeds": list(study.seeds),
        "table": table,
        "published": published,
        "seconds_of_this_call": round(study.seconds, 1),
    }
    for suffix, written in {"md": text, "csv": buffer.getvalue(), "json": json.dumps(content, indent=2) + "\n"}.items():
        write_atomically(folder / f"{name}.{suffix}", lambda path, written=written: path.write_text(written))
    draw(name, table, published, folder / f"{name}.png")
    print(f"\n{text}\n{name}.md, .csv, .json and .png are in {folder}")


def _figure(values: list[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head."""
    head, *rows = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *rows])


def draw(name: str, table: Table, published: dict[str, dict[str, float]], path: Path) -> None:
    """A bar per row and column; what the paper has as a line across."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    figure = Figure(figsize=(max(5.0, 1.3 * len(table)), 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(columns)
    for number, column in enumerate(columns):
        places = [place for place, row in enumerate(table.values()) if column in row]
        values = [row[column] for row in table.values() if column in row]
        at = [place + (number - (len(columns) - 1) / 2) * width for place in places]
        errors = [stdev(each) if len(each) > 1 else 0.0 for each in values]
        axis.bar(at, [fmean(each) for each in values], width, yerr=errors, label=column)
        for place, row in zip(at, (row for row in table if column in table[row]), strict=True):
            if (value := published.get(row, {}).get(column)) is not None:
                axis.plot([place - width / 2, place + width / 2], [value, value], color="black")
    axis.set(title=name, ylabel="DSC (%)", ylim=(0, 100), xticks=range(len(table)))
    axis.set_xticklabels(list(table), rotation=20 if len(table) > 4 else 0)
    axis.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))


# ---- command line ---------------------------------------------------------------------------------------------------

STUDIES = {
    "data-efficiency": Study.data_efficiency,
    "domain-generalization": Study.domain_generalization,
    "prompt-designs": Study.prompt_designs,
    "backbones": Study.backbones,
    "semi-supervised": Study.semi_supervised,
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    study = Study(args.suite, args)
    args.output.mkdir(parents=True, exist_ok=True)
    report(args.study, STUDIES[args.study](study), study)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("study", choices=STUDIES)
    add("--suite", choices=("brains", "paper"), default="brains", help="(%(default)s)")
    add("--group", action="append", help="your own datasets, instead: TRAINED,TESTED,... (may be repeated)")
    add("--recipe", help="instead of the suite's")
    add("--backbones", nargs="+", help="instead of the suite's; the first is that of the recipe")
    add("--seeds", type=int, default=1, help="trainings of each kind (%(default)s)")
    add("--data-folder", type=Path, default=Path("data"), help="where the datasets are (%(default)s)")
    add("--launch", default="", help='instead of python: "accelerate launch --num_processes 4"')
    add("--consistency", type=float, default=1.0, help="of the semi-supervised study (%(default)s)")
    add("--semi-args", default="", help='more for examples/train_semi.py: "--epochs 80"')
    add("--train-args", default="", help='more for examples/train.py: "--mixed-precision bf16"')
    add("--evaluate-args", default="", help='more for examples/evaluate.py: "--num-samples auto"')
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
    args.suite = Suite(**{**vars(suite), **changes})
    return args


if __name__ == "__main__":
    main()
