"""The towers of transformers' dual encoders: a table of rows, by class of the host.

Read off transformers 5.23.

Shape alphabet: B batch, F frames, V image tokens, N patches, L text tokens, W tower width, H W pixels.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from pvl_adapter.towers.base import ImageTower, Inputs, TextTower, check_finite, describe
from pvl_adapter.towers.normalization import HALF, IMAGENET, OPENAI, Normalization, saved_normalization
from pvl_adapter.towers.token_masks import mask_by_pooling


@dataclass(frozen=True, kw_only=True)
class HFImage(ImageTower):
    """An image tower with a class token (or none) before its patches.

    Attributes:
        method: The host's method that runs this tower and projects its pooled output.
        any_size: Whether the tower resizes its positions unasked.
        family_normalization: What the checkpoints of this family are trained with; None if they differ.
    """

    path: str = "vision_model.encoder.layers"
    projection: tuple[str, ...] | None = ("vision_model.post_layernorm", "visual_projection")
    key: str = "pixel_values"
    config: str = "config.vision_config"
    method: str = "get_image_features"
    any_size: bool = False
    family_normalization: Normalization | None = OPENAI
    other_sizes: str = " or, where the model allows it, pass interpolate_pos_encoding=True"

    def takes_any_size(self, host: Any, inputs: Inputs) -> bool:
        return bool(inputs.get("interpolate_pos_encoding", self.any_size))

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return pooled(call(getattr(host, self.method), inputs, _IMAGE_ARGUMENTS))

    def normalization(self, host: Any) -> Normalization | None:
        """The processor saved with the checkpoint tells, else the family; a dual encoder's image tower has its own."""
        configs = [each for each in (host.config, self.settings(host)) if getattr(each, "_name_or_path", None)]
        for config in configs:
            found = saved_normalization(config._name_or_path, revision=getattr(config, "_commit_hash", None))
            if found is not None:
                return found
        if configs and self.family_normalization is not None:
            name = configs[0]._name_or_path
            warnings.warn(
                f"no image processor was found for {name}; images are normalised as for most {type(host).__name__}s. "
                f"Download it with AutoImageProcessor.from_pretrained({name!r}), or set image_mean and image_std in "
                "MedCLIPSegConfig",
                stacklevel=2,
            )
        return self.family_normalization


@dataclass(frozen=True, kw_only=True)
class Siglip2Image(HFImage):
    """SigLIP 2 takes flattened patches, padded to a common number, and each image's grid."""

    projection: tuple[str, ...] | None = ("vision_model.post_layernorm",)
    family_normalization: Normalization | None = HALF

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
        return {
            "pixel_values": reference.new_zeros(batch, count, settings.num_channels * settings.patch_size**2),
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


@dataclass(frozen=True, kw_only=True)
class XClipVideo(HFImage):
    """X-CLIP reads videos [B, F, 3, H, W]; its blocks see one frame each, the adapters a whole video.

    A video has more than one grid of patches, so there is no projection.
    """

    projection: tuple[str, ...] | None = None
    method: str = "get_video_features"
    family_normalization: Normalization | None = None

    def gather(self, host: Any, inputs: Inputs, hidden: Tensor) -> Tensor:
        return rearrange(hidden, "(b f) v w -> b (f v) w", f=inputs["pixel_values"].shape[1])

    def scatter(self, host: Any, inputs: Inputs, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b (f v) w -> (b f) v w", f=inputs["pixel_values"].shape[1])

    def dummy_inputs(self, host: Any, *, batch: int) -> dict[str, Any]:
        frames = int(self.settings(host).num_frames)
        return {"pixel_values": next(host.parameters()).new_zeros(batch, frames, 3, *self.image_size(host))}

    def check(self, host: Any, inputs: Inputs) -> None:
        video, frames = inputs["pixel_values"], int(self.settings(host).num_frames)
        if not isinstance(video, Tensor) or video.ndim != 5 or video.shape[1] != frames:
            raise ValueError(f"pixel_values is {describe(video)}, expected [batch, {frames} frames, 3, height, width]")
        super().check(host, {**inputs, "pixel_values": video.flatten(0, 1)})


@dataclass(frozen=True, kw_only=True)
class HFText(TextTower):
    """A text tower.

    Attributes:
        pooling: Which position it pools; see `mask_by_pooling`.
    """

    path: str = "text_model.encoder.layers"
    projection: tuple[str, ...] | None = ("text_model.final_layer_norm", "text_projection")
    key: str = "input_ids"
    config: str = "config.text_config"
    pooling: str = "eos"

    def tokenizer_name(self, host: Any) -> str | None:
        return host.name_or_path or None

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return pooled(call(host.get_text_features, inputs, _TEXT_ARGUMENTS))

    def ignores_padding(self, host: Any, inputs: Inputs) -> bool:
        return self.pooling == "first" and inputs.get("attention_mask") is not None  # no end token beyond the mask

    def check(self, host: Any, inputs: Inputs) -> None:
        super().check(host, inputs)
        text, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and mask.shape != text.shape:
            raise ValueError(f"attention_mask is {describe(mask)}, expected the shape of input_ids {tuple(text.shape)}")

    def token_mask(self, host: Any, inputs: Inputs) -> Tensor:
        if inputs.get("attention_mask") is not None:
            return inputs["attention_mask"].bool()
        end, padding = (getattr(self.settings(host), name, None) for name in ("eos_token_id", "pad_token_id"))
        # An end id of 2 is a known slip in old configurations; the model itself then pools the highest id.
        pooling = "argmax" if self.pooling == "eos" and end == 2 else self.pooling
        return mask_by_pooling(inputs["input_ids"], pooling=pooling, end=end, padding=padding)


_BERT = HFText(
    path="text_model.encoder.layer",
    projection=("text_projection",),
    pooling="first",
    key_value=("attention.self.key", "attention.self.value"),
)
_ROBERTA = replace(_BERT, positions_after_padding=True)
_SIGLIP = HFText(projection=("text_model.final_layer_norm", "text_model.head"), pooling="last")
_LAYERNORM = ("vision_model.layernorm", "visual_projection")

FAMILIES: dict[str, tuple[ImageTower, TextTower]] = {
    "CLIPModel": (HFImage(), HFText()),
    "MetaClip2Model": (HFImage(), HFText()),
    # Trained so; the default of the image processor class is another.
    "CLIPSegModel": (HFImage(any_size=True, family_normalization=IMAGENET), HFText()),
    "OwlViTModel": (HFImage(), HFText()),
    "Owlv2Model": (HFImage(), HFText()),
    "XCLIPModel": (XClipVideo(), HFText()),
    # Only its first stage; later ones have groups in place of patches, so no patch reaches the joint space.
    "GroupViTModel": (
        HFImage(path="vision_model.encoder.stages.0.layers", projection=None, family_normalization=None),
        HFText(),
    ),
    "Aimv2Model": (
        HFImage(projection=("vision_model.rms_norm", "visual_projection")),
        HFText(projection=("text_model.rms_norm", "text_projection")),
    ),
    "SiglipModel": (HFImage(projection=("vision_model.post_layernorm",), family_normalization=HALF), _SIGLIP),
    "Siglip2Model": (Siglip2Image(), _SIGLIP),
    "AltCLIPModel": (
        HFImage(),
        replace(
            _ROBERTA,
            path="text_model.roberta.encoder.layers",
            projection=("text_model.pre_LN", "text_model.transformation", "text_projection"),
        ),
    ),
    "ChineseCLIPModel": (HFImage(), _BERT),
    "BlipModel": (HFImage(), _BERT),
    "FlavaModel": (
        HFImage(
            path="image_model.encoder.layer",
            projection=("image_model.layernorm", "image_projection"),
            config="config.image_config",
        ),
        replace(
            _BERT,
            projection=("text_model.layernorm", "text_projection"),
            key_value=("attention.attention.key", "attention.attention.value"),
        ),
    ),
}
"""The towers of each supported class; subclasses count too."""

# Checkpoints of ViT and DINOv2 are trained with different normalisations.
_DINOV2 = HFImage(path="vision_model.encoder.layer", projection=_LAYERNORM, any_size=True, family_normalization=None)
DUAL_IMAGE: dict[str, ImageTower] = {
    "clip_vision_model": HFImage(),
    "siglip_vision_model": HFImage(family_normalization=HALF),
    "vit": HFImage(path="vision_model.layers", projection=_LAYERNORM, family_normalization=None),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
}
DUAL_TEXT: dict[str, TextTower] = {"bert": _BERT, "roberta": _ROBERTA, "xlm-roberta": _ROBERTA}
"""The towers of VisionTextDualEncoderModel, by the model types of its two configurations."""

REFUSED: dict[str, str] = {
    "AlignModel": "its image tower is an EfficientNet without a stack of token blocks",
    "Blip2Model": "its towers meet in a Q-Former, not in a joint space",
    "BridgeTowerModel": "its towers feed each other already, block by block",
    "VideoPrismClipModel": "its image tower is two stacks, one over space and one over time",
}
"""Why well-known classes cannot be run in lockstep."""


_FORMERLY = {
    "vision_model.layers": "vision_model.encoder.layer",  # ViT, before 5.9
    "text_model.roberta.encoder.layers": "text_model.roberta.encoder.layer",  # AltCLIP, before 5.5
    "vision_model.encoder.layers": "vision_model.vision_model.encoder.layers",  # CLIP and SigLIP in duals, before 5.5
    "vision_model.post_layernorm": "vision_model.vision_model.post_layernorm",
}


def _of_this_version(tower: Any, model: Any) -> Any:
    """The tower where the installed transformers keeps it."""
    names = {name for name, _ in model.named_modules()}
    if isinstance(tower, str) or tower.path in names or _FORMERLY.get(tower.path) not in names:
        return tower
    projection = tower.projection and tuple(_FORMERLY.get(path, path) for path in tower.projection)
    return replace(tower, path=_FORMERLY[tower.path], projection=projection)


def find(model: Any) -> tuple[ImageTower | str, TextTower | str]:
    """The towers of a transformers model, or why there are none."""
    names = [kind.__name__ for kind in type(model).__mro__]
    if "VisionTextDualEncoderModel" in names:
        vision, text = model.config.vision_config.model_type, model.config.text_config.model_type
        image = DUAL_IMAGE.get(vision) or f"its image tower is a {vision}"
        return _of_this_version(image, model), DUAL_TEXT.get(text) or f"its text tower is a {text}"
    for name in names:
        if name in FAMILIES:
            image, text = FAMILIES[name]
            return _of_this_version(image, model), _of_this_version(text, model)
    reason = next((REFUSED[name] for name in names if name in REFUSED), "its class is not a dual encoder known here")
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
    """The pooled embeddings [B, D] in what get_*_features returns."""
    embeds: Tensor = output.pooler_output
    return embeds[:, 0] if embeds.ndim == 3 else embeds  # FLAVA projects all tokens
