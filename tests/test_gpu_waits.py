"""What prediction would make a GPU wait for: run with tensors that say they are on one and hold no values."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hosts import CORE_HOSTS, Host
from support import HOST, segmenter
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pvl_adapter as pvl
from pvl_adapter import fused, noise
from pvl_adapter.engine import run_samples
from pvl_adapter.image_part import ImagePart
from pvl_adapter.monte_carlo import MonteCarloConfig

VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")  # to be looked at


class Waits(TorchDispatchMode):
    """Counts by function what waits: values looked at, blocking copies, indices on another device or of bools."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        waits = name in VALUES
        if name == "_to_copy" and kwargs.get("device") is not None:
            waits = torch.device(kwargs["device"]).type != args[0].device.type and not kwargs.get("non_blocking")
        elif name in ("index", "index_put", "index_put_"):
            waits = any(i is not None and (i.device != args[0].device or i.dtype == torch.bool) for i in args[1])
        if waits:
            self.seen[next(f.name for f in reversed(traceback.extract_stack()) if "pvl_adapter/" in f.filename)] += 1
        return False if name == "_local_scalar_dense" else func(*args, **kwargs)


AUTO = pvl.Auto(tolerance=1e-9, max_samples=6)
QUICK = ("transformers-clip",)


@pytest.mark.parametrize(
    "host",
    [pytest.param(h, marks=[] if h.name in QUICK else pytest.mark.slow, id=h.name) for h in CORE_HOSTS],
)
def test_samples_of_a_known_number_wait_for_nothing(host, monkeypatch):
    waits, count = run(host, 5, monkeypatch=monkeypatch)

    assert count == [5, 5, 5]
    assert set(waits) <= {"real_tokens"}  # once, before the loop: where sentences end


@pytest.mark.parametrize("images", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_of_auto_only_the_decision_to_stop_waits(images, monkeypatch):
    """It looks after each pair but the last, at one number for each of three sentences."""
    waits, count = run(HOST, AUTO, images=images, lazy=images == 1, monkeypatch=monkeypatch)

    assert count == [6, 6, 6]
    assert waits["_look"] == 3
    assert set(waits) <= {"real_tokens", "_look"}


def run(
    host: Host, num_samples: int | pvl.Auto, *, images: int = 3, lazy: bool = False, monkeypatch: pytest.MonkeyPatch
) -> tuple[Counter[str], list[int]]:
    """What waits in a prediction of three sentences, and how many samples each has had.

    Args:
        host: Of the segmenter.
        num_samples: How many.
        images: One for all sentences, or three.
        lazy: Noise as counters, as for the fused kernel (which cannot itself be run so).
        monkeypatch: pytest's.
    """
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(fused, "is_available", lambda device: False)
    monkeypatch.setattr(noise, "is_available", lambda device: lazy)
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    model, text = segmenter(host), segmenter(host).tokenize(host.text)
    with FakeTensorMode() as fake, torch.no_grad(), Waits() as waits:

        def on_gpu(tensor: Tensor) -> Tensor:
            return fake.from_tensor(tensor).to("cuda", non_blocking=True)

        model._apply(on_gpu)
        tokens = {name: on_gpu(ids) for name, ids in text.items()} if isinstance(text, dict) else on_gpu(text)
        done = run_samples(
            model,
            ImagePart(on_gpu(host.image[:images])),
            tokens,
            config=MonteCarloConfig(num_samples),
            seed=3,
            memory_budget=2 * 10**5,
            keep=num_samples != AUTO,
        )

    return waits.seen, done.statistics.count
