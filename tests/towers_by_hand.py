"""The towers of four families written out by hand, and a lockstep of them: what the library is compared with.

Each tower is three functions of a plain, never injected model: embed (up to the first block), one block, and project
(pooled embedding and tokens). Masks are built here, not taken from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hosts import END, PAD, Text
from torch import Tensor

NoisePair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Tower:
    """`embed(model, input)`, `blocks(model)`, `block(block, hidden, input)` and `project(model, hidden, input)`."""

    embed: Callable[[Any, Any], Tensor]
    blocks: Callable[[Any], Sequence[Any]]
    block: Callable[[Any, Tensor, Any], Tensor]
    project: Callable[[Any, Tensor, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Features:
    """Pooled embeddings [B, D] and tokens [B, tokens, D] of both towers."""

    image_embeds: Tensor
    patch_tokens: Tensor
    text_embeds: Tensor
    text_tokens: Tensor


def run_in_lockstep(
    name: str,
    model: Any,
    adapters: Sequence[Any],
    points: Sequence[tuple[int, int]],
    image: Tensor,
    text: Text,
    *,
    noise: Sequence[NoisePair] | None = None,
) -> Features:
    """Run the plain `model`, with adapter k before blocks `points[k]` (image, text) of the towers."""
    image_tower, text_tower, token_mask = BY_HAND[name]
    vision, words = image_tower.embed(model, image), text_tower.embed(model, text)
    image_blocks, text_blocks = list(image_tower.blocks(model)), list(text_tower.blocks(model))
    done_image = done_text = 0
    for k, (image_point, text_point) in enumerate(points):
        for block in image_blocks[done_image:image_point]:
            vision = image_tower.block(block, vision, image)
        for block in text_blocks[done_text:text_point]:
            words = text_tower.block(block, words, text)
        done_image, done_text = image_point, text_point
        vision_update, text_update = adapters[k](
            vision,
            words,
            text_mask=token_mask(text),
            sample=noise is not None,
            noise=None if noise is None else noise[k],
        )
        vision, words = vision + vision_update, words + text_update
    for block in image_blocks[done_image:]:
        vision = image_tower.block(block, vision, image)
    for block in text_blocks[done_text:]:
        words = text_tower.block(block, words, text)
    return Features(*image_tower.project(model, vision, image), *text_tower.project(model, words, text))


def end_positions(ids: Tensor) -> Tensor:
    return torch.tensor([row.tolist().index(END) for row in ids])


def real_by_end(ids: Tensor) -> Tensor:
    """True up to and including the end token."""
    return torch.stack([torch.arange(ids.shape[1]) <= end for end in end_positions(ids)])


def real_by_padding(ids: Tensor) -> Tensor:
    return ids != PAD


def causal(length: int) -> Tensor:
    """[length, length], minus infinity where a token would see a later one."""
    later = torch.arange(length)[None, :] > torch.arange(length)[:, None]
    return torch.zeros(length, length).masked_fill(later, float("-inf"))


# --- image towers ----------------------------------------------------------------------------------------------------


def vit_embed(model: Any, image: Tensor) -> Tensor:
    visual = model.visual
    patches = visual.conv1(image).flatten(2).transpose(1, 2)
    start = visual.class_embedding.expand(len(image), 1, -1)
    return visual.ln_pre(torch.cat([start, patches], dim=1) + visual.positional_embedding)


def vit_project(model: Any, hidden: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model.visual.ln_post(hidden) @ model.visual.proj
    return tokens[:, 0], tokens[:, 1:]


def hf_clip_image_embed(model: Any, image: Tensor) -> Tensor:
    embeddings = model.vision_model.embeddings
    patches = embeddings.patch_embedding(image).flatten(2).transpose(1, 2)
    start = embeddings.class_embedding.expand(len(image), 1, -1)
    hidden = torch.cat([start, patches], dim=1) + embeddings.position_embedding.weight
    return model.vision_model.pre_layrnorm(hidden)


def hf_clip_image_project(model: Any, hidden: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model.visual_projection(model.vision_model.post_layernorm(hidden))
    return tokens[:, 0], tokens[:, 1:]


VIT = Tower(
    embed=vit_embed,
    blocks=lambda model: model.visual.transformer.resblocks,
    block=lambda block, hidden, image: block(hidden),
    project=vit_project,
)
HF_CLIP_IMAGE = Tower(
    embed=hf_clip_image_embed,
    blocks=lambda model: model.vision_model.encoder.layers,
    block=lambda block, hidden, image: hidden_of(block(hidden, attention_mask=None)),
    project=hf_clip_image_project,
)


# --- text towers -----------------------------------------------------------------------------------------------------


def open_clip_text(module: Callable[[Any], Any]) -> Tower:
    """The text transformer of open_clip, wherever `module(model)` says its parts are."""

    def project(model: Any, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens = module(model).ln_final(hidden) @ module(model).text_projection
        return tokens[torch.arange(len(ids)), end_positions(ids)], tokens

    return Tower(
        embed=lambda model, ids: module(model).token_embedding(ids) + module(model).positional_embedding,
        blocks=lambda model: module(model).transformer.resblocks,
        block=lambda block, hidden, ids: block(hidden, attn_mask=causal(ids.shape[1])),
        project=project,
    )


def bert_embed(model: Any, ids: Tensor) -> Tensor:
    embeddings = model.text.transformer.embeddings
    positions = embeddings.position_embeddings.weight[: ids.shape[1]]
    return embeddings.LayerNorm(
        embeddings.word_embeddings(ids) + positions + embeddings.token_type_embeddings.weight[0]
    )


def bert_block(block: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    mask = torch.zeros(len(ids), 1, 1, ids.shape[1]).masked_fill(~real_by_padding(ids)[:, None, None], -1e30)
    return hidden_of(block(hidden, mask))


def bert_project(model: Any, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model.text.proj(hidden)
    return tokens[:, 0], tokens


def hf_clip_text_embed(model: Any, text: dict[str, Tensor]) -> Tensor:
    embeddings, ids = model.text_model.embeddings, text["input_ids"]
    return embeddings.token_embedding(ids) + embeddings.position_embedding.weight[: ids.shape[1]]


def hf_clip_text_block(block: Any, hidden: Tensor, text: dict[str, Tensor]) -> Tensor:
    padding = text["attention_mask"][:, None, None] == 0
    mask = causal(hidden.shape[1]).clamp_min(-1e30).masked_fill(padding, -1e30)
    return hidden_of(block(hidden, attention_mask=mask))


def hf_clip_text_project(model: Any, hidden: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    tokens = model.text_projection(model.text_model.final_layer_norm(hidden))
    return tokens[torch.arange(len(tokens)), end_positions(text["input_ids"])], tokens


BERT = Tower(
    embed=bert_embed,
    blocks=lambda model: model.text.transformer.encoder.layer,
    block=bert_block,
    project=bert_project,
)
HF_CLIP_TEXT = Tower(
    embed=hf_clip_text_embed,
    blocks=lambda model: model.text_model.encoder.layers,
    block=hf_clip_text_block,
    project=hf_clip_text_project,
)


def hidden_of(output: Any) -> Tensor:
    """transformers 4 returns a tuple, 5 a tensor."""
    return output[0] if isinstance(output, tuple) else output


BY_HAND: dict[str, tuple[Tower, Tower, Callable[[Any], Tensor]]] = {
    "open_clip-inlined_text": (VIT, open_clip_text(lambda model: model), real_by_end),
    "open_clip-text_transformer": (VIT, open_clip_text(lambda model: model.text), real_by_end),
    "open_clip-bert": (VIT, BERT, real_by_padding),
    "transformers-clip": (HF_CLIP_IMAGE, HF_CLIP_TEXT, lambda text: text["attention_mask"].bool()),
}
"""Image tower, text tower, and which text positions are real."""
