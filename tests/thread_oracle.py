"""An oracle that shares no mechanism and no table with the library: two threads that wait for each other.

Each tower of a plain model runs in a thread of its own, by its own code, so every block is given what its tower gives
it (masks, rotary positions, position biases). Where an adapter belongs, a hook before the block waits for the other
tower, and the adapter works on both hidden states.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hosts import Host
from support import assert_close_gradients, blocks, gradients
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainTower:
    """A tower of a model without adapters: its blocks, and how it is run to its pooled embeddings [B, D]."""

    blocks: Sequence[nn.Module]
    run: Callable[[], Any]


def plain_towers(host: Host, model: nn.Module) -> tuple[PlainTower, PlainTower]:
    """Image and text tower, told apart by their depths."""

    def tower(side: int) -> PlainTower:
        prefixes = {name.rpartition(".")[0] for name in blocks(model)}
        rows = [list(model.get_submodule(prefix)) for prefix in prefixes]
        (row,) = [row for row in rows if len(row) == host.depths[side]]
        return PlainTower(row, lambda: host.call_alone(model, *host.lone_calls[side]))

    return tower(0), tower(1)


def points(layers: Sequence[int], depths: tuple[int, int]) -> list[tuple[int, int]]:
    """Blocks (image, text) at the relative depth of a block of the shallower tower, halves rounded up."""
    return [tuple(math.floor(layer * depth / min(depths) + 0.5) for depth in depths) for layer in layers]


class Meeting:
    """Where two threads hand in a hidden state each and take an updated one away."""

    def __init__(self, adapter: nn.Module, settings: dict[str, Any]) -> None:
        self.adapter, self.settings = adapter, settings
        self.given: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(2, action=self.exchange, timeout=60)

    def exchange(self) -> None:
        with torch.enable_grad():
            updates = self.adapter(self.given[0], self.given[1], **self.settings)
        self.given = {side: self.given[side] + update for side, update in enumerate(updates)}

    def attend(self, side: int, hidden: Tensor) -> Tensor:
        self.given[side] = hidden
        self.barrier.wait()
        return self.given[side]


def run_in_threads(
    towers: tuple[PlainTower, PlainTower],
    adapters: Sequence[nn.Module],
    layers: Sequence[int],
    *,
    text_mask: Tensor | None = None,
    noise: Sequence[Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Pooled embeddings of both towers, with an adapter before each of `layers` of the shallower one."""
    results: dict[int, Tensor] = {}
    meetings: list[Meeting] = []
    depths = len(towers[0].blocks), len(towers[1].blocks)
    for k, (adapter, point) in enumerate(zip(adapters, points(layers, depths), strict=True)):
        draws = {"sample": False} if noise is None else {"noise": noise[k]}
        meeting = Meeting(adapter, {"text_mask": text_mask, **draws})
        meetings.append(meeting)
        for side, tower in enumerate(towers):

            def before(_: nn.Module, args: Any, kwargs: Any, side: int = side, meeting: Meeting = meeting) -> Any:
                if args:
                    return (meeting.attend(side, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": meeting.attend(side, kwargs["hidden_states"])}

            tower.blocks[point[side]].register_forward_pre_hook(before, with_kwargs=True, prepend=True)

    def run(side: int) -> None:
        try:
            with torch.enable_grad():
                output = towers[side].run()
        except BaseException:
            for meeting in meetings:  # the other tower is not to wait for this one
                meeting.barrier.abort()
            raise
        pooled = output if isinstance(output, Tensor) else output.pooler_output
        results[side] = pooled[:, 0] if pooled.ndim == 3 else pooled  # FLAVA returns all tokens

    threads = [threading.Thread(target=run, args=(side,)) for side in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0], results[1]


def assert_equal_to_lockstep(
    joint: Any, expected: tuple[Tensor, Tensor], got_adapters: nn.Module, expected_adapters: nn.Module
) -> None:
    """Both pooled embeddings, and the gradients of all adapters."""
    got = joint.image_embeds, joint.text_embeds
    for embeds in (got, expected):
        sum((each**3).sum() for each in embeds).backward()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert_close_gradients(gradients(got_adapters), gradients(expected_adapters))
