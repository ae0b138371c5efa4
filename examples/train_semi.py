"""Train with few labels and many pictures that have none: an uncertainty-aware mean teacher.

    python examples/train_semi.py --data data/Colin27 --fraction 10 --recipe brains --epochs 150
    python examples/train_semi.py ... --consistency 0          # the same with labels alone, to compare with

Labelled are the rows of Train_text_10 (or 25, 50); of the other rows of Train_text only picture and sentence are used.
The teacher is a running mean of the student's weights. It says what it sees in an unlabelled picture by a few
stochastic passes, and the student is to agree, pixel by pixel, the more the surer the teacher is (Yu et al. 2019, arXiv
1907.07034, whose dropout passes are the adapters' draws here; pixels are weighted by 1 - entropy / ln 2 instead of cut
at a threshold). The teacher is what is validated and saved, in both cases.

All options are those of examples/train.py, and four more; so are the files of a run.

Cost and score: on one CPU core 2 minutes with labels alone, 4.5 minutes with unlabelled pictures (150 epochs); expect a
test DSC of about 17.3% and 18.3%. The CLIP is a small random one; docs/studies.md says what that gain is worth.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import train
from rows import Rows
from torch import Tensor
from training import Training, load_trainable, number, tensors

import pvl_adapter as pvl


class SemiSupervised(Training):
    """A training that also learns from rows whose masks are not looked at: those that are not labelled.

    Args:
        consistency: Weight of agreeing with the teacher, in the end.
        ramp: Part of all steps over which that weight rises, by exp(-5 (1 - t)^2).
        decay: Of the teacher's running mean, per step.
        teacher_samples: Stochastic passes of the teacher.
        args: Those of `Training`.
        kwargs: Likewise.
    """

    def __init__(
        self, *args: Any, consistency: float, ramp: float, decay: float, teacher_samples: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.consistency, self.ramp, self.decay, self.teacher_samples = consistency, ramp, decay, teacher_samples
        self.unlabelled = sorted(set(range(len(self.rows))) - set(self.labelled))
        self.teacher = copy.deepcopy(self.model)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "labelled": len(self.labelled),
            "consistency": self.consistency,
            "ramp": self.ramp,
            "decay": self.decay,
            "teacher_samples": self.teacher_samples,
        }

    @property
    def evaluated(self) -> pvl.MedCLIPSeg:
        return self.teacher

    @property
    def weight(self) -> float:
        """Of the consistency at the present step."""
        done = min(1.0, self.step / (self.ramp * self.recipe.epochs * self.batches_per_epoch))
        return self.consistency * math.exp(-5.0 * (1.0 - done) ** 2)

    def take_step(self, batch: list[int]) -> dict[str, float]:
        losses = super().take_step(batch)
        decay = min(self.decay, 1.0 - 1.0 / (self.step + 1))  # a plain mean at first
        student = tensors(self.model)
        for name, mean in tensors(self.teacher).items():
            mean.lerp_(student[name], 1.0 - decay)
        return losses

    def terms(self, rows: Sequence[int], places: Sequence[int]) -> pvl.LossTerms:
        if not self.consistency:
            return super().terms(rows, places)
        others, beside = self._unlabelled_rows(places), [self.recipe.batch_size + place for place in places]
        images, masks = self.pictures([*rows, *others], [*places, *beside])
        seen = images.clone()
        seen[len(rows) :] += (0.1 * torch.randn(images[len(rows) :].shape)).clamp(-0.2, 0.2)  # by the student alone
        out = self.forward(seen, [*rows, *others], [*places, *beside])
        labelled, unlabelled = (
            pvl.SegmentationOutput(*(each[part] for each in (out.logits, out.patch_tokens, out.text_embeds)))
            for part in (slice(len(rows)), slice(len(rows), None))
        )
        terms = self.loss_terms(labelled, masks[: len(rows)])
        opinion = self.teacher.predict(
            images[len(rows) :].to(self.accelerator.device),
            [self.rows.texts[row] for row in others],
            num_samples=self.teacher_samples,
            seed=number(self.seed, 4, self.step),
        )
        agreement = disagreement(unlabelled.logits, opinion)
        return dataclasses.replace(terms, total=terms.total + self.weight * agreement)

    def _unlabelled_rows(self, places: Sequence[int]) -> list[int]:
        """One for each labelled row, whatever other processes there are."""
        count = len(self.unlabelled)
        return [self.unlabelled[number(self.seed, 5, self.step, place) % count] for place in places]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "teacher": tensors(self.teacher)}

    def load_state(self, state: dict[str, Any], *, source: Path) -> None:
        super().load_state(state, source=source)
        load_trainable(self.teacher, state["teacher"], source=source)


def disagreement(logits: Tensor, opinion: pvl.Prediction) -> Tensor:
    """Mean squared difference of the student's probability from the teacher's, weighted by how sure the teacher is.

    Args:
        logits: [B, H, W], the student's.
        opinion: The teacher's.

    Returns:
        Scalar.
    """
    surety = 1.0 - opinion.uncertainty / math.log(2.0)  # [B, H, W]
    squares = (logits.float().sigmoid() - opinion.probability).square()
    return (surety * squares).sum() / surety.sum().clamp(min=1.0)


# ---- command line ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    command = sys.argv if argv is None else ["train_semi.py", *argv]
    few = {
        (dataset.name, row.image, row.mask)
        for dataset in train.splits(args)[0]  # the rows of --fraction
        for row in dataset.rows
    }

    def training(*given: Any, rows: Rows, **settings: Any) -> SemiSupervised:
        return SemiSupervised(
            *given,
            rows=rows,
            labelled=[row for row, names in enumerate(rows.names) if names in few],
            consistency=args.consistency,
            ramp=args.ramp,
            decay=args.decay,
            teacher_samples=args.teacher_samples,
            **settings,
        )

    everything = argparse.Namespace(**{**vars(args), "fraction": 100})
    train.execute(train.set_up(everything, training), args, command=command)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    line = train.parser()
    line.description = (__doc__ or "").partition("\n")[0]
    add = line.add_argument_group("semi-supervised").add_argument
    add("--consistency", type=float, default=1.0, help="weight of agreeing with the teacher (%(default)s)")
    add("--ramp", type=float, default=0.4, help="part of all steps over which it rises (%(default)s)")
    add("--decay", type=float, default=0.99, help="of the teacher's running mean (%(default)s)")
    add("--teacher-samples", type=int, default=4, help="its stochastic passes (%(default)s)")
    args = train.parse(line, argv)
    if args.fraction == 100:
        line.error("--fraction is 100, expected 10, 25 or 50: the other rows are those without labels")
    if args.consistency < 0 or not 0 < args.ramp <= 1 or not 0 <= args.decay < 1 or args.teacher_samples < 1:
        line.error("expected --consistency from 0, --ramp in (0, 1], --decay in [0, 1) and --teacher-samples from 1")
    return args


if __name__ == "__main__":
    main()
