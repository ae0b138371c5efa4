"""Matrix products of float32 inference on CPUs, by whichever of torch's two ways is faster on this processor.

torch gives linear layers to its BLAS (MKL in its wheels) and convolutions to oneDNN. On processors whose widest
instructions MKL does not use, oneDNN is up to 1.9 times faster; a linear layer is a convolution of kernel size 1. Which
is faster is measured once per process.

Shape alphabet: B batch, N tokens, M all tokens, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
    tokens, layer = torch.zeros(788, 768), nn.Linear(768, 3072).requires_grad_(False)
    ways: tuple[Callable[[], Tensor], ...] = (
        partial(F.linear, tokens, layer.weight, layer.bias),
        partial(_linear, layer, tokens),
    )
    best = [float("inf")] * len(ways)
    for turn in range(6):
        for index, way in enumerate(ways):
            started = time.perf_counter()
            way()
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


def _self_attention(layer: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
    """As `nn.MultiheadAttention.forward`, to which it leaves whatever is no plain self-attention."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    tokens, mask = given["query"], given.get("attn_mask")
    plain = (
        len(args) <= 3
        and given.keys() <= {"query", "key", "value", "attn_mask", "need_weights"}
        and tokens is given["key"] is given["value"]
        and tokens.ndim == 3
        and given.get("need_weights") is False
        and layer.batch_first
        and not layer.training
        and layer.in_proj_weight is not None
        and layer.bias_k is None
        and not layer.add_zero_attn
        and (mask is None or (mask.ndim == 2 and mask.is_floating_point()))
    )
    if not plain:
        return type(layer).forward(layer, *args, **kwargs)
    projected = _as_convolution(tokens, layer.in_proj_weight, layer.in_proj_bias)  # [B, N, 3 W]
    query, key, value = rearrange(projected, "b n (three h d) -> three b h n d", three=3, h=layer.num_heads)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return _as_convolution(
        rearrange(attended, "b h n d -> b n (h d)"), layer.out_proj.weight, layer.out_proj.bias
    ), None


_REPLACEMENTS: dict[type[nn.Module], Callable[..., Any]] = {nn.Linear: _linear, nn.MultiheadAttention: _self_attention}
