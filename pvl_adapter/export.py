"""Export to ONNX: both joined towers, the adapters and the pixel head as one graph, by torch.export.

Shape alphabet: B batch, A adapters, V image tokens, L text tokens, C adapter width, H W pixels.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from pvl_adapter.adapter import NoisePair
from pvl_adapter.atomic import replace_files
from pvl_adapter.joint import SharedPrefix, eval_mode
from pvl_adapter.lockstep import lockstep_of
from pvl_adapter.segmentation import MedCLIPSeg, Prompts
from pvl_adapter.wrappers import is_sharded

_BATCH, _TOKENS = 2, 8  # to trace with: torch.export takes sizes of 1, and as many tokens as positions, for constants


def export_onnx(model: MedCLIPSeg, path: str | os.PathLike[str], *, text: Prompts = "a", noise: bool = True) -> Path:
    """Write a segmenter as an ONNX file, which runs without torch and without this library.

    The graph takes `image` [B, 3, H, W] as `model.prepare` makes it, `input_ids` [B, L] as `model.tokenize` does (and
    what else its mapping holds, such as `attention_mask`), `image_noise` [B, A, V, C] and `text_noise` [B, A, L, C]:
    standard normal numbers for one sample, zeros for the mean pass. It returns `logits` [B, H, W], whose sigmoid is
    the sample's probability. B is free, and L where the text tower takes sentences of any length.

    It computes in float32 and eval mode, whatever the model's type, device and mode, which stay as they are. Needs the
    extra "onnx".

    Args:
        model: The segmenter itself, in no wrapper of another library.
        path: The file, replaced in one step when all is written; missing folders are made. Weights of more than 1.5 GiB
            go into a second file, of the same name with ".data" appended.
        text: An example of the sentences or token ids to come; the names in its mapping become inputs.
        noise: Whether there are inputs for noise; if not, the graph is the mean pass.

    Returns:
        The file.

    Raises:
        ImportError: If the extra is not installed.
        TypeError: If `model` is no segmenter.
        ValueError: If `path` is a folder, the model is sharded, or the model takes no such text.
    """
    path = Path(path)
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ImportError(f'{" and ".join(missing)} not installed: pip install "pvl-adapter[onnx]"')
    if not isinstance(model, MedCLIPSeg):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a MedCLIPSeg: wrap a CLIP as MedCLIPSeg(clip), and take a "
            "segmenter out of the wrapper of another library (torch.compile: model._orig_mod, DDP: model.module)"
        )
    if any(is_sharded(module) for module in model.modules()):
        raise ValueError("fully_shard has spread the model's weights; export it in one process without fully_shard")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file such as {path / 'model.onnx'}")
    if any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in model.parameters()):
        model = copy.deepcopy(model).to("cpu", torch.float32)

    autocast_off = torch.autocast("cpu", enabled=False)
    with lockstep_of(model.clip).exclusive(), eval_mode(model), torch.no_grad(), autocast_off:
        inputs, free = _example(model, text, noise=noise)
        graph = _Graph(model, tuple(inputs)).eval()
        program = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=(free,), strict=False)
        exported: Any = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=({0: "batch"}, {1: "tokens"}, *({} for _ in free[2:])),  # their names
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    for node in exported.model.graph:
        node.metadata_props.clear()  # stack traces, with paths of this machine
    with replace_files(path.parent, truth=path.name) as folder:
        exported.save(folder / path.name)
    return path


class _Graph(nn.Module):
    """A segmenter's forward on tensors alone; logits [B, H, W]."""

    def __init__(self, model: MedCLIPSeg, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        text = dict(zip(self.names, inputs, strict=True))
        image, noise = text.pop("image"), None
        if "image_noise" in text:
            image_noise, text_noise = text.pop("image_noise"), text.pop("text_noise")
            noise = [NoisePair(*pair) for pair in zip(image_noise.unbind(1), text_noise.unbind(1), strict=True)]
        return self.model(image, text, sample=noise is not None, noise=noise).logits


def _example(model: MedCLIPSeg, text: Prompts, *, noise: bool) -> tuple[dict[str, Tensor], tuple[dict[int, Any], ...]]:
    """Inputs to trace with, by name, and the free axes of each."""
    lockstep, tokens = lockstep_of(model.clip), model.tokenize(text)
    tower, adapters, dim = lockstep.towers.text, len(lockstep.points), lockstep.config.dim
    is_free, limit = tower.variable_length(model.clip), tower.context_length(model.clip) or 2 * _TOKENS
    length = min(_TOKENS, limit - 1) if is_free else limit
    batch, both = {0: Dim.DYNAMIC}, dict.fromkeys((0, 1) if is_free else (0,), Dim.DYNAMIC)

    inputs, free = {"image": torch.zeros(_BATCH, 3, *model.image_size)}, [batch]
    for name, ids in lockstep.towers.text_inputs(tokens).items():
        inputs["input_ids" if name == tower.key else name] = torch.ones(_BATCH, length, dtype=ids.dtype)
        free.append(both)
    if noise:
        found = SharedPrefix(model.clip, inputs["image"][:1], tokens).prefix
        inputs["image_noise"] = torch.zeros(_BATCH, adapters, found.image.tokens, dim)
        inputs["text_noise"] = torch.zeros(_BATCH, adapters, length, dim)
        free += [batch, {2 * axis: hint for axis, hint in both.items()}]
    return inputs, tuple(free)
