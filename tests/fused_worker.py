"""Run by test_fused.py with TRITON_INTERPRET=1: what the fused kernel computes on this CPU, and what it should."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from hosts import BY_NAME
from support import normal, predict, segmenter
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter import fused, noise
from pvl_adapter.attention import probabilistic_attention
from pvl_adapter.fused import CounterNoise, fused_attention

SIZES = [(3, 5, 7, 6), (2, 33, 40, 5), (3, 40, 35, 48), (1, 65, 37, 256), (1, 3, 5, 300)]  # R, Q, K, C
HOSTS = ("open_clip-inlined_text", "open_clip-timm-bert")


def compare(rows: int, queries: int, keys: int, width: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    query, key_mean, value_mean = (
        normal(rows, tokens, width, seed=seed).to(dtype) for seed, tokens in enumerate((queries, keys, keys))
    )
    # Halves of something wider, as the adapter has them: not contiguous.
    key_var, value_var = normal(rows, keys, 2 * width, seed=3).square().add(1e-6).chunk(2, dim=-1)
    mask = normal(rows, keys, seed=4) > 0
    mask[1:2] = False  # no real token
    streams, signs = torch.tensor([-(2**63), 12345678901234567, -7]), torch.tensor([1, -1, 0])
    counted = CounterNoise(streams[:rows], signs[:rows], noise.element_counters(keys, (width + 1) // 2), width)
    found = {}
    for is_masked in (False, True):
        for name, some in {"none": None, "given": normal(rows, keys, width, seed=5), "counted": counted}.items():
            inputs = (query, key_mean, key_var, value_mean, value_var)
            settings: dict[str, Any] = {"beta": 2.35, "context_mask": mask if is_masked else None, "noise": some}
            got, expected = fused_attention(*inputs, **settings), probabilistic_attention(*inputs, **settings)
            found[f"{rows, queries, keys, width} {dtype} {name} masked={is_masked}"] = (got, expected)
    return found


@torch.no_grad()
def main(path: Path) -> None:
    expected = {name: predict(segmenter(BY_NAME[name]), 5, seed=7).probability for name in HOSTS}
    auto = predict(segmenter(), pvl.Auto(tolerance=1e-3, max_samples=6)).probability
    found: dict[str, Any] = {"loaded on the CPU": "pvl_adapter.fused_kernel" in sys.modules}
    found["attention"] = {k: v for size in SIZES for k, v in compare(*size, torch.float32).items()}
    found["attention"].update(compare(*SIZES[1], torch.bfloat16))

    rows, ones, zeros = 100, torch.ones(100, 1, 6), torch.zeros(100, 1, 6)
    streams = torch.arange(rows) * noise.GOLDEN
    counted = CounterNoise(streams, torch.ones(rows), noise.element_counters(1, 3), 6)
    one_key = fused_attention(zeros, zeros, ones, zeros, ones, beta=1.0, noise=counted)
    found["noise"] = (one_key, counted.tensor())

    found["agrees"] = [fused.agrees(torch.device("cpu"))]
    kernel = fused.fused_attention
    for broken in (lambda *args, **settings: args[0], lambda *args, **settings: 1 / 0):
        fused.fused_attention = broken
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found["agrees"] += [fused.agrees(torch.device("cpu")), len(caught)]
    fused.fused_attention = kernel

    made: list[tuple[int, ...]] = []
    eager_normal = noise.normal
    noise.normal = lambda *args: made.append(args) or eager_normal(*args)  # type: ignore[assignment]
    fused.is_available = noise.is_available = lambda device: True
    found["can fuse"] = {
        "float32": fused.can_fuse(ones),
        "float64": fused.can_fuse(ones.double()),
    }
    with torch.enable_grad():
        found["can fuse"]["with gradients"] = fused.can_fuse(ones)
    found["predict"] = {
        name: (predict(segmenter(BY_NAME[name]), 5, seed=7).probability, value) for name, value in expected.items()
    }
    found["predict"]["auto"] = (predict(segmenter(), pvl.Auto(tolerance=1e-3, max_samples=6)).probability, auto)
    found["noise tensors made"] = len(made)
    torch.save(found, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
