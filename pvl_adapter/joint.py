"""Run two joined towers: `encode` for features, contexts for sampling and for the towers without adapters.

Shape alphabet: B batch, R rows of one forward, A adapters, N patches, V image tokens, L text tokens, C adapter width, D
joint width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvl_adapter.adapter import NoisePair
from pvl_adapter.joint_run import JointRun, Prefix, TowerPrefix, ValueSampling
from pvl_adapter.lockstep import Lockstep, lockstep_of
from pvl_adapter.noise import on_device
from pvl_adapter.towers import Inputs, Tower


@dataclass(frozen=True)
class JointFeatures:
    """What two joined towers say of image and sentence pairs, in the joint space, not normalised.

    Attributes:
        patch_tokens: [B, N, D], row by row, without class token. None where the host has no way to bring single
            patches into the joint space (CoCa pools them by attention, GroupViT groups them, X-CLIP reads videos).
        grid: Rows and columns of patches; N is their product.
        image_embeds: [B, D], pooled.
        text_tokens: [B, L, D]; None where they were not asked for.
        text_embeds: [B, D], pooled.
        kl: If asked for, [B, 2 A, C]: KL divergence of the adapters' values from a standard normal in nats, averaged
            over the tokens that are read: of each adapter's text values, then of its image values.
    """

    patch_tokens: Tensor | None
    grid: tuple[int, int]
    image_embeds: Tensor
    text_tokens: Tensor | None
    text_embeds: Tensor
    kl: Tensor | None = None

    def summary(self) -> Tensor:
        """What image and sentence are like, [B, 2 D]: average direction of the patches, direction of the sentence."""
        patches = F.normalize(cast(Tensor, self.patch_tokens).float(), dim=-1).mean(dim=1)
        return torch.cat([patches, F.normalize(self.text_embeds.float(), dim=-1)], dim=-1)

    def likeness(self) -> Tensor:
        """How alike the sentence and single patches are, [B, 3]: the largest cosine, the mean of the highest tenth, and
        the mean of all."""
        patches = F.normalize(cast(Tensor, self.patch_tokens).float(), dim=-1)
        cosines = (patches @ F.normalize(self.text_embeds.float(), dim=-1)[:, :, None])[..., 0]  # [B, N]
        highest = cosines.topk(max(1, cosines.shape[1] // 10), dim=1).values  # [B, N / 10]
        return torch.stack([highest[:, 0], highest.mean(dim=1), cosines.mean(dim=1)], dim=1)


@contextmanager
def disable_adapters(clip: nn.Module) -> Iterator[None]:
    """The untouched host, bit for bit, inside the block; its towers can be called alone and follow its train mode.

    Its weights stay frozen: torch folds some products otherwise where weights want gradients, so compare it with a
    frozen host. Other threads' calls stay joined; in train mode they are refused until the block ends, since their
    towers share its dropout.
    """
    lockstep = lockstep_of(clip)
    local, guard, awake = lockstep.local, lockstep.guard, int(clip.training)
    before = local.enabled
    try:
        local.enabled = False
        guard.awake += awake
        clip.train(clip.training)
        yield
    finally:
        guard.awake -= awake
        local.enabled = before
        clip.train(clip.training)


@contextmanager
def sampling(
    clip: nn.Module,
    *,
    sample: bool = True,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    noise: Sequence[NoisePair] | None = None,
) -> Iterator[None]:
    """Say how the adapters' values are sampled in this thread's calls inside the block, whatever the train mode.

    Args:
        clip: An injected model.
        sample: Sample the values; False takes their means.
        num_samples: How many samples each attention averages.
        generator: Source of the noise, on the model's device.
        noise: The noise itself, for each adapter the image values' [B, V, C] and the text values' [B, L, C].
    """
    local = lockstep_of(clip).local
    before = local.sampling
    try:
        local.sampling = ValueSampling(sample=sample, num_samples=num_samples, generator=generator, noise=noise)
        yield
    finally:
        local.sampling = before


def encode(
    clip: nn.Module,
    image: Tensor | Mapping[str, Any],
    text: Tensor | Mapping[str, Any],
    *,
    sample: bool | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    noise: Sequence[NoisePair] | None = None,
    text_tokens: bool = True,
    kl: bool = False,
) -> JointFeatures:
    """Joint features of image and sentence pairs, each tower run once.

    Args:
        clip: An injected model.
        image: [B, 3, H, W], as the model's preprocessing makes it, or the mapping a Hugging Face processor returns.
        text: Token ids [B, L], or the mapping a Hugging Face tokenizer returns.
        sample: Sample the adapters' values; None samples in train mode, or as an enclosing `sampling` says.
        num_samples: How many samples each attention averages, if `sample` is given.
        generator: Source of the noise, if `sample` is given.
        noise: The noise itself, as for `sampling`; implies `sample=True`.
        text_tokens: Compute all text tokens; otherwise what only they need is left out, padding first of all, and a
            generator draws no noise for what is left out.
        kl: Compute `JointFeatures.kl` too, for `kl_loss`.

    Raises:
        ValueError: If the model has no adapters, or the inputs are not what it takes.
    """
    lockstep = lockstep_of(clip)
    how = lockstep.local.sampling
    if sample is not None or noise is not None:
        sample = True if sample is None else sample
        how = ValueSampling(sample=sample, num_samples=num_samples, generator=generator, noise=noise)
    elif num_samples != 1 or generator is not None:
        raise ValueError("num_samples and generator say how to sample, so give sample=True with them")
    inputs = lockstep.towers.inputs(image, text)
    lockstep.towers.check(clip, inputs)
    run = JointRun(lockstep, inputs, sampling=how, keep_outputs=text_tokens or _has_hooks(lockstep), kl=kl)
    return _features(lockstep, run, text_tokens=text_tokens)


Prefixes = dict[tuple[Hashable, ...], TowerPrefix]
"""What the image tower computes of some images before the first adapter, by all that it depends on besides them."""


class SharedPrefix:
    """Image and sentence pairs whose towers have been run up to the first adapter, once for all samples.

    One image may go with several sentences: its part is then computed once.

    Args:
        clip: An injected model.
        image: As for `encode`.
        text: Likewise.
        known: What earlier calls for the same images and weights have found, which is then not computed again.
        kernels: How this call computes, for `known`: the type of an autocast around it, and whether it is on.

    Raises:
        ValueError: If the model has no adapters, or the inputs are not what it takes.
    """

    def __init__(
        self,
        clip: nn.Module,
        image: Tensor | Mapping[str, Any],
        text: Tensor | Mapping[str, Any],
        *,
        known: Prefixes | None = None,
        kernels: tuple[torch.dtype | None, bool] = (None, False),
    ) -> None:
        self.lockstep = lockstep = lockstep_of(clip)
        towers = lockstep.towers
        image_inputs, text_inputs = towers.image_inputs(image), towers.text_inputs(text)
        towers.image.check(clip, image_inputs)
        towers.text.check(clip, text_inputs)
        images, self.batch = len(image_inputs[towers.image.key]), len(text_inputs[towers.text.key])
        if images not in (1, self.batch) or not self.batch:
            raise ValueError(
                f"got {images} images and {self.batch} sentences, expected one sentence for each image, or several "
                "sentences for a single one"
            )
        self.shares_image = images == 1
        self.keep_outputs = _has_hooks(lockstep)
        known = {} if known is None else known
        key = (kernels, lockstep.local.enabled, self.keep_outputs)
        if key not in known:
            known[key] = self._run(towers.image, image_inputs)
        self.prefix = Prefix(known[key], self._run(towers.text, text_inputs))

    def _run(self, tower: Tower, inputs: Inputs) -> TowerPrefix:
        """One tower alone, up to the first adapter."""
        lockstep, keep = self.lockstep, self.keep_outputs
        run = JointRun(lockstep, inputs, sampling=ValueSampling(), prefix_only=True, keep_outputs=keep)
        lockstep.conduct(run, lambda: tower.encode(lockstep.host, inputs))
        if run.found is None:
            raise RuntimeError(f"the model never ran the blocks of {tower.path}, so its towers cannot meet")
        return run.found

    def encode(self, pairs: Sequence[int], *, noise: Sequence[NoisePair] | None) -> JointFeatures:
        """Run the rest for some of the pairs, each as often as it is listed: R rows for R entries.

        Args:
            pairs: Which.
            noise: For each adapter [R, V, C] and [R, L, C]; None takes the mean values.

        Returns:
            Features of R rows, without text tokens.
        """
        index = on_device(pairs, self.prefix.text.inputs[self.lockstep.towers.text.key].device)
        of_image, images = (torch.zeros_like(index), 1) if self.shares_image else (index, self.batch)
        prefix = Prefix(_rows(self.prefix.image, of_image, images), _rows(self.prefix.text, index, self.batch))
        run = JointRun(
            self.lockstep,
            {**prefix.image.inputs, **prefix.text.inputs},
            sampling=ValueSampling(sample=noise is not None, noise=noise),
            prefix=prefix,
            keep_outputs=self.keep_outputs,
        )
        return _features(self.lockstep, run, text_tokens=False)

    def mean_passes(self, rows: int) -> list[JointFeatures]:
        """Features of every pair with the adapters' mean values, `rows` pairs at a time."""
        every = range(self.batch)
        return [self.encode(every[first : first + rows], noise=None) for first in every[::rows]]


def _features(lockstep: Lockstep, run: JointRun, *, text_tokens: bool) -> JointFeatures:
    """Conduct a run and read both towers off it."""
    image_embeds, text_embeds = _run_towers(lockstep, run)
    towers, clip, inputs = lockstep.towers, lockstep.host, run.inputs
    return JointFeatures(
        patch_tokens=towers.image.patches(clip, inputs, run.image.last_hidden),
        grid=towers.image.grid(clip, inputs),
        image_embeds=image_embeds,
        text_tokens=towers.text.tokens(clip, run.text.last_hidden) if text_tokens else None,
        text_embeds=text_embeds,
        kl=torch.stack(run.kl, dim=1) if run.kl else None,
    )


def _run_towers(lockstep: Lockstep, run: JointRun) -> tuple[Tensor, Tensor]:
    """Conduct a run by calling the image tower, which fetches the text tower; both pooled embeddings, [B, D]."""
    image_embeds = lockstep.conduct(run, lambda: lockstep.towers.image.encode(lockstep.host, run.inputs))
    if run.text.pooled is None:
        raise RuntimeError("the model never ran the blocks of its image tower, so its towers cannot meet")
    return image_embeds, run.text.pooled


def _has_hooks(lockstep: Lockstep) -> bool:
    """Whether forward hooks look at the blocks, so that every output is to be kept for them."""
    blocks = (*lockstep.image.blocks, *lockstep.text.blocks)
    return any(part._forward_hooks or part._forward_pre_hooks for block in blocks for part in block.modules())


def _rows(prefix: TowerPrefix, index: Tensor, batch: int) -> TowerPrefix:
    """Some rows of a batch."""
    inputs = {name: _take_rows(value, index, batch) for name, value in prefix.inputs.items()}
    return dataclasses.replace(prefix, inputs=inputs, outputs=_take_rows(prefix.outputs, index, batch))


def _take_rows(value: Any, index: Tensor, batch: int) -> Any:
    """Rows of every batched tensor in what a tower is given or a block returns; what has one row serves all."""
    if isinstance(value, tuple):
        return tuple(_take_rows(item, index, batch) for item in value)
    return value[index] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
