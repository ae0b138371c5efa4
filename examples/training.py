"""The steps of examples/train.py, by one process or many.

What is random in a step follows from seed, step and place in the batch alone. So nothing random need be saved to go on
exactly, and the same rows get the same draws whichever process computes them.

Shape alphabet: B batch, L text tokens, V image tokens, C adapter width, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from recipe import Recipe
from rows import Normalization, Rows, augment
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torchmetrics.functional.classification import binary_f1_score

import pvl_adapter as pvl
from pvl_adapter.hub.weights import check_tensors
from pvl_adapter.hub.backbones import fingerprint
from pvl_adapter.injection import SharedStart
from pvl_adapter.lockstep import lockstep_of


def number(*parts: int) -> int:
    """A seed that follows from some numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class Training:
    """A model and what changes from step to step; nothing random is kept, so nothing random need be restored.

    Args:
        model: On the CPU or where `accelerator` computes.
        recipe: How.
        rows: To train on.
        val: To validate on; may be empty.
        seed: Of batches, augmentation and draws.
        accelerator: Of all processes.
        accumulate: A batch is computed in so many parts: less memory. The contrastive loss sees a part at a time.
        labelled: Rows to train on; None means all.
    """

    def __init__(
        self,
        model: pvl.MedCLIPSeg,
        recipe: Recipe,
        *,
        rows: Rows,
        val: Rows,
        seed: int,
        accelerator: Accelerator,
        accumulate: int = 1,
        labelled: Sequence[int] | None = None,
    ) -> None:
        self.labelled = list(range(len(rows))) if labelled is None else list(labelled)
        self.recipe, self.rows, self.val, self.seed = recipe, rows, val, seed
        self.accelerator, self.accumulate = accelerator, accumulate
        self.frozen_weights = fingerprint(model.clip)
        self.model = model.to(accelerator.device)
        self.normalization = Normalization(model)
        self.loss = recipe.loss()
        # Shared is the model with gradients exchanged between processes.
        self.shared, self.optimizer = accelerator.prepare(model, recipe.optimizer(trainable(model).values()))
        self.image_tokens, self.text_tokens, self.extra_tokens = self._token_counts()
        parts = accelerator.num_processes * accumulate
        if recipe.batch_size % parts or len(self.labelled) < parts:
            raise SystemExit(
                f"a batch of {recipe.batch_size} of {len(self.labelled)} rows cannot be shared by "
                f"{accelerator.num_processes} processes in {accumulate} parts; choose a --batch-size that can be "
                f"divided by {parts}"
            )
        self.batches_per_epoch = len(self.batches(0))
        self.step = 0  # taken so far
        self.sums: dict[str, float] = {}  # of losses of the epoch under way
        self.history: list[dict[str, Any]] = []  # of epochs
        self.best = -1.0
        self.seconds = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """What a training of another kind has to be asked for besides, to go on with it."""
        return {}

    @property
    def evaluated(self) -> pvl.MedCLIPSeg:
        """What is validated and saved."""
        return self.model

    @property
    def epoch(self) -> int:
        return self.step // self.batches_per_epoch

    @property
    def stopped_early(self) -> bool:
        scores = [entry["val_dice"] for entry in self.history if "val_dice" in entry]
        since = len(scores) - 1 - scores.index(max(scores)) if scores else 0
        return 0 < self.recipe.patience <= since

    def batches(self, epoch: int) -> list[list[int]]:
        """Rows of every batch of an epoch: all rows once, but for a rest that cannot be shared evenly."""
        parts, size = self.accelerator.num_processes * self.accumulate, self.recipe.batch_size
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.labelled).tolist()
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return [batch[: len(batch) - len(batch) % parts] for batch in batches if len(batch) >= parts]

    def take_step(self, batch: list[int]) -> dict[str, float]:
        """One step of the optimiser; returns the losses, of the whole batch."""
        model, world, rank = self.shared, self.accelerator.num_processes, self.accelerator.process_index
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.step, steps_per_epoch=self.batches_per_epoch)
        torch.manual_seed(number(self.seed, 1, self.step, rank))  # of what the towers drop, if they do
        losses: dict[str, Tensor] = {}
        size = len(batch) // self.accumulate
        for part in range(self.accumulate):
            places = range(part * size + rank, (part + 1) * size, world)  # of this process
            with self.accelerator.no_sync(model) if part + 1 < self.accumulate else nullcontext():
                terms = self.terms([batch[place] for place in places], places)
                self.accelerator.backward(terms.total / self.accumulate)
            for name in ("total", "dice", "bce", "contrastive"):
                losses[name] = losses.get(name, 0.0) + getattr(terms, name).detach() / self.accumulate
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean = self.accelerator.reduce(torch.stack(list(losses.values())).float(), reduction="mean").tolist()
        if not all(map(math.isfinite, mean)):
            raise SystemExit(f"the losses of step {self.step + 1} are {mean}; try a smaller --lr")
        self.step += 1
        return dict(zip(losses, mean, strict=True))

    def terms(self, rows: Sequence[int], places: Sequence[int]) -> pvl.LossTerms:
        """Losses of some rows, which have these places in the batch of all processes."""
        images, masks = self.pictures(rows, places)
        return self.loss_terms(self.forward(images, rows, places), masks)

    def forward(self, images: Tensor, rows: Sequence[int], places: Sequence[int]) -> pvl.SegmentationOutput:
        tokens = self.model.tokenize([self.rows.texts[row] for row in rows])
        with self.accelerator.autocast():
            return self.shared(images.to(self.accelerator.device), tokens, noise=self._noise(tokens, places))

    def loss_terms(self, out: pvl.SegmentationOutput, masks: Tensor) -> pvl.LossTerms:
        """Of which the contrastive one looks at the rows of all processes."""
        patch_tokens, text_embeds = out.patch_tokens, out.text_embeds
        if self.accelerator.num_processes > 1:
            patch_tokens, text_embeds = (torch.cat(all_gather(each)) for each in (patch_tokens, text_embeds))
        masks = masks.to(self.accelerator.device)
        return self.loss(out.logits, masks, patch_tokens=patch_tokens, text_embeds=text_embeds)

    def pictures(self, rows: Sequence[int], places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] as the network takes them, and masks [B, H, W]."""
        pairs = []
        for row, place in zip(rows, places, strict=True):
            levels = self.rows.pictures[self.rows.picture[row]]
            random = np.random.default_rng([self.seed, 2, self.step, place])
            pairs.append(augment(levels[None], self.rows.masks[row][None], self.recipe, random=random))
        return self.normalization.images(torch.cat([image for image, _ in pairs])), torch.cat(
            [mask for _, mask in pairs]
        )

    def _noise(self, tokens: Any, places: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The adapters' draws, each row's its own: for each adapter [B, L, C] and [B, V, C]."""
        lockstep = lockstep_of(self.model.clip)
        adapters, width, device = len(lockstep.points), lockstep.config.dim, self.accelerator.device
        length = self._length(tokens) + self.extra_tokens
        text, vision = [], []
        for place in places:
            generator = torch.Generator(device).manual_seed(number(self.seed, 3, self.step, place))
            drawn = [
                torch.randn(adapters, count, width, generator=generator, device=device)
                for count in (self.text_tokens, self.image_tokens)
            ]
            text.append(drawn[0][:, :length])
            vision.append(drawn[1])
        return list(zip(torch.stack(text, dim=1), torch.stack(vision, dim=1), strict=True))

    def _length(self, tokens: Any) -> int:
        towers = lockstep_of(self.model.clip).towers
        return towers.text_inputs(tokens)[towers.text.key].shape[1]

    @torch.no_grad()
    def _token_counts(self) -> tuple[int, int, int]:
        """How many tokens an adapter reads of an image, and of the longest text; how many of a text have no id."""
        clip, size = self.model.clip, self.model.image_size
        tokens = self.model.tokenize(["a"])
        state = SharedStart(clip, self.model.prepare(np.zeros(size, dtype=np.uint8)), tokens).state
        extra = state.text_tokens - self._length(tokens)
        return state.image_tokens, lockstep_of(clip).towers.text.context_length(clip) + extra, extra

    def validate(self) -> float:
        """Mean Dice of the deterministic pass over the validation rows, at the network's size; an empty mask for an
        empty label scores 1."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = range(rank, len(self.val), world)
        total = torch.zeros((), device=self.accelerator.device)
        for start in range(0, len(mine), self.recipe.batch_size):
            rows = list(mine[start : start + self.recipe.batch_size])
            levels = self.val.pictures[[self.val.picture[row] for row in rows]]
            images = self.normalization.images(levels).to(self.accelerator.device)
            masks = self.evaluated.predict(images, [self.val.texts[row] for row in rows], num_samples=0).mask
            labels = self.val.masks[rows].to(masks.device)
            total += binary_f1_score(masks.int(), labels.int(), multidim_average="samplewise", zero_division=1).sum()
        return self.accelerator.reduce(total).item() / len(self.val)

    def state(self) -> dict[str, Any]:
        return {
            "trainable": tensors(self.model),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any], *, source: Path) -> None:
        load_trainable(self.model, state["trainable"], source=source)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.sums, self.history = state["step"], state["sums"], state["history"]
        self.best, self.seconds = state["best"], state["seconds"]


def load_trainable(model: pvl.MedCLIPSeg, values: dict[str, Tensor], *, source: Path) -> None:
    parameters = trainable(model)
    check_tensors(values, parameters, source=source)
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trained."""
    return {name: parameter.detach() for name, parameter in trainable(model).items()}
