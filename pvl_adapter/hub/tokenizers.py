"""Tokenizers that belong to a model: loaded by name, and saved beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvl_adapter.hub.download import Hub
from pvl_adapter.tokenization import Tokenizer

FOLDER = "tokenizer"  # within the folder of a saved model
_FILES = ("tokenizer*", "vocab*", "special_tokens_map.json", "merges.txt", "config.json", "*.model")


def load_tokenizer(tokenizer: Tokenizer | str | os.PathLike[str], *, hub: Hub) -> Tokenizer:
    """A Hugging Face tokenizer from a folder, the cache or the hub; a tokenizer itself is passed through.

    Raises:
        OSError: If it cannot be had.
    """
    if callable(tokenizer):
        return tokenizer
    from transformers import AutoTokenizer

    folder = Path(tokenizer)
    if not folder.is_dir():
        # A revision is of the model's repository, and no other has it.
        elsewhere = Hub(cache_dir=hub.cache_dir, token=hub.token, local_files_only=hub.local_files_only)
        try:
            folder = elsewhere.folder(str(tokenizer), _FILES)
        except OSError as error:
            raise type(error)(
                f"the tokenizer is missing: {error}; or give a folder that holds it, tokenizer=..."
            ) from error
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise OSError(f"{tokenizer} holds no tokenizer ({error}); give another folder as tokenizer=...") from error


def save_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> dict[str, Any] | None:
    """Write a tokenizer into a folder of its own beside a model.

    Returns:
        What `restore_tokenizer` needs besides; None if the tokenizer is of no kind that can be written.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from transformers import PreTrainedTokenizerBase

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.save_pretrained(folder / FOLDER)
        return {"library": "transformers"}
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.tokenizer.save_pretrained(folder / FOLDER)
        return {
            "library": "open_clip",
            "context_length": tokenizer.context_length,
            "clean": _cleaning(tokenizer),
            "strip_sep_token": tokenizer.strip_sep_token,
            "tokenizer_mode": tokenizer.tokenizer_mode,
        }
    if isinstance(tokenizer, SimpleTokenizer) and type(tokenizer) is SimpleTokenizer:
        length = tokenizer.context_length
        return {"library": "open_clip", "context_length": length, "clean": _cleaning(tokenizer), "simple": True}
    return None


def restore_tokenizer(description: Mapping[str, Any] | None, folder: Path) -> Tokenizer | None:
    """The tokenizer that `save_tokenizer` wrote."""
    if description is None:
        return None
    settings = {name: value for name, value in description.items() if name not in ("library", "simple")}
    if description.get("simple"):
        from open_clip import SimpleTokenizer

        return SimpleTokenizer(**settings)
    if description["library"] == "open_clip":
        from open_clip.tokenizer import HFTokenizer

        return HFTokenizer(str(folder / FOLDER), **settings)
    return load_tokenizer(folder / FOLDER, hub=Hub(local_files_only=True))


def _cleaning(tokenizer: Any) -> str:
    """open_clip's name of the function that a tokenizer cleans sentences with."""
    return str(tokenizer.clean_fn.__name__).removeprefix("_clean_")
