"""Faster ways to compute what torch's linear layers and self-attentions compute, where torch takes a slow one.

Inference in float32 on CPUs: torch gives linear layers to its BLAS (MKL in its wheels) and convolutions to oneDNN. On
processors whose widest instructions MKL does not use, oneDNN is up to 1.9 times faster; a linear layer is a convolution
of kernel size 1. Which is faster is measured once per process.

Training: `nn.MultiheadAttention` projects tokens in the order N, B, not contiguous, and torch then multiplies them with
frozen weights one position at a time, in bfloat16 even with a copy of the weights for each.

Both act on one thread's calls inside a context; no module is changed.

Shape alphabet: B batch, N tokens, M all tokens, W width.
"""

from __future__ import annotations

import inspect
import platform
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_WORTHWHILE = 1.05
_MEASURING = threading.Lock()  # so that all threads go by one measurement
_ATTENTION = inspect.signature(F.multi_head_attention_forward)


def fast_linears(model: nn.Module) -> AbstractContextManager[object]:
    """Inside, linear layers and self-attentions run through oneDNN, if that is faster for this model.

    For calls without gradients, of float32 models on the CPU.
    """
    reference = next(model.parameters())
    with _MEASURING:
        wanted = reference.device.type == "cpu" and reference.dtype == torch.float32 and onednn_is_faster()
    return _Kernels(_as_convolution) if wanted else nullcontext()


def batch_first_attention() -> AbstractContextManager[object]:
    """Inside, self-attentions with frozen weights keep their tokens in the order B, N throughout."""
    return _Kernels(F.linear)


@cache
def onednn_is_faster() -> bool:
    """Whether a layer of usual size takes less time as a convolution."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    tokens, weight, bias = torch.zeros(788, 768), torch.zeros(3072, 768), torch.zeros(3072)
    ways: tuple[Callable[..., Tensor], ...] = (F.linear, _as_convolution)
    best = [float("inf")] * len(ways)
    for turn in range(6):
        for index, way in enumerate(ways):
            started = time.perf_counter()
            way(tokens, weight, bias)
            if turn:  # the first warms up
                best[index] = min(best[index], time.perf_counter() - started)
    return best[0] > _WORTHWHILE * best[1]


@cache
def has_native_bfloat16() -> bool:
    """Whether this processor has bfloat16 instructions; without them bfloat16 is 7 to 12 times slower than float32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def usable_dtype(dtype: torch.dtype | None, device: torch.device | str | None) -> torch.dtype | None:
    """The type itself, but float32, with a warning, for bfloat16 on a CPU that has no instructions for it."""
    on_cpu = device is None or torch.device(device).type == "cpu"
    if dtype != torch.bfloat16 or not on_cpu or has_native_bfloat16():
        return dtype
    warnings.warn(
        "this processor has no bfloat16 instructions, which makes bfloat16 about 10 times slower than float32; "
        "float32 is computed instead",
        stacklevel=4,
    )
    return torch.float32


def warn_of_slow_bfloat16(model: nn.Module) -> None:
    """Warn if a model on the CPU has bfloat16 weights and the processor no instructions for them."""
    reference = next(model.parameters())
    if reference.device.type == "cpu" and reference.dtype == torch.bfloat16 and not has_native_bfloat16():
        warnings.warn(
            "this processor has no bfloat16 instructions, so bfloat16 weights make it about 10 times slower than "
            "float32; call model.float()",
            stacklevel=3,
        )


class _Kernels(TorchFunctionMode):
    """Computes linear layers by another function, and plain self-attentions with their tokens in the order B, N."""

    def __init__(self, linear: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear = linear

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self.linear(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            attended = _self_attention(self.linear, _ATTENTION.bind(*args, **kwargs).arguments)
            if attended is not None:
                return attended, None
        return func(*args, **kwargs)


def _as_convolution(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, of any batch shape."""
    if not tokens.numel() or weight.ndim != 2 or torch.is_grad_enabled():
        return F.linear(tokens, weight, bias)
    image = tokens.reshape(1, 1, -1, tokens.shape[-1]).permute(0, 3, 1, 2)  # [1, W, 1, M], channels last
    result = F.conv2d(image, weight[:, :, None, None], bias)
    return result.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], weight.shape[0])


def _self_attention(linear: Callable[..., Tensor], given: dict[str, Any]) -> Tensor | None:
    """`F.multi_head_attention_forward` for what is a plain self-attention with frozen weights; None for what is not.

    Args:
        linear: Computes `F.linear`.
        given: Its arguments by name; `query` is [N, B, W].

    Returns:
        [N, B, W].
    """
    tokens, mask = given["query"], given.get("attn_mask")
    weights = (given["in_proj_weight"], given["out_proj_weight"])
    plain = (
        tokens is given["key"] is given["value"]
        and tokens.ndim == 3
        and all(weight is not None and not (weight.requires_grad and torch.is_grad_enabled()) for weight in weights)
        and given.get("need_weights") is False
        and given.get("key_padding_mask") is None
        and not given.get("use_separate_proj_weight")
        and not given.get("is_causal")
        and not (given.get("training") and given["dropout_p"])
        and given.get("bias_k") is None
        and not given.get("add_zero_attn")
        and (mask is None or (mask.ndim == 2 and mask.is_floating_point()))
    )
    if not plain:
        return None
    tokens = tokens.transpose(0, 1)  # [B, N, W], as it was before torch turned it
    projected = linear(tokens, given["in_proj_weight"], given["in_proj_bias"])  # [B, N, 3 W]
    query, key, value = rearrange(projected, "b n (three h d) -> three b h n d", three=3, h=given["num_heads"])
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=None if mask is None else mask.to(query.dtype)
    )
    joined = linear(rearrange(attended, "b h n d -> b n (h d)"), given["out_proj_weight"], given["out_proj_bias"])
    return joined.transpose(0, 1)
