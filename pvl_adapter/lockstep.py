"""Run two towers block by block, with adapters between them.

Fusion is bidirectional at each depth, so ordinary hooks cannot do it. Instead each block of both towers gets an
instance-level forward. When one tower's own forward reaches its first block, that call starts the other tower's own
forward; when this reaches its first block too, both embedded sequences and both argument lists are at hand and the
joint loop runs. From then on every block call returns its stored output, so both towers embed, mask, pool and project
with their own code. Nothing of any host is re-implemented.

In a call of the host itself the tower that was fetched from within the other is later called again by the host; its
blocks then replay too, so only its embedding and pooling run twice (torch.compile removes the first, unused copy).

All state of a run is in one `JointRun` (joint_run.py), which belongs to one thread and ends with the call. Another
thread's call waits.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import CodeType
from typing import Any, TypeVar, cast

import torch
from torch import nn

from pvl_adapter.adapter import PVLAdapter
from pvl_adapter.config import PVLConfig
from pvl_adapter.joint_run import CHECKPOINTING, JointRun, ValueSampling
from pvl_adapter.kernels import batch_first_attention
from pvl_adapter.padding import RealKeys, RealTokens
from pvl_adapter.towers import Tower, Towers
from pvl_adapter.wrappers import refuse_wrappers, tuner_parts

ADAPTERS = "pvl_adapters"  # where the host keeps its adapters, and so their prefix in its state_dict
_LOCKSTEP = "_pvl_lockstep"

_Result = TypeVar("_Result")


class BlockStack:
    """One tower's blocks with redirected forwards."""

    def __init__(self, lockstep: Lockstep, tower: Tower) -> None:
        self.lockstep = lockstep
        self.tower = tower
        self.blocks = list(tower.blocks(lockstep.host))
        self.replaced = [block.__dict__.get("forward") for block in self.blocks]  # another library's, usually None
        self.has_attention = [
            any(type(part) is nn.MultiheadAttention for part in block.modules()) for block in self.blocks
        ]
        self.key_value = [[block.get_submodule(name) for name in tower.key_value] for block in self.blocks]

    def install(self) -> None:
        for index, block in enumerate(self.blocks):
            block.forward = _BlockEntry(self, index)

    def uninstall(self) -> None:
        for block, replaced in zip(self.blocks, self.replaced, strict=True):
            restore(block, "forward", replaced)

    def enter(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """A block has been called by its tower."""
        run = self.lockstep.local.run
        if run is not None:
            return run.enter(self, index, args, kwargs)
        if self.lockstep.local.enabled:
            raise RuntimeError(
                "this model's towers are joined by adapters and cannot run alone: call the model with images and "
                "sentences, or use pvl_adapter.encode(model, image, text); for the features without adapters use "
                "`with pvl_adapter.disable_adapters(model):`"
            )
        return self.original_forward(index, *args, **kwargs)

    def original_forward(self, index: int, *args: Any, **kwargs: Any) -> Any:
        return original_forward(self.blocks[index], self.replaced[index])(*args, **kwargs)

    def run_block(self, index: int, real: RealTokens | None, *args: Any, **kwargs: Any) -> Any:
        """Call a block's own forward within a joint run; `real` tokens alone are keys where padding is masked."""
        context: AbstractContextManager[object] = nullcontext()
        if real is not None and self.key_value[index]:
            context = RealKeys(real, self.key_value[index])
        elif self.has_attention[index] and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            context = batch_first_attention()
        with context:
            return self.original_forward(index, *args, **kwargs)

    def run_block_checkpointed(self, index: int, real: RealTokens | None, *args: Any, **kwargs: Any) -> Any:
        """`run_block` for our own checkpointing, which runs it in the backward pass too: the block's own is off."""
        block = self.blocks[index]
        switched_on = [name for name in CHECKPOINTING if getattr(block, name, False)]
        for name in switched_on:
            setattr(block, name, False)
        try:
            return self.run_block(index, real, *args, **kwargs)
        finally:
            for name in switched_on:
                setattr(block, name, True)


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
    def __code__(self) -> CodeType:
        """That of the host's method, whose file and line torch.export notes."""
        return cast(CodeType, getattr(type(self.lockstep.host), self.name).__code__)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the host's method, which trainers look at to see what a model takes."""
        original = inspect.signature(getattr(type(self.lockstep.host), self.name))
        return original.replace(parameters=list(original.parameters.values())[1:])


class _ThreadState(threading.local):
    """What one thread asks of a host: its run while it lasts, and the contexts it is in."""

    def __init__(self) -> None:
        self.run: JointRun | None = None
        self.enabled = True
        self.sampling = ValueSampling()


class _Guard:
    """A host's lock and each thread's state; a copy of the host starts with fresh ones."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.local = _ThreadState()
        self.awake = 0  # how many disable_adapters blocks have woken the towers' dropout

    def __reduce__(self) -> tuple[type[_Guard], tuple[()]]:
        return _Guard, ()


class Lockstep:
    """Redirects one host's forwards, and runs its two towers together.

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
        self.image = BlockStack(self, towers.image)
        self.text = BlockStack(self, towers.text)
        self.replaced = {name: host.__dict__.get(name) for name in ("forward", "train")}
        self.requires_grad = {name: parameter.requires_grad for name, parameter in host.named_parameters()}
        self.modes = {name: module.training for name, module in host.named_modules()}
        self.guard = _Guard()

    @property
    def local(self) -> _ThreadState:
        return self.guard.local

    def install(self) -> None:
        """Redirect the host's and its blocks' forwards."""
        object.__setattr__(self.host, _LOCKSTEP, self)
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
        delattr(self.host, _LOCKSTEP)

    def exclusive(self) -> AbstractContextManager[object]:
        """Inside, other threads' runs wait. A compiled call does not wait: it holds all of its state itself."""
        return nullcontext() if torch.compiler.is_compiling() else self.guard.lock

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the host's forward: its own code and return type, with the towers joined."""
        original = original_forward(self.host, self.replaced["forward"])
        if not self.local.enabled:
            with self.exclusive():
                return original(*args, **kwargs)
        inputs = self.towers.bind(args, kwargs)
        self.towers.check(self.host, inputs)
        run = JointRun(self, inputs, sampling=self.local.sampling)
        return self.conduct(run, lambda: original(*args, **kwargs))

    def train(self, mode: bool = True) -> nn.Module:
        """Stands in for the host's train: frozen towers stay in eval mode unless their dropout is wanted."""
        type(self.host).train(self.host, mode)
        if self.local.enabled and not self.config.tower_dropout:
            for name, child in self.host.named_children():
                if name != ADAPTERS:
                    child.eval()
            for _, part in tuner_parts(self.host):
                part.train(mode)  # as LoRA's dropout
        return self.host

    def conduct(self, run: JointRun, call: Callable[[], _Result]) -> _Result:
        """Make `call` with the towers joined; nothing of the run is left behind, however it ends."""
        local = self.local
        if local.run is not None:
            raise RuntimeError("this model is already running: it cannot be called from its own hooks or blocks")
        refuse_wrappers(self.host, self.adapters, blocks=(*self.image.blocks, *self.text.blocks))
        if local.enabled and self.guard.awake:
            raise RuntimeError(
                "another thread has disabled the adapters in train mode, which wakes the dropout of the towers; call "
                "the model again after its disable_adapters block"
            )
        with self.exclusive():
            try:
                local.run = run
                run.image.override()
                run.text.override()
                return call()
            finally:
                local.run = None
                run.image.restore()
                run.text.restore()

    @property
    def adapters(self) -> nn.ModuleList:
        return cast(nn.ModuleList, getattr(self.host, ADAPTERS))

    def adapter(self, index: int) -> PVLAdapter:
        return cast(PVLAdapter, self.adapters[index])


def lockstep_of(clip: nn.Module) -> Lockstep:
    """The lockstep of an injected model.

    Raises:
        ValueError: If the model has no adapters.
    """
    lockstep = getattr(clip, _LOCKSTEP, None)
    if lockstep is None:
        raise ValueError(f"this {type(clip).__name__} has no adapters; call inject_adapters(model) first")
    return cast(Lockstep, lockstep)


def original_forward(module: nn.Module, replaced: Callable[..., Any] | None) -> Callable[..., Any]:
    """A module's own forward: the instance-level one that another library had put there, or its class's."""
    return partial(type(module).forward, module) if replaced is None else replaced


def restore(module: nn.Module, name: str, replaced: Callable[..., Any] | None) -> None:
    """Take an instance-level method away again, and return the one that another library had put there."""
    delattr(module, name)
    if replaced is not None:
        setattr(module, name, replaced)
