"""Our own folders: a trained `MedCLIPSeg` on disk, whole or without the frozen CLIP.

A folder holds `model.safetensors`, whose metadata is the configuration, a readable copy of that in `config.json`, the
tokenizer and a model card.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pvl_adapter.atomic import replace_files
from pvl_adapter.config import MedCLIPSegConfig, PVLConfig
from pvl_adapter.distilled_head import DistilledHead
from pvl_adapter.head import PixelHead
from pvl_adapter.hub.adapter_folder import adapter_shapes
from pvl_adapter.hub.backbones import build_backbone, describe_backbone, fetch_backbone, fingerprint
from pvl_adapter.hub.download import Hub, find_local
from pvl_adapter.hub.model_card import model_card, note_provenance, saved_provenance
from pvl_adapter.hub.official import load_meta_state
from pvl_adapter.hub.tokenizers import restore_tokenizer, save_tokenizer
from pvl_adapter.hub.weights import (
    check_sizes,
    check_tensors,
    is_frozen,
    read_description,
    read_tensors,
    write_described,
)
from pvl_adapter.injection import inject_adapters, remove_adapters
from pvl_adapter.lockstep import ADAPTERS, lockstep_of
from pvl_adapter.segmentation import MedCLIPSeg
from pvl_adapter.tokenization import Tokenizer, find_tokenizer
from pvl_adapter.towers import find_towers
from pvl_adapter.trust.calibration import Calibration

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PATTERNS = (WEIGHTS_FILE, CONFIG_FILE, "tokenizer*/*", "README.md")
_KIND = "pvl_adapter.MedCLIPSeg"
_VERSION = 1
_ENTRIES = ("version", "whole", "model", "adapters", "backbone", "backbone_fingerprint", "tokenizer", "provenance")

logger = logging.getLogger(__name__)


def save_checkpoint_folder(
    model: MedCLIPSeg, folder: str | os.PathLike[str], *, whole: bool = True, card: Mapping[str, Any] | None = None
) -> Path:
    """Write a model; see `MedCLIPSeg.save_pretrained`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder to save into")
    description = {**_describe(model, whole=whole), "provenance": saved_provenance(model, **(card or {}))}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if whole or not is_frozen(name)}
    if model.distilled is not None:
        try:
            model.distilled.check(model)
            description["distilled"] = model.distilled.facts
        except ValueError as error:
            logger.warning("saved without the distilled head: %s", error)
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("distilled.")}
    if model.calibration is not None:
        try:
            model.calibration.check(model, hashed=True)
            description["calibration"] = model.calibration.to_dict()
        except ValueError as error:
            logger.warning("saved without the calibration: %s", error)
    with replace_files(folder, truth=WEIGHTS_FILE) as new:
        description["tokenizer"] = tokenizer = _save_tokenizer(model, new)
        write_described(new / WEIGHTS_FILE, new / CONFIG_FILE, tensors, kind=_KIND, description=description)
        (new / "README.md").write_text(model_card(model, description), encoding="utf-8")
    for old in folder.glob("tokenizer-*"):  # of earlier saves
        if re.fullmatch(r"tokenizer-[0-9a-f]{12}", old.name) and old.name != (tokenizer or {}).get("folder"):
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _describe(model: MedCLIPSeg, *, whole: bool) -> dict[str, Any]:
    """What `config.json` holds, but for tokenizer and provenance; ValueError if it could not be loaded again."""
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
    lockstep, config = lockstep_of(model.clip), model.config
    unknown = config.image_mean is None or config.image_std is None
    if unknown and backbone.get("library") == "transformers":  # whose configuration has no normalisation
        mean, std = lockstep.towers.image.normalization(model.clip) or (None, None)
        config = replace(config, image_mean=config.image_mean or mean, image_std=config.image_std or std)
    return {
        "format": _KIND,
        "version": _VERSION,
        "whole": whole,
        "model": config.to_dict(),
        "adapters": lockstep.config.to_dict(),
        "backbone": backbone,
        "backbone_fingerprint": fingerprint(model.clip),
    }


def is_checkpoint_folder(folder: Path) -> bool:
    """Even if a file of it is missing."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / CONFIG_FILE).is_file()


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
    weights = folder / WEIGHTS_FILE
    before = (weights if weights.is_file() else folder).stat()
    description = read_description(weights, folder / CONFIG_FILE, kind=_KIND, entries=_ENTRIES)
    if (version := description["version"]) != _VERSION:
        raise ValueError(f"{weights} has version {version}, expected {_VERSION}; use the release that wrote it")
    whole = description["whole"]
    if whole and clip is not None:
        raise ValueError(f"{folder} holds a whole model, its CLIP included; clip=... is for folders without one")
    adapters = PVLConfig.from_dict(description["adapters"])
    config = MedCLIPSegConfig.from_dict(description["model"])
    words = restore_tokenizer(description["tokenizer"], folder) if tokenizer is None else tokenizer
    tensors = read_tensors(weights)  # mapped, so without memory
    sizes = {"adapters": {"layers": len(adapters.layers or ()), "dim": adapters.dim}, "model": description["model"]}
    sizes["distilled"] = description.get("distilled")
    state = description.get("calibration")
    calibration = None if state is None else Calibration.from_dict(state)
    check_sizes({**sizes, "backbone": description["backbone"] if whole else None}, tensors, source=weights)
    if whole:
        with torch.device("meta"):
            joined = inject_adapters(build_backbone(description["backbone"], device="meta"), adapters)
            model = MedCLIPSeg(joined, config=config, tokenizer=words)
            model.distilled = DistilledHead.from_facts(model.head.dim, sizes["distilled"])
        tensors = check_tensors(tensors, model.state_dict(), source=weights)
        clip = None if description["backbone"]["library"] == "official" else build_backbone(description["backbone"])
    else:
        clip = fetch_backbone(description["backbone"], hub=hub) if clip is None else clip
        if fingerprint(clip) != description["backbone_fingerprint"]:
            fix = "give that CLIP, in float32 or bfloat16"
            raise ValueError(f"the adapters were trained on another CLIP, or one with other weights; {fix}")
        with torch.device("meta"):
            width = find_towers(clip).joint_width(clip) or 0
            head = PixelHead(width, num_upscale=config.num_upscale).state_dict()
            distilled = DistilledHead.from_facts(width, sizes["distilled"])
        expected = {f"clip.{ADAPTERS}.{name}": tensor for name, tensor in adapter_shapes(clip, adapters).items()}
        expected |= {f"head.{name}": tensor for name, tensor in head.items()}
        if distilled is not None:
            expected |= {f"distilled.{name}": tensor for name, tensor in distilled.state_dict().items()}
        tensors = check_tensors(tensors, expected, source=weights)
    if clip is None and not (device is None and dtype is None):
        tensors = read_tensors(weights, device=device, dtype=dtype)
    if not os.path.samestat(before, weights.stat()):
        raise ValueError(f"{folder} was saved over while it was being loaded; load it again")
    if clip is None:
        load_meta_state(model, tensors, source=weights)
    else:
        inject_adapters(clip, adapters)
        try:
            model = MedCLIPSeg(clip, config=config, tokenizer=words)
            model.distilled = DistilledHead.from_facts(model.head.dim, sizes["distilled"])
            frozen = {t.dtype for name, t in tensors.items() if is_frozen(name) and t.is_floating_point()}
            if len(frozen) == 1:
                cast(model, device=None, dtype=frozen.pop())  # with the buffers that no file holds
            for name, own in model.state_dict(keep_vars=True).items():
                own.data = own.data.to(tensors.get(name, own).dtype)
            model.load_state_dict(tensors, strict=False)
        except BaseException:
            remove_adapters(clip)  # a CLIP that was given stays as it was
            raise
    cast(model, device=device, dtype=dtype)
    note_provenance(model, description["provenance"])
    if calibration is not None:
        calibration.check(model)
        model.calibration = calibration
    return model.eval()


def member_weights(
    sources: Sequence[MedCLIPSeg | str | os.PathLike[str]], *, like: MedCLIPSeg
) -> list[dict[str, Tensor]]:
    """Adapters and pixel head of other models, or of saved ones, by name; see `Ensemble`.

    Raises:
        ValueError: If the CLIP or the settings of one are others than those of `like`, or a file is damaged.
    """
    own, hub = _describe(like, whole=False), Hub()
    expected = {name: tensor for name, tensor in like.state_dict().items() if _is_member(name)}
    found = []
    for source in sources:
        if isinstance(source, MedCLIPSeg):
            tensors, theirs, name = source.state_dict(), _describe(source, whole=False), "a member of the ensemble"
        else:
            weights = (find_local(source, hub=hub) or hub.folder(str(source), PATTERNS)) / WEIGHTS_FILE
            theirs = read_description(weights, weights.with_name(CONFIG_FILE), kind=_KIND, entries=_ENTRIES)
            tensors, name = read_tensors(weights), str(source)  # mapped, so without memory
        if theirs["backbone_fingerprint"] != own["backbone_fingerprint"]:
            raise ValueError(f"{name} belongs to another CLIP, or one with other weights, than the first member")
        for entry, kind in (("adapters", PVLConfig), ("model", MedCLIPSegConfig)):
            got, wanted = (kind.from_dict(each[entry]) for each in (theirs, own))
            if got != wanted:
                raise ValueError(f"{name} has {got}, expected that of the first member, {wanted}")
        tensors = {name: tensor.to(like.device) for name, tensor in tensors.items() if _is_member(name)}
        found.append(check_tensors(tensors, expected, source=name))
    return found


def _is_member(name: str) -> bool:
    return not is_frozen(name) and not name.startswith("distilled.")


def cast(model: MedCLIPSeg, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Move a model, and cast its frozen CLIP."""
    model.to(device)
    if dtype is not None:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if is_frozen(name) and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _save_tokenizer(model: MedCLIPSeg, folder: Path) -> dict[str, Any] | None:
    try:
        tokenizer = find_tokenizer(model.clip) if model.tokenizer is None else model.tokenizer
    except (ValueError, OSError) as error:
        logger.warning("saved without a tokenizer (%s); give one when loading", error)
        return None
    description = save_tokenizer(tokenizer, folder)
    if description["library"] is None:
        logger.warning("a %s cannot be saved; give it again when loading", description["kind"])
    return description
