"""The towers of open_clip: native and timm image transformers; inlined, own and Hugging Face text transformers.

Read off open_clip 3.3, timm 1.0.31 and transformers 5.23.

Shape alphabet: B batch, V image tokens, L text tokens, W tower width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pvl_adapter.towers.base import (
    RGB,
    Arguments,
    ImageTower,
    Inputs,
    TextTower,
    before_trailing_run,
    mask_through,
    pair,
)


@dataclass(frozen=True)
class OpenClipImage(ImageTower):
    """What open_clip's image towers have in common."""

    key: str = "image"

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return host.encode_image(inputs["image"], normalize=False)

    def image_size(self, host: Any) -> tuple[int, int]:
        return pair(host.visual.image_size)

    def normalization(self, host: Any) -> tuple[RGB, RGB]:
        mean, std = super().normalization(host)
        # Set by open_clip's factory.
        return tuple(getattr(host.visual, "image_mean", mean)), tuple(getattr(host.visual, "image_std", std))

    @property
    def other_sizes(self) -> str:
        return " or build the model for another size with force_image_size"


@dataclass(frozen=True)
class NativeViT(OpenClipImage):
    """open_clip's own VisionTransformer; the class token comes first."""

    path: str = "visual.transformer.resblocks"
    projection: tuple[str, ...] | None = ("visual.ln_post", "visual.proj")

    def width(self, host: Any) -> int:
        return int(host.visual.transformer.width)

    def patch_size(self, host: Any) -> tuple[int, int]:
        return pair(host.visual.patch_size)

    def drops_patches(self, host: Any) -> bool:
        return getattr(host.visual.patch_dropout, "prob", 0.0) > 0

    def unsupported_reason(self, host: Any) -> str | None:
        if not host.visual.transformer.batch_first:
            return "its blocks take tokens before batch (batch_first=False)"
        return None


@dataclass(frozen=True)
class TimmViT(OpenClipImage):
    """A timm transformer (ViT, SigLIP, ViTamin, MobileCLIP-B, relative positions); prefix tokens come first."""

    path: str = "visual.trunk.blocks"
    projection: tuple[str, ...] | None = (
        "visual.trunk.norm",
        "visual.trunk.fc_norm",
        "visual.trunk.head",
        "visual.head",
    )

    def width(self, host: Any) -> int:
        return int(host.visual.trunk.embed_dim)

    def image_size(self, host: Any) -> tuple[int, int]:
        return pair(host.visual.trunk.patch_embed.img_size or host.visual.image_size)

    def patch_size(self, host: Any) -> tuple[int, int]:
        return pair(host.visual.trunk.patch_embed.patch_size)

    def grid(self, host: Any, inputs: Inputs) -> tuple[int, int]:
        embed = host.visual.trunk.patch_embed
        size = tuple(inputs[self.key].shape[-2:])
        # A hybrid stem (ViTamin, MobileCLIP) has a grid of its own; it is what the stem was built with.
        return pair(embed.grid_size) if size == self.image_size(host) else pair(embed.dynamic_feat_size(size))

    def drops_patches(self, host: Any) -> bool:
        return getattr(getattr(host.visual.trunk, "patch_drop", None), "prob", 0.0) > 0

    def takes_any_size(self, host: Any, inputs: Inputs) -> bool:
        trunk = host.visual.trunk
        if not getattr(trunk, "dynamic_img_size", False):
            return False
        rows, columns = self.patch_size(host)
        height, width = inputs[self.key].shape[-2:]
        return height % rows == 0 and width % columns == 0


@dataclass(frozen=True)
class TimmEva(TimmViT):
    """timm's Eva: EVA-02, Perception Encoder, with rotary positions."""

    def block_arguments(self, host: Any, inputs: Inputs, index: int, given: Arguments, previous: Any) -> Arguments:
        args, kwargs = given
        trunk = host.visual.trunk
        if index and getattr(trunk, "rope_mixed", False):  # a rotation of its own for every depth
            kwargs = {**kwargs, "rope": trunk.rope.get_embed(shape=list(self.grid(host, inputs)))[index]}
        return args, kwargs


@dataclass(frozen=True)
class CoCaViT(NativeViT):
    """CoCa's image tower pools by attention: it has no way to bring a single patch into the joint space."""

    projection: tuple[str, ...] | None = None


@dataclass(frozen=True)
class OpenClipText(TextTower):
    """open_clip's TextTransformer as a module of its own."""

    path: str = "text.transformer.resblocks"
    projection: tuple[str, ...] | None = ("text.ln_final", "text.text_projection")
    key: str = "text"

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return host.encode_text(inputs["text"], normalize=False)

    def width(self, host: Any) -> int:
        return int(host.text.transformer.width)

    def context_length(self, host: Any) -> int | None:
        return int(host.text.context_length)

    def variable_length(self, host: Any) -> bool:
        return host.text.attn_mask is None or bool(host.text.use_pad_mask)  # else the causal mask is never cut

    def vocab_size(self, host: Any) -> int:
        return int(host.text.token_embedding.num_embeddings)

    def token_mask(self, host: Any, inputs: Inputs) -> Tensor:
        return _before_padding(inputs["text"], host.text.pool_type, host.text.eos_id, host.text.pad_id)


@dataclass(frozen=True)
class InlinedText(OpenClipText):
    """open_clip's CLIP class, whose text transformer is spread over the host itself."""

    path: str = "transformer.resblocks"
    projection: tuple[str, ...] | None = ("ln_final", "text_projection")

    def width(self, host: Any) -> int:
        return int(host.transformer.width)

    def context_length(self, host: Any) -> int | None:
        return int(host.context_length)

    def variable_length(self, host: Any) -> bool:
        return False  # all positions and the whole mask are always used

    def vocab_size(self, host: Any) -> int:
        return int(host.token_embedding.num_embeddings)

    def token_mask(self, host: Any, inputs: Inputs) -> Tensor:
        return _before_padding(inputs["text"], host.text_pool_type, host.text_eos_id, 0)


@dataclass(frozen=True)
class CoCaText(OpenClipText):
    """CoCa's text tower, which appends a class token."""

    def variable_length(self, host: Any) -> bool:
        return True

    def tokens(self, host: Any, hidden: Tensor) -> Tensor | None:
        return super().tokens(host, hidden[:, :-1])

    def token_mask(self, host: Any, inputs: Inputs) -> Tensor:
        real = inputs["text"] != host.text.pad_id  # [B, L]
        return torch.cat([real, torch.ones_like(real[:, :1])], dim=1)  # [B, L + 1]


@dataclass(frozen=True)
class HFText(TextTower):
    """open_clip's HFTextEncoder around a BERT-like encoder."""

    path: str = "text.transformer.encoder.layer"
    projection: tuple[str, ...] | None = ("text.proj",)
    key: str = "text"

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return host.encode_text(inputs["text"], normalize=False)

    def width(self, host: Any) -> int:
        return int(host.text.config.hidden_size)

    def context_length(self, host: Any) -> int | None:
        limit = getattr(host.text.config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def vocab_size(self, host: Any) -> int:
        return int(host.text.config.vocab_size)

    def ignores_padding(self, host: Any) -> bool:
        return True  # the encoder masks it, and so do those poolers that look at more than the first token

    def tokenizer_name(self, host: Any) -> str | None:
        return host.text.config._name_or_path or None

    def token_mask(self, host: Any, inputs: Inputs) -> Tensor:
        return inputs["text"] != host.text.config.pad_token_id


@dataclass(frozen=True)
class HFBertText(HFText):
    """BERT, whose last block need only serve the first token where the host pools that one."""

    def last_block_for_pooling(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from open_clip.hf_model import ClsLastHiddenStatePooler
        from transformers.models.bert.modeling_bert import BertLayer

        block: Any = self.blocks(host)[-1]
        if type(block) is not BertLayer or not isinstance(host.text.pooler, ClsLastHiddenStatePooler) or host.training:
            return None
        hidden, mask = args[0], args[1]  # [B, L, W], and [B, 1, L, L] or None
        attention = block.attention.self

        def heads(tokens: Tensor) -> Tensor:
            return rearrange(tokens, "b l (h d) -> b h l d", h=attention.num_attention_heads)

        attended = F.scaled_dot_product_attention(
            heads(attention.query(hidden[:, :1])),
            heads(attention.key(hidden)),
            heads(attention.value(hidden)),
            attn_mask=None if mask is None else mask[:, :, :1],
            scale=attention.scaling,
        )
        first = block.attention.output(rearrange(attended, "b h l d -> b l (h d)"), hidden[:, :1])  # [B, 1, W]
        return torch.cat([block.feed_forward_chunk(first), hidden[:, 1:]], dim=1)


@dataclass(frozen=True)
class HFRobertaText(HFText):
    """RoBERTa and XLM-R, whose positions start behind the padding id."""

    def context_length(self, host: Any) -> int | None:
        return int(host.text.config.max_position_embeddings) - int(host.text.config.pad_token_id) - 1


@dataclass(frozen=True)
class HFM2M100Text(HFText):
    """M2M100 and NLLB."""

    path: str = "text.transformer.layers"
    projection: tuple[str, ...] | None = ("text.transformer.layer_norm", "text.proj")

    def width(self, host: Any) -> int:
        return int(host.text.config.d_model)

    def joint_overrides(self, host: Any) -> dict[str, Any]:
        return {"layerdrop": 0.0}  # in training it would skip blocks at random


@dataclass(frozen=True)
class HFMT5Text(HFText):
    """mT5, whose blocks hand the position bias from one to the next."""

    path: str = "text.transformer.block"
    projection: tuple[str, ...] | None = ("text.transformer.final_layer_norm", "text.proj")

    def width(self, host: Any) -> int:
        return int(host.text.config.d_model)

    def block_arguments(self, host: Any, inputs: Inputs, index: int, given: Arguments, previous: Any) -> Arguments:
        args, kwargs = given
        if index:
            args = (*args[:2], previous[1], *args[3:])  # hidden, mask, position bias, ...
        return args, kwargs


HF_TEXT: dict[str, HFText] = {
    "bert": HFBertText(),
    "roberta": HFRobertaText(),
    "xlm-roberta": HFRobertaText(),
    "m2m_100": HFM2M100Text(),
    "mt5": HFMT5Text(),
}
"""Text towers within HFTextEncoder, by the model type of their configuration."""


def image_tower(model: Any) -> ImageTower | str:
    """The image tower of an open_clip model, or why there is none."""
    from open_clip.transformer import VisionTransformer
    from timm.models.eva import Eva

    visual = model.visual
    if isinstance(visual, VisionTransformer):
        return NativeViT() if visual.attn_pool is None else CoCaViT()
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return f"its image tower is a {type(visual).__name__} without a stack of token blocks"
    if not (hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed")):
        return f"its image tower is a timm {type(trunk).__name__} without a stack of token blocks"
    return TimmEva() if isinstance(trunk, Eva) else TimmViT()


def text_tower(model: Any) -> TextTower | str:
    """The text tower of an open_clip model, or why there is none."""
    import open_clip
    from open_clip.hf_model import HFTextEncoder
    from open_clip.transformer import TextTransformer

    if isinstance(model, open_clip.CLIP):
        return InlinedText()
    text = getattr(model, "text", None)
    if isinstance(text, TextTransformer):
        return OpenClipText() if text.cls_emb is None else CoCaText()
    if isinstance(text, HFTextEncoder):
        return HF_TEXT.get(text.config.model_type) or f"its text tower is a Hugging Face {text.config.model_type}"
    return f"its text tower is a {type(text).__name__}"


def _before_padding(text: Tensor, pool_type: str, eos_id: Any, pad_id: int) -> Tensor:
    """[B, L] bool: through the end token if the host pools there, else all that is no padding."""
    if pool_type == "argmax":  # the end token has the highest id of the vocabulary
        return mask_through(text.argmax(dim=-1), length=text.shape[1])
    if pool_type == "eos":
        return mask_through(text.eq(eos_id).int().argmax(dim=-1), length=text.shape[1])
    if pool_type == "last":  # SigLIP, CLIPA: trained on padded sentences, by tokenizers with other padding ids
        return before_trailing_run(text)
    return text.ne(pad_id)
