"""Probabilistic attention as one Triton kernel on CUDA: no score and no noise is ever stored.

The same function as `attention.probabilistic_attention`, without gradients. The kernel keeps a running softmax over
the keys (Dao et al., 2022, arXiv 2205.14135) and makes the noise of the values from the counters of noise.py.

Shape alphabet: R rows, Q query tokens, K context tokens, C adapter width.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class CounterNoise(NamedTuple):
    """Standard normal noise [R, K, C] that is not made yet.

    Attributes:
        streams: Int64 [R], the counters before each row's first.
        signs: [R], what each row is multiplied by: 1, or -1 for an antithetic partner, or 0 for the mean.
        counters: Int64 [K, half of C], of the elements; added to a stream's.
        width: C.
    """

    streams: Tensor
    signs: Tensor
    counters: Tensor
    width: int

    def tensor(self) -> Tensor:
        """The noise itself, [R, K, C], float32."""
        from pvl_adapter.noise import normal

        return normal(self.streams, self.counters)[..., : self.width] * self.signs[:, None, None]


@cache
def is_available(device: torch.device) -> bool:
    """Whether a device can run the kernel: NVIDIA's from Ampere on, with triton installed, if it agrees there."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and agrees(device)
    )


def agrees(device: torch.device) -> bool:
    """Whether the kernel gives what torch's own operations give, on a small example; warns if not."""
    from pvl_adapter.attention import probabilistic_attention
    from pvl_adapter.noise import element_counters

    query, *inputs = torch.rand(5, 2, 20, 48, generator=torch.Generator().manual_seed(0)).to(device)
    streams, signs = torch.tensor([[3, 4], [1, -1]], device=device)
    noise = CounterNoise(streams, signs, element_counters(20, 24, device=device), 48)
    try:
        found = fused_attention(query, *inputs, beta=2.35, noise=noise)
        with torch.inference_mode(False), torch.enable_grad():  # which takes torch's operations
            expected = probabilistic_attention(query, *inputs, beta=2.35, noise=noise.tensor())
        if (found - expected).abs().max() < 1e-2:  # TF32 is right to 1e-3
            return True
        reason = "gives other values than torch's operations"
    except Exception as error:  # of triton or the driver, whatever it is
        reason = f"fails: {error}"
    warnings.warn(f"the fused attention kernel {reason}; the slower way is taken on {device}", stacklevel=2)
    return False


def can_fuse(query: Tensor) -> bool:
    """Whether `fused_attention` is to be taken: on a device that can, for 32 or 16 bits, without gradients.

    A graph of torch.compile has eager code instead, which its compiler fuses itself.
    """
    wanted = query.dtype in _TYPES and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return wanted and is_available(query.device)


def fused_attention(
    query: Tensor,
    key_mean: Tensor,
    key_var: Tensor,
    value_mean: Tensor,
    value_var: Tensor,
    *,
    beta: float,
    context_mask: Tensor | None = None,
    noise: Tensor | CounterNoise | None = None,
) -> Tensor:
    """`probabilistic_attention` in one kernel; arguments and result as there. Products are TF32 where torch's are.

    Args:
        noise: [R, K, C], also as counters, those of `noise.element_counters`: then it is made inside the kernel.
    """
    from pvl_adapter.fused_kernel import attend

    (rows, tokens, width), context = query.shape, key_mean.shape[1]
    half = -(-width // 2)
    counted = noise if isinstance(noise, CounterNoise) else None
    given = noise if isinstance(noise, Tensor) else None
    inputs = [x.contiguous() for x in (query, key_mean, key_var, value_mean, value_var)]
    output = torch.empty_like(inputs[0])
    block, block_e = 32, min(128, max(16, 1 << (half - 1).bit_length()))
    grid = (rows, -(-tokens // block), -(-half // block_e))
    attend[grid](
        output,
        *inputs,
        None if context_mask is None else context_mask.contiguous().view(torch.uint8),
        None if given is None else given.contiguous(),
        None if counted is None else counted.streams,
        None if counted is None else counted.signs,
        beta,
        width**-0.5,
        tokens,
        context,
        width=width,
        half=half,
        precision="tf32" if _allows_tf32() else "ieee",
        block=block,
        block_e=block_e,
        num_warps=8,  # hardly any registers spill then (cuobjdump, sm_80 to sm_120)
        num_stages=1,
    )
    return output


def _allows_tf32() -> bool:
    settings = torch.backends.cuda.matmul
    precision = getattr(settings, "fp32_precision", None)  # torch 2.9's; asking the old name may then raise
    return bool(settings.allow_tf32) if precision is None else precision == "tf32"
