"""The fused kernel against eager attention, by Triton's interpreter: no GPU is needed, and none has been tried."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import normal

from pvl_adapter import fused
from pvl_adapter.attention import probabilistic_attention
from pvl_adapter.fused import CounterNoise, can_fuse
from pvl_adapter.noise import element_counters

pytest.importorskip("triton")
IN_THE_INTERPRETER = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of its own has computed: Triton looks for its interpreter when it is imported."""
    script, path = Path(__file__).with_name("fused_worker.py"), tmp_path_factory.mktemp("fused") / "found.pt"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[1])}
    outcome = subprocess.run(
        [sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=300, check=False, env=env
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return torch.load(path, weights_only=True)


@IN_THE_INTERPRETER
def test_the_kernel_gives_what_eager_attention_gives(found):
    """All sizes of blocks, with and without padding, for noise that is given, made inside, or absent."""
    assert len(found["attention"]) == 36
    for case, (got, expected) in found["attention"].items():
        assert got.dtype == expected.dtype
        in_float32 = got.dtype == torch.float32
        torch.testing.assert_close(
            got, expected, atol=1e-5 if in_float32 else 1e-2, rtol=0.0, msg=lambda text, case=case: f"{case}: {text}"
        )


@IN_THE_INTERPRETER
def test_the_noise_made_inside_is_that_of_the_counters(found):
    got, expected = found["noise"]

    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0.0)


@IN_THE_INTERPRETER
def test_a_prediction_is_the_same_and_no_noise_tensor_is_made(found):
    assert set(found["predict"]) == {"open_clip-inlined_text", "open_clip-timm-bert", "auto"}
    for got, expected in found["predict"].values():
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.0)
    assert found["noise tensors made"] == 0


@IN_THE_INTERPRETER
def test_the_kernel_is_taken_where_it_works_alone(found):
    assert not found["loaded on the CPU"]
    assert found["can fuse"] == {"float32": True, "float64": False, "with gradients": False}
    with torch.no_grad():
        assert not can_fuse(torch.zeros(1))
    assert not fused.is_available(torch.device("mps"))


@IN_THE_INTERPRETER
def test_a_kernel_that_fails_or_disagrees_is_not_taken(found):
    assert found["agrees"] == [True, False, 1, False, 1]


def test_eager_attention_takes_counters_too():
    counted = CounterNoise(torch.tensor([3, -4]), torch.tensor([1, 0]), element_counters(4, 3), width=5)
    query, keys = normal(2, 3, 5), normal(2, 4, 5, seed=1)
    inputs = (query, keys, keys.square(), keys, keys.square())
    noise = counted.tensor()

    got = probabilistic_attention(*inputs, beta=1.0, noise=counted)

    assert noise.shape == (2, 4, 5)
    assert noise[0].std() > 0.5
    assert not noise[1].any()
    assert torch.equal(got, probabilistic_attention(*inputs, beta=1.0, noise=noise))


@pytest.mark.slow  # some seconds each
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("noise", ["none", "given", "counted"])
def test_the_kernel_compiles_for_nvidia(capability, precision, dtype, noise):
    """To the end, by the assembler in Triton's wheel, at the published sizes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pvl_adapter.fused_kernel import attend

    absent = {"mask": None, "noise": None, "streams": None, "signs": None}
    types = {"key_var": "*fp32", "value_var": "*fp32", "beta": "fp32", "scale": "fp32", "queries": "i32", "keys": "i32"}
    types |= dict.fromkeys(("output", "query", "key_mean", "value_mean"), f"*{dtype}")
    given = {"given": {"mask": "*u8", "noise": "*fp32"}, "counted": {"streams": "*i64", "signs": "*i64"}}.get(noise, {})
    fixed = {"width": 256, "half": 128, "precision": precision, "block": 32, "block_e": 128, **absent}
    fixed = {name: value for name, value in fixed.items() if name not in given}
    order = {**types, **given, **dict.fromkeys(fixed, "constexpr")}
    signature = {name: order[name] for name in attend.arg_names}

    kernel = triton.compile(
        ASTSource(attend, signature, fixed),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 8, "num_stages": 1},
    )

    assert kernel.metadata.shared <= 48 * 1024  # what any card gives
    assert kernel.asm["cubin"]
