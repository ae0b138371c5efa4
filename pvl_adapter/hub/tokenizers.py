"""Tokenizers that belong to a model: loaded by name, and saved beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvl_adapter.hub.download import Hub, sha256
from pvl_adapter.tokenization import Tokenizer

FOLDER = "tokenizer"  # within the folder of a saved model
_FILES = ("tokenizer*", "vocab*", "special_tokens_map.json", "merges.txt", "config.json", "*.model")


class MissingTokenizer:
    """Stands for a tokenizer that could not be saved, so that no other one takes its place unnoticed.

    Args:
        kind: Name of its class.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, sentences: Any) -> Any:
        raise ValueError(
            f"the model was saved with a {self.kind}, which could not be saved with it; give it when loading, as in "
            "from_pretrained(..., tokenizer=...), or pass token ids"
        )


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


def save_tokenizer(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write a tokenizer into a folder of its own beside a model.

    Returns:
        What `restore_tokenizer` needs besides; its "library" is None if the tokenizer is of no kind that can be
        written.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from transformers import PreTrainedTokenizerBase

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return {"library": "transformers", "files": _write(tokenizer, folder)}
    if type(tokenizer) is HFTokenizer:
        return {
            "library": "open_clip",
            "context_length": tokenizer.context_length,
            "clean": _cleaning(tokenizer),
            "strip_sep_token": tokenizer.strip_sep_token,
            "tokenizer_mode": tokenizer.tokenizer_mode,
            "files": _write(tokenizer.tokenizer, folder),
        }
    if type(tokenizer) is SimpleTokenizer and _is_plain(tokenizer):
        length = tokenizer.context_length
        return {"library": "open_clip", "context_length": length, "clean": _cleaning(tokenizer), "simple": True}
    kind = tokenizer.kind if isinstance(tokenizer, MissingTokenizer) else type(tokenizer).__name__
    return {"library": None, "kind": kind}


def restore_tokenizer(description: Mapping[str, Any] | None, folder: Path) -> Tokenizer | None:
    """The tokenizer that `save_tokenizer` wrote.

    Raises:
        FileNotFoundError: If one of its files is missing.
        ValueError: If one is not as it was written.
    """
    if description is None:
        return None
    if description["library"] is None:
        return MissingTokenizer(description["kind"])
    for name, digest in description.get("files", {}).items():
        file = folder / FOLDER / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; save or fetch the folder again, or give tokenizer=...")
        if sha256(file) != digest:
            raise ValueError(
                f"{file} is damaged or of another save; save or fetch the folder again, or give tokenizer=..."
            )
    settings = {name: value for name, value in description.items() if name not in ("library", "simple", "files")}
    if description.get("simple"):
        from open_clip import SimpleTokenizer

        return SimpleTokenizer(**settings)
    if description["library"] == "open_clip":
        from open_clip.tokenizer import HFTokenizer

        return HFTokenizer(str(folder / FOLDER), **settings)
    return load_tokenizer(folder / FOLDER, hub=Hub(local_files_only=True))


def _write(tokenizer: Any, folder: Path) -> dict[str, str]:
    """Save a tokenizer of transformers; the SHA-256 of each of its files."""
    tokenizer.save_pretrained(folder / FOLDER)
    return {file.name: sha256(file) for file in sorted((folder / FOLDER).iterdir()) if file.is_file()}


def _is_plain(tokenizer: Any) -> bool:
    """Whether open_clip's own tokenizer has its own vocabulary and takes sentences whole."""
    from open_clip import SimpleTokenizer

    return tokenizer.reduction_fn is None and tokenizer.encoder == SimpleTokenizer().encoder


def _cleaning(tokenizer: Any) -> str:
    """open_clip's name of the function that a tokenizer cleans sentences with."""
    return str(tokenizer.clean_fn.__name__).removeprefix("_clean_")
