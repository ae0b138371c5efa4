"""The towers of open_clip: native and timm image transformers; inlined, own and Hugging Face text transformers.

Read off open_clip 3.3, timm 1.0.31 and transformers 5.23.

Shape alphabet: B batch, V image tokens, L text tokens, W tower width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvl_adapter.towers.base import Arguments, ImageTower, Inputs, TextTower, pair
from pvl_adapter.towers.normalization import OPENAI, Normalization
from pvl_adapter.towers.token_masks import mask_by_pooling


@dataclass(frozen=True, kw_only=True)
class NativeViT(ImageTower):
    """open_clip's own VisionTransformer; the class token comes first."""

    path: str = "visual.transformer.resblocks"
    projection: tuple[str, ...] | None = ("visual.ln_post", "visual.proj")
    key: str = "image"
    config: str = "visual"
    width_name: str = "transformer.width"
    other_sizes: str = " or build the model for another size with force_image_size"

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return host.encode_image(inputs["image"], normalize=False)

    def normalization(self, host: Any) -> Normalization | None:
        """As open_clip's factory sets it; a model built by hand has open_clip's default, OpenAI's."""
        mean, std = getattr(host.visual, "image_mean", None), getattr(host.visual, "image_std", None)
        return (tuple(mean), tuple(std)) if mean and std else OPENAI

    def drops_patches(self, host: Any) -> bool:
        names = ("patch_dropout", "patch_drop")  # open_clip's and timm's
        return any(getattr(getattr(self.settings(host), name, None), "prob", 0.0) > 0 for name in names)

    def unsupported_reason(self, host: Any) -> str | None:
        batch_first = getattr(getattr(host.visual, "transformer", None), "batch_first", True)
        return None if batch_first else "its blocks take tokens before batch (batch_first=False)"


@dataclass(frozen=True, kw_only=True)
class TimmViT(NativeViT):
    """A timm transformer (ViT, SigLIP, ViTamin, MobileCLIP-B, relative positions); prefix tokens come first."""

    path: str = "visual.trunk.blocks"
    projection: tuple[str, ...] | None = (
        "visual.trunk.norm",
        "visual.trunk.fc_norm",
        "visual.trunk.head",
        "visual.head",
    )
    config: str = "visual.trunk"
    width_name: str = "embed_dim"
    patch_name: str = "patch_embed.patch_size"

    def image_size(self, host: Any) -> tuple[int, int]:
        return pair(host.visual.trunk.patch_embed.img_size or host.visual.image_size)

    def grid(self, host: Any, inputs: Inputs) -> tuple[int, int]:
        embed = host.visual.trunk.patch_embed
        size = tuple(inputs[self.key].shape[-2:])
        # A hybrid stem (ViTamin, MobileCLIP) has a grid of its own: the one it was built with.
        return pair(embed.grid_size) if size == self.image_size(host) else pair(embed.dynamic_feat_size(size))

    def takes_any_size(self, host: Any, inputs: Inputs) -> bool:
        if not getattr(host.visual.trunk, "dynamic_img_size", False):
            return False
        rows, columns = self.patch_size(host)
        height, width = inputs[self.key].shape[-2:]
        return height % rows == 0 and width % columns == 0


@dataclass(frozen=True, kw_only=True)
class TimmEva(TimmViT):
    """timm's Eva: EVA-02, Perception Encoder, with rotary positions."""

    def block_arguments(self, host: Any, inputs: Inputs, index: int, given: Arguments, previous: Any) -> Arguments:
        args, kwargs = given
        trunk = host.visual.trunk
        if index and getattr(trunk, "rope_mixed", False):  # every depth has a rotation of its own
            kwargs = {**kwargs, "rope": trunk.rope.get_embed(shape=list(self.grid(host, inputs)))[index]}
        return args, kwargs


@dataclass(frozen=True, kw_only=True)
class OpenClipText(TextTower):
    """open_clip's TextTransformer, as a module of its own or, without `config`, spread over the host itself."""

    path: str = "text.transformer.resblocks"
    projection: tuple[str, ...] | None = ("text.ln_final", "text.text_projection")
    key: str = "text"
    config: str = "text"
    width_name: str = "transformer.width"
    length_name: str = "context_length"
    vocab_name: str = "token_embedding.num_embeddings"

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return host.encode_text(inputs["text"], normalize=False)

    def variable_length(self, host: Any) -> bool:
        if not self.config:
            return False  # all positions and the whole mask are always used
        return host.text.attn_mask is None or bool(host.text.use_pad_mask)  # else the causal mask is never cut

    def ignores_padding(self, host: Any, inputs: Inputs) -> bool:
        """Behind the pooled end token, where tokens look back only."""
        settings, prefix = self.settings(host), "" if self.config else "text_"
        return settings.attn_mask is not None and getattr(settings, f"{prefix}pool_type") in ("argmax", "eos")

    def token_mask(self, host: Any, inputs: Inputs) -> Tensor:
        settings, prefix = self.settings(host), "" if self.config else "text_"
        pooling, end = getattr(settings, f"{prefix}pool_type"), getattr(settings, f"{prefix}eos_id")
        return mask_by_pooling(inputs["text"], pooling=pooling, end=end, padding=getattr(settings, "pad_id", 0))


@dataclass(frozen=True, kw_only=True)
class CoCaText(OpenClipText):
    """CoCa's text tower, which appends a class token."""

    def ignores_padding(self, host: Any, inputs: Inputs) -> bool:
        return False

    def variable_length(self, host: Any) -> bool:
        return True

    def tokens(self, host: Any, hidden: Tensor) -> Tensor | None:
        return super().tokens(host, hidden[:, :-1])

    def token_mask(self, host: Any, inputs: Inputs) -> Tensor:
        real = inputs["text"] != host.text.pad_id  # [B, L]
        return torch.cat([real, torch.ones_like(real[:, :1])], dim=1)  # [B, L + 1]


@dataclass(frozen=True, kw_only=True)
class HFText(OpenClipText):
    """open_clip's HFTextEncoder around a BERT-like encoder."""

    path: str = "text.transformer.encoder.layer"
    projection: tuple[str, ...] | None = ("text.proj",)
    config: str = "text.config"
    width_name: str = "hidden_size"
    length_name: str = "max_position_embeddings"
    vocab_name: str = "vocab_size"
    key_value: tuple[str, ...] = ("attention.self.key", "attention.self.value")

    def variable_length(self, host: Any) -> bool:
        return True

    def ignores_padding(self, host: Any, inputs: Inputs) -> bool:
        return True  # the encoder masks it, and so do those poolers that look at more than the first token

    def tokenizer_name(self, host: Any) -> str | None:
        return host.text.config._name_or_path or None

    def token_mask(self, host: Any, inputs: Inputs) -> Tensor:
        return inputs["text"] != host.text.config.pad_token_id


@dataclass(frozen=True, kw_only=True)
class HFMT5Text(HFText):
    """mT5, whose blocks hand the position bias from one to the next."""

    path: str = "text.transformer.block"
    projection: tuple[str, ...] | None = ("text.transformer.final_layer_norm", "text.proj")
    width_name: str = "d_model"
    key_value: tuple[str, ...] = ("layer.0.SelfAttention.k", "layer.0.SelfAttention.v")

    def block_arguments(self, host: Any, inputs: Inputs, index: int, given: Arguments, previous: Any) -> Arguments:
        args, kwargs = given
        if index:
            args = (*args[:2], previous[1], *args[3:])  # hidden, mask, position bias, ...
        return args, kwargs


HF_TEXT: dict[str, HFText] = {
    "bert": HFText(),
    "roberta": HFText(positions_after_padding=True),
    "xlm-roberta": HFText(positions_after_padding=True),
    "m2m_100": HFText(
        path="text.transformer.layers",
        projection=("text.transformer.layer_norm", "text.proj"),
        width_name="d_model",
        key_value=("self_attn.k_proj", "self_attn.v_proj"),
        joint_attributes=(("layerdrop", 0.0),),  # in training it would skip blocks at random
    ),
    "mt5": HFMT5Text(),
}
"""Text towers within HFTextEncoder, by the model type of their configuration."""


def image_tower(model: Any) -> ImageTower | str:
    """The image tower of an open_clip model, or why there is none."""
    from open_clip.transformer import VisionTransformer
    from timm.models.eva import Eva

    visual = model.visual
    if isinstance(visual, VisionTransformer):
        # CoCa pools by attention: a single patch cannot be brought into the joint space.
        return NativeViT() if visual.attn_pool is None else NativeViT(projection=None)
    trunk = getattr(visual, "trunk", None)
    if not (hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed")):
        kind = type(visual).__name__ if trunk is None else f"timm {type(trunk).__name__}"
        return f"its image tower is a {kind} without a stack of token blocks"
    return TimmEva() if isinstance(trunk, Eva) else TimmViT()


def text_tower(model: Any) -> TextTower | str:
    """The text tower of an open_clip model, or why there is none."""
    import open_clip
    from open_clip.hf_model import HFTextEncoder
    from open_clip.transformer import TextTransformer

    if isinstance(model, open_clip.CLIP):
        return OpenClipText(path="transformer.resblocks", projection=("ln_final", "text_projection"), config="")
    text = getattr(model, "text", None)
    if isinstance(text, TextTransformer):
        return OpenClipText() if text.cls_emb is None else CoCaText()
    if isinstance(text, HFTextEncoder):
        return HF_TEXT.get(text.config.model_type) or f"its text tower is a Hugging Face {text.config.model_type}"
    return f"its text tower is a {type(text).__name__}"
