"""One joint run of two towers: the loop over fusion points, and all of its state.

Each tower's blocks run up to the next fusion point, an adapter exchanges evidence, and so on; afterwards every block
call of the host gets its stored output (see lockstep.py for why).

Shape alphabet: B batch, V image tokens, L text tokens, W tower width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from pvl_adapter.adapter import NoisePair
from pvl_adapter.padding import RealTokens, cut_masks, real_tokens
from pvl_adapter.towers import Inputs

if TYPE_CHECKING:
    from pvl_adapter.lockstep import BlockStack, Lockstep

CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")  # open_clip's and timm's switch; transformers'
HIDDEN = "hidden_states"  # what blocks call the hidden state where they take it by keyword


@dataclass(frozen=True)
class ValueSampling:
    """How the adapters' values are sampled during a call.

    Attributes:
        sample: Sample, or take the mean; None samples in train mode only.
        num_samples: How many value samples each attention averages.
        generator: Source of the noise.
        noise: The noise itself, one pair per adapter.
    """

    sample: bool | None = None
    num_samples: int = 1
    generator: torch.Generator | None = None
    noise: Sequence[NoisePair] | None = None


@dataclass(frozen=True)
class TowerPrefix:
    """One tower at the first adapter, which it reaches without the other.

    Attributes:
        inputs: What it was given, by name.
        outputs: Of the blocks before the adapter, or of the last of them alone; empty if there are none.
        tokens: V or L, as an adapter sees them.
        real: Of the sentences; None for images, and where padding is computed like words.
    """

    inputs: Inputs
    outputs: tuple[Any, ...]
    tokens: int
    real: RealTokens | None


class Prefix(NamedTuple):
    """Both towers at the first adapter: what all samples of an input share."""

    image: TowerPrefix
    text: TowerPrefix


class TowerRun:
    """One tower's part of a joint run: what its first block was given, and what its blocks returned."""

    def __init__(
        self, stack: BlockStack, inputs: Inputs, *, keep_outputs: bool, real: RealTokens | None = None
    ) -> None:
        self.stack = stack
        self.inputs = inputs
        self.keep_outputs = keep_outputs
        self.real = real
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.arrived = False
        self.outputs: tuple[Any, ...] = ()
        self.pooled: Tensor | None = None
        self.checkpointing = False
        self.overridden: list[tuple[nn.Module, str, Any]] = []
        self.watcher: RemovableHandle | None = None

    def override(self) -> None:
        """Change the host for the run. Its own gradient checkpointing would run blocks out of step, so it is switched
        off and done here instead."""
        lockstep = self.stack.lockstep
        encoder = self.stack.tower.encoder_module(lockstep.host)
        modules = (encoder, *self.stack.blocks)
        native = any(getattr(module, name, False) for module in modules for name in CHECKPOINTING)
        self.checkpointing = native or lockstep.config.gradient_checkpointing
        # Blocks too: up to transformers 5.20 their `__call__` does it, and would call a block again after the run.
        off = [(module, name, False) for module in modules for name in CHECKPOINTING if getattr(module, name, False)]
        others = [(encoder, name, value) for name, value in self.stack.tower.joint_overrides(lockstep.host).items()]
        for module, name, value in (*off, *others):
            self.overridden.append((module, name, getattr(module, name)))
            setattr(module, name, value)
        if self.stack.blocks[-1]._forward_hooks and not torch.compiler.is_compiling():
            self.watcher = self.stack.blocks[-1].register_forward_hook(self._refuse_change)

    def restore(self) -> None:
        """Undo `override`."""
        for module, name, value in self.overridden:
            setattr(module, name, value)
        if self.watcher is not None:
            self.watcher.remove()

    @property
    def first_hidden(self) -> Tensor:
        """The embedded sequence, [B, tokens, W]."""
        return given_hidden(self.args, self.kwargs)

    @property
    def last_hidden(self) -> Tensor:
        """The last block's output, [B, tokens, W]."""
        return returned_hidden(self.outputs[-1])

    def begin(self, prefix: tuple[Any, ...], depth: int) -> Tensor:
        """Begin with the embedded sequence, or with the outputs of the blocks before `depth`; [B, tokens, W]."""
        self.outputs = prefix if len(prefix) == depth else prefix[-1:] * depth
        return returned_hidden(prefix[-1]) if prefix else self.first_hidden

    def advance(self, hidden: Tensor, stop: int, *, rows: int | None = None) -> Tensor:
        """Run blocks up to, not including, `stop`.

        Args:
            hidden: [B, tokens, W], what block number `len(self.outputs)` reads.
            stop: Index of a block.
            rows: How many positions are read afterwards; None means all.

        Returns:
            [B, rows, W].
        """
        stack, host = self.stack, self.stack.lockstep.host
        tokens, hidden = self.first_hidden.shape[1], hidden[:, :rows]  # [B, rows, W]
        for index in range(len(self.outputs), stop):
            previous = self.outputs[-1] if index else None
            args, kwargs = stack.tower.block_arguments(host, self.inputs, index, (self.args, self.kwargs), previous)
            args, kwargs = (args[1:], kwargs) if args else (args, {k: v for k, v in kwargs.items() if k != HIDDEN})
            if rows is not None:
                args, kwargs = cut_masks(args, rows, tokens), cut_masks(kwargs, rows, tokens)
            if self.args:
                args = (hidden, *args)
            else:
                kwargs = {**kwargs, HIDDEN: hidden}
            if self.checkpointing and torch.is_grad_enabled():
                output = checkpoint(
                    stack.run_block_checkpointed, index, self.real, *args, use_reentrant=False, **kwargs
                )
            else:
                output = stack.run_block(index, self.real, *args, **kwargs)
            hidden = returned_hidden(output)
            # A new tuple each time: torch.compile loses appends to a shared list.
            self.outputs = (*self.outputs, output) if self.keep_outputs else (output,) * (index + 1)
        return hidden

    def finish(self) -> None:
        """Complete the outputs for the host, which expects all positions of all blocks."""
        if not self.outputs:
            self.advance(self.first_hidden, 1)
        last, hidden = self.outputs[-1], self.last_hidden
        if missing := self.first_hidden.shape[1] - hidden.shape[1]:
            hidden = F.pad(hidden, (0, 0, 0, missing))  # [B, tokens, W]
            last = (hidden, *last[1:]) if isinstance(last, tuple) else hidden
        kept = self.outputs if self.keep_outputs else ()
        self.outputs = (*kept, *[last] * (len(self.stack.blocks) - len(kept)))

    def replay(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block returned, for its tower."""
        hidden = given_hidden(args, kwargs)
        if index == 0 and hidden.shape != self.first_hidden.shape:
            raise RuntimeError(
                "the model ran one of its towers twice on different inputs, which lockstep cannot follow"
            )
        if index and not torch.compiler.is_compiling():
            self._refuse_change(None, None, hidden, index=index - 1)
        return self.outputs[index]

    def _refuse_change(self, block: object, args: object, output: Any, *, index: int = -1) -> None:
        """Raise if `output` is not what block `index` has returned."""
        if returned_hidden(output) is not returned_hidden(self.outputs[index]):
            raise RuntimeError(
                f"a hook changes what a block of {self.stack.tower.path} is given or returns (block "
                f"{index % len(self.outputs)} or the next). Joined blocks run before their hooks, so the change would "
                "be lost: remove the hook, or run the towers alone inside `pvl_adapter.disable_adapters(model)`"
            )


class JointRun:
    """One call of a host with joined towers: all of its state, and the loop over fusion points.

    Args:
        lockstep: Of the host.
        inputs: The arguments of the host's forward, by name.
        sampling: How the adapters' values are sampled.
        prefix: Begin with it instead of running the blocks before the first adapter.
        prefix_only: The tower that is called runs alone and ends before the first adapter; `found` is its prefix.
        keep_outputs: Keep every block's output for hooks to see; otherwise the last one alone, and of the text only
            what the image and the pooled embedding read is computed.
        kl: Gather the KL divergences of the adapters' values, which are then in `kl`.
    """

    def __init__(
        self,
        lockstep: Lockstep,
        inputs: Inputs,
        *,
        sampling: ValueSampling,
        prefix: Prefix | None = None,
        prefix_only: bool = False,
        keep_outputs: bool = True,
        kl: bool = False,
    ) -> None:
        self.lockstep = lockstep
        self.inputs = inputs
        self.sampling = sampling
        self.prefix = prefix
        self.prefix_only = prefix_only
        self.keep_outputs = keep_outputs
        self.points = lockstep.points if lockstep.local.enabled else ()
        tower, real = lockstep.towers.text, None if prefix is None else prefix.text.real
        has_text = tower.key in inputs  # else the image tower runs alone
        if prefix is None and has_text and not keep_outputs and tower.ignores_padding(lockstep.host, inputs):
            real = real_tokens(tower.token_mask(lockstep.host, inputs))
        self.image = TowerRun(lockstep.image, inputs, keep_outputs=keep_outputs)
        self.text = TowerRun(lockstep.text, inputs, keep_outputs=keep_outputs, real=real)
        self.found: TowerPrefix | None = None
        self.kl: list[Tensor] | None = [] if kl else None

    def enter(self, stack: BlockStack, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block has been called: start the other tower if it is wanted, or run both if both are here; then replay."""
        mine, other = (self.image, self.text) if stack is self.image.stack else (self.text, self.image)
        if mine.outputs:
            return mine.replay(index, args, kwargs)
        mine.args, mine.kwargs, mine.arrived = args, kwargs, True
        if self.prefix_only:
            self.found = self._run_prefix(mine)
        elif other.arrived:
            self._conduct()
        else:
            other.pooled = other.stack.tower.encode(self.lockstep.host, self.inputs)
        if not mine.outputs:
            raise RuntimeError(f"the model never ran the blocks of {other.stack.tower.path}, so its towers cannot meet")
        return mine.outputs[index]

    def _run_prefix(self, tower: TowerRun) -> TowerPrefix:
        """Run a tower alone up to the first adapter, and let the host finish without the rest."""
        hidden = self._begin(tower)
        if tower is self.image:
            hidden = self.lockstep.towers.image.gather(self.lockstep.host, self.inputs, hidden)
        found = TowerPrefix(self.inputs, tower.outputs, hidden.shape[1], tower.real)
        tower.finish()
        return found

    def _begin(self, tower: TowerRun, prefix: TowerPrefix | None = None) -> Tensor:
        """Run a tower up to the first adapter, or take what its prefix holds; [B, tokens, W]."""
        depths = self.points[0] if self.points else (0, 0)
        depth = depths[0] if tower is self.image else depths[1]
        hidden = tower.begin(prefix.outputs if prefix else (), depth)
        return tower.advance(hidden, depth, rows=self._rows_read(tower))

    def _rows_read(self, tower: TowerRun) -> int | None:
        """How many tokens of a tower adapters read; None means all, padding too."""
        return tower.real.length if tower.real and (self.lockstep.config.mask_padding or not self.points) else None

    def _conduct(self) -> None:
        """Run both towers; adapters read `rows` text tokens, and what follows the last of them `last_rows`."""
        host, towers, config = self.lockstep.host, self.lockstep.towers, self.lockstep.config
        vision = self._begin(self.image, self.prefix and self.prefix.image)  # [B, V, W]
        text = self._begin(self.text, self.prefix and self.prefix.text)  # [B, L, W]
        rows, last_rows = self._rows_read(self.text), self.text.real.length if self.text.real else None
        text_mask = towers.text.token_mask(host, self.inputs)[:, :rows] if config.mask_padding else None  # [B, L]
        vision_mask = towers.image.token_mask(host, self.inputs) if config.mask_padding else None  # [B, V]
        sample = host.training if self.sampling.sample is None else self.sampling.sample
        noise = self._noise(text.shape[1])
        for k, (image_depth, text_depth) in enumerate(self.points):
            vision = self.image.advance(vision, image_depth)
            text = self.text.advance(text, text_depth, rows=rows)
            rows = last_rows if k == len(self.points) - 1 else rows
            vision_update, text_update = self.lockstep.adapter(k)(
                towers.image.gather(host, self.inputs, vision),
                text,
                text_mask=text_mask,
                vision_mask=vision_mask,
                text_rows=rows,
                sample=sample,
                num_samples=self.sampling.num_samples,
                noise=None if noise is None else noise[k],
                generator=self.sampling.generator,
                kl=self.kl,
            )
            vision = vision + towers.image.scatter(host, self.inputs, vision_update)
            text = text[:, :rows] + text_update
        self.image.advance(vision, len(self.image.stack.blocks))
        self.text.advance(text, len(self.text.stack.blocks), rows=rows)
        self.image.finish()
        self.text.finish()

    def _noise(self, tokens: int) -> Sequence[NoisePair] | None:
        """The noise that was given, for the first `tokens` text tokens."""
        noise = self.sampling.noise
        if noise is None:
            return None
        if len(noise) != len(self.points):
            raise ValueError(f"noise holds {len(noise)} pairs, expected one for each of {len(self.points)} adapters")
        given = self.text.first_hidden.shape[1]
        return [
            n._replace(text=n.text[..., :tokens, :])
            if isinstance(n.text, Tensor) and n.text.shape[-2] == given  # counters are made as long as is read
            else n
            for n in noise
        ]


def given_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a block's arguments."""
    return cast(Tensor, args[0] if args else kwargs[HIDDEN])


def returned_hidden(output: Any) -> Tensor:
    """The hidden state in a block's output, which some families wrap in a tuple."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
