"""Adapters alone on disk: `save_adapters` and `load_adapters`. Frozen weights are never written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from pvl_adapter.adapter import PVLAdapter
from pvl_adapter.atomic import replace_files
from pvl_adapter.config import PVLConfig
from pvl_adapter.hub.download import Hub, find_local
from pvl_adapter.hub.weights import check_sizes, check_tensors, read_description, read_tensors, write_described
from pvl_adapter.injection import inject_adapters
from pvl_adapter.lockstep import ADAPTERS, lockstep_of
from pvl_adapter.towers import find_towers

WEIGHTS_FILE = "pvl_adapters.safetensors"
CONFIG_FILE = "pvl_config.json"
_KIND = "pvl_adapter"

_Host = TypeVar("_Host", bound=nn.Module)


def save_adapters(clip: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the adapters of an injected model, and what is needed to put them into a fresh one.

    Args:
        clip: An injected model.
        folder: Made if it is missing. If the process is killed, it holds the old adapters or the new ones.
    """
    description = {"config": lockstep_of(clip).config.to_dict(), "host": _host_shape(clip)}
    tensors = getattr(clip, ADAPTERS).state_dict()
    folder = Path(folder)
    with replace_files(folder, truth=WEIGHTS_FILE) as new:
        write_described(new / WEIGHTS_FILE, new / CONFIG_FILE, tensors, kind=_KIND, description=description)
    return folder


def load_adapters(clip: _Host, folder_or_hub_id: str | os.PathLike[str], *, revision: str | None = None) -> _Host:
    """Load what `save_adapters` wrote, injecting adapters first if the model has none.

    Args:
        clip: A model of the kind the adapters were trained on.
        folder_or_hub_id: A local folder, or `owner/name` of a Hugging Face hub repository.
        revision: Of the hub repository.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or does not fit the model. The model is then unchanged.
    """
    hub = Hub(revision=revision)
    local = find_local(folder_or_hub_id, hub=hub)
    folder = local or hub.folder(str(folder_or_hub_id), (WEIGHTS_FILE, CONFIG_FILE))
    weights = folder / WEIGHTS_FILE
    description = read_description(weights, folder / CONFIG_FILE, kind=_KIND, entries=("config", "host"))
    config = PVLConfig.from_dict(description["config"])
    if (host := _host_shape(clip)) != description["host"]:
        raise ValueError(f"the adapters were trained on a model with {description['host']}, this one has {host}")
    tensors = read_tensors(weights)
    check_sizes({"layers": len(config.layers or ()), "dim": config.dim}, tensors, source=weights)
    tensors = check_tensors(tensors, adapter_shapes(clip, config), source=weights)
    if not hasattr(clip, ADAPTERS):
        inject_adapters(clip, config)
    elif lockstep_of(clip).config != config:
        raise ValueError(f"the model has adapters with {lockstep_of(clip).config}, the file holds {config}")
    getattr(clip, ADAPTERS).load_state_dict(tensors)
    return clip


def adapter_shapes(clip: nn.Module, config: PVLConfig) -> dict[str, Tensor]:
    """What the adapters of a model with explicit `config.layers` hold, on the meta device."""
    towers = find_towers(clip)
    with torch.device("meta"):
        widths = (towers.image.width(clip), towers.text.width(clip))
        adapter = PVLAdapter(*widths, config.dim, learn_beta=config.learn_beta).state_dict()
    return {f"{index}.{name}": tensor for index in range(len(config.layers or ())) for name, tensor in adapter.items()}


def _host_shape(clip: nn.Module) -> dict[str, int]:
    """What of a host decides whether adapters fit it."""
    towers = find_towers(clip)
    return {
        "image_depth": len(towers.image.blocks(clip)),
        "image_width": towers.image.width(clip),
        "text_depth": len(towers.text.blocks(clip)),
        "text_width": towers.text.width(clip),
    }
