"""Other ways of computing what torch's linear layers and self-attentions compute, where torch takes a slow one.

Inference in float32 on CPUs: torch gives linear layers to its BLAS (MKL in its wheels) and convolutions to oneDNN. On
processors whose widest instructions MKL does not use, oneDNN is up to 1.9 times faster; a linear layer is a convolution
of kernel size 1. Which is faster is measured once per process.

Training: `nn.MultiheadAttention` projects tokens in the order N, B, not contiguous, and torch then multiplies them with
frozen weights one position at a time, in bfloat16 even with a copy of the weights for each.

Shape alphabet: B batch, N tokens, M all tokens, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_WORTHWHILE = 1.05


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers and self-attentions of a float32 model on the CPU run through oneDNN, if that is faster.

    For calls without gradients. Layers whose forward another library has replaced are left alone.
    """
    reference = next(model.parameters())
    changed: list[nn.Module] = []
    try:
        if reference.device.type == "cpu" and reference.dtype == torch.float32 and onednn_is_faster():
            for module in model.modules():
                if "forward" not in module.__dict__ and (replacement := _REPLACEMENTS.get(type(module))):
                    module.forward = partial(replacement, module)
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


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


def _linear(layer: nn.Linear, tokens: Tensor) -> Tensor:
    return _as_convolution(tokens, layer.weight, layer.bias)


def _as_convolution(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, of any batch shape."""
    if not tokens.numel():
        return F.linear(tokens, weight, bias)
    image = tokens.reshape(1, 1, -1, tokens.shape[-1]).permute(0, 3, 1, 2)  # [1, W, 1, M], channels last
    result = F.conv2d(image, weight[:, :, None, None], bias)
    return result.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], weight.shape[0])


def _attention_by_convolution(layer: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
    return self_attention(_as_convolution, layer, *args, **kwargs)


@contextmanager
def batch_first_attention(layers: Sequence[nn.MultiheadAttention]) -> Iterator[None]:
    """Inside, those of these layers that are frozen keep their tokens in the order B, N throughout."""
    frozen = (layer for layer in layers if not any(weight.requires_grad for weight in layer.parameters()))
    changed = [layer for layer in frozen if "forward" not in layer.__dict__]
    try:
        for layer in changed:
            layer.__dict__["forward"] = partial(self_attention, F.linear, layer)
        yield
    finally:
        for layer in changed:
            del layer.__dict__["forward"]


def self_attention(linear: Callable[..., Tensor], layer: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
    """As `nn.MultiheadAttention.forward`, to which it leaves whatever is no plain self-attention.

    Args:
        linear: Computes `F.linear`.
        layer: Whose forward it is.
        args: Of the forward.
        kwargs: Likewise.
    """
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    tokens, mask = given["query"], given.get("attn_mask")
    plain = (
        len(args) <= 3
        and given.keys() <= {"query", "key", "value", "attn_mask", "need_weights"}
        and tokens is given["key"] is given["value"]
        and tokens.ndim == 3
        and given.get("need_weights") is False
        and layer.batch_first
        and not (layer.training and layer.dropout)
        and layer.in_proj_weight is not None
        and layer.bias_k is None
        and not layer.add_zero_attn
        and (mask is None or (mask.ndim == 2 and mask.is_floating_point()))
    )
    if not plain:
        return type(layer).forward(layer, *args, **kwargs)
    projected = linear(tokens, layer.in_proj_weight, layer.in_proj_bias)  # [B, N, 3 W]
    query, key, value = rearrange(projected, "b n (three h d) -> three b h n d", three=3, h=layer.num_heads)
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=None if mask is None else mask.to(query.dtype)
    )
    return linear(rearrange(attended, "b h n d -> b n (h d)"), layer.out_proj.weight, layer.out_proj.bias), None


_REPLACEMENTS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.MultiheadAttention: _attention_by_convolution,
}
