"""How good is how many samples? The error of antithetic and independent samples, and of `Auto`, against time.

    python examples/train.py                        # once: trains the network this looks at
    python benchmarks/inference.py                  # once: what a sample costs
    python benchmarks/sampling_quality.py           # 15 minutes on 2 cores; writes results/sampling_quality.json
                                                    # and docs/images/sampling_quality.png

Errors are those of the small network of examples/train.py (random CLIP, trained adapters and head) on six held-out
slices with something to find, against the mean of 1,000 samples of each: root mean squares over pixels, cases and
seeds.
Times are those of the published configuration at full size, as benchmarks/inference.py has measured them.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, write
from matplotlib.figure import Figure
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.data import SegmentationDataset

ROOT = Path(__file__).parent.parent
REFERENCE = 1000
COUNTS = (2, 4, 8, 16, 30)
SEEDS = 20
TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01)
PICTURE = ROOT / "docs" / "images" / "sampling_quality.png"

Predict = Callable[..., pvl.Prediction]


def load(run: Path, data: Path) -> tuple[pvl.MedCLIPSeg, Tensor, list[str]]:
    """The trained network, six held-out slices and the sentence of each."""
    model = pvl.from_pretrained(run / "last")
    held_out = SegmentationDataset(data, "test")
    found = [row for row in map(held_out.__getitem__, range(len(held_out))) if row["mask"].any()]
    chosen = found[:: len(found) // 6][:6]
    return model.eval(), model.prepare([row["image"] for row in chosen]), [row["text"] for row in chosen]


def measure(predict: Predict, reference: Tensor, count: int | pvl.Auto, **settings: Any) -> dict[str, Any]:
    """Error and calibration of one way of predicting, over seeds."""
    runs = [predict(count, seed=seed, **settings) for seed in range(SEEDS)]
    errors = torch.stack([run.probability - reference for run in runs])  # [seeds, B, H, W]
    told = torch.stack([run.standard_error for run in runs])
    row = {
        "rms": rms(errors),
        "rms_per_case": errors.square().mean(dim=(0, 2, 3)).sqrt().tolist(),
        "mean_samples": torch.stack([run.num_samples for run in runs]).float().mean().item(),
    }
    if not told.isnan().any():
        row["told_standard_error"] = rms(told)
        inside, varied = [], told > 1e-6  # elsewhere every sample says the same
        for run in runs:
            low, high = run.interval(0.95)
            inside.append((low <= reference) & (reference <= high))
        row["95_percent_interval_holds"] = torch.stack(inside)[varied].float().mean().item()
    return row


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


@torch.inference_mode()
def main(run: Path, data: Path) -> None:
    model, images, sentences = load(run, data)
    low_model = copy.deepcopy(model).bfloat16()

    def exact(count: int | pvl.Auto, **settings: Any) -> pvl.Prediction:
        return model.predict(images, sentences, num_samples=count, prepared=True, **settings)

    def low(count: int | pvl.Auto, **settings: Any) -> pvl.Prediction:
        return low_model.predict(images, sentences, num_samples=count, prepared=True, **settings)

    reference = exact(REFERENCE, seed=10**6)  # in pairs, so that its own error is far below those it judges
    mean = reference.probability
    rows: dict[str, dict[str, dict[str, Any]]] = {
        "independent": {str(count): measure(exact, mean, count, antithetic=False) for count in COUNTS},
        "antithetic": {str(count): measure(exact, mean, count) for count in COUNTS},
        "antithetic bfloat16": {str(count): measure(low, mean, count) for count in COUNTS},
        "auto": {str(tolerance): measure(exact, mean, pvl.Auto(tolerance)) for tolerance in TOLERANCES},
        "auto bfloat16": {str(tolerance): measure(low, mean, pvl.Auto(tolerance)) for tolerance in TOLERANCES},
        "mean pass": {
            "float32": {"rms": rms(exact(0).probability - mean)},
            "bfloat16": {"rms": rms(low(0).probability - mean)},
        },
    }
    cost = json.loads((RESULTS / "inference.json").read_text())
    figures = {
        "weights": "random CLIP, trained adapters and head",
        "reference_samples": REFERENCE,
        "reference_standard_error": rms(reference.standard_error),
        "seeds": SEEDS,
        **rows,
        "good_enough_auto": good_enough(rows, cost["seconds"]),
    }
    write("sampling_quality", figures)
    plot(rows, cost["seconds"])


def passes(row: dict[str, Any]) -> float:
    """Of "auto": its samples, and the mean pass of its first look."""
    return row["mean_samples"] + 1


def good_enough(rows: dict[str, dict[str, dict[str, Any]]], seconds: dict[str, float]) -> dict[str, Any]:
    """The loosest tolerance at which "auto" in bfloat16 errs no more than 30 independent samples, and its speed."""
    target = rows["independent"]["30"]["rms"]
    for tolerance, row in rows["auto bfloat16"].items():
        if row["rms"] <= target:
            spent = passes(row) / 3 * seconds["auto_first_look_bfloat16"]
            return {
                "tolerance": float(tolerance),
                "rms": row["rms"],
                "rms_of_30_independent": target,
                "passes": passes(row),
                "times_faster_than_released": seconds["released"] / spent,
            }
    return {"rms_of_30_independent": target, "tolerance": None}


def plot(rows: dict[str, dict[str, dict[str, Any]]], seconds: dict[str, float]) -> None:
    each = {"float32": seconds["engine_float32"] / 30, "bfloat16": seconds["engine_bfloat16"] / 30}
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(seconds["released"], rows["independent"]["30"]["rms"], "k*", markersize=12, label="released: 31 passes")
    for name, kind, style in (
        ("independent", "float32", "o-"),
        ("antithetic", "float32", "o-"),
        ("antithetic bfloat16", "bfloat16", "o-"),
    ):
        axis.plot(
            [count * each[kind] for count in COUNTS], [row["rms"] for row in rows[name].values()], style, label=name
        )
    axis.plot(
        [passes(row) * each["bfloat16"] for row in rows["auto bfloat16"].values()],
        [row["rms"] for row in rows["auto bfloat16"].values()],
        "x--",
        label='"auto" bfloat16, by tolerance',
    )
    axis.plot(seconds["mean_pass_bfloat16"], rows["mean pass"]["bfloat16"]["rms"], "s", label="mean pass bfloat16")
    axis.set(xscale="log", yscale="log", xlabel="seconds an image (published configuration, 2 CPU cores)")
    axis.set_ylabel("RMS error of the probability")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/MNI152-mni152-seed0"), help="of examples/train.py")
    parser.add_argument("--data", type=Path, default=Path("data/MNI152"), help="what it was trained on")
    args = parser.parse_args()
    main(args.run, args.data)
