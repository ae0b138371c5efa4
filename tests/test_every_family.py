"""Every family against the oracle of thread_oracle.py."""

from __future__ import annotations

import copy

import pytest
from support import CONFIG, injected
from thread_oracle import assert_equal_to_lockstep, run_in_threads

import pvl_adapter as pvl
from pvl_adapter.lockstep import lockstep_of

UNMASKED = pvl.PVLConfig(layers=CONFIG.layers, dim=CONFIG.dim, mask_padding=False)


def test_lockstep_equals_two_waiting_threads_in_outputs_and_gradients(host):
    model = injected(host, config=UNMASKED)
    plain, adapters = host.build().requires_grad_(False), copy.deepcopy(model.pvl_adapters)

    joint = pvl.encode(model, host.image, host.text)
    expected = run_in_threads(plain, host.arguments(host.image, host.text), adapters, lockstep_of(model))

    assert_equal_to_lockstep(joint, expected, model.pvl_adapters, adapters)


@pytest.mark.parametrize("depth", [0, 2])
def test_the_oracle_notices_a_wrong_fusion_point(host, depth):
    """An oracle that cannot fail proves nothing."""
    model = injected(host, config=UNMASKED)
    elsewhere = injected(host, config=pvl.PVLConfig(layers=[1, 2] if depth == 0 else [0, 1], dim=8, mask_padding=False))
    plain = host.build().requires_grad_(False)

    joint = pvl.encode(model, host.image, host.text)
    expected, _ = run_in_threads(
        plain, host.arguments(host.image, host.text), copy.deepcopy(model.pvl_adapters), lockstep_of(elsewhere)
    )

    assert (joint.image_embeds - expected).abs().max() > 1e-4
