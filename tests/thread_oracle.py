"""An oracle that shares no mechanism with the library: two threads that wait for each other.

Each tower of a plain model runs in a thread of its own, by its own loop, so every block is given what its tower gives
it (masks, rotary positions, position biases). Where an adapter belongs, a hook before the block waits for the other
tower, and the adapter works on both hidden states.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from support import assert_close_gradients, gradients
from torch import Tensor, nn


class Meeting:
    """Where two threads hand in a hidden state each and take an updated one away."""

    def __init__(self, adapter: nn.Module) -> None:
        self.adapter = adapter
        self.given: dict[str, Tensor] = {}
        self.barrier = threading.Barrier(2, action=self.exchange, timeout=60)

    def exchange(self) -> None:
        with torch.enable_grad():
            updates = self.adapter(self.given["image"], self.given["text"], sample=False)
        self.given = {side: self.given[side] + update for side, update in zip(("image", "text"), updates, strict=True)}

    def attend(self, side: str, hidden: Tensor) -> Tensor:
        self.given[side] = hidden
        self.barrier.wait()
        return self.given[side]


def run_in_threads(
    model: nn.Module, inputs: dict[str, Any], adapters: nn.ModuleList, conductor: Any
) -> tuple[Tensor, Tensor]:
    """Pooled embeddings of both towers of a plain model, with adapters between them."""
    towers, results = conductor.towers, {}
    for adapter, depths in zip(adapters, conductor.points, strict=True):
        meeting = Meeting(adapter)
        for side, tower, depth in zip(("image", "text"), (towers.image, towers.text), depths, strict=True):

            def before(_: nn.Module, args: Any, kwargs: Any, side: str = side, meeting: Meeting = meeting) -> Any:
                if args:
                    return (meeting.attend(side, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": meeting.attend(side, kwargs["hidden_states"])}

            tower.blocks(model)[depth].register_forward_pre_hook(before, with_kwargs=True)

    def run(side: str, tower: Any) -> None:
        with torch.enable_grad():
            results[side] = tower.encode(model, inputs)

    threads = [threading.Thread(target=run, args=(side, getattr(towers, side))) for side in ("image", "text")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results["image"], results["text"]


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
