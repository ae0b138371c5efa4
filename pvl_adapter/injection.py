"""Putting adapters into a CLIP, taking them out, and running what comes of it.

An injected host keeps its class, its own weights and keys; it gains one submodule, `pvl_adapters`, and instance-level
forwards (lockstep.py) that `remove_adapters` takes away again.

Shape alphabet: B batch, N patches, L text tokens, D joint width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pvl_adapter.adapter import NoisePair, PVLAdapter
from pvl_adapter.check_blocks import check_blocks
from pvl_adapter.config import PVLConfig
from pvl_adapter.lockstep import ADAPTERS, LOCKSTEP, Draw, Lockstep, lockstep_of
from pvl_adapter.towers import Towers, find_towers

_Host = TypeVar("_Host", bound=nn.Module)


@dataclass(frozen=True)
class JointFeatures:
    """What two joined towers say of image and sentence pairs, in the joint space, not normalised.

    Attributes:
        patch_tokens: [B, N, D], row by row, without class token. None where the host has no way to bring single
            patches into the joint space (CoCa pools them by attention, GroupViT groups them, X-CLIP reads videos).
        grid: Rows and columns of patches; N is their product.
        image_embeds: [B, D], pooled.
        text_tokens: [B, L, D].
        text_embeds: [B, D], pooled.
    """

    patch_tokens: Tensor | None
    grid: tuple[int, int]
    image_embeds: Tensor
    text_tokens: Tensor | None
    text_embeds: Tensor


class _Injected(Lockstep):
    """A lockstep that remembers what the host was like before."""

    def __init__(
        self, host: nn.Module, *, towers: Towers, config: PVLConfig, points: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__(host, towers=towers, config=config, points=points)
        self.requires_grad = {name: parameter.requires_grad for name, parameter in host.named_parameters()}
        self.modes = {name: module.training for name, module in host.named_modules()}


def inject_adapters(clip: _Host, config: PVLConfig | None = None) -> _Host:
    """Join the two towers of a CLIP by trainable adapters, in place; the CLIP itself is frozen.

    Afterwards `clip(image, text)` takes one sentence per image and keeps its return type. In train mode a call draws
    one sample of the adapters' values, in eval mode it is deterministic; see `sampling`. A tower called alone raises.

    Args:
        clip: An open_clip or transformers model, see `find_towers` for which.
        config: Where adapters go and what they are like; None means the defaults.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: If the model is none of the supported kinds.
        ValueError: If the model has adapters already, or a layer is out of range. The model is then unchanged.
    """
    config = PVLConfig() if config is None else config
    if not isinstance(config, PVLConfig):
        raise TypeError(f"config is a {type(config).__name__}, expected a PVLConfig")
    if hasattr(clip, ADAPTERS):
        raise ValueError("this model has adapters already; call remove_adapters(model) first")
    towers = find_towers(clip)
    image_depth, text_depth = len(towers.image.blocks(clip)), len(towers.text.blocks(clip))
    config = dataclasses.replace(config, layers=_resolve_layers(config.layers, min(image_depth, text_depth)))
    points = fusion_points(config.layers or (), image_depth=image_depth, text_depth=text_depth)
    check_blocks(clip, towers)
    if config.tower_dropout and towers.image.drops_patches(clip):
        raise ValueError("this model drops patches in training, so its towers must stay in eval: tower_dropout=False")
    adapters = _build_adapters(clip, towers, config)
    lockstep = _Injected(clip, towers=towers, config=config, points=points)

    foreign = _tuner_parameters(clip)
    for name, parameter in clip.named_parameters():
        if name not in foreign:
            parameter.requires_grad_(False)
    clip.add_module(ADAPTERS, adapters)
    object.__setattr__(clip, LOCKSTEP, lockstep)
    lockstep.install()
    clip.train(clip.training)
    return clip


def remove_adapters(clip: _Host) -> _Host:
    """Take the adapters out again: the same object as before `inject_adapters`, training flags included.

    Raises:
        ValueError: If the model has no adapters.
    """
    lockstep = lockstep_of(clip)
    lockstep.uninstall()
    delattr(clip, LOCKSTEP)
    delattr(clip, ADAPTERS)
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(lockstep.requires_grad.get(name, parameter.requires_grad))
    for name, module in clip.named_modules():
        module.training = lockstep.modes.get(name, module.training)
    return clip


@contextmanager
def disable_adapters(clip: nn.Module) -> Iterator[None]:
    """The untouched host, bit for bit, inside the block; its towers can be called alone and follow its train mode.

    Its weights stay frozen: torch folds some products otherwise where weights want gradients, so compare it with a
    frozen host.
    """
    lockstep = lockstep_of(clip)
    before = lockstep.enabled
    try:
        lockstep.enabled = False
        clip.train(clip.training)
        yield
    finally:
        lockstep.enabled = before
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
    """Say how the adapters' values are drawn in calls inside the block, whatever the train mode.

    Args:
        clip: An injected model.
        sample: Draw the values; False takes their means.
        num_samples: How many draws each attention averages.
        generator: Source of the draws, on the model's device.
        noise: The draws themselves, for each adapter the text values' [B, L, C] and the image values' [B, V, C].
    """
    lockstep = lockstep_of(clip)
    before = lockstep.draw
    lockstep.draw = Draw(sample=sample, num_samples=num_samples, generator=generator, noise=noise)
    try:
        yield
    finally:
        lockstep.draw = before


def encode(
    clip: nn.Module,
    image: Tensor | Mapping[str, Any],
    text: Tensor | Mapping[str, Any],
    *,
    sample: bool | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    noise: Sequence[NoisePair] | None = None,
) -> JointFeatures:
    """Joint features of image and sentence pairs, each tower run once.

    Args:
        clip: An injected model.
        image: [B, 3, H, W], as the model's preprocessing makes it, or the mapping a Hugging Face processor returns.
        text: Token ids [B, L], or the mapping a Hugging Face tokenizer returns.
        sample: Draw the adapters' values; None draws in train mode, or as an enclosing `sampling` says.
        num_samples: How many draws each attention averages, if `sample` is given.
        generator: Source of the draws, if `sample` is given.
        noise: The draws themselves; implies `sample=True`.

    Raises:
        ValueError: If the model has no adapters, or the inputs are not what it takes.
    """
    lockstep = lockstep_of(clip)
    draw = None
    if sample is not None or noise is not None:
        sample = True if sample is None else sample
        draw = Draw(sample=sample, num_samples=num_samples, generator=generator, noise=noise)
    elif num_samples != 1 or generator is not None:
        raise ValueError("num_samples and generator say how to draw, so give sample=True with them")
    towers = lockstep.towers
    inputs = towers.inputs(image, text)
    with lockstep.running(inputs, draw=draw):
        return _joint_features(lockstep, inputs)


class SharedStart:
    """Image and sentence pairs whose towers have been run up to the first adapter, once for all samples.

    One image may go with several sentences: its part is then computed once.

    Args:
        clip: An injected model.
        image: As for `encode`.
        text: Likewise.

    Raises:
        ValueError: If the model has no adapters, or the inputs are not what it takes.
    """

    def __init__(self, clip: nn.Module, image: Tensor | Mapping[str, Any], text: Tensor | Mapping[str, Any]) -> None:
        self.lockstep = lockstep_of(clip)
        towers = self.lockstep.towers
        self.image_inputs, self.text_inputs = towers.image_inputs(image), towers.text_inputs(text)
        towers.image.check(clip, self.image_inputs)
        towers.text.check(clip, self.text_inputs)
        images, self.batch = len(self.image_inputs[towers.image.key]), len(self.text_inputs[towers.text.key])
        if images not in (1, self.batch) or not self.batch:
            raise ValueError(
                f"got {images} images and {self.batch} sentences, expected one sentence for each image, or several "
                "sentences for a single one"
            )
        self.shares_image = images == 1
        blocks = (*self.lockstep.image.blocks, *self.lockstep.text.blocks)
        parts = (part for block in blocks for part in block.modules())
        self.lean = not any(part._forward_hooks or part._forward_pre_hooks for part in parts)  # nobody looks on
        self.state = self.lockstep.start({**self.image_inputs, **self.text_inputs}, lean=self.lean)

    def encode(self, pairs: Sequence[int], *, draw: Draw) -> JointFeatures:
        """Go on from the start with some of the pairs, each as often as it is named; [R, ...] for R names.

        Text tokens may be missing: only what is pooled of the text is computed where the family allows.

        Args:
            pairs: Which.
            draw: How the adapters' values are drawn; `noise` is [R, L, C] and [R, V, C].
        """
        index = torch.tensor(list(pairs), device=self.text_inputs[self.lockstep.towers.text.key].device)
        of_image = torch.zeros_like(index) if self.shares_image else index
        inputs = {
            **{name: _rows(value, of_image) for name, value in self.image_inputs.items()},
            **{name: _rows(value, index) for name, value in self.text_inputs.items()},
        }
        start = dataclasses.replace(
            self.state, image=_rows(self.state.image, of_image), text=_rows(self.state.text, index)
        )
        with self.lockstep.running(inputs, draw=draw, given=start, lean=self.lean):
            return _joint_features(self.lockstep, inputs)


def _rows(value: Any, index: Tensor) -> Any:
    """Rows of every batched tensor in what a tower is given or a block returns; what has one row serves all."""
    if isinstance(value, tuple):
        return tuple(_rows(item, index) for item in value)
    if isinstance(value, Tensor) and value.ndim:
        return value if len(value) == 1 and int(index.max()) > 0 else value[index]
    return value


def _joint_features(lockstep: Lockstep, inputs: Mapping[str, Any]) -> JointFeatures:
    """Run both towers within `lockstep.running`."""
    towers, clip = lockstep.towers, lockstep.host
    image_embeds = towers.image.encode(clip, inputs)  # [B, D]; runs the text tower too
    if lockstep.text.pooled is None:
        raise RuntimeError("the image tower never reached its blocks; this model cannot be run in lockstep")
    return JointFeatures(
        patch_tokens=towers.image.patches(clip, inputs, lockstep.image.last_hidden),
        grid=towers.image.grid(clip, inputs),
        image_embeds=image_embeds,
        text_tokens=None if lockstep.lean else towers.text.tokens(clip, lockstep.text.last_hidden),
        text_embeds=lockstep.text.pooled,
    )


def fusion_points(layers: Sequence[int], *, image_depth: int, text_depth: int) -> tuple[tuple[int, int], ...]:
    """Blocks (image, text) before which the towers meet, matched by relative depth.

    `layers` counts blocks of the shallower tower; the deeper one meets it at the nearest relative depth (halves up).
    """
    shallow, deep = sorted((image_depth, text_depth))
    matched = [(2 * layer * deep + shallow) // (2 * shallow) for layer in layers]
    pairs = zip(layers, matched, strict=True)
    return tuple((deeper, layer) if image_depth > text_depth else (layer, deeper) for layer, deeper in pairs)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many of a model's parameters are trained."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / max(total, 1):.2f} %)")


def _resolve_layers(layers: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    if layers is None:
        if depth < 3:
            raise ValueError(
                f"the shallower tower has {depth} blocks, the default layers (all but the first and last) need 3; "
                "name them, as in PVLConfig(layers=[0])"
            )
        return tuple(range(1, depth - 1))
    if layers[-1] >= depth:
        raise ValueError(f"layers {layers} go beyond the shallower tower, whose blocks are 0 to {depth - 1}")
    return layers


def _build_adapters(clip: nn.Module, towers: Towers, config: PVLConfig) -> nn.ModuleList:
    reference = next(towers.image.blocks(clip).parameters())
    dtype = torch.promote_types(reference.dtype, torch.float32)  # half-precision hosts still train in float32
    vision_dim, text_dim = towers.image.width(clip), towers.text.width(clip)
    adapters = [
        PVLAdapter(vision_dim, text_dim, config.dim, beta=config.beta, gate_init=config.gate_init)
        for _ in config.layers or ()
    ]
    return nn.ModuleList(adapters).to(device=reference.device, dtype=dtype)


def _tuner_parameters(clip: nn.Module) -> set[str]:
    """Names of parameters that PEFT has put into the host: they go on training beside our adapters."""
    return {
        f"{prefix}.{kind}.{name}"
        for prefix, module in clip.named_modules()
        for kind in getattr(module, "adapter_layer_names", ())  # PEFT's tuner layers list their own parts so
        if isinstance(part := getattr(module, kind, None), nn.Module)
        for name, _ in part.named_parameters()
    }
