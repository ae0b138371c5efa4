"""Where the two towers of a CLIP are: one small entry for each family, `find_towers` to choose.

A new family is a row in huggingface.py's tables, or a subclass of `ImageTower` or `TextTower` in openclip.py.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import nn

from pvl_adapter.towers.base import ImageTower, Inputs, TextTower, Tower, Towers

__all__ = ["ImageTower", "Inputs", "TextTower", "Tower", "Towers", "UnsupportedModelError", "find_towers"]


class UnsupportedModelError(TypeError):
    """The model is no dual tower whose blocks can be run in lockstep."""


def find_towers(model: nn.Module) -> Towers:
    """Say where the two towers of `model` are.

    Raises:
        UnsupportedModelError: If `model` is none of the supported kinds; the message names them.
    """
    libraries = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    if "transformers" in libraries:
        from pvl_adapter.towers import huggingface

        image, text = huggingface.find(model)
    elif "open_clip" in libraries and hasattr(model, "visual"):
        from pvl_adapter.towers import openclip

        image, text = openclip.image_tower(model), openclip.text_tower(model)
    else:
        image = text = "it is no open_clip or transformers model with two towers"
    for tower in (image, text):
        reason = tower if isinstance(tower, str) else tower.unsupported_reason(model)
        if reason is not None:
            raise UnsupportedModelError(_refusal(model, reason))
    parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
    return Towers(image=cast(ImageTower, image), text=cast(TextTower, text), parameters=parameters)


def _refusal(model: Any, reason: str) -> str:
    from pvl_adapter.towers import huggingface, openclip

    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return (
        f"cannot put adapters into {name}: {reason}; supported are open_clip's CLIP, CustomTextCLIP and CoCa with a "
        f"native ViT or a timm transformer and with an own or Hugging Face ({', '.join(openclip.HF_TEXT)}) text tower, "
        f"transformers' {', '.join(huggingface.FAMILIES)} and VisionTextDualEncoderModel over "
        f"{', '.join(huggingface.DUAL_IMAGE)} with {', '.join(huggingface.DUAL_TEXT)}"
    )
