"""Which positions of a batch of token ids belong to the sentences, where no attention mask says it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mask_by_pooling(text: Tensor, *, pooling: str, end: Any, padding: Any) -> Tensor:
    """[B, L] bool, True where a position of `text` [B, L] holds a token of the sentence rather than padding.

    Args:
        text: Token ids.
        pooling: Which position the tower pools: "eos" (the end token), "argmax" (the highest id, an end token too),
            "last" (padding included: the id a row ends with is its padding), or anything else.
        end: Id of the end token, read for "eos".
        padding: Id of padding, read for anything else.
    """
    positions = torch.arange(text.shape[1], device=text.device)
    if pooling == "argmax":
        last = text.argmax(dim=-1)  # [B]
    elif pooling == "eos":
        last = text.eq(end).int().argmax(dim=-1)  # [B]
    elif pooling == "last":  # SigLIP, CLIPA: the first of the final run may be the end token and counts as real
        last = torch.where(text != text[:, -1:], positions, -1).amax(dim=1) + 1  # [B]
    else:
        return text.ne(padding)
    return positions <= last[:, None]
