"""How good are few samples? Every map's error, and how often the error bars hold, in and out of domain.

    python examples/train.py                              # once: the network this looks at, trained on MNI152
    python benchmarks/sampling_quality.py                 # 8 minutes on 2 cores; writes results/sampling_quality.json
                                                          # and docs/images/sampling_quality.png
    python benchmarks/sampling_quality.py --published     # 6 minutes; the published size with random weights instead

The small network of examples/train.py (random CLIP, trained adapters and head) segments held-out slices of the brain it
was trained on, of another human brain and of a macaque's, all made by examples/make_brains.py. The truth is the plain
average of 2,000 independent samples, so it assumes nothing of what is tested. Errors are root mean squares over pixels,
slices and seeds. Error bars are judged where samples vary at all (the error told exceeds 1e-6).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import write
from matplotlib.figure import Figure
from released import image_and_prompt, released_network
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.adapter import NoisePair
from pvl_adapter.data import SegmentationDataset
from pvl_adapter.error_bars import LogitMoments, fit_logits, interval, normal_maps
from pvl_adapter.sample_statistics import binary_entropy

REFERENCE, PART = 2000, 100
COUNTS = (4, 8, 16, 24, 30)
SLICES, AT_ONCE, SEEDS = 20, 10, 5
TOLERANCES = (0.05, 0.02, 0.01)
MAPS = ("probability", "uncertainty", "epistemic", "deviation")  # the last is the samples' standard deviation
EDGES = (0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999)  # of bins of the probability
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "sampling_quality.png"

Row = dict[str, Any]


class Tally:
    """Errors of maps [B, H, W] and coverage of their intervals, added up over slices and seeds."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(MAPS), 7, dtype=torch.float64)
        self.held = torch.zeros(len(EDGES) + 1, 2, dtype=torch.float64)
        self.told = 0.0
        self.passes: list[float] = []

    def add(self, maps: dict[str, Tensor], bounds: tuple[Tensor, Tensor], truth: dict[str, Tensor]) -> None:
        for sums, name in zip(self.sums, MAPS, strict=True):
            x, y = maps[name].double(), truth[name].double()
            sums += torch.stack([each.sum() for each in ((x - y) ** 2, x**0, x, y, x * x, y * y, x * y)])
        probability, told = maps["probability"], maps["standard_error"]
        self.told += told.double().square().sum().item()
        inside = (bounds[0] <= truth["probability"]) & (truth["probability"] <= bounds[1])
        bins = torch.bucketize(probability, torch.tensor(EDGES))
        for index, held in enumerate(self.held):
            here = (bins == index) & (told > 1e-6)
            held += torch.stack([inside[here].sum(), here.sum()])

    def row(self) -> Row:
        squares, n, x, y, xx, yy, xy = self.sums.T
        pearson = (n * xy - x * y) / ((n * xx - x * x) * (n * yy - y * y)).sqrt()
        rms = (squares / n).sqrt()
        held, all_pixels = self.held.sum(dim=0).tolist()
        return {
            "rms": dict(zip(MAPS, rms.tolist(), strict=True)),
            "pearson": dict(zip(MAPS, pearson.tolist(), strict=True)),
            "told_over_true_error": (self.told / n[0].item()) ** 0.5 / rms[0].item(),
            "95_percent_interval_holds": held / max(all_pixels, 1),
            "by_probability": [None if pixels < 100 else inside / pixels for inside, pixels in self.held.tolist()],
            **({"mean_passes": sum(self.passes) / len(self.passes)} if self.passes else {}),
        }


def maps_of(prediction: pvl.Prediction) -> dict[str, Tensor]:
    maps = {name: getattr(prediction, name) for name in ("probability", "uncertainty", "epistemic", "standard_error")}
    return {**maps, "deviation": prediction.variance.sqrt()}


def slices(model: pvl.MedCLIPSeg, data: Path) -> Iterator[tuple[Tensor, list[str]]]:
    """Prepared images [b, 3, H, W] and sentences of held-out slices with something to find."""
    held_out = SegmentationDataset(data, "test")
    found = [row for row in map(held_out.__getitem__, range(len(held_out))) if row["mask"].any()]
    chosen = [found[i * len(found) // SLICES] for i in range(SLICES)] if len(found) > SLICES else found
    for start in range(0, len(chosen), AT_ONCE):
        some = chosen[start : start + AT_ONCE]
        yield model.prepare([row["image"] for row in some]), [row["text"] for row in some]


def reference(model: pvl.MedCLIPSeg, images: Tensor, sentences: list[str], **settings: Any) -> dict[str, Tensor]:
    """Plain averages in float64: a float32 running mean near 1 no longer moves after a thousand samples."""
    sums = torch.zeros(3, len(sentences), *images.shape[-2:], dtype=torch.float64)
    for part in range(REFERENCE // PART):
        how: dict[str, Any] = {"num_samples": PART, "antithetic": False, "seed": 10**6 + part}
        found = model.predict(images, sentences, **how, **settings)
        square = found.variance * (1 - 1 / PART) + found.probability.square()
        sums += torch.stack([found.probability, square, found.aleatoric])
    probability, square, aleatoric = sums / (REFERENCE // PART)
    total = binary_entropy(probability)
    deviation = (square - probability.square()).clamp_min(0.0).sqrt()
    return {
        "probability": probability,
        "uncertainty": total,
        "epistemic": total - aleatoric,
        "deviation": deviation,
    }


def compare(model: pvl.MedCLIPSeg, data: Path) -> dict[str, dict[str, Row]]:
    """Each way of predicting, by its number of samples or its tolerance."""
    ways: dict[str, dict[str, dict[str, Any]]] = {
        "released": {str(count): {"num_samples": count, "antithetic": False} for count in COUNTS},
        "default": {str(count): {"num_samples": count} for count in COUNTS},
        "pairs": {str(count): {"num_samples": pvl.Auto(1e-9, max_samples=count)} for count in COUNTS},
        "auto": {str(tolerance): {"num_samples": pvl.Auto(tolerance)} for tolerance in TOLERANCES},
    }
    tallies = {way: {name: Tally() for name in settings} for way, settings in ways.items()}
    mean_pass = []
    for images, sentences in slices(model, data):
        settings: dict[str, Any] = {"prepared": True, "memory_budget": 2**26}
        truth = reference(model, images, sentences, **settings)
        mean = model.predict(images, sentences, num_samples=0, **settings)
        mean_pass.append((mean.probability - truth["probability"]).square().mean())
        for way, by_name in ways.items():
            for name, how in by_name.items():
                for seed in range(SEEDS):
                    found = model.predict(images, sentences, seed=seed, **how, **settings)
                    tallies[way][name].add(maps_of(found), found.interval(0.95), truth)
                    tallies[way][name].passes += found.num_samples.tolist()
    rows = {way: {name: tally.row() for name, tally in by_name.items()} for way, by_name in tallies.items()}
    return {**rows, "mean pass": {"1": {"rms": {"probability": torch.stack(mean_pass).mean().sqrt().item()}}}}


def fewest(results: dict[str, dict[str, dict[str, Row]]], way: str) -> int | None:
    """Samples that bring probability, total and epistemic as near as 30 released ones do, on every brain."""

    def near(count: int) -> bool:
        pairs = [(rows[way][str(count)]["rms"], rows["released"]["30"]["rms"]) for rows in results.values()]
        return all(ours[name] <= theirs[name] for ours, theirs in pairs for name in MAPS[:3])

    return next((count for count in COUNTS if near(count)), None)


def plot(results: dict[str, dict[str, dict[str, Row]]]) -> None:
    figure = Figure(figsize=(10.0, 6.2), layout="constrained")
    axes = figure.subplots(2, len(results), sharey="row", squeeze=False)
    colours = {"released": "0.5", "pairs": "tab:orange", "default": "tab:blue"}
    for column, (data, rows) in zip(axes.T, results.items(), strict=True):
        target = rows["released"]["30"]["rms"]
        for way, colour in colours.items():
            for name, style in (("probability", ":"), ("uncertainty", "--"), ("epistemic", "-")):
                errors = [rows[way][str(count)]["rms"][name] / target[name] for count in COUNTS]
                column[0].plot(COUNTS, errors, style, color=colour, label=f"{way}, {name}")
            held = [100 * rows[way][str(count)]["95_percent_interval_holds"] for count in COUNTS]
            column[1].plot(COUNTS, held, "o-", color=colour, label=way)
        column[0].axhline(1.0, color="k", linewidth=0.8)
        column[0].set(title=data, yscale="log", ylim=(0.25, 8.0), xlabel="passes")
        column[1].axhspan(93, 97, color="tab:green", alpha=0.15)
        column[1].set(ylim=(85, 100), xlabel="passes")
    axes[0, 0].set_ylabel("RMS error over 30 released samples'")
    axes[1, 0].set_ylabel("95% interval holds, % of pixels")
    axes[0, 0].legend(fontsize=6, loc="upper right")
    axes[1, -1].legend(fontsize=8, loc="lower right")
    figure.savefig(PICTURE, dpi=100)


# --- published size --------------------------------------------------------------------------------------------------


def noisy_network() -> pvl.MedCLIPSeg:
    """Of published size; adapters and head are scaled so that logits span several units and noise moves them by one."""
    model = released_network()
    for adapter in model.clip.pvl_adapters:
        for up in (adapter.vision_up, adapter.text_up):
            up.weight *= 5
        for attention in (adapter.two_way.image_to_text, adapter.two_way.text_to_image):
            attention.v_proj.bias[attention.dim :] += 250  # of the raw variance
    for parameter in model.head.mask_head[-1].parameters():
        parameter *= 10
    return model


def drawn_pairs(model: pvl.MedCLIPSeg, number: int) -> Tensor:
    """Logits of antithetic pairs, [number, 2, H, W], about half of them positive."""
    image, text = image_and_prompt()
    generator = torch.Generator().manual_seed(0)
    tokens, width = (image.shape[-1] // 16) ** 2 + 1, model.clip.pvl_adapters[0].two_way.image_to_text.dim
    both, logits = image.expand(2, -1, -1, -1), []
    for _ in range(number):
        halves = [
            [torch.randn(1, length, width, generator=generator) for length in (tokens, text.shape[-1])]
            for _ in model.clip.pvl_adapters
        ]
        noise = [NoisePair(image=torch.cat([v, -v]), text=torch.cat([t, -t])) for v, t in halves]
        joint = pvl.encode(model.clip, both, text.expand(2, -1), noise=noise, text_tokens=False)
        logits.append(model.pixel_logits(joint, size=(image.shape[-2], image.shape[-1])))
    drawn = torch.stack(logits)
    return drawn - drawn.mean(dim=(0, 1)).median()


def plain_maps(logits: Tensor) -> dict[str, Tensor]:
    """Averages of samples [S, H, W], as released; maps [1, H, W]."""
    p = logits.sigmoid()[:, None]
    total, aleatoric = (binary_entropy(x) for x in (p.mean(dim=0), p))
    epistemic = total - aleatoric.mean(dim=0)
    return {"probability": p.mean(dim=0), "uncertainty": total, "epistemic": epistemic, "deviation": p.std(dim=0)}


def published(references: int, pool: int, *, resamplings: int = 20) -> dict[str, Any]:
    """The estimators by themselves, on some of a pool of pairs, against the plain average of other pairs."""
    drawn = drawn_pairs(noisy_network(), references + pool)
    truth, drawn = plain_maps(drawn[:references].flatten(0, 1)), drawn[references:]
    half = (drawn[:, 0] - drawn[:, 1]) / 2
    figures: dict[str, Any] = {
        "logits_standard_deviation": half.square().mean().sqrt().item(),
        "kurtosis": (half.pow(4).mean(dim=0) / half.square().mean(dim=0).square()).median().item(),
        "variance_of_pair_means_over_that": (drawn.mean(dim=1).var(dim=0) / half.square().mean(dim=0)).median().item(),
    }

    def moments(logits: Tensor) -> LogitMoments:
        mean = logits.mean(dim=0) if len(logits) else torch.zeros(logits.shape[1:])
        return LogitMoments(torch.tensor([len(logits)]), mean[None], (logits - mean).square().sum(dim=0)[None])

    schemes = {"4": (2, 0), "8": (2, 4), "24": (2, 20), "30": (4, 22), "8 in pairs": (4, 0), "30 in pairs": (15, 0)}
    for name, (pairs, singles) in {**schemes, "30 released": (0, 30)}.items():
        tally, generator = Tally(), torch.Generator().manual_seed(1)
        for _ in range(resamplings):
            chosen = torch.randperm(pool, generator=generator)
            paired, others = drawn[chosen[:pairs]], drawn[chosen[pairs : pairs + singles], 0]
            halves = half[chosen[:pairs]].square().sum(dim=0)[None]
            fit = fit_logits(moments(others), moments(paired.mean(dim=1)), halves)
            maps = normal_maps(fit)
            maps["deviation"] = maps["variance"].sqrt()
            plain = None if pairs else plain_maps(others)
            maps.update(plain or {})
            tally.add(maps, interval(fit, 0.95, probability=plain and plain["probability"]), truth)
        figures[name] = tally.row()
    return figures


@torch.no_grad()
def main(run: Path, data: Sequence[Path]) -> None:
    model = pvl.from_pretrained(run / "last").eval()
    results = {folder.name: compare(model, folder) for folder in data}
    samples = {way: fewest(results, way) for way in ("default", "pairs")}
    figures = {"reference_samples": REFERENCE, "seeds": SEEDS, "edges": EDGES, "fewest_as_near_as_released": samples}
    write("sampling_quality", {"weights": "random CLIP, trained adapters and head", **figures, **results})
    plot(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/MNI152-mni152-seed0"), help="of examples/train.py")
    of_brains = [Path("data") / name for name in ("MNI152", "Colin27", "INIA19")]
    parser.add_argument("--data", type=Path, nargs="+", default=of_brains, help="what it was trained on, and others")
    parser.add_argument("--published", action="store_true", help="the published size, with random weights")
    args = parser.parse_args()
    if args.published:
        with torch.no_grad():
            write("sampling_quality_published", published(references=120, pool=45))
    else:
        main(args.run, args.data)
