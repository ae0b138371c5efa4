"""Adapters on disk: safetensors and JSON, written atomically, checked before anything is loaded.

A folder holds `pvl_adapters.safetensors` and `pvl_config.json`. Frozen weights are never written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pvl_adapter.atomic import write_atomically
from pvl_adapter.config import PVLConfig
from pvl_adapter.injection import inject_adapters, remove_adapters
from pvl_adapter.lockstep import ADAPTERS, lockstep_of
from pvl_adapter.towers import find_towers

WEIGHTS_FILE = "pvl_adapters.safetensors"
CONFIG_FILE = "pvl_config.json"
_DESCRIPTION = "pvl_adapter"  # the entry of the weights file's metadata that repeats the configuration

_Host = TypeVar("_Host", bound=nn.Module)


def save_adapters(clip: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the adapters of an injected model, and what is needed to put them into a fresh one.

    Args:
        clip: An injected model.
        folder: Made if it is missing. Each file is replaced at once or not at all.

    Returns:
        The folder.
    """
    lockstep = lockstep_of(clip)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in getattr(clip, ADAPTERS).state_dict().items()}
    description = json.dumps({"config": lockstep.config.to_dict(), "host": _host_shape(clip)}, indent=2) + "\n"
    metadata = {"format": "pt", _DESCRIPTION: description}  # so that files of two saves cannot be mixed
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata=metadata))
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(description))
    return folder


def load_adapters(clip: _Host, folder_or_hub_id: str | os.PathLike[str], *, revision: str | None = None) -> _Host:
    """Load what `save_adapters` wrote, injecting adapters first if the model has none.

    Args:
        clip: A model of the kind the adapters were trained on.
        folder_or_hub_id: A local folder, or `owner/name` of a Hugging Face hub repository.
        revision: Of the hub repository.

    Returns:
        The same object.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or does not fit the model. The model is then unchanged.
    """
    weights_path, config_path = _locate(folder_or_hub_id, revision=revision)
    description, config, saved_host = _read_description(config_path)
    try:
        with safe_open(weights_path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
            own_description = (opened.metadata() or {}).get(_DESCRIPTION)
    except SafetensorError as error:
        raise ValueError(f"{weights_path} is damaged ({error}); fetch or save it again") from error
    host = _host_shape(clip)
    if host != saved_host:
        raise ValueError(f"the adapters were trained on a model with {saved_host}, this one has {host}")
    fresh = not hasattr(clip, ADAPTERS)
    if fresh:
        inject_adapters(clip, config)
    elif lockstep_of(clip).config != config:
        raise ValueError(f"the model has adapters with {lockstep_of(clip).config}, the file holds {config}")
    adapters = getattr(clip, ADAPTERS)
    try:
        check_tensors(tensors, adapters.state_dict(), source=weights_path)
        if own_description is not None and json.loads(own_description) != description:
            raise ValueError(
                f"{config_path} and {weights_path} are of different saves (one was interrupted, or a file was edited); "
                "fetch or save them again"
            )
    except ValueError:
        if fresh:
            remove_adapters(clip)
        raise
    adapters.load_state_dict(tensors)
    return clip


def check_tensors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: object) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: If any differ; the message names them.
    """
    faults = []
    if missing := sorted(set(expected) - set(got)):
        faults.append(f"missing {missing[:5]}" + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""))
    if unexpected := sorted(set(got) - set(expected)):
        faults.append(
            f"unexpected {unexpected[:5]}" + (f" and {len(unexpected) - 5} more" if len(unexpected) > 5 else "")
        )
    misshapen = [
        f"{name} has shape {tuple(got[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(set(got) & set(expected))
        if got[name].shape != expected[name].shape
    ]
    faults += misshapen[:5] + ([f"and {len(misshapen) - 5} more shapes"] if len(misshapen) > 5 else [])
    if faults:
        raise ValueError(f"the tensors of {source} do not fit: {'; '.join(faults)}")


def _host_shape(clip: nn.Module) -> dict[str, int]:
    """What of a host decides whether adapters fit it."""
    towers = find_towers(clip)
    return {
        "image_depth": len(towers.image.blocks(clip)),
        "image_width": towers.image.width(clip),
        "text_depth": len(towers.text.blocks(clip)),
        "text_width": towers.text.width(clip),
    }


def _read_description(path: Path) -> tuple[dict[str, Any], PVLConfig, dict[str, int]]:
    """What the file says, and its two parts."""
    try:
        description = json.loads(path.read_text())
        return description, PVLConfig.from_dict(description["config"]), description["host"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no adapter configuration ({error!r}); fetch or save it again") from error


def _locate(folder_or_hub_id: str | os.PathLike[str], *, revision: str | None) -> tuple[Path, Path]:
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        paths = folder / WEIGHTS_FILE, folder / CONFIG_FILE
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; expected a folder that save_adapters has written")
        return paths
    if not isinstance(folder_or_hub_id, str) or folder_or_hub_id.count("/") != 1:
        raise FileNotFoundError(f"{folder_or_hub_id} is no folder, nor the owner/name of a hub repository")
    from huggingface_hub import hf_hub_download

    weights = hf_hub_download(folder_or_hub_id, WEIGHTS_FILE, revision=revision)
    config = hf_hub_download(folder_or_hub_id, CONFIG_FILE, revision=revision)
    return Path(weights), Path(config)
