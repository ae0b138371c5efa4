"""Putting adapters into a CLIP, and taking them out again.

An injected host keeps its class, its own weights and keys; it gains one submodule, `pvl_adapters`, and instance-level
forwards (lockstep.py) that `remove_adapters` takes away again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from pvl_adapter.adapter import PVLAdapter
from pvl_adapter.check_blocks import check_blocks
from pvl_adapter.config import PVLConfig
from pvl_adapter.lockstep import ADAPTERS, Lockstep, lockstep_of
from pvl_adapter.towers import Towers, find_towers
from pvl_adapter.wrappers import tuner_parameters

_Host = TypeVar("_Host", bound=nn.Module)


def inject_adapters(clip: _Host, config: PVLConfig | None = None) -> _Host:
    """Join the two towers of a CLIP by trainable adapters, in place; the CLIP itself is frozen.

    Afterwards `clip(image, text)` takes one sentence per image and keeps its return type. In train mode a call takes
    one sample of the adapters' values, in eval mode it is deterministic; see `sampling`. A tower called alone raises.

    PEFT's layers (LoRA and the like) that are in the CLIP already go on training beside the adapters. Forward hooks on
    the towers' blocks see what the blocks are given and return, but must not change it. FSDP2's `fully_shard` may wrap
    the whole model, not single blocks; scalar parameters of the CLIP (`logit_scale`) go into its `ignored_params`.

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
    lockstep = Lockstep(clip, towers=towers, config=config, points=points)

    foreign = tuner_parameters(clip)
    for name, parameter in clip.named_parameters():
        if name not in foreign:
            parameter.requires_grad_(False)
    clip.add_module(ADAPTERS, adapters)
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
    delattr(clip, ADAPTERS)
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(lockstep.requires_grad.get(name, parameter.requires_grad))
    for name, module in clip.named_modules():
        module.training = lockstep.modes.get(name, module.training)
    return clip


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
        PVLAdapter(
            vision_dim,
            text_dim,
            config.dim,
            beta=config.beta,
            gate_init=config.gate_init,
            learn_beta=config.learn_beta,
        )
        for _ in config.layers or ()
    ]
    return nn.ModuleList(adapters).to(device=reference.device, dtype=dtype)
