"""How to build small random CLIPs of every supported family: towers of unequal depth and width, images not square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import transformers
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import nn

VOCABULARY = 100
START, END, PAD = 97, 99, 0  # the end token has the highest id, as pooling by argmax needs
JOINT_WIDTH = 16
IMAGE_WIDTH, TEXT_WIDTH = 32, 24
PATCH = 16
IMAGE_SIZE = (2 * PATCH, 3 * PATCH)
Settings = dict[str, Any]
Make = Callable[[float], nn.Module]
"""Builds a model, given the dropout of its towers (ignored by families without)."""

# --- open_clip -------------------------------------------------------------------------------------------------------


def vit(depth: int, **more: Any) -> Settings:
    sizes = {"layers": depth, "width": IMAGE_WIDTH, "head_width": 8, "patch_size": PATCH, "image_size": IMAGE_SIZE}
    return {**sizes, **more}


def transformer(depth: int, **more: Any) -> Settings:
    sizes = {"context_length": 12, "vocab_size": VOCABULARY, "width": TEXT_WIDTH, "heads": 3, "layers": depth}
    return {**sizes, **more}


def open_clip_with(
    depths: tuple[int, int],
    *,
    image: Callable[[], nn.Module] | None = None,
    text: str | None = None,
    pooler: str = "mean_pooler",
    positions: int = 19,
    **settings: Any,
) -> Make:
    """open_clip's CustomTextCLIP with another image tower, or with a Hugging Face text tower of a kind, or both."""

    def make(dropout: float) -> nn.Module:
        clip = open_clip.CustomTextCLIP(JOINT_WIDTH, vit(depths[0]), transformer(depths[1], **settings))
        if image is not None:
            clip.visual = image()
        if text is not None:
            config = text_config(text, dropout, depths[1], positions=positions)
            clip.text = HFTextEncoder("", JOINT_WIDTH, config=config, pooler_type=pooler, proj_type="mlp")
            if config.is_encoder_decoder:  # open_clip takes the encoder alone when it loads by name
                clip.text.transformer = clip.text.transformer.encoder
        return clip

    return make


def text_config(kind: str, dropout: float, depth: int, *, positions: int) -> transformers.PretrainedConfig:
    """Of a small text encoder of each kind that open_clip's HFTextEncoder can hold."""
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": PAD}
    if kind == "m2m_100":
        layers = {"encoder_layers": depth, "decoder_layers": 1, "encoder_ffn_dim": 2 * TEXT_WIDTH}
        heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 18}
        return transformers.M2M100Config(
            d_model=TEXT_WIDTH, dropout=dropout, activation_dropout=0.0, **sizes, **layers, **heads
        )
    if kind == "mt5":
        layers = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 2 * TEXT_WIDTH, "num_layers": depth, "num_heads": 3}
        return transformers.MT5Config(dropout_rate=dropout, **sizes, **layers)
    config = {"bert": transformers.BertConfig, "xlm-roberta": transformers.XLMRobertaConfig}[kind]
    layers = {"hidden_size": TEXT_WIDTH, "num_hidden_layers": depth, "num_attention_heads": 3}
    return config(
        intermediate_size=2 * TEXT_WIDTH,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **sizes,
        **layers,
    )


def timm(kind: Callable[..., nn.Module], depth: int, **settings: Any) -> Callable[[], nn.Module]:
    """open_clip's wrapper around a small timm transformer."""

    def make() -> nn.Module:
        wrapper = TimmModel("test_vit", JOINT_WIDTH, image_size=IMAGE_SIZE, pool="", proj="linear")
        sizes = {"img_size": IMAGE_SIZE, "patch_size": PATCH, "embed_dim": IMAGE_WIDTH, "depth": depth, "num_heads": 4}
        wrapper.trunk = kind(**{**sizes, "num_classes": 0, **settings})
        wrapper.head = nn.Sequential(nn.Linear(IMAGE_WIDTH, JOINT_WIDTH, bias=False))
        return wrapper

    return make


def coca(dropout: float = 0.0) -> nn.Module:
    vision = vit(4, attentional_pool=True, attn_pooler_heads=4, output_tokens=True)
    narrow = {"width": JOINT_WIDTH, "heads": 2}  # its decoder reads both towers' tokens as they are
    text = transformer(3, embed_cls=True, output_tokens=True, **narrow)
    return CoCa(JOINT_WIDTH, transformer(2, mlp_ratio=4, **narrow), text, vision)


# --- transformers ----------------------------------------------------------------------------------------------------


def hf_sizes(depth: int, dropout: float, **more: Any) -> Settings:
    sizes = {"intermediate_size": 2 * TEXT_WIDTH, "num_hidden_layers": depth, "attention_dropout": dropout}
    return {**sizes, **more}


def hf_text(depth: int, dropout: float = 0.0, **more: Any) -> Settings:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": TEXT_WIDTH, "num_attention_heads": 3}
    ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    return hf_sizes(depth, dropout, **{**sizes, "max_position_embeddings": 18, **ids, **more})


def hf_bert_text(depth: int, dropout: float = 0.0, **more: Any) -> Settings:
    awake = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return hf_text(depth, **{**awake, "max_position_embeddings": 19, **more})


def hf_image(depth: int, dropout: float = 0.0, **more: Any) -> Settings:
    sizes = {"hidden_size": IMAGE_WIDTH, "num_attention_heads": 4, "image_size": 2 * PATCH, "patch_size": PATCH}
    return hf_sizes(depth, dropout, **{**sizes, **more})


def hf(name: str, text: Settings, image: Settings, *, image_key: str = "vision_config", **more: Any) -> nn.Module:
    """A transformers model of a class, from the settings of its towers."""
    config = getattr(transformers, f"{name}Config")(**{"text_config": text, image_key: image, **more})
    return getattr(transformers, f"{name}Model")(config)


def hf_clip_like(name: str) -> Make:
    return lambda dropout: hf(name, hf_text(3, dropout), hf_image(5, dropout), projection_dim=JOINT_WIDTH)


def hf_with_bert(name: str) -> Make:
    def make(dropout: float) -> nn.Module:
        text = hf_bert_text(3, dropout, encoder_hidden_size=IMAGE_WIDTH)
        return hf(name, text, hf_image(5, dropout), projection_dim=JOINT_WIDTH)

    return make


def hf_siglip(dropout: float) -> nn.Module:
    text = hf_text(3, dropout, projection_size=IMAGE_WIDTH, max_position_embeddings=12)
    return hf("Siglip", text, hf_image(5, dropout))


def hf_altclip(dropout: float) -> nn.Module:
    text = hf_bert_text(4, dropout, project_dim=20, type_vocab_size=1)
    return hf("AltCLIP", text, hf_image(3, dropout), projection_dim=JOINT_WIDTH)


def hf_dual(image: str, text: str) -> Make:
    images = {
        "clip": transformers.CLIPVisionConfig,
        "siglip": transformers.SiglipVisionConfig,
        "vit": transformers.ViTConfig,
        "dinov2": transformers.Dinov2Config,
        "registers": transformers.Dinov2WithRegistersConfig,
    }
    texts = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}

    def make(dropout: float) -> nn.Module:
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            images[image](**hf_image(5)), texts[text](**hf_bert_text(3, dropout)), projection_dim=JOINT_WIDTH
        )
        return transformers.VisionTextDualEncoderModel(config)

    return make


def hf_flava() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    more = {"image_key": "image_config", "multimodal_config": sizes, "projection_dim": JOINT_WIDTH}
    return hf("Flava", hf_bert_text(3), hf_image(5), **more)


def hf_siglip2() -> nn.Module:
    image = hf_image(5, num_patches=9)
    del image["image_size"]
    return hf("Siglip2", hf_text(3, projection_size=IMAGE_WIDTH), image)


def hf_xclip() -> nn.Module:
    video = {"num_frames": 2, "mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_hidden_layers": 1}
    image = hf_image(5, **video, mit_num_attention_heads=2)
    return hf("XCLIP", hf_text(3), image, projection_dim=JOINT_WIDTH, prompt_num_attention_heads=2)


def hf_groupvit() -> nn.Module:
    groups = {"depths": [4, 2], "num_group_tokens": [4, 0], "num_output_groups": [4, 0]}
    image = hf_image(4, image_size=4 * PATCH, **groups)
    del image["num_hidden_layers"]
    return hf("GroupViT", hf_text(3), image, projection_dim=JOINT_WIDTH, projection_intermediate_dim=20)
