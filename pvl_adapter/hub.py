"""The released MedCLIPSeg checkpoints: how their tensors are named, and what they are called here.

Source: github HealthX-Lab/MedCLIPSeg, commit 8d7ef36. Each released checkpoint holds the whole network, frozen CLIP
included, as `MedCLIPSeg` on an open_clip CustomTextCLIP with a native ViT and a Hugging Face BERT.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

RELEASED_NAMES: tuple[tuple[str, str], ...] = (
    ("logit_scale", "clip.logit_scale"),
    ("vision_model.", "clip.visual."),
    ("text_model.", "clip.text."),
    ("pvl_adapters.", "clip.pvl_adapters."),
    ("mask_head.", "head.mask_head."),
    ("upscale.", "head.upscale."),
)
"""Released prefix and ours, for every tensor of a checkpoint."""

RELEASED_ADAPTER_PARTS: tuple[tuple[str, str], ...] = (
    (".proj_vis_down.0.", ".vision_down."),
    (".proj_txt_down.", ".text_down."),
    (".proj_vis_up.", ".vision_up."),
    (".proj_txt_up.", ".text_up."),
    (".two_way.cross_attn_img_to_txt.", ".two_way.image_to_text."),
    (".two_way.cross_attn_txt_to_img.", ".two_way.text_to_image."),
)
"""Released part and ours, within the names of an adapter."""


def rename_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict under the names of `MedCLIPSeg`.

    Raises:
        ValueError: If a name belongs to no part of the released network.
    """
    return {released_to_ours(name): tensor for name, tensor in tensors.items()}


def released_to_ours(name: str) -> str:
    """The name in `MedCLIPSeg` of a released tensor.

    Raises:
        ValueError: If the name belongs to no part of the released network.
    """
    for released, ours in RELEASED_NAMES:
        if name.startswith(released):
            renamed = ours + name[len(released) :]
            break
    else:
        raise ValueError(f"{name!r} is no tensor of a released MedCLIPSeg checkpoint")
    if released == "pvl_adapters.":
        for released, ours in RELEASED_ADAPTER_PARTS:
            renamed = renamed.replace(released, ours)
    return renamed
