"""Configurations: frozen dataclasses, checked when built, JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

CHANNEL_ORDERS = ("RGB", "BGR")
RESIZES = ("bicubic", "opencv_bilinear")

_Config = TypeVar("_Config", bound="JSONConfig")


class JSONConfig:
    """Mixin for frozen dataclasses that are written to and read from JSON."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """Build from a mapping.

        Raises:
            ValueError: If it is none, a key is unknown (the file may be newer) or a value is out of range.
        """
        if not isinstance(values, dict):
            raise ValueError(f"got the JSON value {json.dumps(values)}, expected an object: {cls.__name__}'s fields")
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{cls.__name__} has no field {unknown}, known are {sorted(known)}; is the file newer?")
        return cls(**values)

    @classmethod
    def from_json(cls: type[_Config], text: str) -> _Config:
        """Build from what `to_json` wrote.

        Raises:
            ValueError: If the text is no JSON object, a key is unknown, or a value is out of range.
        """
        return cls.from_dict(json.loads(text))


@dataclass(frozen=True)
class PVLConfig(JSONConfig):
    """Where adapters go and what they are like.

    Args:
        layers: Blocks of the shallower tower, counted from 0, before which the towers exchange evidence. The deeper
            tower takes part at the same relative depth. None means all blocks but the first and the last.
        dim: Adapter width C.
        beta: How strongly uncertain keys lose attention; 0 gives ordinary attention.
        gate_init: Initial value of the learned gates, before the sigmoid.
        mask_padding: Keep image tokens from reading text padding. The published weights need False.
        tower_dropout: In train mode, wake the frozen towers' own dropout too (as released). By default the towers stay
            in eval mode whatever the model's mode is.
        gradient_checkpointing: Recompute every block of both towers in the backward pass to save memory. The host's
            own switch, where it is on, has the same effect.
        learn_beta: Learn `beta`, one for each direction of each adapter, from that value on; it stays positive.

    Raises:
        ValueError: If a value is out of range.
    """

    layers: tuple[int, ...] | None = None
    dim: int = 256
    beta: float = 2.35
    gate_init: float = 0.0
    mask_padding: bool = True
    tower_dropout: bool = False
    gradient_checkpointing: bool = False
    learn_beta: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", _block_indices(self.layers))
        require(is_int(self.dim) and self.dim > 0, "dim", self.dim, "a positive integer")
        require(_is_finite(self.beta) and self.beta >= 0, "beta", self.beta, "a finite number, 0 or more")
        require(_is_finite(self.gate_init), "gate_init", self.gate_init, "a finite number")
        for name in ("mask_padding", "tower_dropout", "gradient_checkpointing", "learn_beta"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        require(self.beta > 0 or not self.learn_beta, "beta", self.beta, "a positive number where it is learned")


@dataclass(frozen=True)
class MedCLIPSegConfig(JSONConfig):
    """What the segmentation head is like and how images reach the network.

    Args:
        image_mean: Mean of each channel in [0, 1] that images are normalised with, in the order the network takes
            the channels; None means the host's own.
        image_std: Standard deviation, likewise.
        num_upscale: Scale blocks of the pixel head, each doubling the patch grid.
        channel_order: Of the images the network takes, "RGB" or "BGR"; images are given in RGB either way.
        resize: How images reach the network's size: "bicubic" (antialiased) or "opencv_bilinear" (as released).
        context_length: Tokens that every sentence is padded or cut to; None pads to the longest of a batch, where the
            host's tokenizer can.
        clean_prompts: Repair encoding errors and HTML entities of sentences and collapse their white space, as the
            authors' code does, before they are tokenized.

    Raises:
        ValueError: If a value is out of range.
    """

    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    num_upscale: int = 2
    channel_order: str = "RGB"
    resize: str = "bicubic"
    context_length: int | None = None
    clean_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            if (values := getattr(self, name)) is not None:
                valid = isinstance(values, Sequence) and len(values) == 3 and all(map(_is_finite, values))
                require(valid, name, values, "three finite numbers")
                object.__setattr__(self, name, tuple(values))
        require(self.image_std is None or min(self.image_std) > 0, "image_std", self.image_std, "positive numbers")
        require(is_int(self.num_upscale) and self.num_upscale >= 0, "num_upscale", self.num_upscale, "0 or more")
        for name, known in (("channel_order", CHANNEL_ORDERS), ("resize", RESIZES)):
            require(getattr(self, name) in known, name, getattr(self, name), f"one of {known}")
        length = self.context_length
        valid = length is None or (is_int(length) and length > 0)
        require(valid, "context_length", length, "a positive integer or None")
        require(isinstance(self.clean_prompts, bool), "clean_prompts", self.clean_prompts, "True or False")


def _block_indices(layers: Iterable[int]) -> tuple[int, ...]:
    require(isinstance(layers, Iterable), "layers", layers, "block indices, as in range(1, 11) or [1, 2]")
    indices = tuple(layers)
    valid = bool(indices) and all(is_int(i) and i >= 0 for i in indices) and len(set(indices)) == len(indices)
    require(valid, "layers", indices, "distinct block indices counted from 0, at least one")
    return tuple(sorted(indices))


def is_int(value: object) -> bool:
    """Whether a value is a plain integer, not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise ValueError for an argument that is out of range."""
    if not condition:
        raise ValueError(f"{name} is {got!r}, expected {expected}")
