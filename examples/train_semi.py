"""Train with few labels and many images that have none: an uncertainty-aware mean teacher.

    python examples/train_semi.py --data data/Colin27 --fraction 10 --recipe brains --epochs 150
    python examples/train_semi.py ... --consistency 0          # the same with labels alone, to compare with

Labelled are the rows of Train_text_10 (or 25, 50); of the other rows of Train_text only image and sentence are used.
The teacher is a running mean of the student's weights. It predicts an unlabelled image from a few samples, and the
student is to agree, pixel by pixel, the more the surer the teacher is (Yu et al. 2019, arXiv 1907.07034, whose dropout
passes are the adapters' samples here; pixels are weighted by 1 - entropy / ln 2 instead of cut at a threshold). The
teacher is what is validated and saved, in both cases.

Takes the options of examples/train.py too, and writes the same files.

Cost and score: on one CPU core 2 minutes with labels alone, 4.5 minutes with unlabelled images (150 epochs); expect a
test DSC of about 17.3% and 18.3%. The CLIP is a small random one; docs/studies.md says what that gain is worth.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and what is left for examples/train.py."""
    line = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="and the options of examples/train.py",
        allow_abbrev=False,
    )
    add = line.add_argument
    add("--consistency", type=float, default=1.0, help="weight of agreeing with the teacher (%(default)s)")
    add("--ramp", type=float, default=0.4, help="part of all steps over which it rises (%(default)s)")
    add("--decay", type=float, default=0.99, help="of the teacher's running mean, per step (%(default)s)")
    add("--teacher-samples", type=int, default=4, help="its stochastic passes (%(default)s)")
    own, others = line.parse_known_args(argv)
    if own.consistency < 0 or not 0 < own.ramp <= 1 or not 0 <= own.decay < 1 or own.teacher_samples < 1:
        line.error("expected --consistency from 0, --ramp in (0, 1], --decay in [0, 1) and --teacher-samples from 1")
    return own, others


if __name__ == "__main__":
    OPTIONS = parse()  # before the imports that take seconds

import torch
import train
from torch import Tensor, nn
from torch.utils.data import Dataset

import pvl_adapter as pvl


class Pairs(Dataset[dict[str, Any]]):
    """Labelled rows, each with {"unlabelled": {"image", "text"}} of another row; an index is an epoch and a row."""

    def __init__(self, labelled: train.Rows, unlabelled: train.Rows, rows: Sequence[int]) -> None:
        self.labelled, self.unlabelled, self.rows = labelled, unlabelled, rows

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(index, int):
            return self.labelled[index]
        epoch, row = index
        generator = torch.Generator().manual_seed(hash((self.labelled.seed, 1, epoch, row)))
        other = self.rows[int(torch.randint(len(self.rows), (), generator=generator))]
        unlabelled = {name: self.unlabelled[epoch, other][name] for name in ("image", "text")}
        return {**self.labelled[index], "unlabelled": unlabelled}


class SemiTrainer(train.Trainer):
    """A training that also learns from rows whose masks are not used."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.teacher = self.evaluated = copy.deepcopy(self.network)
        self.accelerator.register_for_checkpointing(Trained(self.teacher))
        self.optimizer.optimizer.register_step_post_hook(lambda *_: self.update_teacher())

    def read_data(self) -> tuple[Dataset[Any], train.Rows]:
        labelled, val = super().read_data()
        few = {(dataset.name, row) for dataset in labelled.data.datasets for row in map(key, dataset.rows)}
        unlabelled = train.Rows(self.open_split("train", 100), labelled.transform, self.args.seed)
        every = [(dataset.name, row) for dataset in unlabelled.data.datasets for row in map(key, dataset.rows)]
        return Pairs(labelled, unlabelled, [number for number, row in enumerate(every) if row not in few]), val

    def losses(self, batch: dict[str, Any]) -> pvl.LossTerms:
        terms, args, progress = super().losses(batch), self.args, self.progress
        if not args.consistency:
            return terms
        images, texts = batch["unlabelled"]["image"], batch["unlabelled"]["text"]
        teacher = self.teacher.predict(images, texts, num_samples=args.teacher_samples, seed=progress.step)
        prepared = self.network.prepare(images)
        noise = (0.1 * torch.randn_like(prepared)).clamp(-0.2, 0.2)  # that the student alone sees
        student = self.model(prepared + noise, texts, sample=args.sample)
        done = (progress.epoch + progress.batch / self.batches_per_epoch) / (args.ramp * args.epochs)
        weight = args.consistency * math.exp(-5.0 * (1.0 - min(1.0, done)) ** 2)
        return replace(terms, total=terms.total + weight * disagreement(student.logits, teacher))

    @torch.no_grad()
    def update_teacher(self) -> None:
        decay = min(self.args.decay, 1.0 - 1.0 / (self.progress.step + 2))  # a plain mean at first
        for mean, student in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            if student.requires_grad:
                mean.lerp_(student, 1.0 - decay)


class Trained:
    """The trained parameters of a model, for Accelerate to save."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return {name: each.detach() for name, each in self.model.named_parameters() if each.requires_grad}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state, strict=False)


def key(row: Any) -> tuple[str, str]:
    return row.image, row.mask


def disagreement(logits: Tensor, teacher: pvl.Prediction) -> Tensor:
    """Mean squared difference of the student's probability from the teacher's, weighted by the teacher's confidence.

    Args:
        logits: [B, H, W], the student's.
        teacher: The teacher's prediction.

    Returns:
        Scalar.
    """
    confidence = 1.0 - teacher.uncertainty / math.log(2.0)  # [B, H, W]
    squares = (logits.float().sigmoid() - teacher.probability).square()
    return (confidence * squares).sum() / confidence.sum().clamp(min=1.0)


def main(own: argparse.Namespace, others: Sequence[str]) -> None:
    args = train.parse(others)
    if args.table or args.fraction == 100:
        raise SystemExit("train_semi.py needs --data and --fraction 10, 25 or 50: the other rows count as unlabelled")
    train.main(argparse.Namespace(**vars(args), **vars(own)), SemiTrainer)


if __name__ == "__main__":
    main(*OPTIONS)
