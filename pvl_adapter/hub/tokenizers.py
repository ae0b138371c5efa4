"""Tokenizers that belong to a model: loaded by name, and saved beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pvl_adapter.hub.download import Hub, find_local, sha256
from pvl_adapter.tokenization import Tokenizer

_FILES = ("tokenizer*", "vocab*", "special_tokens_map.json", "merges.txt", "config.json", "*.model")


class MissingTokenizer:
    """Stands for a tokenizer of class `kind` that could not be saved, so that no other one replaces it unnoticed."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, sentences: Any) -> Any:
        raise ValueError(
            f"the model was saved with a {self.kind}, which could not be saved with it; give it when loading, as in "
            "from_pretrained(..., tokenizer=...), or pass token ids"
        )


def load_tokenizer(tokenizer: Tokenizer | str | os.PathLike[str], *, hub: Hub) -> Tokenizer:
    """A Hugging Face tokenizer from a folder, the cache or the hub, else OSError; a tokenizer itself is passed on."""
    if callable(tokenizer):
        return tokenizer
    from transformers import AutoTokenizer

    elsewhere = replace(hub, revision=None)  # a revision is of the model's repository
    try:
        folder = find_local(tokenizer, hub=elsewhere, with_owner=False) or elsewhere.folder(str(tokenizer), _FILES)
        return AutoTokenizer.from_pretrained(folder)
    except OSError as error:
        raise type(error)(f"the tokenizer is missing ({error}); or give its folder as tokenizer=...") from error
    except (ValueError, KeyError) as error:
        raise OSError(f"{tokenizer} holds no tokenizer ({error}); give another folder as tokenizer=...") from error


def save_tokenizer(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write a tokenizer into a subfolder that is named by its content; what `restore_tokenizer` needs besides.

    Of a tokenizer of no kind that can be written, "library" is None.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from transformers import PreTrainedTokenizerBase

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return {"library": "transformers", **_write(tokenizer, folder)}
    plain = type(tokenizer) is SimpleTokenizer and tokenizer.reduction_fn is None
    plain = plain and tokenizer.encoder == SimpleTokenizer().encoder  # no words of its own
    if plain or type(tokenizer) is HFTokenizer:
        clean = str(tokenizer.clean_fn.__name__).removeprefix("_clean_")
        settings = {"library": "open_clip", "context_length": tokenizer.context_length, "clean": clean}
        if plain:
            return {**settings, "simple": True}
        more = {name: getattr(tokenizer, name) for name in ("strip_sep_token", "tokenizer_mode")}
        return {**settings, **more, **_write(tokenizer.tokenizer, folder)}
    return {"library": None, "kind": getattr(tokenizer, "kind", type(tokenizer).__name__)}


def restore_tokenizer(description: Mapping[str, Any] | None, folder: Path) -> Tokenizer | None:
    """The tokenizer that `save_tokenizer` wrote; FileNotFoundError or ValueError if a file is missing or changed."""
    if description is None:
        return None
    settings = dict(description)
    if settings.pop("library") is None:
        return MissingTokenizer(settings["kind"])
    if settings.pop("simple", False):
        from open_clip import SimpleTokenizer

        return SimpleTokenizer(**settings)
    own = folder / Path(settings.pop("folder")).name
    for name, digest in settings.pop("files").items():
        fix = "save or fetch the folder again, or give tokenizer=..."
        if not (own / name).is_file():
            raise FileNotFoundError(f"{own / name} is missing; {fix}")
        if sha256(own / name) != digest:
            raise ValueError(f"{own / name} is damaged; {fix}")
    if description["library"] == "open_clip":
        from open_clip.tokenizer import HFTokenizer

        return HFTokenizer(str(own), **settings)
    return load_tokenizer(own, hub=Hub(local_files_only=True))


def _write(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Save a tokenizer of transformers; its folder's name, and the SHA-256 of each of its files."""
    try:
        tokenizer.save_pretrained(folder / "tokenizer")
    except Exception as error:  # a full disk is a bare Exception of the library beneath transformers
        raise OSError(f"the tokenizer cannot be written to {folder} ({error}); free some space") from error
    files = {file.name: sha256(file) for file in sorted((folder / "tokenizer").iterdir()) if file.is_file()}
    name = f"tokenizer-{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]}"
    (folder / "tokenizer").rename(folder / name)
    return {"folder": name, "files": files}
