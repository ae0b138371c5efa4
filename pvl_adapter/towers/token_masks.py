"""Which positions of a batch of token ids belong to the sentences, where no attention mask says it.

Shape alphabet: B batch, L text tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mask_by_pooling(text: Tensor, *, pooling: str, end: Any, padding: Any) -> Tensor:
    """[B, L] bool, True where a position holds a token of the sentence.

    Args:
        text: Token ids [B, L].
        pooling: Which position the tower pools: "eos" (the end token), "argmax" (the highest id, an end token too),
            "last" (padding included), or anything else.
        end: Id of the end token, read for "eos".
        padding: Id of padding, read for anything else.
    """
    if pooling in ("eos", "argmax"):
        position = text.argmax(dim=-1) if pooling == "argmax" else text.eq(end).int().argmax(dim=-1)  # [B]
        return mask_through(position, length=text.shape[1])
    if pooling == "last":  # SigLIP, CLIPA: trained on padded sentences, by tokenizers with other padding ids
        return before_trailing_run(text)
    return text.ne(padding)


def mask_through(position: Tensor, *, length: int) -> Tensor:
    """[B, length] bool, True up to and including each row's `position` [B]."""
    return torch.arange(length, device=position.device) <= position[:, None]


def before_trailing_run(text: Tensor) -> Tensor:
    """[B, L] bool, for towers that do not tell their padding id: the id a row ends with is its padding.

    The first of that final run may be the end token and counts as real.
    """
    positions = torch.arange(text.shape[1], device=text.device)
    last_other = torch.where(text != text[:, -1:], positions, -1).amax(dim=1)  # [B]
    return mask_through(last_other + 1, length=text.shape[1])
