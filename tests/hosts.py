"""Small random CLIPs of every supported family, and how to talk to each.

A new family is one entry in `HOSTS`: how to make it, how deep its towers are, and what differs from the defaults. The
towers are of unequal depth and width, images are not square where the family allows it, and sentences end in padding,
so that mixing any two of these up shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import transformers
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

import pvl_adapter as pvl

Text = Tensor | dict[str, Tensor]

VOCABULARY = 100
START, END, PAD = 97, 99, 0  # the end token has the highest id, as pooling by argmax needs
JOINT_WIDTH = 16
IMAGE_WIDTH, TEXT_WIDTH = 32, 24
PATCH = 16
BATCH = 3


@dataclass(frozen=True)
class Host:
    """One family.

    Attributes:
        name: Used as test id.
        make: Builds the model, given the dropout of its towers (ignored by families without).
        depths: Blocks of the image tower and of the text tower.
        image_size: Height and width in pixels.
        patch: Height and width of a patch.
        widths: Of the tokens of the image tower and of the text tower.
        joint_width: Of the joint space.
        prefix_tokens: Class and register tokens before the patches.
        positions: The most tokens its text tower takes.
        text_length: Tokens of `text`, padding included; below `positions` where the family takes shorter texts.
        text_as_mapping: Whether sentences travel as a mapping with an attention mask (transformers) or as plain ids.
        image_key: Name of the image among the arguments of its forward.
        ids_key: Name of the token ids.
        pad_is_end: Whether it pools its last token, so that nothing tells padding but a run of one id at the end.
        lone_calls: Methods that run one tower, with the arguments they take.
    """

    name: str
    make: Callable[[float], nn.Module]
    depths: tuple[int, int]
    image_size: tuple[int, int] = (2 * PATCH, 3 * PATCH)
    patch: int = PATCH
    widths: tuple[int, int] = (IMAGE_WIDTH, TEXT_WIDTH)
    joint_width: int = JOINT_WIDTH
    prefix_tokens: int = 1
    positions: int = 12
    text_length: int = 12
    text_as_mapping: bool = False
    image_key: str = "image"
    ids_key: str = "text"
    pad_is_end: bool = False
    lone_calls: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("encode_image", ("image",)),
        ("encode_text", ("text",)),
        ("get_logits", ("image", "text")),
    )

    def __str__(self) -> str:
        return self.name

    def build(self, *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
        """A model in eval mode; the same weights for the same seed, whatever the dropout."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make(dropout).eval()
            with torch.no_grad():
                for parameter in model.parameters():  # biases and norms are not to stay at 0 and 1
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

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

    def noise(self, config: pvl.PVLConfig, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Draws for each adapter of an explicit configuration: text values [3, L, C] and image values [3, V, C]."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(BATCH, self.text_length, config.dim), (BATCH, self.image_tokens, config.dim)]
        return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in config.layers]

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


def _vit(depth: int) -> dict[str, Any]:
    return {
        "layers": depth,
        "width": IMAGE_WIDTH,
        "head_width": 8,
        "patch_size": PATCH,
        "image_size": (2 * PATCH, 3 * PATCH),
    }


def _transformer(depth: int, **more: Any) -> dict[str, Any]:
    sizes = {"context_length": 12, "vocab_size": VOCABULARY, "width": TEXT_WIDTH, "heads": 3, "layers": depth}
    return {**sizes, **more}


def _open_clip_bert(dropout: float) -> nn.Module:
    clip = open_clip.CustomTextCLIP(JOINT_WIDTH, _vit(3), _transformer(1))
    config = _hf_text_config("bert", dropout, 4, positions=18)
    clip.text = HFTextEncoder(
        "", JOINT_WIDTH, config=config, pooler_type="cls_last_hidden_state_pooler", proj_type="mlp"
    )
    return clip


def _hf_clip(dropout: float) -> nn.Module:
    return _hf("CLIP", _hf_text(3, dropout), _hf_image(5, dropout), projection_dim=JOINT_WIDTH)


CORE_HOSTS = (
    Host(
        name="open_clip-inlined_text",
        make=lambda dropout: open_clip.CLIP(JOINT_WIDTH, _vit(5), _transformer(3)),
        depths=(5, 3),
    ),
    Host(
        name="open_clip-text_transformer",
        make=lambda dropout: open_clip.CustomTextCLIP(JOINT_WIDTH, _vit(3), _transformer(5)),
        depths=(3, 5),
    ),
    Host(
        name="open_clip-text_transformer-bidirectional",
        make=lambda dropout: open_clip.CustomTextCLIP(
            JOINT_WIDTH,
            _vit(4),
            _transformer(3, no_causal_mask=True, pool_type="last"),
            init_logit_bias=-1.0,
            output_dict=True,
        ),
        depths=(4, 3),
        pad_is_end=True,
    ),
    Host(
        name="open_clip-bert",
        make=_open_clip_bert,
        depths=(3, 4),
        positions=18,
    ),
    Host(
        name="transformers-clip",
        make=_hf_clip,
        depths=(5, 3),
        image_size=(2 * PATCH, 2 * PATCH),
        positions=18,
        text_as_mapping=True,
        image_key="pixel_values",
        ids_key="input_ids",
        lone_calls=(
            ("get_image_features", ("pixel_values",)),
            ("get_text_features", ("input_ids", "attention_mask")),
        ),
    ),
)

# --- families beyond the core ----------------------------------------------------------------------------------------


def _hf_text_config(kind: str, dropout: float, depth: int, *, positions: int = 19) -> transformers.PretrainedConfig:
    """A small text encoder of each kind that open_clip's HFTextEncoder can hold."""
    if kind == "m2m_100":
        return transformers.M2M100Config(
            vocab_size=VOCABULARY,
            d_model=TEXT_WIDTH,
            encoder_layers=depth,
            decoder_layers=1,
            encoder_ffn_dim=2 * TEXT_WIDTH,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
            max_position_embeddings=18,
            pad_token_id=PAD,
            dropout=dropout,
            activation_dropout=0.0,
        )
    if kind == "mt5":
        return transformers.MT5Config(
            vocab_size=VOCABULARY,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=2 * TEXT_WIDTH,
            num_layers=depth,
            num_heads=3,
            dropout_rate=dropout,
            pad_token_id=PAD,
        )
    config = {"bert": transformers.BertConfig, "xlm-roberta": transformers.XLMRobertaConfig}[kind]
    return config(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=3,
        intermediate_size=2 * TEXT_WIDTH,
        max_position_embeddings=positions,
        pad_token_id=PAD,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def _open_clip_with(
    *,
    image: Callable[[], nn.Module] | None = None,
    text: str | None = None,
    depths: tuple[int, int],
    **transformer: Any,
) -> Callable[[float], nn.Module]:
    """open_clip's CustomTextCLIP with another image tower, or with a Hugging Face text tower of a kind, or both."""

    def make(dropout: float) -> nn.Module:
        clip = open_clip.CustomTextCLIP(JOINT_WIDTH, _vit(depths[0]), _transformer(depths[1], **transformer))
        if image is not None:
            clip.visual = image()
        if text is not None:
            config = _hf_text_config(text, dropout, depths[1])
            encoder = HFTextEncoder("", JOINT_WIDTH, config=config, pooler_type="mean_pooler", proj_type="mlp")
            if config.is_encoder_decoder:  # open_clip takes the encoder alone when it loads by name
                encoder.transformer = encoder.transformer.encoder
            clip.text = encoder
        return clip

    return make


def _timm(kind: Callable[..., nn.Module], depth: int, **settings: Any) -> Callable[[], nn.Module]:
    """open_clip's wrapper around a small timm transformer."""

    def make() -> nn.Module:
        wrapper = TimmModel("test_vit", JOINT_WIDTH, image_size=(32, 48), pool="", proj="linear")
        defaults = {"img_size": (32, 48), "patch_size": PATCH, "embed_dim": IMAGE_WIDTH, "depth": depth, "num_heads": 4}
        wrapper.trunk = kind(**{**defaults, "num_classes": 0, **settings})
        wrapper.head = nn.Sequential(nn.Linear(IMAGE_WIDTH, JOINT_WIDTH, bias=False))
        return wrapper

    return make


def _coca(dropout: float) -> nn.Module:
    vision = {**_vit(4), "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    narrow = {"width": JOINT_WIDTH, "heads": 2}  # its decoder reads both towers' tokens as they are
    text = _transformer(3, embed_cls=True, output_tokens=True, **narrow)
    return CoCa(JOINT_WIDTH, {**_transformer(2, **narrow), "mlp_ratio": 4}, text, vision)


def _hf_sizes(depth: int, dropout: float, **more: Any) -> dict[str, Any]:
    return {
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": depth,
        "attention_dropout": dropout,
        **more,
    }


def _hf_text(depth: int, dropout: float, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": TEXT_WIDTH, "num_attention_heads": 3}
    ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    return _hf_sizes(depth, dropout, **{**sizes, "max_position_embeddings": 18, **ids, **more})


def _hf_bert_text(depth: int, dropout: float, **more: Any) -> dict[str, Any]:
    wake = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return _hf_text(depth, 0.0, **{**wake, "max_position_embeddings": 19, **more})


def _hf_image(depth: int, dropout: float, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": IMAGE_WIDTH, "num_attention_heads": 4, "image_size": 2 * PATCH, "patch_size": PATCH}
    return _hf_sizes(depth, dropout, **{**sizes, **more})


def _hf(
    name: str, text: dict[str, Any], image: dict[str, Any], *, image_key: str = "vision_config", **more: Any
) -> Any:
    """A transformers model of a class, from the settings of its towers."""
    config = getattr(transformers, f"{name}Config")(**{"text_config": text, image_key: image, **more})
    return getattr(transformers, f"{name}Model")(config)


def _hf_siglip(dropout: float) -> nn.Module:
    text = _hf_text(3, dropout, projection_size=IMAGE_WIDTH, max_position_embeddings=12)
    return _hf("Siglip", text, _hf_image(5, dropout))


def _hf_altclip(dropout: float) -> nn.Module:
    text = _hf_bert_text(4, dropout, project_dim=20, type_vocab_size=1)
    return _hf("AltCLIP", text, _hf_image(3, dropout), projection_dim=JOINT_WIDTH)


def _hf_dual(image: str, text: str) -> Callable[[float], nn.Module]:
    images = {
        "clip": transformers.CLIPVisionConfig,
        "siglip": transformers.SiglipVisionConfig,
        "vit": transformers.ViTConfig,
        "dinov2": transformers.Dinov2Config,
    }
    texts = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}

    def make(dropout: float) -> nn.Module:
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            images[image](**_hf_image(5, 0.0)), texts[text](**_hf_bert_text(3, dropout)), projection_dim=JOINT_WIDTH
        )
        return transformers.VisionTextDualEncoderModel(config)

    return make


def _hf_host(name: str, make: Callable[[float], nn.Module], **more: Any) -> Host:
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


FAMILIES = (
    Host(
        name="open_clip-timm-bert",
        make=_open_clip_with(image=_timm(VisionTransformer, 5), text="bert", depths=(5, 3)),
        depths=(5, 3),
        positions=19,
    ),
    Host(
        name="open_clip-timm-map_pool",  # SigLIP's shape
        make=_open_clip_with(
            image=_timm(VisionTransformer, 5, class_token=False, global_pool="map"),
            depths=(5, 3),
            no_causal_mask=True,
            pool_type="last",
        ),
        depths=(5, 3),
        prefix_tokens=0,
        pad_is_end=True,
    ),
    Host(
        name="open_clip-timm-relpos",
        make=_open_clip_with(image=_timm(VisionTransformerRelPos, 5), depths=(5, 3)),
        depths=(5, 3),
        prefix_tokens=0,
    ),
    Host(
        name="open_clip-eva-rope",
        make=_open_clip_with(image=_timm(Eva, 5, use_rot_pos_emb=True, qkv_fused=False), depths=(5, 3)),
        depths=(5, 3),
    ),
    Host(
        name="open_clip-eva-rope_mixed",
        make=_open_clip_with(
            image=_timm(Eva, 3, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", qkv_fused=False),
            depths=(3, 5),
        ),
        depths=(3, 5),
    ),
    *(
        Host(
            name=f"open_clip-{kind}",
            make=_open_clip_with(text=kind, depths=(3, 5)),
            depths=(3, 5),
            positions=18,
        )
        for kind in ("xlm-roberta", "m2m_100", "mt5")
    ),
    *(
        _hf_host(
            name.lower(),
            lambda dropout, name=name: _hf(
                name, _hf_text(3, dropout), _hf_image(5, dropout), projection_dim=JOINT_WIDTH
            ),
            prefix_tokens=0 if name == "Aimv2" else 1,
        )
        for name in ("MetaClip2", "CLIPSeg", "OwlViT", "Owlv2", "Aimv2")
    ),
    _hf_host("siglip", _hf_siglip, joint_width=IMAGE_WIDTH, prefix_tokens=0, positions=12),
    _hf_host("altclip", _hf_altclip, depths=(3, 4)),
    *(
        _hf_host(
            name.lower(),
            lambda dropout, name=name: _hf(
                name,
                _hf_bert_text(3, dropout, encoder_hidden_size=IMAGE_WIDTH),
                _hf_image(5, dropout),
                projection_dim=JOINT_WIDTH,
            ),
            positions=19,
        )
        for name in ("ChineseCLIP", "Blip")
    ),
    *(
        _hf_host(f"dual-{image}-{text}", _hf_dual(image, text), prefix_tokens=0 if image == "siglip" else 1)
        for image, text in (("clip", "bert"), ("vit", "roberta"), ("dinov2", "bert"), ("siglip", "roberta"))
    ),
)
"""Small members of the other families whose inputs look like CLIP's; the contract suite runs over them too."""

HOSTS = (*CORE_HOSTS, *FAMILIES)
BY_NAME = {host.name: host for host in HOSTS}
