"""What the lockstep must know of a CLIP: where its blocks are, how its towers are called, which text is real.

`find_towers(model)` picks an image tower and a text tower, or raises `UnsupportedModelError` naming what is supported.
A new family is one subclass of `ImageTower` or `TextTower` and one line in the tables at the end. Towers hold no
reference to the model, so models stay deep-copyable.

Read off open_clip 3.3 and transformers 5.23.

Shape alphabet: B batch, V image tokens, N patches, L text tokens, W tower width, D joint width, H W pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RGB = tuple[float, float, float]
OPENAI_DATASET_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, the default of both libraries
OPENAI_DATASET_STD: RGB = (0.26862954, 0.26130258, 0.27577711)
Inputs = Mapping[str, Any]
"""The arguments of the host's own forward, by name."""


class UnsupportedModelError(TypeError):
    """The model is no dual tower whose blocks can be run in lockstep."""


class Tower:
    """One tower of a host. `path` leads from the host to its list of blocks."""

    path: str

    def blocks(self, host: nn.Module) -> nn.ModuleList:
        return host.get_submodule(self.path)  # type: ignore[return-value]

    def width(self, host: nn.Module) -> int:
        """Width W of the tower's tokens."""
        raise NotImplementedError

    def encode(self, host: nn.Module, inputs: Inputs) -> Tensor:
        """Run the tower by the host's own code; pooled embeddings in the joint space, [B, D], not normalised."""
        raise NotImplementedError

    def tokens(self, host: nn.Module, hidden: Tensor) -> Tensor:
        """Project the last block's output [B, tokens, W] to the joint space, [B, N, D] or [B, L, D]."""
        raise NotImplementedError


class ImageTower(Tower):
    key: str  # the forward argument that holds the image

    def image_size(self, host: nn.Module) -> tuple[int, int]:
        """Height and width the tower takes, in pixels."""
        raise NotImplementedError

    def patch_size(self, host: nn.Module) -> tuple[int, int]:
        raise NotImplementedError

    def joint_width(self, host: nn.Module) -> int:
        """Width D of the joint space."""
        raise NotImplementedError

    def normalization(self, host: nn.Module) -> tuple[RGB, RGB]:
        """Mean and standard deviation of red, green and blue in [0, 1] that the host was trained with."""
        return OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    def grid(self, host: nn.Module, inputs: Inputs) -> tuple[int, int]:
        """Rows and columns of patches for these inputs."""
        height, width = inputs[self.key].shape[-2:]
        patch_height, patch_width = self.patch_size(host)
        return height // patch_height, width // patch_width

    def check(self, host: nn.Module, inputs: Inputs) -> None:
        """Raise ValueError for an image the tower cannot take."""
        image = inputs[self.key]
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(
                f"{self.key} is {_describe(image)}, expected a floating-point tensor [batch, 3, height, width] "
                "as the model's own preprocessing makes it"
            )
        if tuple(image.shape[-2:]) != self.image_size(host):
            raise ValueError(
                f"{self.key} is {image.shape[-2]} x {image.shape[-1]} pixels, this model takes "
                f"{' x '.join(map(str, self.image_size(host)))}; resize it"
            )
        # Reading values would make a GPU wait and break a compiled graph, so only eager CPU input is looked at here.
        if _may_read(image) and not torch.isfinite(image).all():
            bad = (~torch.isfinite(image)).flatten(1).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(f"{self.key} holds NaN or infinite values in batch item {bad}, expected finite numbers")


class TextTower(Tower):
    key: str  # the forward argument that holds the token ids

    def context_length(self, host: nn.Module) -> int:
        """How many positions the tower has."""
        raise NotImplementedError

    def vocab_size(self, host: nn.Module) -> int:
        raise NotImplementedError

    def tokenizer_name(self, host: nn.Module) -> str | None:
        """Hub name or folder of the tokenizer the host was trained with, if it tells."""
        return None

    def real_tokens(self, host: nn.Module, inputs: Inputs) -> Tensor:
        """[B, L] bool, True where a position holds a token of the sentence rather than padding."""
        raise NotImplementedError

    def check(self, host: nn.Module, inputs: Inputs) -> None:
        """Raise ValueError for token ids the tower cannot take."""
        text = inputs[self.key]
        if not isinstance(text, Tensor) or text.ndim != 2 or text.is_floating_point() or text.is_complex():
            raise ValueError(f"{self.key} is {_describe(text)}, expected integer token ids [batch, tokens]")
        length = self.context_length(host)
        if text.shape[1] > length:
            raise ValueError(f"{self.key} holds {text.shape[1]} tokens, this model takes at most {length}; truncate it")
        vocabulary = self.vocab_size(host)
        if _may_read(text) and text.numel() and (int(text.min()) < 0 or int(text.max()) >= vocabulary):
            raise ValueError(
                f"{self.key} holds token ids from {int(text.min())} to {int(text.max())}, this model's vocabulary has "
                f"{vocabulary}; was another model's tokenizer used?"
            )


@dataclass(frozen=True)
class Towers:
    """The two towers of a host and the names of its forward's arguments, in order."""

    image: ImageTower
    text: TextTower
    parameters: tuple[str, ...]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Name the arguments of a call of the host."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def inputs(self, image: Tensor, text: Tensor | Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the host for an image and token ids (or the mapping a Hugging Face tokenizer returns)."""
        if isinstance(text, Mapping):
            if "input_ids" not in text:
                raise ValueError(f"text has the entries {sorted(text)}, expected 'input_ids' among them")
            named = {self.text.key if name == "input_ids" else name: value for name, value in text.items()}
            return {self.image.key: image, **{name: named[name] for name in named if name in self.parameters}}
        return {self.image.key: image, self.text.key: text}

    def check(self, host: nn.Module, inputs: Inputs) -> None:
        """Raise ValueError unless the inputs are image and text batches of one size that the host can take."""
        for tower in (self.image, self.text):
            if inputs.get(tower.key) is None:
                raise ValueError(
                    f"{tower.key} is missing: the towers are joined, so every call takes images and sentences; "
                    "for one tower alone use `with pvl_adapter.disable_adapters(model):`"
                )
            tower.check(host, inputs)
        images, sentences = inputs[self.image.key].shape[0], inputs[self.text.key].shape[0]
        if images != sentences:
            raise ValueError(
                f"got {images} images and {sentences} sentences, expected one sentence for each image; repeat the fewer"
            )


# --- open_clip -------------------------------------------------------------------------------------------------------


class OpenClipViT(ImageTower):
    """open_clip's own VisionTransformer."""

    path = "visual.transformer.resblocks"
    key = "image"

    def width(self, host: Any) -> int:
        return int(host.visual.transformer.width)

    def image_size(self, host: Any) -> tuple[int, int]:
        return tuple(host.visual.image_size)

    def patch_size(self, host: Any) -> tuple[int, int]:
        return tuple(host.visual.patch_size)

    def joint_width(self, host: Any) -> int:
        return int(self.width(host) if host.visual.proj is None else host.visual.proj.shape[1])

    def normalization(self, host: Any) -> tuple[RGB, RGB]:
        mean = getattr(host.visual, "image_mean", None) or OPENAI_DATASET_MEAN  # set by open_clip's factory
        std = getattr(host.visual, "image_std", None) or OPENAI_DATASET_STD
        return tuple(mean), tuple(std)

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return host.encode_image(inputs["image"])

    def tokens(self, host: Any, hidden: Tensor) -> Tensor:
        visual = host.visual
        patches = visual.ln_post(hidden)[:, 1:]  # [B, N, W], the class token comes first
        return patches if visual.proj is None else patches @ visual.proj  # [B, N, D]


class OpenClipTextTransformer(TextTower):
    """open_clip's TextTransformer, a module of its own (CustomTextCLIP) at `prefix`."""

    path = "text.transformer.resblocks"
    key = "text"

    def module(self, host: Any) -> Any:
        """What holds ln_final and text_projection."""
        return host.text

    def pooling(self, host: Any) -> tuple[str, int | None]:
        return host.text.pool_type, host.text.eos_id

    def pad_id(self, host: Any) -> int:
        return int(host.text.pad_id)

    def width(self, host: Any) -> int:
        return int(self.module(host).transformer.width)

    def context_length(self, host: Any) -> int:
        return int(self.module(host).context_length)

    def vocab_size(self, host: Any) -> int:
        return int(self.module(host).token_embedding.num_embeddings)

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return host.encode_text(inputs["text"])

    def tokens(self, host: Any, hidden: Tensor) -> Tensor:
        module = self.module(host)
        tokens = module.ln_final(hidden)  # [B, L, W]
        projection = module.text_projection
        if projection is None:
            return tokens
        return projection(tokens) if isinstance(projection, nn.Module) else tokens @ projection  # [B, L, D]

    def real_tokens(self, host: nn.Module, inputs: Inputs) -> Tensor:
        text = inputs["text"]
        pool_type, eos_id = self.pooling(host)
        if pool_type == "argmax":  # the end token has the highest id of the vocabulary
            return through(text.argmax(dim=-1), length=text.shape[1])
        if pool_type == "eos":
            return through((text == eos_id).int().argmax(dim=-1), length=text.shape[1])
        return text != self.pad_id(host)


class OpenClipInlinedText(OpenClipTextTransformer):
    """open_clip's CLIP class, whose text transformer is spread over the host itself."""

    path = "transformer.resblocks"

    def module(self, host: Any) -> Any:
        return host

    def pooling(self, host: Any) -> tuple[str, int | None]:
        return host.text_pool_type, host.text_eos_id

    def pad_id(self, host: Any) -> int:
        return 0

    def check(self, host: nn.Module, inputs: Inputs) -> None:
        super().check(host, inputs)
        length = self.context_length(host)
        if inputs["text"].shape[1] != length:  # the host adds all its positions and its whole mask
            raise ValueError(f"text holds {inputs['text'].shape[1]} tokens, this model takes exactly {length}; pad it")


class OpenClipHFText(TextTower):
    """open_clip's HFTextEncoder around a BERT-like encoder."""

    path = "text.transformer.encoder.layer"
    key = "text"

    def width(self, host: Any) -> int:
        return int(host.text.config.hidden_size)

    def context_length(self, host: Any) -> int:
        return int(host.text.config.max_position_embeddings)

    def vocab_size(self, host: Any) -> int:
        return int(host.text.config.vocab_size)

    def tokenizer_name(self, host: Any) -> str | None:
        return host.text.config._name_or_path or None

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return host.encode_text(inputs["text"])

    def tokens(self, host: Any, hidden: Tensor) -> Tensor:
        return host.text.proj(hidden)  # [B, L, D]

    def real_tokens(self, host: Any, inputs: Inputs) -> Tensor:
        return inputs["text"] != host.text.config.pad_token_id


# --- transformers ----------------------------------------------------------------------------------------------------


class HFClipVision(ImageTower):
    """The image tower of transformers' CLIPModel."""

    path = "vision_model.encoder.layers"
    key = "pixel_values"

    def width(self, host: Any) -> int:
        return int(host.config.vision_config.hidden_size)

    def image_size(self, host: Any) -> tuple[int, int]:
        return (host.config.vision_config.image_size,) * 2

    def patch_size(self, host: Any) -> tuple[int, int]:
        return (host.config.vision_config.patch_size,) * 2

    def joint_width(self, host: Any) -> int:
        return int(host.config.projection_dim)

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return _pooled(host.get_image_features(**_subset(inputs, "pixel_values", "interpolate_pos_encoding")))

    def tokens(self, host: Any, hidden: Tensor) -> Tensor:
        return host.visual_projection(host.vision_model.post_layernorm(hidden)[:, 1:])  # [B, N, D]


class HFClipText(TextTower):
    """The text tower of transformers' CLIPModel."""

    path = "text_model.encoder.layers"
    key = "input_ids"

    def width(self, host: Any) -> int:
        return int(host.config.text_config.hidden_size)

    def context_length(self, host: Any) -> int:
        return int(host.config.text_config.max_position_embeddings)

    def vocab_size(self, host: Any) -> int:
        return int(host.config.text_config.vocab_size)

    def tokenizer_name(self, host: Any) -> str | None:
        return host.name_or_path or None

    def encode(self, host: Any, inputs: Inputs) -> Tensor:
        return _pooled(host.get_text_features(**_subset(inputs, "input_ids", "attention_mask", "position_ids")))

    def tokens(self, host: Any, hidden: Tensor) -> Tensor:
        return host.text_projection(host.text_model.final_layer_norm(hidden))  # [B, L, D]

    def real_tokens(self, host: Any, inputs: Inputs) -> Tensor:
        if inputs.get("attention_mask") is not None:
            return inputs["attention_mask"].bool()
        text, end = inputs["input_ids"], host.config.text_config.eos_token_id
        # An end id of 2 is a known slip in old configurations; the model itself then pools the highest id.
        position = text.argmax(dim=-1) if end == 2 else (text == end).int().argmax(dim=-1)  # [B]
        return through(position, length=text.shape[1])


# --- choosing --------------------------------------------------------------------------------------------------------

SUPPORTED = (
    "open_clip CLIP (native ViT with inlined text), open_clip CustomTextCLIP (native ViT with a TextTransformer or a "
    "Hugging Face BERT) and transformers CLIPModel"
)


def find_towers(model: nn.Module) -> Towers:
    """Say where the two towers of `model` are.

    Raises:
        UnsupportedModelError: If `model` is none of the supported kinds; the message names them.
    """
    libraries = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    if "transformers" in libraries:
        from transformers import CLIPModel

        if isinstance(model, CLIPModel):
            return _towers(model, HFClipVision(), HFClipText())
    if "open_clip" in libraries and hasattr(model, "visual"):
        return _towers(model, _open_clip_image(model), _open_clip_text(model))
    raise _unsupported(model, "it is not a dual tower known to this library")


def _open_clip_image(model: Any) -> ImageTower:
    from open_clip.transformer import VisionTransformer

    if not isinstance(model.visual, VisionTransformer):
        raise _unsupported(model, f"its image tower is a {type(model.visual).__name__}")
    if model.visual.attn_pool is not None:
        raise _unsupported(model, "its image tower pools by attention")
    return OpenClipViT()


def _open_clip_text(model: Any) -> TextTower:
    import open_clip
    from open_clip.hf_model import HFTextEncoder
    from open_clip.transformer import TextTransformer

    if type(model) is open_clip.CLIP:
        return OpenClipInlinedText()
    text = getattr(model, "text", None)
    if isinstance(text, TextTransformer) and text.cls_emb is None:
        return OpenClipTextTransformer()
    if isinstance(text, HFTextEncoder) and text.config.model_type == "bert":
        return OpenClipHFText()
    kind = getattr(getattr(text, "config", None), "model_type", type(text).__name__)
    raise _unsupported(model, f"its text tower is a {kind}")


def _towers(model: nn.Module, image: ImageTower, text: TextTower) -> Towers:
    return Towers(image=image, text=text, parameters=tuple(inspect.signature(type(model).forward).parameters)[1:])


def _unsupported(model: nn.Module, why: str) -> UnsupportedModelError:
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return UnsupportedModelError(f"cannot put adapters into {name}: {why}; supported are {SUPPORTED}")


def through(position: Tensor, *, length: int) -> Tensor:
    """[B, length] bool, True up to and including each row's `position` [B]."""
    return torch.arange(length, device=position.device) <= position[:, None]


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output  # transformers 4 gives a tensor, 5 an object


def _subset(inputs: Inputs, *names: str) -> dict[str, Any]:
    return {name: inputs[name] for name in names if name in inputs}


def _may_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _describe(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
