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
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pvl_adapter.config import MedCLIPSegConfig, PVLConfig
from pvl_adapter.hub.adapter_folder import check_tensors
from pvl_adapter.hub.backbones import build_backbone, describe_backbone, fetch_backbone, fingerprint
from pvl_adapter.hub.download import Hub
from pvl_adapter.hub.model_card import model_card
from pvl_adapter.hub.official import load_meta_state
from pvl_adapter.hub.tokenizers import FOLDER as TOKENIZER_FOLDER
from pvl_adapter.hub.tokenizers import restore_tokenizer, save_tokenizer
from pvl_adapter.injection import inject_adapters, remove_adapters
from pvl_adapter.lockstep import ADAPTERS, lockstep_of
from pvl_adapter.segmentation import MedCLIPSeg
from pvl_adapter.tokenization import Tokenizer, find_tokenizer

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PATTERNS = (WEIGHTS_FILE, CONFIG_FILE, f"{TOKENIZER_FOLDER}/*", "README.md")
_FORMAT = "pvl_adapter.MedCLIPSeg"
_VERSION = 1

logger = logging.getLogger(__name__)


def save_checkpoint_folder(
    model: MedCLIPSeg, folder: str | os.PathLike[str], *, whole: bool = True, card: Mapping[str, Any] | None = None
) -> Path:
    """Write a model; see `MedCLIPSeg.save_pretrained`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder to save into")
    description = describe(model, whole=whole)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if whole or not is_frozen(name)}
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Everything is written aside first, so that a full disk or a kill leaves the files of the folder as they were.
        # Within the folder, for another place may be of another file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".part") as temporary:
            new = Path(temporary)
            description["tokenizer"] = _save_tokenizer(model, new)
            text = json.dumps(description, indent=2) + "\n"
            write_tensors(new / WEIGHTS_FILE, tensors, metadata={_FORMAT: text})
            (new / CONFIG_FILE).write_text(text, encoding="utf-8")
            (new / "README.md").write_text(model_card(model, description, **(card or {})), encoding="utf-8")
            (new / WEIGHTS_FILE).chmod((new / CONFIG_FILE).stat().st_mode)  # safetensors lets nobody else read
            _replace(folder, new)
    except BaseException:
        with suppress(OSError):
            for place in made:
                place.rmdir()
        raise
    return folder


def _replace(folder: Path, new: Path) -> None:
    """Move every file of `new` to its place in `folder`, and remove what an earlier tokenizer has left there."""
    files = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (new / file).replace(folder / file)
    for old in (folder / TOKENIZER_FOLDER).glob("*"):
        if old.is_file() and old.relative_to(folder) not in files:
            old.unlink()


def describe(model: MedCLIPSeg, *, whole: bool) -> dict[str, Any]:
    """What `config.json` holds, but for the tokenizer.

    Raises:
        ValueError: If the whole model is wanted and its CLIP does not tell what it is; or if parts of the CLIP itself
            are trained that the folder could not give back.
    """
    trained = [name for name, weight in model.named_parameters() if is_frozen(name) and weight.requires_grad]
    if trained and not whole:
        raise ValueError(f"weights of the CLIP itself are trained, as {trained[0]}; save the whole model (whole=True)")
    if any(hasattr(module, "adapter_layer_names") for module in model.clip.modules()):  # PEFT's tuner layers
        raise ValueError("the CLIP holds layers of PEFT, which a fresh one lacks; merge them into its weights first")
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
        "provenance": dict(model.provenance),
    }


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether `save_checkpoint_folder` wrote a folder, even if one of its files is damaged."""
    if (folder / WEIGHTS_FILE).is_file():
        return True
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_checkpoint_folder(
    folder: Path,
    *,
    clip: nn.Module | None,
    tokenizer: Tokenizer | None,
    hub: Hub,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> MedCLIPSeg:
    """Read what `save_checkpoint_folder` wrote; see `from_pretrained`."""
    description = _read_description(folder / CONFIG_FILE)
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
    if own is None or json.loads(own) != description:
        raise ValueError(f"{folder / CONFIG_FILE} and {weights} are of different saves; save or fetch them again")
    config = PVLConfig.from_dict(description["adapters"])
    model_config = MedCLIPSegConfig.from_dict(description["model"])
    words = restore_tokenizer(description["tokenizer"], folder) if tokenizer is None else tokenizer
    if clip is None:
        clip = _backbone(description, hub=hub, source=folder / CONFIG_FILE)
    if not whole and fingerprint(clip) != description["backbone_fingerprint"]:
        raise ValueError(
            "the adapters were trained on another CLIP, or one with other weights, than this one; give that CLIP, in "
            "float32 or bfloat16"
        )
    meta = next(clip.parameters()).is_meta
    tensors = read_tensors(weights, device="cpu" if not meta else device, dtype=dtype if meta else None)
    with torch.device("meta" if meta else "cpu"):
        inject_adapters(clip, config)
    try:
        with torch.device("meta" if meta else "cpu"):
            model = MedCLIPSeg(clip, config=model_config, tokenizer=words)
        if meta:
            _check(tensors, model.state_dict(), source=weights)
            load_meta_state(model, tensors, source=weights)
            model.to(device)  # the few buffers that no file holds
        else:
            _load(model, tensors, source=weights)
            cast(model, device=device, dtype=dtype)
    except BaseException:
        remove_adapters(clip)  # a CLIP that was given stays as it was
        raise
    model.provenance = description["provenance"]
    return model.eval()


def _backbone(description: Mapping[str, Any], *, hub: Hub, source: Path) -> nn.Module:
    """The CLIP that a folder describes, and holds or names."""
    try:
        if description["whole"]:
            return build_backbone(description["backbone"])
        return fetch_backbone(description["backbone"], hub=hub)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} describes no CLIP that can be built ({error!r}); is the file newer?") from error


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: Path) -> None:
    check_tensors(tensors, expected, source=source)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{source}: {name} is of {tensor.dtype}, expected {expected[name].dtype}")


def _load(model: MedCLIPSeg, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Give values to a model that has some: all of them, or all but the frozen CLIP's; in the types of the file."""
    whole = any(map(is_frozen, tensors))
    state = {name: own for name, own in model.state_dict(keep_vars=True).items() if whole or not is_frozen(name)}
    _check(tensors, state, source=source)
    frozen = {tensor.dtype for name, tensor in tensors.items() if is_frozen(name) and tensor.is_floating_point()}
    if len(frozen) == 1:
        cast(model, device=None, dtype=frozen.pop())  # with the buffers that no file holds
    for name, own in state.items():
        own.data = own.data.to(tensors[name].dtype)
    model.load_state_dict(dict(tensors), strict=False)


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
    if description["library"] is None:
        logger.warning("a %s cannot be saved; give it again when loading", description["kind"])
    return description


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; save or fetch the folder again")
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != _FORMAT:
            raise KeyError("format")
        version = description["version"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of a MedCLIPSeg ({error!r}); save or fetch it again") from error
    if version != _VERSION:
        raise ValueError(
            f"{path} has version {version}, expected {_VERSION}; use the release of pvl_adapter that wrote it"
        )
    entries = ("whole", "model", "adapters", "backbone", "backbone_fingerprint", "tokenizer", "provenance")
    if missing := [entry for entry in entries if entry not in description]:
        raise ValueError(f"{path} is no configuration of a MedCLIPSeg (missing {missing}); save or fetch it again")
    return description
