"""Ways to be probabilistic, side by side: KL, a learned beta, no value noise in training, and deep ensembles.

    python examples/make_brains.py
    python benchmarks/toolbox.py          # 40 minutes on 2 cores; writes results/toolbox.json and prints the table

Each way is trained five times on MNI152 (examples/train.py, half of its usual epochs) with one frozen CLIP of RANDOM
weights, and tested on held-out slices of MNI152 and on another man's brain, Colin27. An ensemble has three of the five
members of the default way, with a third of the samples each. What is trained already is not trained again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import open_clip
import torch
from harness import write

import pvl_adapter as pvl
from pvl_adapter.data import SegmentationDataset
from pvl_adapter.images import prepare_masks
from pvl_adapter.trust import scores

EXAMPLES = Path(__file__).parents[1] / "examples"
SEEDS, ROWS_AT_ONCE, TESTED = 5, 16, ("MNI152", "Colin27")
TRAININGS = {
    "default": "",
    "KL .1, free bits .1": "[loss]\nkl_weight = 0.1\nfree_bits = 0.1\n",
    "KL .01, free bits .1": "[loss]\nkl_weight = 0.01\nfree_bits = 0.1\n",
    "learned beta": "learn_beta = true\n",  # of [adapters], the table that the recipe below ends with
    "no noise in training": "",
}
RECIPE = """backbone = "small-patch-16"
epochs = 20
batch_size = 16
lr = 2e-3
warmup = 20
sample = {sample}

[augmentation]
degrees = 8
scale = 0.05
brightness = 0.1

[adapters]
dim = 64
{extra}"""
COLUMNS = ("dice", "ece", "nll", "aurc", "absent_auroc", "epistemic_auroc")


def train(way: str, seed: int, args: argparse.Namespace) -> Path:
    """The folder of a trained model."""
    name = way.replace(" ", "_").replace(",", "")
    run, recipe, clip = args.output / f"{name}-seed{seed}", args.output / f"{name}.toml", args.output / "clip.pt"
    if not clip.is_file():
        open_clip.add_model_config(EXAMPLES / "backbones")
        torch.manual_seed(0)
        made = open_clip.create_model("small-patch-16")
        for embedding in (made.token_embedding.weight, made.positional_embedding, made.visual.positional_embedding):
            torch.nn.init.normal_(embedding)
        torch.save(made.state_dict(), clip)
    if not (run / "last" / "model.safetensors").is_file():
        recipe.write_text(RECIPE.format(extra=TRAININGS[way], sample=str(way != "no noise in training").lower()))
        command = [sys.executable, EXAMPLES / "train.py", "--data", args.data / TESTED[0], "--recipe", recipe]
        command += ["--pretrained", clip, "--seed", seed, "--output", run, "--cpu"]
        command += ["--resume"] if any((run / "checkpoints").glob("[0-9]*")) else []
        subprocess.run([str(each) for each in command], check=True)
    return run / "last"


def judge(model: Any, dataset: SegmentationDataset, **how: Any) -> dict[str, float]:
    """Scores of a way to predict; `model` has a `predict`."""
    bins = scores.calibration(np.zeros((0, 0)), np.zeros((0, 0), dtype=bool))
    rows: list[tuple[float, float, bool, float, float]] = []
    for first in range(0, len(dataset), ROWS_AT_ONCE):
        samples = [dataset[index] for index in range(first, min(first + ROWS_AT_ONCE, len(dataset)))]
        found = model.predict([each["image"] for each in samples], [each["text"] for each in samples], **how)
        for index, each in enumerate(samples):
            truth = prepare_masks(torch.as_tensor(each["mask"]), size=tuple(found.mask.shape[1:]))[0]
            mask, probability = found.mask[index], found.probability[index]
            bins += scores.calibration(probability, truth)
            doubt = scores.aggregate_uncertainty(found.epistemic[index], mask, how="boundary")
            dice = scores.dice(mask, truth)
            rows.append((dice, float(found.review_score[index]), bool(truth.any()), float(probability.max()), doubt))
    dice, review, present, largest, doubt = map(np.array, zip(*rows, strict=True))
    return {
        "dice": float(dice[present].mean()),
        "ece": bins.expected_error,
        "nll": bins.nll,
        "aurc": scores.risk_coverage(review, 1.0 - dice).aurc,
        "absent_auroc": scores.detection_auroc(largest, present),
        "epistemic_auroc": scores.detection_auroc(doubt, dice < 0.5),  # does the epistemic map tell poor masks
    }


def main(args: argparse.Namespace) -> None:
    tests = {name: SegmentationDataset(args.data / name, "test") for name in TESTED}
    figures: dict[str, dict[str, dict[str, list[float]]]] = {}

    def note(way: str, model: Any, **how: Any) -> None:
        for name, dataset in tests.items():
            for column, value in judge(model, dataset, **how).items():
                figures.setdefault(way, {}).setdefault(name, {}).setdefault(column, []).append(value)
        print(
            way,
            {name: {column: round(each[-1], 4) for column, each in of.items()} for name, of in figures[way].items()},
        )

    for seed in range(SEEDS):
        for way in TRAININGS:
            model = pvl.from_pretrained(train(way, seed, args))
            note(way, model)
            if way == "default":
                note("default, mean pass", model, num_samples=0)
            if way == "no noise in training":
                note("no noise at all", model, num_samples=0)
    for first in range(SEEDS):
        members = [train("default", (first + step) % SEEDS, args) for step in range(3)]
        note("ensemble of 3", pvl.Ensemble(members), num_samples=10)
    write("toolbox", {"weights": "random CLIP, trained adapters and head", "seeds": SEEDS, "figures": figures})
    print("| tested on | way |" + "".join(f" {column} |" for column in COLUMNS) + "\n|---|---|" + "---|" * len(COLUMNS))
    for name in TESTED:
        for way, of in figures.items():
            cells = [f"{fmean(of[name][column]):.3f} ± {stdev(of[name][column]):.3f}" for column in COLUMNS]
            print(f"| {name} | {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the brains (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/toolbox"), help="of trainings (%(default)s)")
    main(parser.parse_args())
