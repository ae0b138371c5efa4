"""Every family against an oracle that shares no mechanism with the library: two threads that wait for each other.

Each tower of a plain model runs in a thread of its own, by its own loop, so every block is given what its tower gives
it (masks, rotary positions, position biases). Where an adapter belongs, a hook before the block waits for the other
tower, and the adapter works on both hidden states.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hosts import Host
from support import CONFIG, gradients, injected
from torch import Tensor, nn

import pvl_adapter as pvl
from pvl_adapter.injection import lockstep_of

UNMASKED = pvl.PVLConfig(layers=CONFIG.layers, dim=CONFIG.dim, mask_padding=False)


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


def run_in_threads(host: Host, model: nn.Module, adapters: nn.ModuleList, conductor: Any) -> tuple[Tensor, Tensor]:
    """Pooled embeddings of both towers of a plain model, with adapters between them."""
    towers, inputs, results = conductor.towers, host.arguments(host.image, host.text), {}
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


def test_lockstep_equals_two_waiting_threads_in_outputs_and_gradients(host):
    model = injected(host, config=UNMASKED)
    plain, adapters = host.build().requires_grad_(False), copy.deepcopy(model.pvl_adapters)

    joint = pvl.encode(model, host.image, host.text)
    got = joint.image_embeds, joint.text_embeds
    expected = run_in_threads(host, plain, adapters, lockstep_of(model))
    for embeds in (got, expected):
        sum((each**3).sum() for each in embeds).backward()

    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    expected_gradients = gradients(adapters)
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in gradients(model.pvl_adapters).items():
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("depth", [0, 2])
def test_the_oracle_notices_a_wrong_fusion_point(host, depth):
    """An oracle that cannot fail proves nothing."""
    model = injected(host, config=UNMASKED)
    elsewhere = injected(host, config=pvl.PVLConfig(layers=[1, 2] if depth == 0 else [0, 1], dim=8, mask_padding=False))
    plain = host.build().requires_grad_(False)

    joint = pvl.encode(model, host.image, host.text)
    expected, _ = run_in_threads(host, plain, copy.deepcopy(model.pvl_adapters), lockstep_of(elsewhere))

    assert (joint.image_embeds - expected).abs().max() > 1e-4
