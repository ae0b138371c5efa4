"""Uncertainty in one pass: a distilled head against independent samples, in domain and out of it.

    python examples/train.py && python examples/make_brains.py     # once: the network and the three brains
    python benchmarks/one_pass.py                                  # 40 minutes on 2 cores; writes results/one_pass.json
    python benchmarks/one_pass.py --published                      # the published size with random weights: time alone

The small network of examples/train.py (random CLIP, adapters and head trained on MNI152). A head is taught on training
rows of MNI152, or of Colin27, another man; both are tested on test rows of those two and of INIA19, a macaque. The
reference of each row are 1,000 samples; they are kept in --rows, since they take most of the time. Long sentences of a
kind that was not taught (overdescriptive) show where the head fails and what the check gains. RMS errors are over
pixels and rows, then averaged over seeds of the head. `checked` sends rows that the head doubts to the sampler.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from harness import write
from released import image_and_prompt, predict_as_released, released_network
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.data import SegmentationDataset
from pvl_adapter.distilled_head import DistilledHead, predict_in_one_pass
from pvl_adapter.image_part import ImagePart
from pvl_adapter.sample_statistics import binary_entropy

TESTED = {"MNI152": 160, "Colin27": 40, "INIA19": 40, "MNI152 overdescriptive": 24}  # test rows, evenly spread; prompts
TAUGHT = ("MNI152", "Colin27")
COUNTS = (8, 30)
ROWS_AT_ONCE = 16
MAPS = ("probability", "deviation", "epistemic")

Rows = dict[str, Any]  # image [M, 3, H, W], text, and maps [M, H, W] of the reference


def references(model: pvl.MedCLIPSeg, data: Path, name: str, folder: Path) -> Rows:
    """Test rows with 1,000 samples of each, and 60 independent ones of another seed; read where they are kept."""
    brain, _, prompts = name.partition(" ")
    dataset, count, rows = SegmentationDataset(data / brain, "test", prompts=prompts or "original"), TESTED[name], []
    for index in (round(k * (len(dataset) - 1) / (count - 1)) for k in range(count)):
        if not (path := folder / f"{name.replace(' ', '_')}_{index:04d}.pt").is_file():
            row = dataset[index]
            image, text = model.prepare([row["image"]]), row["text"]
            found = model.predict(image, [text], num_samples=1000, seed=10**6, prepared=True, antithetic=False)
            few = model.predict(image, [text], num_samples=120, prepared=True, antithetic=False, return_samples=True)
            maps = {"ref_mean": found.probability[0], "ref_sd": found.variance[0].sqrt()}
            maps |= {"ref_aleatoric": found.aleatoric[0], "samples": few.samples[:, 0]}
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"image": image[0], "text": text, **maps}, path)
        row = torch.load(path)
        samples = row["samples"][::2]  # of antithetic pairs one each
        epistemic = binary_entropy(row["ref_mean"]) - row["ref_aleatoric"]
        kept = {"probability": row["ref_mean"], "deviation": row["ref_sd"], "epistemic": epistemic}
        rows.append({"image": row["image"], "text": row["text"], "samples": samples, **kept})
    texts = [row.pop("text") for row in rows]
    return {"text": texts, **{key: torch.stack([row[key] for row in rows]) for key in rows[0]}}


def errors(maps: dict[str, Tensor], reference: Rows) -> dict[str, float]:
    """RMS error of each map, and its Pearson correlation with the reference."""
    figures = {}
    for name in MAPS:
        figures[f"{name}_rms"] = (maps[name] - reference[name]).square().mean().sqrt().item()
        both = torch.stack([maps[name].flatten(), reference[name].flatten()]).double()
        figures[f"{name}_pearson"] = torch.corrcoef(both)[0, 1].item()
    return figures


def independent(reference: Rows, count: int) -> dict[str, float]:
    """Errors of so many independent samples, averaged plainly as released, over disjoint groups of the 60."""
    groups = []
    for first in range(0, 60 - count + 1, count):
        samples = reference["samples"][:, first : first + count]  # [M, S, H, W]
        probability = samples.mean(dim=1)
        epistemic = binary_entropy(probability) - binary_entropy(samples).mean(dim=1)
        maps = {"probability": probability, "deviation": samples.std(dim=1), "epistemic": epistemic}
        groups.append(errors(maps, reference))
    return average(groups)


def one_pass(model: pvl.MedCLIPSeg, reference: Rows, *, check: bool) -> dict[str, float]:
    """Errors of the distilled head, and what its error bar holds."""
    found = []
    for first in range(0, len(reference["text"]), ROWS_AT_ONCE):
        images = reference["image"][first : first + ROWS_AT_ONCE]
        text = reference["text"][first : first + ROWS_AT_ONCE]

        def sample(rows: list[int], images: Tensor = images, text: list[str] = text) -> pvl.Prediction:
            return model.predict(images[rows], [text[row] for row in rows], prepared=True)

        tokens = model.tokenize(text)
        how = {"threshold": 0.5, "rows": ROWS_AT_ONCE, "sample": sample if check else None}
        found.append(predict_in_one_pass(model, ImagePart(images), tokens, **how))
    maps = {"probability": torch.cat([each.probability for each in found])}
    maps["deviation"] = torch.cat([each.variance for each in found]).sqrt()
    maps["epistemic"] = torch.cat([each.epistemic for each in found])
    low, high = (torch.cat(bound) for bound in zip(*(each.interval(0.95) for each in found), strict=True))
    varied = reference["deviation"] > 1e-3
    inside = ((low <= reference["probability"]) & (reference["probability"] <= high))[varied]
    sampled = torch.cat([each.num_samples for each in found]) > 1
    figures = {**errors(maps, reference), "interval_95_holds": inside.float().mean().item()}
    return {**figures, "sampled": sampled.float().mean().item()}


def average(figures: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in figures) / len(figures) for name in figures[0]}


def minima(ways: dict[str, Any], *, repeats: int) -> dict[str, float]:
    """Least seconds of each way, which take turns: other load on the machine only adds to a time."""
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def times(model: pvl.MedCLIPSeg, image: Tensor, text: Any, *, repeats: int) -> dict[str, Any]:
    """Seconds of a mean pass and of one pass with all its maps."""
    tokens = model.tokenize(text)
    seconds = minima(
        {
            "mean_pass": lambda: model.predict(image, tokens, num_samples=0, prepared=True),
            "one_pass": lambda: predict_in_one_pass(model, ImagePart(image), tokens, threshold=0.5, rows=ROWS_AT_ONCE),
        },
        repeats=repeats,
    )
    return {"seconds": seconds, "mean_passes": seconds["one_pass"] / seconds["mean_pass"]}


def published(*, repeats: int) -> dict[str, Any]:
    """Times at published size, with an untaught head."""
    model = released_network()
    model.distilled = DistilledHead(model.head.dim).eval()
    model.distilled.facts["held_out"] = 2
    model.distilled.check = lambda model: None  # of a model that was taught it compares a list of numbers
    image, text = image_and_prompt()
    figures = times(model, image, text, repeats=repeats)
    figures["seconds"] |= minima({"released": lambda: predict_as_released(model, image, text)}, repeats=2)
    return {**figures, "times_faster_than_released": figures["seconds"]["released"] / figures["seconds"]["one_pass"]}


def main(args: argparse.Namespace) -> None:
    model = pvl.from_pretrained(args.run / "last").eval()
    tested = {name: references(model, args.data, name, args.rows) for name in TESTED}
    figures: dict[str, Any] = {"weights": "random CLIP, trained adapters and head", "reference_samples": 1000}
    figures["test_rows"], figures["seeds"] = TESTED, args.seeds
    figures["independent"] = {
        name: {str(count): independent(rows, count) for count in COUNTS} for name, rows in tested.items()
    }
    for taught in TAUGHT:
        dataset = SegmentationDataset(args.data / taught, "train")
        rows = [dataset[index] for index in range(len(dataset))]
        images, texts = [row["image"] for row in rows], [row["text"] for row in rows]
        runs: dict[str, list[dict[str, float]]] = {}
        reports = []
        for seed in range(args.seeds):
            reports.append(vars(pvl.distill(model, images, texts, seed=seed)))
            for name, reference in tested.items():
                for check in (False, True):
                    key = f"{name}, checked" if check else name
                    runs.setdefault(key, []).append(one_pass(model, reference, check=check))
            print(
                taught,
                seed,
                reports[-1],
                {name: each[-1]["probability_rms"] for name, each in runs.items()},
                flush=True,
            )
        figures[f"taught on {taught}"] = {"report": average(reports), **{k: average(v) for k, v in runs.items()}}
    first = tested["MNI152"]
    figures["time"] = times(model, first["image"][:1], first["text"][:1], repeats=200)
    write("one_pass", figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/MNI152-mni152-seed0"), help="of examples/train.py")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the three brains")
    parser.add_argument("--rows", type=Path, default=Path("data/one_pass_rows"), help="where references are kept")
    parser.add_argument("--seeds", type=int, default=5, help="of the head (%(default)s)")
    parser.add_argument("--published", action="store_true", help="only time the published size, without a file")
    args = parser.parse_args()
    print(published(repeats=7)) if args.published else main(args)
