"""The towers of transformers' dual encoders, by class of the host.

Read off transformers 5.23.

Shape alphabet: B batch, F frames, V image tokens, N patches, L text tokens, W tower width, H W pixels.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from pvl_adapter.towers.base import (
    ImageTower,
    Inputs,
    TextTower,
    before_trailing_run,
    check_finite,
    describe,
    mask_through,
    pair,
)


@dataclass(frozen=True)
class HFImage(ImageTower):
    """An image tower with a class token (or none) before its patches.

    Attributes:
        config: Where the host's configuration keeps the tower's own.
        method: The host's method that runs this tower and projects its pooled output.
        any_size: Whether the tower resizes its positions unasked.
    """

    path: str = "vision_model.encoder.layers"
    projection: tuple[str, ...] | None = ("vision_model.post_layernorm", "visual_projection")
    key: str = "pixel_values"
    config: str = "vision_config"
    method: str = "get_image_features"
    any_size: bool = False

    def settings(self, host: Any) -> Any:
        return getattr(host.config, self.config)

    def width(self, host: Any) -> int:
        return int(self.settings(host).hidden_size)

    def image_size(self, host: Any) -> tuple[int, int]:
        return pair(self.settings(host).image_size)

    def patch_size(self, host: Any) -> tuple[int, int]:
        return pair(self.settings(host).patch_size)

    def takes_any_size(self, host: Any, inputs: Inputs) -> bool:
        return bool(inputs.get("interpolate_pos_encoding", self.any_size))

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return pooled(call(getattr(host, self.method), inputs, _IMAGE_ARGUMENTS))

    @property
    def other_sizes(self) -> str:
        return " or, where the model allows it, pass interpolate_pos_encoding=True"


@dataclass(frozen=True)
class Siglip2Image(HFImage):
    """Siglip2 takes flattened patches, padded to a common number, and each picture's grid."""

    projection: tuple[str, ...] | None = ("vision_model.post_layernorm",)

    def image_size(self, host: Any) -> tuple[int, int]:
        side = int(self.settings(host).num_patches ** 0.5) * int(self.settings(host).patch_size)
        return side, side

    def grid(self, host: Any, inputs: Inputs) -> tuple[int, int]:
        shapes = inputs["spatial_shapes"]  # [B, 2]
        if not bool((shapes == shapes[0]).all()):
            raise ValueError(f"spatial_shapes are {shapes.tolist()}, expected one patch grid for the whole batch")
        rows, columns = shapes[0].tolist()
        return int(rows), int(columns)

    def patches(self, host: Any, inputs: Inputs, hidden: Tensor) -> Tensor | None:
        rows, columns = self.grid(host, inputs)
        tokens = self.project_tokens(host, hidden)
        return None if tokens is None else tokens[:, : rows * columns]  # padding comes last

    def token_mask(self, host: Any, inputs: Inputs) -> Tensor | None:
        return inputs["pixel_attention_mask"].bool()

    def dummy_inputs(self, host: Any, *, batch: int) -> dict[str, Any]:
        reference, settings = next(host.parameters()), self.settings(host)
        count, side = int(settings.num_patches), int(settings.num_patches**0.5)
        channels = settings.num_channels * settings.patch_size**2
        return {
            "pixel_values": torch.zeros(batch, count, channels, device=reference.device, dtype=reference.dtype),
            "pixel_attention_mask": torch.ones(batch, count, dtype=torch.long, device=reference.device),
            "spatial_shapes": torch.tensor([[side, side]] * batch),  # read by the host, so kept on the CPU
        }

    def check(self, host: Any, inputs: Inputs) -> None:
        image = inputs["pixel_values"]
        if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
            raise ValueError(f"pixel_values is {describe(image)}, expected patches [batch, patches, channels] (float)")
        for name in ("pixel_attention_mask", "spatial_shapes"):
            if inputs.get(name) is None:
                raise ValueError(f"{name} is missing; give what the model's processor returns, as a mapping")
        check_finite(image, name="pixel_values")


@dataclass(frozen=True)
class XClipVideo(HFImage):
    """X-CLIP reads videos [B, F, 3, H, W]; its blocks see one frame each, the adapters a whole video.

    A video has no one grid of patches, so there is no projection.
    """

    projection: tuple[str, ...] | None = None
    method: str = "get_video_features"

    def frames(self, inputs: Inputs) -> int:
        return int(inputs["pixel_values"].shape[1])

    def gather(self, host: Any, inputs: Inputs, hidden: Tensor) -> Tensor:
        return rearrange(hidden, "(b f) v w -> b (f v) w", f=self.frames(inputs))

    def scatter(self, host: Any, inputs: Inputs, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b (f v) w -> (b f) v w", f=self.frames(inputs))

    def dummy_inputs(self, host: Any, *, batch: int) -> dict[str, Any]:
        reference, settings = next(host.parameters()), self.settings(host)
        shape = (batch, int(settings.num_frames), 3, *self.image_size(host))
        return {"pixel_values": torch.zeros(shape, device=reference.device, dtype=reference.dtype)}

    def check(self, host: Any, inputs: Inputs) -> None:
        video, frames = inputs["pixel_values"], int(self.settings(host).num_frames)
        if not isinstance(video, Tensor) or video.ndim != 5 or video.shape[1] != frames:
            raise ValueError(f"pixel_values is {describe(video)}, expected [batch, {frames} frames, 3, height, width]")
        super().check(host, {**inputs, "pixel_values": video.flatten(0, 1)})


@dataclass(frozen=True)
class GroupViTImage(HFImage):
    """GroupViT's first stage; later stages have groups in place of patches, so no patch reaches the joint space."""

    path: str = "vision_model.encoder.stages.0.layers"
    projection: tuple[str, ...] | None = None


@dataclass(frozen=True)
class HFText(TextTower):
    """A text tower that looks for an end token, as CLIP's does."""

    path: str = "text_model.encoder.layers"
    projection: tuple[str, ...] | None = ("text_model.final_layer_norm", "text_projection")
    key: str = "input_ids"

    def settings(self, host: Any) -> Any:
        return host.config.text_config

    def width(self, host: Any) -> int:
        return int(self.settings(host).hidden_size)

    def context_length(self, host: Any) -> int | None:
        return int(self.settings(host).max_position_embeddings)

    def vocab_size(self, host: Any) -> int:
        return int(self.settings(host).vocab_size)

    def tokenizer_name(self, host: Any) -> str | None:
        return host.name_or_path or None

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return pooled(call(host.get_text_features, inputs, _TEXT_ARGUMENTS))

    def check(self, host: Any, inputs: Inputs) -> None:
        super().check(host, inputs)
        text, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and mask.shape != text.shape:
            raise ValueError(f"attention_mask is {describe(mask)}, expected the shape of input_ids {tuple(text.shape)}")

    def token_mask(self, host: Any, inputs: Inputs) -> Tensor:
        if inputs.get("attention_mask") is not None:
            return inputs["attention_mask"].bool()
        return self.guess_real_tokens(host, inputs["input_ids"])

    def guess_real_tokens(self, host: Any, text: Tensor) -> Tensor:
        """[B, L] bool, where no attention mask was given."""
        end = self.settings(host).eos_token_id
        # An end id of 2 is a known slip in old configurations; the model itself then pools the highest id.
        position = text.argmax(dim=-1) if end == 2 else (text == end).int().argmax(dim=-1)  # [B]
        return mask_through(position, length=text.shape[1])


@dataclass(frozen=True)
class SiglipText(HFText):
    """SigLIP pools the last position, padding included."""

    projection: tuple[str, ...] | None = ("text_model.final_layer_norm", "text_model.head")

    def guess_real_tokens(self, host: Any, text: Tensor) -> Tensor:
        return before_trailing_run(text)


@dataclass(frozen=True)
class BertText(HFText):
    """A text tower of the BERT kind, which pools the first token."""

    path: str = "text_model.encoder.layer"
    projection: tuple[str, ...] | None = ("text_projection",)

    def guess_real_tokens(self, host: Any, text: Tensor) -> Tensor:
        return text != self.settings(host).pad_token_id


@dataclass(frozen=True)
class RobertaText(BertText):
    """RoBERTa's positions start behind the padding id."""

    def context_length(self, host: Any) -> int | None:
        return int(self.settings(host).max_position_embeddings) - int(self.settings(host).pad_token_id) - 1


_SIGLIP = HFImage(projection=("vision_model.post_layernorm",))
_RMS = ("vision_model.rms_norm", "visual_projection")
_ALT = ("text_model.pre_LN", "text_model.transformation", "text_projection")
_FLAVA_IMAGE = ("image_model.layernorm", "image_projection")

FAMILIES: dict[str, tuple[ImageTower, TextTower]] = {
    "CLIPModel": (HFImage(), HFText()),
    "MetaClip2Model": (HFImage(), HFText()),
    "CLIPSegModel": (HFImage(any_size=True), HFText()),
    "OwlViTModel": (HFImage(), HFText()),
    "Owlv2Model": (HFImage(), HFText()),
    "XCLIPModel": (XClipVideo(), HFText()),
    "GroupViTModel": (GroupViTImage(), HFText()),
    "Aimv2Model": (HFImage(projection=_RMS), HFText(projection=("text_model.rms_norm", "text_projection"))),
    "SiglipModel": (_SIGLIP, SiglipText()),
    "Siglip2Model": (Siglip2Image(), SiglipText()),
    "AltCLIPModel": (HFImage(), RobertaText(path="text_model.roberta.encoder.layers", projection=_ALT)),
    "ChineseCLIPModel": (HFImage(), BertText()),
    "BlipModel": (HFImage(), BertText()),
    "FlavaModel": (
        HFImage(path="image_model.encoder.layer", projection=_FLAVA_IMAGE, config="image_config"),
        BertText(projection=("text_model.layernorm", "text_projection")),
    ),
}
"""The towers of each supported class; subclasses count too."""

DUAL_IMAGE: dict[str, ImageTower] = {
    "clip_vision_model": HFImage(),
    "siglip_vision_model": HFImage(),
    "vit": HFImage(path="vision_model.layers", projection=("vision_model.layernorm", "visual_projection")),
    "dinov2": HFImage(
        path="vision_model.encoder.layer", projection=("vision_model.layernorm", "visual_projection"), any_size=True
    ),
}
DUAL_TEXT: dict[str, TextTower] = {"bert": BertText(), "roberta": RobertaText(), "xlm-roberta": RobertaText()}
"""The towers of VisionTextDualEncoderModel, by the model types of its two configurations."""


REFUSED: dict[str, str] = {
    "AlignModel": "its image tower is an EfficientNet without a stack of token blocks",
    "Blip2Model": "its towers meet in a Q-Former, not in a joint space",
    "BridgeTowerModel": "its towers feed each other already, block by block",
    "VideoPrismClipModel": "its image tower is two stacks, one over space and one over time",
}
"""Why well-known classes cannot be run in lockstep."""


def find(model: Any) -> tuple[ImageTower | str, TextTower | str]:
    """The towers of a transformers model, or why there are none."""
    names = [kind.__name__ for kind in type(model).__mro__]
    if "VisionTextDualEncoderModel" in names:
        vision, text = model.config.vision_config.model_type, model.config.text_config.model_type
        return (
            DUAL_IMAGE.get(vision) or f"its image tower is a {vision}",
            DUAL_TEXT.get(text) or f"its text tower is a {text}",
        )
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    reason = next((REFUSED[name] for name in names if name in REFUSED), "it is no dual encoder known here")
    return reason, reason


_IMAGE_ARGUMENTS = (
    "pixel_values",
    "interpolate_pos_encoding",
    "pixel_attention_mask",
    "spatial_shapes",
    "bool_masked_pos",
)
_TEXT_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def call(method: Any, inputs: Inputs, names: tuple[str, ...]) -> Any:
    """Call a host's method with those inputs it takes."""
    taken = inspect.signature(method).parameters
    return method(**{name: inputs[name] for name in names if inputs.get(name) is not None and name in taken})


def pooled(output: Any) -> Tensor:
    """The pooled embeddings [B, D] in what get_*_features returns: transformers 4 a tensor, 5 an object."""
    embeds = output if isinstance(output, Tensor) else output.pooler_output
    return embeds[:, 0] if embeds.ndim == 3 else embeds  # FLAVA projects all tokens
