"""The families that tests run over, each as a small random CLIP, and how to talk to it.

A new family is one entry: how to make it, how deep its towers are, and what differs from the defaults. Sentences end in
padding, and no two sizes are alike, so that mixing any two of them up shows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import open_clip
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from tiny_models import (
    END,
    IMAGE_SIZE,
    IMAGE_WIDTH,
    JOINT_WIDTH,
    PAD,
    PATCH,
    START,
    TEXT_WIDTH,
    Make,
    hf_altclip,
    hf_clip_like,
    hf_dual,
    hf_siglip,
    hf_with_bert,
    open_clip_with,
    timm,
    transformer,
    vit,
)
from torch import Tensor, nn

import pvl_adapter as pvl

Text = Tensor | dict[str, Tensor]
BATCH = 3


@cache
def _built(host: Host, dropout: float, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = host.make(dropout).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms are not to stay at 0 and 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@dataclass(frozen=True)
class Host:
    """One family: how its model is built, the sizes in it, and what its methods take."""

    name: str
    make: Make
    depths: tuple[int, int]  # blocks of the image tower and of the text tower
    image_size: tuple[int, int] = IMAGE_SIZE
    patch: int = PATCH
    widths: tuple[int, int] = (IMAGE_WIDTH, TEXT_WIDTH)  # of both towers' tokens
    joint_width: int = JOINT_WIDTH
    prefix_tokens: int = 1  # class and register tokens before the patches
    positions: int = 12  # the most tokens its text tower takes
    text_length: int = 12  # of `text`, padding included; below `positions` where shorter texts are taken
    text_as_mapping: bool = False  # as transformers takes sentences, with an attention mask, or as plain ids
    image_key: str = "image"  # among the arguments of its forward
    ids_key: str = "text"
    pad_is_end: bool = False  # it pools its last token, so nothing tells padding but a run of one id at the end
    # Methods that run one tower, with the arguments they take.
    lone_calls: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("encode_image", ("image",)),
        ("encode_text", ("text",)),
        ("get_logits", ("image", "text")),
    )

    def __str__(self) -> str:
        return self.name

    def build(self, *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
        """A model in eval mode; the same weights for the same seed, whatever the dropout."""
        return copy.deepcopy(_built(self, dropout, seed))  # in half the time

    @property
    def image(self) -> Tensor:
        """[3, 3, H, W]."""
        return torch.randn(BATCH, 3, *self.image_size, generator=torch.Generator().manual_seed(1))

    @property
    def ids(self) -> Tensor:
        """[3, text_length], each sentence of another length and padded."""
        generator = torch.Generator().manual_seed(2)
        ids = torch.full((BATCH, self.text_length), PAD)
        for sentence, length in zip(ids, (self.text_length - 4, 4, self.text_length - 2), strict=True):
            sentence[:length] = torch.randint(3, START, (length,), generator=generator)
            sentence[0], sentence[length - 1] = START, END
        return ids

    @property
    def text(self) -> Text:
        return self.text_of(self.ids)

    @property
    def text_mask(self) -> Tensor:
        """[3, text_length], True where a token is real; the first of a run of paddings may be the end token."""
        lengths = (self.ids != PAD).sum(dim=1, keepdim=True) + self.pad_is_end
        return torch.arange(self.text_length) < lengths

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def image_tokens(self) -> int:
        """Patches and what the tower puts before them."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    def noise(self, config: pvl.PVLConfig, *, seed: int = 0) -> list[pvl.NoisePair]:
        """For each adapter of an explicit configuration."""
        generator = torch.Generator().manual_seed(seed)
        image, text = (BATCH, self.image_tokens, config.dim), (BATCH, self.text_length, config.dim)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator)

        return [pvl.NoisePair(image=draw(image), text=draw(text)) for _ in config.layers]

    def text_of(self, ids: Tensor) -> Text:
        """The form in which this family takes token ids."""
        if self.text_as_mapping:
            return {"input_ids": ids, "attention_mask": (ids != PAD).long()}
        return ids

    def arguments(self, image: Tensor, text: Text) -> dict[str, Any]:
        """Of the host's forward, by name."""
        return {self.image_key: image, **(text if isinstance(text, Mapping) else {self.ids_key: text})}

    def call(self, model: nn.Module, image: Tensor | None = None, text: Text | None = None, **more: Any) -> Any:
        """Call the host itself, by default on its own image and text."""
        return model(
            **self.arguments(self.image if image is None else image, self.text if text is None else text), **more
        )

    def features(self, output: Any) -> tuple[Tensor, Tensor]:
        """Normalised image and text embeddings in what the host returns."""
        if self.text_as_mapping:
            return output.image_embeds, output.text_embeds
        if isinstance(output, Mapping):
            return output["image_features"], output["text_features"]
        return output[0], output[1]

    def run(self, model: nn.Module, image: Tensor | None = None, text: Text | None = None) -> Tensor:
        """Both embeddings of a call, [B, 2 D]."""
        return torch.cat(self.features(self.call(model, image, text)), dim=-1)

    def call_alone(self, model: nn.Module, method: str, names: tuple[str, ...]) -> Any:
        """Call a method that runs one tower."""
        available = {"image": self.image, "text": self.ids, **self.arguments(self.image, self.text)}
        return getattr(model, method)(*(available[name] for name in names))


def _hf_host(name: str, make: Make, **more: Any) -> Host:
    """What transformers' models have in common."""
    defaults: dict[str, Any] = {
        "depths": (5, 3),
        "image_size": (2 * PATCH, 2 * PATCH),
        "positions": 18,
        "text_as_mapping": True,
        "image_key": "pixel_values",
        "ids_key": "input_ids",
        "lone_calls": (
            ("get_image_features", ("pixel_values",)),
            ("get_text_features", ("input_ids", "attention_mask")),
        ),
    }
    return Host(name=f"transformers-{name}", make=make, **{**defaults, **more})


def _open_clip_host(name: str, depths: tuple[int, int], *, make: Make | None = None, **more: Any) -> Host:
    """Those with a part of another library; `more` holds fields of Host and settings of `open_clip_with`."""
    fields = {key: more.pop(key) for key in tuple(more) if key in Host.__annotations__}
    return Host(name=f"open_clip-{name}", make=make or open_clip_with(depths, **more), depths=depths, **fields)


def _bidirectional(dropout: float) -> nn.Module:
    text = transformer(3, no_causal_mask=True, pool_type="last")
    return open_clip.CustomTextCLIP(JOINT_WIDTH, vit(4), text, init_logit_bias=-1.0, output_dict=True)


_SIGLIP_TEXT = {"no_causal_mask": True, "pool_type": "last", "pad_is_end": True}
_ROPE = {"use_rot_pos_emb": True, "qkv_fused": False}

CORE_HOSTS = (
    _open_clip_host("inlined_text", (5, 3), make=lambda dropout: open_clip.CLIP(JOINT_WIDTH, vit(5), transformer(3))),
    Host(
        name="open_clip-bert",
        make=open_clip_with((3, 4), text="bert", pooler="cls_last_hidden_state_pooler", positions=18),
        depths=(3, 4),
        positions=18,
    ),
    _open_clip_host(
        "timm-map_pool",  # SigLIP's shape
        (5, 3),
        image=timm(VisionTransformer, 5, class_token=False, global_pool="map"),
        prefix_tokens=0,
        **_SIGLIP_TEXT,
    ),
    _hf_host("clip", hf_clip_like("CLIP")),
    _hf_host("siglip", hf_siglip, joint_width=IMAGE_WIDTH, prefix_tokens=0, positions=12),
)
"""Those that stand for all where a promise is about the mechanism."""

FAMILIES = (
    _open_clip_host("text_transformer", (3, 5)),
    _open_clip_host("text_transformer-bidirectional", (4, 3), make=_bidirectional, pad_is_end=True),
    Host(
        name="open_clip-timm-bert",
        make=open_clip_with((5, 3), image=timm(VisionTransformer, 5), text="bert"),
        depths=(5, 3),
        positions=19,
    ),
    _open_clip_host("timm-relpos", (5, 3), image=timm(VisionTransformerRelPos, 5), prefix_tokens=0),
    _open_clip_host("eva-rope", (5, 3), image=timm(Eva, 5, **_ROPE)),
    _open_clip_host("eva-rope_mixed", (3, 5), image=timm(Eva, 3, rope_type="mixed", attn_type="rope", **_ROPE)),
    *(
        Host(name=f"open_clip-{kind}", make=open_clip_with((3, 5), text=kind), depths=(3, 5), positions=18)
        for kind in ("xlm-roberta", "m2m_100", "mt5")
    ),
    *(
        _hf_host(name.lower(), hf_clip_like(name), prefix_tokens=0 if name == "Aimv2" else 1)
        for name in ("MetaClip2", "CLIPSeg", "OwlViT", "Owlv2", "Aimv2")
    ),
    _hf_host("altclip", hf_altclip, depths=(3, 4)),
    *(_hf_host(name.lower(), hf_with_bert(name), positions=19) for name in ("ChineseCLIP", "Blip")),
    _hf_host("dual-registers-bert", hf_dual("registers", "bert"), prefix_tokens=5),
    *(
        _hf_host(f"dual-{image}-{text}", hf_dual(image, text), prefix_tokens=0 if image == "siglip" else 1)
        for image, text in (("clip", "bert"), ("vit", "roberta"), ("dinov2", "bert"), ("siglip", "roberta"))
    ),
)

HOSTS = (*CORE_HOSTS, *FAMILIES)
BY_NAME = {host.name: host for host in HOSTS}
