"""Seeing what a host gives its blocks, before it is run in lockstep.

Most towers give every block the same arguments. Where one does not (mT5 hands a position bias on, some rotary
positions differ by depth), running the others with block 0's arguments would be silently wrong. So each tower is run
once, its blocks recorded, and what they were given compared with what the lockstep would give them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pvl_adapter.joint import eval_mode
from pvl_adapter.joint_run import HIDDEN
from pvl_adapter.lockstep import original_forward, restore
from pvl_adapter.towers import Tower, Towers, UnsupportedModelError

_Call = tuple[tuple[Any, ...], dict[str, Any]]


def check_blocks(host: nn.Module, towers: Towers) -> None:
    """Run each tower once on a small example and compare what its blocks are given with what lockstep gives them.

    Only block 0 computes, unless the family's blocks depend on one another. The host is left as it was. On the meta
    device a tower whose own code looks at values cannot run; it is then not checked.

    Raises:
        UnsupportedModelError: If a block is given something else, is skipped, or is called twice.
    """
    for tower in (towers.image, towers.text):
        inputs = tower.dummy_inputs(host, batch=2)
        try:
            calls, outputs = _record(host, tower, inputs)
        except RuntimeError:
            if next(host.parameters()).is_meta:
                continue
            raise
        depth = len(tower.blocks(host))
        if [index for index, _ in calls] != list(range(depth)):
            raise UnsupportedModelError(
                f"{type(host).__name__} calls the blocks of {tower.path} in the order {[i for i, _ in calls]}, "
                f"expected each of 0 to {depth - 1} once"
            )
        first = calls[0][1]
        for index, call in calls:
            previous = outputs[index - 1] if index else None
            expected = tower.block_arguments(host, inputs, index, first, previous)
            if not _same(_besides_hidden(call), _besides_hidden(expected)):
                raise UnsupportedModelError(
                    f"{type(host).__name__} gives block {index} of {tower.path} other arguments than block 0, and how "
                    "they differ is not known here; running it in lockstep would be silently wrong"
                )


def _record(host: nn.Module, tower: Tower, inputs: dict[str, Any]) -> tuple[list[tuple[int, _Call]], list[Any]]:
    calls: list[tuple[int, _Call]] = []
    outputs: list[Any] = []
    blocks = list(tower.blocks(host))
    replaced = [block.__dict__.get("forward") for block in blocks]
    depends = type(tower).block_arguments is not Tower.block_arguments

    def recorder(index: int) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append((index, (args, kwargs)))
            if index == 0 or depends or not outputs:
                output = original_forward(blocks[index], replaced[index])(*args, **kwargs)
            else:
                output = outputs[0]
            outputs.append(output)
            return output

        return record

    with eval_mode(host), torch.no_grad():
        for index, block in enumerate(blocks):
            block.forward = recorder(index)
        try:
            tower.encode(host, inputs)
        finally:
            for block, native in zip(blocks, replaced, strict=True):
                restore(block, "forward", native)
    return calls, outputs


def _besides_hidden(call: _Call) -> _Call:
    args, kwargs = call
    return args[1:], {name: value for name, value in kwargs.items() if name != HIDDEN}


def _same(got: Any, expected: Any) -> bool:
    if got is expected:
        return True
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        return got.shape == expected.shape and (got.is_meta or torch.equal(got, expected))
    if isinstance(got, (tuple, list)) and isinstance(expected, (tuple, list)):
        return len(got) == len(expected) and all(map(_same, got, expected))
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(_same(got[name], expected[name]) for name in got)
    return type(got) is type(expected) and bool(got == expected)
