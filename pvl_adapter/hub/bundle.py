"""Our own folders: a trained `MedCLIPSeg` on disk, whole or without the frozen CLIP.

A folder holds `model.safetensors`, `config.json`, the tokenizer and a model card. The configuration is repeated in the
metadata of the weights, so that files of two saves cannot be mixed.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pvl_adapter.config import MedCLIPSegConfig, PVLConfig
from pvl_adapter.hub.backbones import build_backbone, describe_backbone, fetch_backbone, fingerprint
from pvl_adapter.hub.download import Hub
from pvl_adapter.hub.model_card import model_card
from pvl_adapter.hub.released import fill
from pvl_adapter.hub.tokenizers import FOLDER as TOKENIZER_FOLDER
from pvl_adapter.hub.tokenizers import restore_tokenizer, save_tokenizer
from pvl_adapter.injection import inject_adapters, lockstep_of
from pvl_adapter.lockstep import ADAPTERS
from pvl_adapter.segmentation import MedCLIPSeg
from pvl_adapter.serialization import check_tensors
from pvl_adapter.tokenization import Tokenizer, find_tokenizer

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PATTERNS = (WEIGHTS_FILE, CONFIG_FILE, f"{TOKENIZER_FOLDER}/*", "README.md")
_FORMAT = "pvl_adapter.MedCLIPSeg"
_VERSION = 1

logger = logging.getLogger(__name__)


def save_bundle(
    model: MedCLIPSeg, folder: str | os.PathLike[str], *, whole: bool = True, card: Mapping[str, Any] | None = None
) -> Path:
    """Write a model; see `MedCLIPSeg.save_pretrained`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder to save into")
    description = describe(model, whole=whole)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if whole or not is_frozen(name)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written beside the folder first, so that a full disk or a kill leaves the folder as it was.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part") as temporary:
        new = Path(temporary)
        new.chmod(0o755)
        description["tokenizer"] = _save_tokenizer(model, new)
        text = json.dumps(description, indent=2) + "\n"
        write_tensors(new / WEIGHTS_FILE, tensors, metadata={_FORMAT: text})
        (new / CONFIG_FILE).write_text(text)
        (new / "README.md").write_text(model_card(model, description, **(card or {})))
        folder.mkdir(exist_ok=True)
        for file in sorted(path for path in new.rglob("*") if path.is_file()):
            target = folder / file.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    return folder


def describe(model: MedCLIPSeg, *, whole: bool) -> dict[str, Any]:
    """What `config.json` holds, but for the tokenizer.

    Raises:
        ValueError: If the whole model is wanted and its CLIP does not tell what it is.
    """
    try:
        backbone = describe_backbone(model.clip)
    except ValueError:
        if whole:
            raise
        backbone = {}
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "whole": whole,
        "model": model.config.to_dict(),
        "adapters": lockstep_of(model.clip).config.to_dict(),
        "backbone": backbone,
        "backbone_fingerprint": fingerprint(model.clip),
        "origin": dict(model.origin),
    }


def is_bundle(folder: Path) -> bool:
    """Whether a folder was written by `save_bundle`."""
    try:
        return json.loads((folder / CONFIG_FILE).read_text())["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_bundle(
    folder: Path,
    *,
    clip: nn.Module | None,
    tokenizer: Tokenizer | None,
    hub: Hub,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> MedCLIPSeg:
    """Read what `save_bundle` wrote; see `from_pretrained`."""
    text, description = _read_description(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; save or fetch the folder again")
    whole = description["whole"]
    if whole and clip is not None:
        raise ValueError(f"{folder} holds a whole model, its CLIP included; clip=... is for folders without one")
    try:
        with safe_open(weights, framework="pt") as opened:
            own = (opened.metadata() or {}).get(_FORMAT)
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged ({error}); save or fetch it again") from error
    if own is not None and json.loads(own) != json.loads(text):
        raise ValueError(f"{folder / CONFIG_FILE} and {weights} are of different saves; save or fetch them again")
    if clip is None:
        clip = build_backbone(description["backbone"]) if whole else fetch_backbone(description["backbone"], hub=hub)
    if not whole and fingerprint(clip) != description["backbone_fingerprint"]:
        raise ValueError(
            "the adapters were trained on a CLIP with other weights than this one's; give that CLIP, in float32 or "
            "bfloat16"
        )
    config = PVLConfig.from_dict(description["adapters"])
    meta = next(clip.parameters()).is_meta
    model_config = MedCLIPSegConfig.from_dict(description["model"])
    with torch.device("meta" if meta else "cpu"):
        model = MedCLIPSeg(inject_adapters(clip, config), config=model_config)
    model.tokenizer = tokenizer or restore_tokenizer(description["tokenizer"], folder)
    model.origin = description["origin"]
    tensors = read_tensors(weights, device="cpu" if not meta else device, dtype=dtype if meta else None)
    if meta:
        fill(model, tensors, source=weights)
    else:
        expected = model.state_dict()
        check_tensors(
            tensors, {name: expected[name] for name in expected if whole or not is_frozen(name)}, source=weights
        )
        model.load_state_dict(tensors, strict=False)
        cast(model, device=device, dtype=dtype)
    return model.eval()


def is_frozen(name: str) -> bool:
    """Whether a tensor of `MedCLIPSeg.state_dict()` is the CLIP's own."""
    return name.startswith("clip.") and not name.startswith(f"clip.{ADAPTERS}.")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write safetensors; tensors that share memory are written once each."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        separate[name] = own.clone() if own.data_ptr() in seen else own
        seen.add(own.data_ptr())
    save_file(separate, path, metadata={"format": "pt", **metadata})


def read_tensors(
    path: Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file: mapped from it on the CPU, and else moved and cast one after another.

    Args:
        path: The file.
        device: Where to; None means the CPU.
        dtype: Of the frozen CLIP's weights; None leaves them as they are. Adapters and head keep their own.

    Raises:
        ValueError: If the file is damaged.
    """
    target = torch.device(device or "cpu")
    try:
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            if target.type == "cpu" and dtype is None:
                return {name: opened.get_tensor(name) for name in names}
        tensors = {}
        for name in names:
            with safe_open(path, framework="pt") as opened:  # opened anew, so that the pages read are given back
                tensor = opened.get_tensor(name)
                wanted = dtype if is_frozen(name) and tensor.is_floating_point() else None
                tensors[name] = tensor.to(target, wanted or tensor.dtype, copy=True)
        return tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch or save it again") from error


def cast(model: MedCLIPSeg, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Move a model, and cast its frozen CLIP."""
    model.to(device)
    if dtype is not None:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if is_frozen(name) and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _save_tokenizer(model: MedCLIPSeg, folder: Path) -> dict[str, Any] | None:
    tokenizer = model.tokenizer
    if tokenizer is None:
        try:
            tokenizer = find_tokenizer(model.clip)
        except (ValueError, OSError) as error:
            logger.warning("saved without a tokenizer (%s); give one when loading", error)
            return None
    description = save_tokenizer(tokenizer, folder)
    if description is None:
        logger.warning("a %s cannot be saved; give it again when loading", type(tokenizer).__name__)
    return description


def _read_description(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text()
        description = json.loads(text)
        for entry in ("whole", "model", "adapters", "backbone", "backbone_fingerprint", "tokenizer", "origin"):
            description[entry]
        version = description["version"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of a MedCLIPSeg ({error!r}); save or fetch it again") from error
    if version != _VERSION:
        raise ValueError(
            f"{path} has version {version}, expected {_VERSION}; use the release of pvl_adapter that wrote it"
        )
    return text, description
