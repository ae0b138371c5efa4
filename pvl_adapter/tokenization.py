"""Sentences in: the host's own tokenizer, found or given."""

from __future__ import annotations

import html
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pvl_adapter.lockstep import lockstep_of

Tokenizer = Callable[..., Any]
"""open_clip's tokenizers (sentences to ids [B, L]) or a Hugging Face one (sentences to a mapping)."""

_ONE_THREAD = threading.Lock()  # transformers' tokenizers hold padding and truncation, which each call sets
_CLIP_VOCABULARY = 49408  # of the byte-pair vocabulary that OpenAI's CLIP and most of its descendants share


def find_tokenizer(clip: nn.Module) -> Tokenizer:
    """The tokenizer an injected model was trained with.

    Raises:
        ValueError: If the model does not tell which that is.
        OSError: If it names one that cannot be loaded.
    """
    text = lockstep_of(clip).towers.text
    if name := text.tokenizer_name(clip):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    if text.vocab_size(clip) == _CLIP_VOCABULARY:
        from open_clip import SimpleTokenizer

        return SimpleTokenizer(context_length=text.context_length(clip))
    raise ValueError(
        f"this model's vocabulary has {text.vocab_size(clip)} entries and it does not tell its tokenizer; give one, as "
        "in MedCLIPSeg(clip, tokenizer=...), or pass token ids"
    )


def tokenize(
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    *,
    context_length: int | None,
    pad_to_context: bool = False,
    clean: bool = False,
) -> Tensor | Mapping[str, Tensor]:
    """Token ids of sentences, padded; what exceeds the context is cut off with a warning.

    Args:
        tokenizer: Of open_clip, whose own context length applies, or of transformers.
        sentences: At least one.
        context_length: Tokens at most; None means no limit.
        pad_to_context: Pad to `context_length` rather than to the longest sentence.
        clean: Clean the sentences first, see `clean_prompt`.

    Raises:
        ValueError: If there is no sentence, or one is not a string or empty.
    """
    listed = isinstance(sentences, Sequence) and len(sentences) > 0
    if not listed or not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
        raise ValueError(f"text is {sentences!r}, expected one sentence (a string with words) for each image")
    if clean:
        sentences = [clean_prompt(sentence) for sentence in sentences]
    from transformers import PreTrainedTokenizerBase

    with _ONE_THREAD:
        _warn_of_long(tokenizer, sentences, context_length)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            encoded = tokenizer(
                list(sentences),
                padding="max_length" if pad_to_context else "longest",
                truncation=context_length is not None,
                max_length=context_length,
                return_tensors="pt",
            )
            return dict(encoded)
        return tokenizer(list(sentences))


def clean_prompt(sentence: str) -> str:
    """A sentence as the authors' code gives it to BERT: encoding errors and HTML entities resolved, one space each.

    Source: github HealthX-Lab/MedCLIPSeg, commit 8d7ef36.
    """
    import ftfy

    unescaped = html.unescape(html.unescape(ftfy.fix_text(sentence)))
    return " ".join(unescaped.split())


def _warn_of_long(tokenizer: Tokenizer, sentences: Sequence[str], context_length: int | None) -> None:
    """Warn of sentences that have more tokens than the tower has positions."""
    from transformers import PreTrainedTokenizerBase

    limit = context_length or getattr(tokenizer, "context_length", None)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokens = max(map(len, tokenizer(list(sentences), verbose=False)["input_ids"]))
    elif hasattr(tokenizer, "encode"):  # open_clip's, without start and end
        tokens = max(len(tokenizer.encode(sentence)) + 2 for sentence in sentences)
    else:
        tokens = max(len(sentence.split()) for sentence in sentences)
    if limit is not None and tokens > limit:
        warnings.warn(
            f"a sentence has {tokens} tokens, this model reads {limit}; the rest is cut off, so shorten it",
            stacklevel=2,
        )
