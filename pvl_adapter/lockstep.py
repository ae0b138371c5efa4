"""Running two towers block by block, with adapters between them.

Fusion is bidirectional at each depth, so ordinary hooks cannot do it. Instead each block of both towers gets an
instance-level forward. When one tower's own forward reaches its first block, that call starts the other tower's own
forward; when this reaches its first block too, both embedded sequences and both argument lists are at hand and the
joint loop runs. From then on every block call returns its stored output, so both towers embed, mask, pool and project
with their own code. Nothing of any host is re-implemented.

In a call of the host itself the tower that was fetched from within the other is later called again by the host; its
blocks then replay too, so only its embedding and pooling run twice (torch.compile removes the first, unused copy).

One call at a time: a host is not to be called from two threads at once.

Shape alphabet: B batch, V image tokens, L text tokens, W tower width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pvl_adapter.adapter import NoisePair, PVLAdapter
from pvl_adapter.config import PVLConfig
from pvl_adapter.kernels import batch_first_attention
from pvl_adapter.towers import Inputs, Tower, Towers

ADAPTERS = "pvl_adapters"  # where the host keeps its adapters, and so their prefix in its state_dict
LOCKSTEP = "_pvl_lockstep"  # where the host keeps its conductor


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


@dataclass(frozen=True)
class Start:
    """Both towers at the first adapter.

    Attributes:
        image: What the blocks before it returned, or the last of them alone; empty if there are none.
        text: Likewise.
        image_tokens: V, as an adapter sees them.
        text_tokens: L.
    """

    image: tuple[Any, ...]
    text: tuple[Any, ...]
    image_tokens: int
    text_tokens: int


class Reached(Exception):  # noqa: N818, it tells that all went well
    """Ends a joint call before its first adapter."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.start = start


class BlockStack:
    """One tower's blocks with redirected forwards, and what passes through them during a joint call."""

    def __init__(self, lockstep: Lockstep, tower: Tower) -> None:
        self.lockstep = lockstep
        self.tower = tower
        self.blocks = list(tower.blocks(lockstep.host))
        self.replaced = [block.__dict__.get("forward") for block in self.blocks]  # another library's, usually None
        self.attentions = [
            [part for part in block.modules() if type(part) is nn.MultiheadAttention] for block in self.blocks
        ]
        self.checkpointing = False
        self.switched: dict[str, Any] = {}  # attributes of the owner, as they were
        self.reset()

    @property
    def encoder_module(self) -> nn.Module:
        return self.tower.encoder_module(self.lockstep.host)

    def install(self) -> None:
        for index, block in enumerate(self.blocks):
            block.forward = _BlockEntry(self, index)

    def uninstall(self) -> None:
        for block, replaced in zip(self.blocks, self.replaced, strict=True):
            restore(block, "forward", replaced)

    def begin(self) -> None:
        """Get ready for a joint call. Native gradient checkpointing would run blocks out of step: it moves in here."""
        modules = (self.encoder_module, *self.blocks)
        native = any(getattr(module, name, False) for module in modules for name in _CHECKPOINTING)
        self.checkpointing = native or self.lockstep.config.gradient_checkpointing
        off = {name: False for name in _CHECKPOINTING if getattr(self.encoder_module, name, False)}
        for name, value in {**off, **self.tower.joint_overrides(self.lockstep.host)}.items():
            self.switched[name] = getattr(self.encoder_module, name)
            setattr(self.encoder_module, name, value)

    def reset(self) -> None:
        """Forget the joint call."""
        for name, value in self.switched.items():
            setattr(self.encoder_module, name, value)
        self.switched = {}
        self.args: tuple[Any, ...] | None = None
        self.kwargs: dict[str, Any] = {}
        self.outputs: tuple[Any, ...] | None = None
        self.pooled: Tensor | None = None

    def native(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Call a block's own forward."""
        return original_forward(self.blocks[index], self.replaced[index])(*args, **kwargs)

    def joint(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Call a block's own forward within a joint call."""
        attentions = self.attentions[index]
        if not attentions or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.native(index, *args, **kwargs)
        with batch_first_attention(attentions):
            return self.native(index, *args, **kwargs)

    def recomputable(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """`joint` for our own checkpointing, which also runs in the backward pass: the block's own stays off."""
        block = self.blocks[index]
        wanted = [name for name in _CHECKPOINTING if getattr(block, name, False)]
        for name in wanted:
            setattr(block, name, False)
        try:
            return self.joint(index, *args, **kwargs)
        finally:
            for name in wanted:
                setattr(block, name, True)

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
        elif index == 0 and given_hidden(args, kwargs).shape != self.first_hidden.shape:
            raise RuntimeError(
                "the model ran one of its towers twice on different inputs, which lockstep cannot follow"
            )
        return self._outputs[index]

    @property
    def arrived(self) -> bool:
        return self.args is not None

    @property
    def first_hidden(self) -> Tensor:
        """The embedded sequence, [B, tokens, W]."""
        return given_hidden(cast(tuple[Any, ...], self.args), self.kwargs)

    @property
    def last_hidden(self) -> Tensor:
        """The last block's output, [B, tokens, W]."""
        return returned_hidden(self._outputs[-1])

    @property
    def so_far(self) -> tuple[Any, ...]:
        """What the blocks so far returned, or the last of them alone; empty if none has run."""
        return self._outputs[-1:] if self.lockstep.lean else self._outputs

    @property
    def _outputs(self) -> tuple[Any, ...]:
        return cast(tuple[Any, ...], self.outputs)

    def start(self, given: tuple[Any, ...] = (), depth: int = 0) -> Tensor:
        """Begin a joint pass with the embedded sequence, or `so_far` of the blocks before `depth`; [B, tokens, W]."""
        self.outputs = given if len(given) == depth else given[-1:] * depth
        return returned_hidden(given[-1]) if given else self.first_hidden

    def advance(self, hidden: Tensor, stop: int) -> Tensor:
        """Run blocks up to, not including, `stop`."""
        for index in range(len(self._outputs), stop):
            previous = self._outputs[-1] if index else None
            given = cast(tuple[Any, ...], self.args), self.kwargs
            inputs = cast(Inputs, self.lockstep.inputs)
            args, kwargs = self.tower.block_arguments(self.lockstep.host, inputs, index, given, previous)
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs = {**kwargs, HIDDEN: hidden}
            if self.checkpointing and torch.is_grad_enabled():
                output = checkpoint(self.recomputable, index, *args, use_reentrant=False, **kwargs)
            else:
                output = self.joint(index, *args, **kwargs)
            # A new tuple each time: torch.compile loses appends to a shared list.
            self.outputs = (output,) * (index + 1) if self.lockstep.lean else (*self._outputs, output)
            hidden = returned_hidden(output)
        return hidden


class _BlockEntry:
    """Stands in for one block's forward. A plain object, so that hosts stay deep-copyable and picklable."""

    def __init__(self, stack: BlockStack, index: int) -> None:
        self.stack = stack
        self.index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stack.enter(self.index, *args, **kwargs)


class _HostEntry:
    """Stands in for one of the host's methods. No bound method: Accelerate would bind its function to the host."""

    def __init__(self, lockstep: Lockstep, name: str) -> None:
        self.lockstep = lockstep
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.lockstep, self.name)(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the host's method, which trainers look at to see what a model takes."""
        native = inspect.signature(getattr(type(self.lockstep.host), self.name))
        return native.replace(parameters=list(native.parameters.values())[1:])


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
        self.given: Start | None = None  # what it begins with, instead of running the blocks before the first adapter
        self.stopping = False  # before the first adapter
        self.lean = False  # keep the last block's output alone, and of the text's need its pooled token alone
        self.image = BlockStack(self, towers.image)
        self.text = BlockStack(self, towers.text)
        self.replaced = {name: host.__dict__.get(name) for name in ("forward", "train")}

    def install(self) -> None:
        """Redirect the host's and its blocks' forwards."""
        self.image.install()
        self.text.install()
        for name in self.replaced:
            setattr(self.host, name, _HostEntry(self, name))

    def uninstall(self) -> None:
        """Undo `install`."""
        self.image.uninstall()
        self.text.uninstall()
        for name, replaced in self.replaced.items():
            restore(self.host, name, replaced)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the host's forward: its own code and return type, with the towers joined."""
        native = original_forward(self.host, self.replaced["forward"])
        if not self.enabled:
            return native(*args, **kwargs)
        with self.running(self.towers.bind(args, kwargs)):
            return native(*args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        """Stands in for the host's train: frozen towers stay in eval mode unless their dropout is wanted."""
        type(self.host).train(self.host, mode)
        if self.enabled and not self.config.tower_dropout:
            for name, child in self.host.named_children():
                if name != ADAPTERS:
                    child.eval()
        return self.host

    @contextmanager
    def running(
        self, inputs: Inputs, *, draw: Draw | None = None, given: Start | None = None, lean: bool = False
    ) -> Iterator[None]:
        """Check the inputs, then join the towers for the calls made inside."""
        if self.inputs is not None:
            raise RuntimeError("this model is already running: call it from one thread, and not from its own hooks")
        if not self.stopping:
            self.towers.check(self.host, inputs)
        before = self.draw
        self.inputs, self.draw = inputs, draw or before
        self.given, self.lean = given, lean
        try:
            self.image.begin()
            self.text.begin()
            yield
        finally:
            self.inputs, self.draw = None, before
            self.given, self.lean = None, False
            self.image.reset()
            self.text.reset()

    def start(self, inputs: Inputs, *, lean: bool = True) -> Start:
        """Run both towers up to the first adapter; images and sentences need not be of one number."""
        self.stopping = True
        try:
            with self.running(inputs, lean=lean):
                self.towers.image.encode(self.host, inputs)
        except Reached as reached:
            return reached.start
        finally:
            self.stopping = False
        raise RuntimeError("the image tower never reached its blocks; this model cannot be run in lockstep")

    def arrived(self, stack: BlockStack) -> None:
        """One tower has reached its first block: fetch the other, or begin if both are there."""
        other = self.text if stack is self.image else self.image
        if not other.arrived:
            other.pooled = other.tower.encode(self.host, cast(Inputs, self.inputs))
        else:
            self._run()

    def _run(self) -> None:
        host, inputs, towers = self.host, cast(Inputs, self.inputs), self.towers
        image_given, text_given = (self.given.image, self.given.text) if self.given else ((), ())
        vision = self.image.start(image_given, self.points[0][0])  # [B, V, W]
        text = self.text.start(text_given, self.points[0][1])  # [B, L, W]
        if self.stopping and not self.enabled:  # no adapter to stop before
            raise Reached(Start((), (), towers.image.gather(host, inputs, vision).shape[1], text.shape[1]))
        if self.enabled:
            text_mask = towers.text.token_mask(host, inputs) if self.config.mask_padding else None  # [B, L]
            vision_mask = towers.image.token_mask(host, inputs) if self.config.mask_padding else None  # [B, V]
            sample = self.host.training if self.draw.sample is None else self.draw.sample
            noise = self._noise()
            for k, (image_depth, text_depth) in enumerate(self.points):
                vision = self.image.advance(vision, image_depth)
                text = self.text.advance(text, text_depth)
                seen = towers.image.gather(host, inputs, vision)  # [B, V, W]
                if self.stopping:
                    raise Reached(Start(self.image.so_far, self.text.so_far, seen.shape[1], text.shape[1]))
                vision_update, text_update = self.adapter(k)(
                    seen,
                    text,
                    text_mask=text_mask,
                    vision_mask=vision_mask,
                    sample=sample,
                    num_samples=self.draw.num_samples,
                    noise=None if noise is None else noise[k],
                    generator=self.draw.generator,
                )
                vision = vision + towers.image.scatter(host, inputs, vision_update)
                text = text + text_update
        self.image.advance(vision, len(self.image.blocks))
        self.text.advance(text, len(self.text.blocks))

    @property
    def adapters(self) -> nn.ModuleList:
        return cast(nn.ModuleList, getattr(self.host, ADAPTERS))

    def adapter(self, index: int) -> PVLAdapter:
        return cast(PVLAdapter, self.adapters[index])

    def _noise(self) -> Sequence[NoisePair] | None:
        noise = self.draw.noise
        if noise is not None and len(noise) != len(self.points):
            raise ValueError(f"noise holds {len(noise)} pairs, expected one for each of {len(self.points)} adapters")
        return noise


def lockstep_of(clip: nn.Module) -> Any:
    """The conductor of an injected model.

    Raises:
        ValueError: If the model has no adapters.
    """
    lockstep = getattr(clip, LOCKSTEP, None)
    if lockstep is None:
        raise ValueError(f"this {type(clip).__name__} has no adapters; call inject_adapters(model) first")
    return lockstep


def original_forward(module: nn.Module, replaced: Callable[..., Any] | None) -> Callable[..., Any]:
    """A module's own forward: the instance-level one that another library had put there, or its class's."""
    return partial(type(module).forward, module) if replaced is None else replaced


def restore(module: nn.Module, name: str, replaced: Callable[..., Any] | None) -> None:
    """Take an instance-level method away again, and return the one that another library had put there."""
    delattr(module, name)
    if replaced is not None:
        setattr(module, name, replaced)


_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")  # open_clip's and timm's switch; transformers'
HIDDEN = "hidden_states"  # what blocks call the hidden state where they take it by keyword


def given_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a block's arguments."""
    return cast(Tensor, args[0] if args else kwargs[HIDDEN])


def returned_hidden(output: Any) -> Tensor:
    """The hidden state in a block's output, which some families wrap in a tuple."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
