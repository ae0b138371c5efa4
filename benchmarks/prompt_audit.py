"""Does a prompt audit tell contradictions from paraphrases, unstable answers from good ones, and models that cheat?

    python examples/train.py                   # once: the network this looks at, trained on MNI152
    python benchmarks/prompt_audit.py          # 8 minutes on one core; writes results/prompt_audit.json

The small network of examples/train.py (random CLIP, trained adapters and head) segments held-out slices, made by
examples/make_brains.py, of the brain it was trained on and of another. Paraphrases are the five phrasings that it was
trained with or, in a second run, those that the audit makes by rules. Two stand-ins answer like it, but one always sees
the mean image of the test slices, and the other always reads the same sentence.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import write
from PIL import Image
from scipy.stats import rankdata, spearmanr

import pvl_adapter as pvl
from pvl_adapter.data import SegmentationDataset
from pvl_adapter.images import prepare_masks
from pvl_adapter.trust.audit import ALTERED_IMAGES, CONTRADICTIONS, MOVED, Audit, audit
from pvl_adapter.trust.scores import detection_auroc, dice

PHRASINGS = tomllib.loads((Path(__file__).parents[1] / "examples" / "brains.toml").read_text())["sentences"]["train"]
ORIGINAL = re.compile(r"one (?P<size>\w+) (?P<shape>\w+) (?P<name>.+) located in the (?P<place>.+) of the axial slice")
CONTRADICTORY = ("side", "structure")  # of what is asked: size and place are only hints to where it is


class Stand:
    """A model that does not look at the image, or at the sentence: it always gets the one given here."""

    def __init__(self, model: pvl.MedCLIPSeg, *, image: Any = None, prompt: str | None = None) -> None:
        self.model, self.image, self.prompt = model, image, prompt

    def predict(self, image: Any, text: Sequence[str], **settings: Any) -> pvl.Prediction:
        text = text if self.prompt is None else [self.prompt] * len(text)
        return self.model.predict(image if self.image is None else self.image, text, **settings)


def distances(audits: Sequence[Audit], *kinds: str) -> list[float]:
    return [variant.distance for found in audits for variant in found.variants if variant.kind in kinds]


def figures(audits: Sequence[Audit], scores: Sequence[float], doubts: Sequence[float]) -> dict[str, Any]:
    """Of audits of images whose masks had these Dice scores and review scores."""
    same = distances(audits, "paraphrase")

    def told(*kinds: str) -> float:
        others = distances(audits, *kinds)
        return float(detection_auroc(others + same, [1] * len(others) + [0] * len(same)))

    instability, wrong = [found.instability for found in audits], 1.0 - np.array(scores)
    return {
        "rows": len(audits),
        "auroc_of_contradictions": told(*CONTRADICTORY),
        "auroc_by_kind": {kind: told(kind) for kind in CONTRADICTIONS},
        "spearman_of_instability_with_1_minus_dice": float(spearmanr(instability, wrong).statistic),
        "spearman_of_review_score_with_it": float(spearmanr(doubts, wrong).statistic),
        "spearman_of_their_sum_of_ranks_with_it": float(
            spearmanr(rankdata(instability) + rankdata(doubts), wrong).statistic
        ),
        "distance_quartiles": {
            kind: np.quantile(distances(audits, kind), [0.25, 0.5, 0.75]).tolist()
            for kind in ("paraphrase", *CONTRADICTIONS, *ALTERED_IMAGES)
        },
        "verdicts": {kind: verdicts(audits, kind) for kind in ("paraphrase", *CONTRADICTIONS)},
        **overall(audits),
    }


def verdicts(audits: Sequence[Audit], kind: str) -> dict[str, float]:
    """The share of each."""
    found = [each.verdicts[kind] for each in audits if kind in each.verdicts]
    return {verdict: found.count(verdict) / len(found) for verdict in sorted(set(found))}


def overall(audits: Sequence[Audit]) -> dict[str, Any]:
    """What decides, the sentence or the image: quantiles of the score, and verdicts."""
    scores = {name: [getattr(found, f"{name}_score") for found in audits] for name in ("sentence", "picture")}
    return {
        name: {"score_5_50_95_percent": np.quantile(values, [0.05, 0.5, 0.95]).tolist(), **verdicts(audits, name)}
        for name, values in scores.items()
    }


def compare(model: pvl.MedCLIPSeg, data: Path, *, every: int) -> dict[str, Any]:
    held_out = SegmentationDataset(data, "test")
    rows = [held_out[index] for index in range(0, len(held_out), every)]
    said = [ORIGINAL.fullmatch(row["text"]).groupdict() for row in rows]
    others = sorted({words["name"] for words in said})
    mean = Image.fromarray(np.mean([np.asarray(row["image"]) for row in rows], axis=0).round().astype(np.uint8))

    def audits(asked: Any, of: Sequence[int], *, trained_phrasings: bool = True) -> list[Audit]:
        found = []
        for index in of:
            same = [phrasing.format(**said[index]) for phrasing in PHRASINGS[1:]] if trained_phrasings else None
            found.append(audit(asked, rows[index]["image"], rows[index]["text"], same, others=others, seed=index))
        return found

    everything, some = range(len(rows)), range(0, len(rows), 6)
    phrasings = audits(model, everything)
    rules = audits(model, everything, trained_phrasings=False)
    masks = prepare_masks([row["mask"] for row in rows], size=model.image_size)
    predicted = [model.predict(row["image"], row["text"], num_samples=8) for row in rows]
    scores = np.array([dice(found.mask[0], truth) for found, truth in zip(predicted, masks, strict=True)])
    doubts = np.array([found.review_score.item() for found in predicted])
    present = [index for index in everything if masks[index].any()]
    blind, deaf = Stand(model, image=mean), Stand(model, prompt=rows[0]["text"])
    stand_ins = {name: overall(audits(asked, some)) for name, asked in (("image", blind), ("sentence", deaf))}
    return {
        "trained_phrasings": figures(phrasings, scores, doubts),
        "trained_phrasings_where_the_structure_is_there": figures(
            [phrasings[index] for index in present], scores[present], doubts[present]
        ),
        "paraphrases_by_rules": figures(rules, scores, doubts),
        "stand_in_that_ignores_the": stand_ins,
    }


def main(run: Path, data: Sequence[Path], *, every: int) -> None:
    model = pvl.from_pretrained(run / "last").eval()
    results = {folder.name: compare(model, folder, every=every) for folder in data}
    setting = {"weights": "random CLIP, trained adapters and head", "num_samples": 8, "moved": MOVED}
    write("prompt_audit", {**setting, **results})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/MNI152-mni152-seed0"), help="of examples/train.py")
    of_brains = [Path("data/MNI152"), Path("data/Colin27")]
    parser.add_argument("--data", type=Path, nargs="+", default=of_brains, help="what it was trained on, and another")
    parser.add_argument("--every", type=int, default=1, help="take every n-th row (%(default)s)")
    args = parser.parse_args()
    with torch.inference_mode():
        main(args.run, args.data, every=args.every)
