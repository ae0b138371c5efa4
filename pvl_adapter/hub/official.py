"""The official MedCLIPSeg network: its sizes and settings, its names for tensors, and how its files are read safely.

Source: github HealthX-Lab/MedCLIPSeg, commit 8d7ef36. Each published checkpoint holds the whole network, frozen CLIP
included: UniMedCLIP's native ViT with QuickGELU and its Hugging Face BERT, as open_clip names them.
"""

from __future__ import annotations

import errno
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from pvl_adapter.config import JSONConfig, MedCLIPSegConfig, PVLConfig
from pvl_adapter.hub.download import first_line, known_sha256
from pvl_adapter.hub.weights import check_tensors
from pvl_adapter.injection import inject_adapters
from pvl_adapter.segmentation import MedCLIPSeg

OFFICIAL_TOKENIZER = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

OFFICIAL_NAMES: tuple[tuple[str, str], ...] = (
    ("logit_scale", "clip.logit_scale"),
    ("vision_model.", "clip.visual."),
    ("text_model.", "clip.text."),
    ("pvl_adapters.", "clip.pvl_adapters."),
    ("mask_head.", "head.mask_head."),
    ("upscale.", "head.upscale."),
)
"""Official prefix and ours, for every tensor of a checkpoint."""

OFFICIAL_ADAPTER_PARTS: tuple[tuple[str, str], ...] = (
    (".proj_vis_down.0.", ".vision_down."),
    (".proj_txt_down.", ".text_down."),
    (".proj_vis_up.", ".vision_up."),
    (".proj_txt_up.", ".text_up."),
    (".two_way.cross_attn_img_to_txt.", ".two_way.image_to_text."),
    (".two_way.cross_attn_txt_to_img.", ".two_way.text_to_image."),
)
"""Official part and ours, within the names of an adapter."""


@dataclass(frozen=True)
class OfficialConfig(JSONConfig):
    """Sizes and settings of a network of the official code; the defaults are those of the published weights.

    Sizes of images and patches are in pixels per side. Sentences are padded to `context_length`, at most `positions`,
    tokens. `layers`, `adapter_dim` and `beta` are those of `PVLConfig`, `num_upscale` is that of `MedCLIPSegConfig`.
    """

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_intermediate: int = 3072
    joint_width: int = 512
    vocab_size: int = 30522
    context_length: int = 256
    positions: int = 512
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_intermediate: int = 3072
    layers: tuple[int, ...] | None = None
    adapter_dim: int = 256
    beta: float = 2.35
    num_upscale: int = 2

    def build_clip(self) -> nn.Module:
        """The CLIP alone, on the meta device: without memory, and without values."""
        from open_clip import CustomTextCLIP
        from open_clip.hf_model import HFTextEncoder
        from transformers import BertConfig

        vision: dict[str, float] = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "layers": self.vision_layers,
        }
        vision |= {"width": self.vision_width, "head_width": self.vision_width // self.vision_heads}
        vision |= {"mlp_ratio": self.vision_intermediate / self.vision_width}
        sizes = {"vocab_size": self.vocab_size, "max_position_embeddings": self.positions}
        sizes |= {"num_hidden_layers": self.text_layers, "num_attention_heads": self.text_heads}
        sizes |= {"hidden_size": self.text_width, "intermediate_size": self.text_intermediate}
        text = BertConfig(**sizes, pad_token_id=0)
        text._name_or_path = OFFICIAL_TOKENIZER
        with torch.device("meta"):
            replaced = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
            clip = CustomTextCLIP(self.joint_width, vision, replaced, quick_gelu=True)
            pooling = {"pooler_type": "cls_last_hidden_state_pooler", "proj_type": "mlp"}
            clip.text = HFTextEncoder("", self.joint_width, config=text, **pooling)
        clip.text.transformer.pooler = None  # the class token is taken as it is
        clip.visual.image_mean, clip.visual.image_std = IMAGENET_MEAN, IMAGENET_STD
        return clip.eval()

    def build(self) -> MedCLIPSeg:
        """The whole network, on the meta device, in eval mode; `load_meta_state` gives it values."""
        adapters = PVLConfig(layers=self.layers, dim=self.adapter_dim, beta=self.beta, mask_padding=False)
        opencv: Any = {"channel_order": "BGR", "resize": "opencv_bilinear"}  # reads images so, never converted
        text: Any = {"context_length": self.context_length, "clean_prompts": True}
        normalised: Any = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
        config = MedCLIPSegConfig(num_upscale=self.num_upscale, **opencv, **text, **normalised)
        with torch.device("meta"):
            return MedCLIPSeg(inject_adapters(self.build_clip(), adapters), config=config).eval()


def load_meta_state(model: nn.Module, tensors: Mapping[str, Tensor], *, source: object) -> None:
    """Give values to a model on the meta device; ValueError, and no change, if they do not fit.

    The tensors become the model's own, without a copy.
    """
    model.load_state_dict(check_tensors(tensors, model.state_dict(), source=source), assign=True)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # BERT's, which no checkpoint holds
            parent, _, part = name.rpartition(".")
            values = torch.arange(buffer.shape[-1]) if part == "position_ids" else torch.zeros((), dtype=buffer.dtype)
            if part not in ("position_ids", "token_type_ids"):
                raise RuntimeError(f"the text tower has a buffer {name!r} that is in no checkpoint; please report this")
            model.get_submodule(parent).register_buffer(part, values.expand(buffer.shape).clone(), persistent=False)


def read_official(path: Path) -> dict[str, Tensor]:
    """The tensors of an official checkpoint under the names of `MedCLIPSeg`; ValueError if it is damaged or none."""
    checkpoint = unpickle(path)
    if not isinstance(checkpoint, Mapping) or "model" not in checkpoint:
        found = sorted(map(str, checkpoint))[:5] if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"{path} is no official checkpoint: expected a dict with the entry 'model', found {found}")
    return rename_official(state_dict(checkpoint["model"], source=path))


def unpickle(path: Path) -> Any:
    """What a .pt or .pth file holds, by torch's weights-only unpickler, which runs no code of the file.

    A file of the hub's cache is mapped rather than read. Any other may be written over while the model lives, as by the
    training that began with it, and reading a mapping of it would then end the process.

    Raises:
        ValueError: If the file is damaged, or holds anything but tensors and plain data.
    """
    mapped = known_sha256(path) is not None and zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (
        UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch seeks before a truncated file's start
            raise
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds more than tensors and plain data ({found[1]}), which could run code when loaded. It was "
                "refused and nothing was run; take the file from where it was published"
            ) from error
        # torch's message is advice to load without its safeguard
        reason = "nothing of it was run" if isinstance(error, UnpicklingError) else first_line(error)
        raise ValueError(f"{path} is damaged or no torch file ({reason}); fetch it again") from error


def state_dict(value: object, *, source: object) -> dict[str, Tensor]:
    """`value` if it maps names to plain floating-point tensors of finite numbers, else ValueError."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{source}: expected tensors by name, found a {type(value).__name__} without them")
    for name, tensor in value.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            found = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{source}: expected a floating-point tensor under {name!r}, found {found}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: tensor {name!r} holds NaN or infinite values, expected finite numbers")
    return {name: tensor.detach() for name, tensor in value.items()}


def rename_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under the names of `MedCLIPSeg`; unknown names stay as they are."""
    return {official_to_ours(name): tensor for name, tensor in tensors.items()}


def official_to_ours(name: str) -> str:
    """The name in `MedCLIPSeg` of an official tensor."""
    for official, ours in OFFICIAL_NAMES:
        if name.startswith(official):
            renamed = ours + name[len(official) :]
            for part, our_part in OFFICIAL_ADAPTER_PARTS if official == "pvl_adapters." else ():
                renamed = renamed.replace(part, our_part)
            return renamed
    return name
