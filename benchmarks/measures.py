"""What each measure of the engine gives: shares of a prediction's time, seconds without one, kernels of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from pvl_adapter import engine, fused, joint, kernels, noise
from pvl_adapter.monte_carlo import MonteCarlo

WITHOUT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "onednn": lambda: patch.object(kernels, "onednn_is_faster", lambda: False),
    "leaving_out_unread_work": lambda: patch.object(joint, "_has_hooks", lambda lockstep: True),
}
ON_GPU = {"fused_attention": lambda: _unfused()}


def shares(predict: Callable[[], Any], *, synchronize: Callable[[], None]) -> dict[str, float]:
    """The parts of a prediction's time that noise and statistics take; noise made inside a kernel is not seen."""
    spent = {"noise": 0.0, "statistics": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            spent[name] += time.perf_counter() - started
            return result

        return call

    seeded_noise = engine.seeded_noise
    with (
        patch.object(engine, "seeded_noise", lambda **settings: timed("noise", seeded_noise(**settings))),
        patch.object(MonteCarlo, "add", timed("statistics", MonteCarlo.add)),
    ):
        synchronize()
        started = time.perf_counter()
        predict()
        synchronize()
        total = time.perf_counter() - started
    return {name: seconds / total for name, seconds in spent.items()}


def without(measures: dict[str, Any], predict: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Ways to predict with one measure switched off each."""

    def way(switched_off: Callable[[], AbstractContextManager[Any]]) -> Callable[[], Any]:
        def call() -> Any:
            with switched_off():
                return predict()

        return call

    return {f"without_{name}": way(switched_off) for name, switched_off in measures.items()}


def kernel_launches(predict: Callable[[], Any]) -> int:
    """How many kernels a prediction starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        predict()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")


@contextmanager
def _unfused() -> Iterator[None]:
    with (
        patch.object(fused, "is_available", lambda device: False),
        patch.object(noise, "is_available", lambda d: False),
    ):
        yield
