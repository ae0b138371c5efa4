"""Computing nothing for padding that nobody reads.

A text tower that masks padding, or looks back only, gives a sentence's own tokens the same whatever follows them. So
padding is cut off wherever no adapter reads it; where one does, it still asks, but it is no key and no value.

Shape alphabet: B batch, L text tokens, W tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class RealTokens(NamedTuple):
    """How much of a batch of sentences is no padding.

    Attributes:
        length: Positions up to the last real token of any sentence.
        everywhere: Whether every sentence fills them, so that they need no mask.
    """

    length: int
    everywhere: bool


def real_tokens(token_mask: Tensor) -> RealTokens | None:
    """How far sentences go, from [B, L]; on a GPU this waits for the mask.

    None where values cannot be looked at, and for a sentence of padding alone, which has nothing else to read.
    """
    capturing = token_mask.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or token_mask.is_meta or capturing:
        return None
    positions = torch.arange(1, token_mask.shape[1] + 1, device=token_mask.device)
    longest, fewest = torch.stack([(token_mask * positions).max(), token_mask.sum(dim=1).min()]).tolist()
    return RealTokens(longest, everywhere=fewest == longest) if fewest else None


def cut_masks(value: Any, rows: int, tokens: int) -> Any:
    """Attention masks and biases among a block's arguments, [.., tokens or 1, tokens], for the first rows alone."""
    if isinstance(value, dict):
        return {name: cut_masks(item, rows, tokens) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(cut_masks(item, rows, tokens) for item in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == tokens and value.dtype != torch.long:
        return value[..., : rows if value.shape[-2] == tokens else None, :rows]
    return value


class RealKeys(TorchFunctionMode):
    """Inside, a block of a tower that masks padding makes keys and values of real tokens alone.

    Args:
        real: Of the sentences.
        layers: The block's layers that make keys and values, [B, L, W] to [B, L, W].
    """

    def __init__(self, real: RealTokens, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.real = real
        self.layers = layers

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, length = kwargs or {}, self.real.length
        if func is F.linear and len(args) > 1 and any(args[1] is layer.weight for layer in self.layers):
            made = func(args[0][:, :length], *args[1:], **kwargs)  # [B, length, W]
            return F.pad(made, (0, 0, 0, args[0].shape[1] - length))  # [B, L, W], as the block expects
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is not None:
            mask = kwargs["attn_mask"]  # [B, heads or 1, L, L]
            unmasked = self.real.everywhere and mask.dtype == torch.bool  # no positions in it
            args = (args[0], *(each[:, :, :length] for each in args[1:3]), *args[3:])  # [B, heads, length, W / heads]
            kwargs = {**kwargs, "attn_mask": None if unmasked else mask[..., :length]}
        return func(*args, **kwargs)
