"""Train text-guided segmentation on the published datasets, on one's own, or on real brains without any download.

    python examples/train.py                                            # a brain, from what the nilearn package holds
    python examples/train.py --data Kvasir --fraction 10 --seed 666 --recipe released    # as in the paper
    python examples/train.py --table train.csv --val-table val.csv --images img --masks label     # your own
    accelerate launch --num_processes 4 examples/train.py --data BUSI BUSBRA --mixed-precision bf16

A recipe (recipes/*.toml) is a few lines of what to train and how; --backbone, --epochs and the like override it.
Everything is checked before anything is computed. A batch is always the whole of all processes: with more of them the
same training gets faster. What is random in a step follows from seed, step and row alone, so a killed run goes on, with
--resume, exactly where its last checkpoint was.

Writes to --output (runs/DATA-RECIPE-seedN): config.json, log.jsonl, checkpoint.pt, best.pt, then best/ and last/ (for
`pvl_adapter.from_pretrained`), scores.json, figures/.

Cost and score: the first command takes 4 to 5 minutes on one or two CPU cores, and 2 GiB; expect a validation Dice of
0.60. Its frozen CLIP is a small one with RANDOM weights: the score shows what adapters and head learn, no more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import make_brains
import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from recipe import Recipe, build_model, is_random
from rows import Normalization, Rows, read_rows
from surroundings import git_commit, versions
from tqdm import tqdm
from training import Training, load_trainable, tensors, trainable

import pvl_adapter as pvl
from pvl_adapter.atomic import write_atomically
from pvl_adapter.data import SegmentationDataset, find_dataset
from pvl_adapter.hub.backbones import describe_backbone
from pvl_adapter.hub.download import first_line

BRAIN = "MNI152"  # what is trained on when nothing is named
CHECKPOINT, BEST = "checkpoint.pt", "best.pt"


class Run:
    """A folder with everything a training leaves behind."""

    def __init__(self, folder: Path, training: Training, settings: dict[str, Any]) -> None:
        self.folder, self.training, self.settings = folder, training, settings
        self.main = training.accelerator.is_main_process

    def _save(self, name: str, state: dict[str, Any]) -> None:
        if self.main:
            content = {"settings": self.settings, **state}
            write_atomically(self.folder / name, lambda path: torch.save(content, path))

    def resume(self) -> None:
        """Go on from the checkpoint, if it was made with the same settings."""
        path = self.folder / CHECKPOINT
        state = read_checkpoint(path)
        saved, mine = state["settings"], self.settings
        if differing := sorted(name for name in saved | mine if saved.get(name) != mine.get(name)):
            faults = "; ".join(f"{name} is {mine.get(name)!r}, expected {saved.get(name)!r}" for name in differing)
            raise SystemExit(
                f"cannot resume: {path} was made with other settings: {faults}. Give those, or leave out --resume and "
                "choose another --output"
            )
        self.training.load_state(state, source=path)

    def train(self, *, checkpoint_every: int) -> None:
        """Take the steps that remain.

        Args:
            checkpoint_every: Steps; one is written after every epoch too.
        """
        training, recipe, accelerator = self.training, self.training.recipe, self.training.accelerator
        per_epoch, before, started = training.batches_per_epoch, training.seconds, time.perf_counter()
        total = recipe.epochs * per_epoch
        with tqdm(total=total, initial=training.step, desc="training", unit="step", disable=not self.main) as bar:
            while training.step < total and not training.stopped_early:
                batches = training.batches(training.epoch)
                for batch in batches[training.step % per_epoch :]:
                    training.model.train()
                    losses = training.take_step(batch)
                    training.sums = {name: training.sums.get(name, 0.0) + value for name, value in losses.items()}
                    accelerator.log({f"loss/{name}": value for name, value in losses.items()}, step=training.step)
                    bar.set_postfix(loss=f"{losses['total']:.3f}", dice=f"{training.best:.3f}", refresh=False)
                    bar.update()
                    training.seconds = before + time.perf_counter() - started
                    if training.step % per_epoch and training.step % checkpoint_every == 0:
                        self._save(CHECKPOINT, training.state())
                self._end_epoch()
        self._write_log()

    def _end_epoch(self) -> None:
        training, per_epoch = self.training, self.training.batches_per_epoch
        entry: dict[str, Any] = {"epoch": training.epoch, "step": training.step}
        entry |= {name: value / per_epoch for name, value in training.sums.items()}
        if len(training.val):
            entry["val_dice"] = training.validate()
            training.accelerator.log({"val_dice": entry["val_dice"]}, step=training.step)
        training.sums = {}
        training.history.append(entry)
        if entry.get("val_dice", -1.0) > training.best:
            training.best = entry["val_dice"]
            self._save(BEST, {"trainable": tensors(training.evaluated)})
        self._save(CHECKPOINT, training.state())
        self._write_log()

    def _write_log(self) -> None:
        if self.main:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.training.history)
            write_atomically(self.folder / "log.jsonl", lambda path: path.write_text(lines))

    def finish(self) -> dict[str, Any]:
        """Write the models, figures and scores of a training that has ended."""
        training, model = self.training, self.training.evaluated.eval()
        self._export("last")
        if (self.folder / BEST).is_file():
            load_trainable(model, read_checkpoint(self.folder / BEST)["trainable"], source=self.folder / BEST)
            self._export("best")
        scores = {
            "note": RANDOM_WEIGHTS if is_random(training.recipe) else None,
            "best_val_dice": training.best if training.best >= 0 else None,
            "last_val_dice": training.history[-1].get("val_dice"),
            "epochs": training.epoch,
            "steps": training.step,
            "stopped_early": training.stopped_early,
            "seconds": round(training.seconds, 1),
            "trainable_parameters": sum(parameter.numel() for parameter in trainable(model).values()),
        }
        draw_curves(training.history, self.folder / "figures" / "curves.png")
        shown = training.val if len(training.val) else training.rows
        draw_examples(model, shown, training.normalization, self.folder / "figures" / "examples.png")
        write_json(self.folder / "scores.json", scores)
        return scores

    def _export(self, name: str) -> None:
        training, model = self.training, self.training.evaluated
        description = describe_backbone(model.clip)
        whole = is_random(training.recipe) or not description.get("name")  # what can be had elsewhere is not written
        card = {
            "training_data": f"{', '.join(self.settings['data'])} ({len(training.rows)} rows), examples/train.py.",
            "scores": {} if training.best < 0 else {"best validation Dice": round(training.best, 4)},
        }
        model.save_pretrained(self.folder / name, whole=whole, model_card_kwargs=card)


RANDOM_WEIGHTS = (
    "the frozen CLIP is a small one with RANDOM weights, so that nothing need be downloaded; the scores show what "
    "adapters and head have learnt. For real use start from a trained CLIP: --recipe default"
)


def read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise SystemExit(
            f"cannot resume: {path} is damaged ({first_line(error)}). Delete it and start again without --resume"
        ) from error
    if not isinstance(state, dict) or "settings" not in state:
        raise SystemExit(f"cannot resume: {path} was not written by this script; choose another --output")
    return state


# ---- figures --------------------------------------------------------------------------------------------------------


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    loss, dice = figure.subplots(1, 2)
    for name in ("total", "dice", "bce", "contrastive"):
        loss.plot([entry["epoch"] for entry in history], [entry[name] for entry in history], label=name)
    loss.set(xlabel="epoch", ylabel="training loss")
    loss.legend()
    scored = [entry for entry in history if "val_dice" in entry]
    dice.plot([entry["epoch"] for entry in scored], [entry["val_dice"] for entry in scored])
    dice.set(xlabel="epoch", ylabel="validation Dice", ylim=(0.0, 1.0))
    save_figure(figure, path)


def draw_examples(
    model: pvl.MedCLIPSeg, rows: Rows, normalization: Normalization, path: Path, *, count: int = 4
) -> None:
    """Some rows, evenly spread over those with something to find: picture, label, probability, uncertainty."""
    found = [row for row in range(len(rows)) if rows.masks[row].any()] or list(range(len(rows)))
    chosen = [found[round(place)] for place in np.linspace(0, len(found) - 1, min(count, len(found)))]
    levels = rows.pictures[[rows.picture[row] for row in chosen]]
    texts = [rows.texts[row] for row in chosen]
    prediction = model.predict(normalization.images(levels).to(model.device), texts, num_samples=10)
    figure = Figure(figsize=(8.4, 2.2 * len(chosen) + 0.4), layout="constrained")
    axes = figure.subplots(len(chosen), 4, squeeze=False)
    columns = {
        "picture": (levels.float().mean(dim=1), {"cmap": "gray"}),
        "label": (rows.masks[chosen], {"cmap": "gray", "vmin": 0, "vmax": 1}),
        "probability": (prediction.probability.cpu(), {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0}),
        "uncertainty (nats)": (prediction.uncertainty.cpu(), {"cmap": "magma", "vmin": 0.0, "vmax": math.log(2.0)}),
    }
    for column, (title, (maps, style)) in enumerate(columns.items()):
        axes[0, column].set_title(title)
        for axis, data in zip(axes[:, column], maps, strict=True):
            shown = axis.imshow(data, **style)
            axis.set(xticks=[], yticks=[])
        if column >= 2:
            figure.colorbar(shown, ax=axes[:, column], orientation="horizontal", shrink=0.9)
    for axis, text in zip(axes[:, 0], texts, strict=True):
        axis.set_ylabel("\n".join(textwrap.wrap(text, width=30)), fontsize=7)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png", bbox_inches="tight"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


# ---- command line ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(), argv)
    execute(set_up(args, Training), args, command=sys.argv if argv is None else ["train.py", *argv])


def execute(training: Training, args: argparse.Namespace, *, command: Sequence[str]) -> None:
    """Train, and write all there is to write."""
    accelerator = training.accelerator
    settings = {
        "recipe": dataclasses.asdict(training.recipe),
        "data": list(args.data or [args.table.stem]),
        "rows": [training.rows.digest(), training.val.digest()],
        "seed": args.seed,
        "accumulate": args.accumulate,
        "mixed_precision": args.mixed_precision,
        "frozen_weights": training.frozen_weights,
        "batches_per_epoch": training.batches_per_epoch,  # which depends on the number of processes
        **training.settings,
    }
    run = Run(args.output, training, settings)
    if args.resume:
        run.resume()
    elif accelerator.is_main_process:
        write_json(args.output / "config.json", {**settings, **surroundings(accelerator, command)})
    if accelerator.is_main_process:
        if is_random(training.recipe):
            print(f"note: {RANDOM_WEIGHTS}")
        pvl.print_trainable_parameters(training.model)
        print(f"{len(training.labelled)} rows to train on, {len(training.val)} to validate on")
    accelerator.init_trackers("tracker")
    run.train(checkpoint_every=args.checkpoint_every)
    accelerator.end_training()
    if accelerator.is_main_process:
        scores = run.finish()
        dice = scores["best_val_dice"]
        print(
            "no validation rows"
            if dice is None
            else f"validation Dice: best {dice:.4f}, last {scores['last_val_dice']:.4f}"
        )
        print(f"best/, last/, scores.json and figures/ are in {args.output}; score it by examples/evaluate.py")


def set_up(args: argparse.Namespace, kind: Callable[..., Training]) -> Training:
    """Model and data of a command line."""
    accelerator = Accelerator(
        cpu=args.cpu, mixed_precision=args.mixed_precision, log_with=args.tracker, project_dir=args.output
    )
    names = ("backbone", "pretrained", "epochs", "batch_size", "lr", "patience")
    try:
        recipe = Recipe.read(args.recipe, **{name: getattr(args, name) for name in names})
        with accelerator.local_main_process_first():
            if args.data == [BRAIN] and not (args.data_folder / BRAIN).exists():
                make_brains.main(["--output", str(args.data_folder)])
        datasets = splits(args)
        dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32  # of what is frozen
        model = build_model(recipe, seed=args.seed, dtype=dtype)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    rows, val = read_rows(datasets, model, quiet=not accelerator.is_local_main_process)
    return kind(model, recipe, rows=rows, val=val, seed=args.seed, accelerator=accelerator, accumulate=args.accumulate)


def splits(args: argparse.Namespace) -> list[list[SegmentationDataset]]:
    """Training and validation datasets of a command line."""
    if args.table:
        tables = {"train": args.table, "val": args.val_table}
        where = {"images": args.images, "masks": args.masks, "window": args.window}
        return [
            [SegmentationDataset.from_table(table, split=split, **where)] if table else []
            for split, table in tables.items()
        ]
    folders = [find_dataset(name, data=args.data_folder) for name in args.data]
    return [
        [SegmentationDataset(folder, split, fraction=args.fraction, window=args.window) for folder in folders]
        for split in ("train", "val")
    ]


def surroundings(accelerator: Accelerator, command: Sequence[str]) -> dict[str, Any]:
    packages = ("pvl-adapter", "torch", "open_clip_torch", "transformers", "accelerate")
    return {
        "command": list(command),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "cpu_threads": torch.get_num_threads(),
        "versions": versions(packages),
        "commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    data = parser.add_argument_group("data").add_argument
    data("--data", nargs="+", help=f"datasets by name or folder, in the released layout (default: {BRAIN})")
    data("--data-folder", type=Path, default=Path("data"), help="where named datasets are (%(default)s)")
    data(
        "--fraction",
        type=int,
        choices=(10, 25, 50, 100),
        default=100,
        help="percent of the training rows (%(default)s)",
    )
    data("--table", type=Path, help="instead of --data: your own .csv, .jsonl or .xlsx with image, text, mask")
    data("--val-table", type=Path, help="its validation rows")
    data("--images", type=Path, help="folder of its pictures (its own)")
    data("--masks", type=Path, help="folder of its masks (its own)")
    data("--window", type=float, nargs=2, metavar=("CENTER", "WIDTH"), help="grey levels shown of deep pictures")
    how = parser.add_argument_group("training").add_argument
    how("--recipe", help="name of a recipe in recipes/, or a .toml (default; without any data: brains)")
    how(
        "--backbone",
        help="instead of the recipe's: UniMedCLIP, BiomedCLIP, PubMedCLIP, CLIP, a model of open_clip, ...",
    )
    how("--pretrained", help="its weights, if it is a model of open_clip")
    how("--epochs", type=int, help="instead of the recipe's")
    how("--batch-size", type=int, help="of all processes together, instead of the recipe's")
    how("--lr", type=float, help="instead of the recipe's")
    how("--patience", type=int, help="end after so many epochs without a better validation Dice")
    how("--seed", type=int, default=0, help="of weights, batches and draws (%(default)s)")
    how("--accumulate", type=int, default=1, help="compute a batch in so many parts, to save memory (%(default)s)")
    how("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="(%(default)s)")
    how("--cpu", action="store_true", help="even if there is a GPU")
    out = parser.add_argument_group("output").add_argument
    out("--output", type=Path, help="folder for all results (runs/DATA-RECIPE-seedN)")
    out("--resume", action="store_true", help="go on from the checkpoint in --output, exactly where it was written")
    out(
        "--checkpoint-every",
        type=int,
        default=100,
        help="steps between checkpoints; also after each epoch (%(default)s)",
    )
    out("--tracker", help="tensorboard, wandb, ...: what Accelerate knows and is installed")
    return parser


def parse(line: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = line.parse_args(argv)
    if bool(args.table) and bool(args.data):
        line.error("--table and --data exclude each other")
    if args.recipe is None:
        args.recipe = "default" if args.data or args.table else "brains"
    if not args.table and not args.data:
        args.data = [BRAIN]
    name = args.table.stem if args.table else "+".join(Path(each).name for each in args.data)
    fraction = "" if args.fraction == 100 else f"_{args.fraction}"
    args.output = args.output or Path("runs") / f"{name}{fraction}-{Path(args.recipe).stem}-seed{args.seed}"
    for option in ("accumulate", "checkpoint_every"):
        if getattr(args, option) < 1:
            line.error(f"--{option.replace('_', '-')} is {getattr(args, option)}, expected 1 or more")
    checkpoint = args.output / CHECKPOINT
    if args.resume and not checkpoint.is_file():
        line.error(f"--resume found no {checkpoint}; start without it, or name the --output of an earlier run")
    if not args.resume and checkpoint.exists():
        line.error(f"{checkpoint} exists already; go on from it with --resume, or choose another --output")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        line.error(f"--output {args.output} cannot be made: {error}")
    return args


if __name__ == "__main__":
    main()
