"""What predicting costs and leaves behind: memory, what is computed once, modes, types and gradients."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hosts import BY_NAME
from support import (
    FEW_HOSTS,
    assert_same_bits,
    assert_same_maps,
    blocks,
    gradients,
    images,
    maps,
    predict,
    segmenter,
)
from torch import Tensor, nn

import pvl_adapter as pvl

IMAGES = images()


@pytest.fixture(scope="module")
def model() -> pvl.MedCLIPSeg:
    return segmenter()


# --- memory ----------------------------------------------------------------------------------------------------------

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError("Unable to allocate 9 bytes"),
]


@pytest.mark.parametrize("number", [5, pvl.Auto(tolerance=0.05, max_samples=20)], ids=["five", "auto"])
@pytest.mark.parametrize("room", [0, 1, 4])
@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_where_memory_is_short_less_is_computed_at_once_or_the_error_is_told(model, error, room, number):
    expected = predict(model, number)
    failures = []

    def allocate(_: nn.Module, args: tuple[Tensor, ...], kwargs: object) -> None:
        if len(args[0]) > room:
            failures.append(len(args[0]))
            raise error

    handle = model.head.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        if room:
            assert_same_maps(maps(predict(model, number)), maps(expected))
            assert failures == sorted(set(failures), reverse=True) != []  # none is tried again, none forgotten
        else:
            with pytest.raises(type(error), match=r"alloc|memory"):
                predict(model, number)
    finally:
        handle.remove()
    assert_same_bits(maps(predict(model, number)), maps(expected))


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x")], ids=str)
def test_other_errors_are_told_at_once(model, error):
    failures = []

    def fail(*_: object) -> None:
        failures.append(1)
        raise error

    handle = model.head.register_forward_pre_hook(fail)
    try:
        with pytest.raises(type(error)):
            predict(model)
    finally:
        handle.remove()
    assert len(failures) == 1


def test_memory_does_not_grow_with_the_number_of_samples(model):
    def peak(number: int) -> int:
        """Most bytes allocated at once."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            predict(model, number, memory_budget=1)
        sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        return int(np.cumsum(sizes).max())

    peak(2)
    assert peak(24) < 1.1 * peak(4)


@pytest.mark.parametrize("host", FEW_HOSTS, ids=str)
@pytest.mark.parametrize("sentences", [1, 3])
def test_what_comes_before_the_first_adapter_is_computed_once(host, sentences, monkeypatch):
    model = segmenter(host, config=pvl.PVLConfig(layers=(2,), dim=8))
    rows: Counter[str] = Counter()
    names = {id(block): name for name, block in blocks(model.clip).items()}
    for kind in {type(block) for block in blocks(model.clip).values()}:

        def forward(self: nn.Module, *args: object, own: Callable = kind.forward, **kwargs: object) -> object:
            output = own(self, *args, **kwargs)
            rows[names[id(self)]] += len(output[0] if isinstance(output, tuple) else output)
            return output

        monkeypatch.setattr(kind, "forward", forward)

    model.predict(IMAGES[0], host.text_of(host.ids[:sentences]), num_samples=6)

    assert rows.keys() == set(names.values())  # no block is left out
    shared = [count for count in rows.values() if count < 6 * sentences]
    assert sorted(shared) == sorted([1] * 3 + [sentences] * 2)  # three image blocks and two of the text


# --- modes, types and gradients --------------------------------------------------------------------------------------


def test_predicting_leaves_modes_gradients_and_training_as_they_were():
    host = BY_NAME["open_clip-bert"]
    model = segmenter(host, config=pvl.PVLConfig(layers=[1], dim=8, tower_dropout=True), dropout=0.9).train()
    model.head.mask_head.eval()
    modes, twin = {name: module.training for name, module in model.named_modules()}, copy.deepcopy(model)

    one, same = (model.predict(IMAGES, host.text, num_samples=2, return_samples=True) for _ in range(2))

    assert_same_bits(maps(one), maps(same))  # a dropout awake would differ
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(map_.requires_grad for map_ in (*maps(one), one.samples))
    assert torch.is_grad_enabled()
    for each in (model, twin):
        torch.manual_seed(3)
        each(host.image, host.text).logits.square().mean().backward()
    got, expected = (
        {name: grad for name, grad in gradients(each).items() if grad is not None} for each in (model, twin)
    )
    assert_same_bits(got, expected)


@pytest.mark.parametrize("host", FEW_HOSTS, ids=str)
@pytest.mark.filterwarnings("ignore:.*bfloat16")
def test_half_precision_gives_nearly_the_same_maps_in_float32(host):
    model = segmenter(host)

    full = model.predict(IMAGES, host.text, num_samples=6)
    half = copy.deepcopy(model).bfloat16().predict(IMAGES, host.text, num_samples=6)

    assert all(map_.dtype == torch.float32 and map_.isfinite().all() for map_ in maps(half))
    assert (half.probability - full.probability).square().mean().sqrt() < 0.05
