"""Running two towers block by block, with adapters between them.

Fusion is bidirectional at each depth, so ordinary hooks cannot do it. Instead each block of both towers gets an
instance-level forward. When one tower's own forward reaches its first block, that call starts the other tower's own
forward; when this reaches its first block too, both embedded sequences and both argument lists are at hand and the
joint loop runs. From then on every block call returns its stored output, so both towers embed, mask, pool and project
with their own code. Nothing of any host is re-implemented.

In a call of the host itself the tower that was started first is later called again by the host; its blocks then
replay too, so only its embedding and pooling run twice (under torch.compile the first, unused copy is removed).

One call at a time: a host is not to be called from two threads at once.

Shape alphabet: B batch, V image tokens, L text tokens, W tower width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pvl_adapter.adapter import NoisePair, PVLAdapter
from pvl_adapter.config import PVLConfig
from pvl_adapter.towers import Inputs, Tower, Towers

ADAPTERS = "pvl_adapters"  # where the host keeps its adapters, and so their prefix in its state_dict


@dataclass(frozen=True)
class Draw:
    """How the adapters' values are drawn during a call.

    Args:
        sample: Draw or take the mean; None draws in train mode only.
        num_samples: How many value draws each attention averages.
        generator: Source of the draws.
        noise: The draws themselves, one pair per adapter.
    """

    sample: bool | None = None
    num_samples: int = 1
    generator: torch.Generator | None = None
    noise: Sequence[NoisePair] | None = None


class BlockStack:
    """One tower's blocks with redirected forwards, and what passes through them during a joint call."""

    def __init__(self, lockstep: Lockstep, tower: Tower) -> None:
        self.lockstep = lockstep
        self.tower = tower
        self.blocks = list(tower.blocks(lockstep.host))
        self.replaced = [block.__dict__.get("forward") for block in self.blocks]  # another library's, usually None
        self.reset()

    def reset(self) -> None:
        self.args: tuple[Any, ...] | None = None
        self.kwargs: dict[str, Any] = {}
        self.outputs: tuple[Any, ...] | None = None
        self.pooled: Tensor | None = None

    def install(self) -> None:
        for index, block in enumerate(self.blocks):
            block.forward = _BlockEntry(self, index)

    def uninstall(self) -> None:
        for block, replaced in zip(self.blocks, self.replaced, strict=True):
            del block.forward
            if replaced is not None:
                block.forward = replaced

    def native(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Call a block's own forward."""
        block, replaced = self.blocks[index], self.replaced[index]
        if replaced is not None:
            return replaced(*args, **kwargs)
        return type(block).forward(block, *args, **kwargs)

    def enter(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """A block has been called by its tower."""
        if self.lockstep.inputs is None:
            if self.lockstep.enabled:
                raise RuntimeError(
                    "this model's towers are joined by adapters and cannot run alone: call the model with images and "
                    "sentences, or use pvl_adapter.encode(model, image, text); for the features without adapters use "
                    "`with pvl_adapter.disable_adapters(model):`"
                )
            return self.native(index, *args, **kwargs)
        if self.outputs is None:
            self.args, self.kwargs = args, kwargs
            self.lockstep.arrived(self)
        return self._outputs[index]

    def start(self) -> Tensor:
        """Begin a joint pass with the embedded sequence, [B, tokens, W]."""
        self.outputs = ()
        return cast(Tensor, self.args[0] if self.args else self.kwargs["hidden_states"])

    def advance(self, hidden: Tensor, stop: int) -> Tensor:
        """Run blocks up to, not including, `stop`."""
        for index in range(len(self._outputs), stop):
            if self.args:
                output = self.native(index, hidden, *self.args[1:], **self.kwargs)
            else:
                output = self.native(index, **{**self.kwargs, "hidden_states": hidden})
            self.outputs = (*self._outputs, output)  # a new tuple: torch.compile loses appends to a shared list
            hidden = _hidden(output)
        return hidden

    @property
    def last_hidden(self) -> Tensor:
        """The last block's output, [B, tokens, W]."""
        return _hidden(self._outputs[-1])

    @property
    def _outputs(self) -> tuple[Any, ...]:
        return cast(tuple[Any, ...], self.outputs)


class _BlockEntry:
    """Stands in for one block's forward. A plain object, so that hosts stay deep-copyable and picklable."""

    def __init__(self, stack: BlockStack, index: int) -> None:
        self.stack = stack
        self.index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stack.enter(self.index, *args, **kwargs)


class Lockstep:
    """Conducts the two towers of one host.

    Args:
        host: The CLIP, whose adapters are in `host.pvl_adapters`.
        towers: Where its towers are.
        config: With `layers` resolved.
        points: Block indices (image, text) before which each adapter works, ascending.
    """

    def __init__(
        self, host: nn.Module, *, towers: Towers, config: PVLConfig, points: Sequence[tuple[int, int]]
    ) -> None:
        self.host = host
        self.towers = towers
        self.config = config
        self.points = tuple(points)
        self.enabled = True
        self.draw = Draw()
        self.inputs: Inputs | None = None  # of the joint call that is running
        self.image = BlockStack(self, towers.image)
        self.text = BlockStack(self, towers.text)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the host's forward: its own code and return type, with the towers joined."""
        native = type(self.host).forward
        if not self.enabled:
            return native(self.host, *args, **kwargs)
        with self.running(self.towers.bind(args, kwargs)):
            return native(self.host, *args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        """Stands in for the host's train: frozen towers stay in eval mode unless their dropout is wanted."""
        type(self.host).train(self.host, mode)
        if self.enabled and not self.config.tower_dropout:
            for name, child in self.host.named_children():
                if name != ADAPTERS:
                    child.eval()
        return self.host

    @contextmanager
    def running(self, inputs: Inputs, *, draw: Draw | None = None) -> Iterator[None]:
        """Check the inputs, then join the towers for the calls made inside."""
        if self.inputs is not None:
            raise RuntimeError("this model is already running: call it from one thread, and not from its own hooks")
        self.towers.check(self.host, inputs)
        before = self.draw
        self.inputs, self.draw = inputs, draw or before
        try:
            yield
        finally:
            self.inputs, self.draw = None, before
            self.image.reset()
            self.text.reset()

    def arrived(self, stack: BlockStack) -> None:
        """One tower has reached its first block: fetch the other, or begin if both are there."""
        other = self.text if stack is self.image else self.image
        if other.args is None and not other.kwargs:
            other.pooled = other.tower.encode(self.host, cast(Inputs, self.inputs))
        else:
            self._run()

    def _run(self) -> None:
        inputs = cast(Inputs, self.inputs)
        vision, text = self.image.start(), self.text.start()  # [B, V, W], [B, L, W]
        if self.enabled:
            mask = self.towers.text.real_tokens(self.host, inputs) if self.config.mask_padding else None  # [B, L]
            sample = self.host.training if self.draw.sample is None else self.draw.sample
            noise = self._noise()
            for k, (image_depth, text_depth) in enumerate(self.points):
                vision = self.image.advance(vision, image_depth)
                text = self.text.advance(text, text_depth)
                vision_update, text_update = self.adapter(k)(
                    vision,
                    text,
                    text_mask=mask,
                    sample=sample,
                    num_samples=self.draw.num_samples,
                    noise=None if noise is None else noise[k],
                    generator=self.draw.generator,
                )
                vision, text = vision + vision_update, text + text_update
        self.image.advance(vision, len(self.image.blocks))
        self.text.advance(text, len(self.text.blocks))

    def adapter(self, index: int) -> PVLAdapter:
        return cast(PVLAdapter, getattr(self.host, ADAPTERS)[index])

    def _noise(self) -> Sequence[NoisePair] | None:
        noise = self.draw.noise
        if noise is not None and len(noise) != len(self.points):
            raise ValueError(f"noise holds {len(noise)} pairs, expected one for each of {len(self.points)} adapters")
        return noise


def _hidden(output: Any) -> Tensor:
    """The hidden state in a block's output, which some families wrap in a tuple."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
