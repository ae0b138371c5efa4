"""Where each CLIP family keeps its two stacks of blocks, its sizes and its projections; `find_towers` looks a model up.

A new family is a row in the tables of huggingface.py, or a subclass of `ImageTower` or `TextTower` in openclip.py.
"""

from __future__ import annotations

import inspect

from torch import nn

from pvl_adapter.towers.base import ImageTower, Inputs, TextTower, Tower, Towers

__all__ = ["ImageTower", "Inputs", "TextTower", "Tower", "Towers", "UnsupportedModelError", "find_towers"]


class UnsupportedModelError(TypeError):
    """The model does not have two towers of blocks that can run in lockstep."""


def find_towers(model: nn.Module) -> Towers:
    """Look up the two towers of `model`.

    Raises:
        UnsupportedModelError: If `model` is not of a supported kind; the message names those that are.
    """
    from pvl_adapter.towers import huggingface, openclip

    libraries = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    image: ImageTower | str
    text: TextTower | str
    if "transformers" in libraries:
        image, text = huggingface.find(model)
    elif "open_clip" in libraries and hasattr(model, "visual"):
        image, text = openclip.image_tower(model), openclip.text_tower(model)
    else:
        image = text = "it is not an open_clip or transformers model with two towers"
    reasons = [tower if isinstance(tower, str) else tower.unsupported_reason(model) for tower in (image, text)]
    if isinstance(image, str) or isinstance(text, str) or any(reasons):
        raise UnsupportedModelError(
            f"cannot put adapters into {type(model).__module__}.{type(model).__qualname__}: "
            f"{next(filter(None, reasons))}; supported are open_clip's CLIP, CustomTextCLIP and CoCa with a native ViT "
            f"or a timm transformer and with its own or a Hugging Face ({', '.join(openclip.HF_TEXT)}) text tower, "
            f"transformers' {', '.join(huggingface.FAMILIES)} and VisionTextDualEncoderModel over "
            f"{', '.join(huggingface.DUAL_IMAGE)} with {', '.join(huggingface.DUAL_TEXT)}"
        )
    return Towers(image=image, text=text, parameters=tuple(inspect.signature(type(model).forward).parameters)[1:])
