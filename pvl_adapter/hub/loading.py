"""`from_pretrained`: one call for published checkpoints, for folders and for hub repositories saved by us."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from pvl_adapter.atomic import write_atomically
from pvl_adapter.hub.backbones import attach_official_config
from pvl_adapter.hub.catalogue import DATASETS, OFFICIAL_REPO, find_checkpoint
from pvl_adapter.hub.checkpoint_folder import CONFIG_FILE, PATTERNS, cast, is_checkpoint_folder, load_checkpoint_folder
from pvl_adapter.hub.download import Hub, discard, find_model, known_sha256, sha256
from pvl_adapter.hub.model_card import note_provenance
from pvl_adapter.hub.official import OFFICIAL_TOKENIZER, OfficialConfig, load_meta_state, read_official
from pvl_adapter.hub.tokenizers import load_tokenizer
from pvl_adapter.hub.weights import check_device, check_tensors, read_tensors, write_tensors
from pvl_adapter.kernels import usable_dtype
from pvl_adapter.segmentation import MedCLIPSeg
from pvl_adapter.tokenization import Tokenizer

logger = logging.getLogger(__name__)


def from_pretrained(
    repo_or_folder: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    fraction: int = 100,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    clip: nn.Module | None = None,
    network: OfficialConfig | None = None,
) -> MedCLIPSeg:
    """Load a trained segmenter: published weights, or what `MedCLIPSeg.save_pretrained` has written.

    No code of any file is run. Names and shapes are checked before there is a model. A published checkpoint is
    converted to safetensors once and kept in the cache, so that the next load is fast.

    Args:
        repo_or_folder: "TahaKoleilat/MedCLIPSeg" or a repository of the same layout, a .pth file of the official code,
            or a folder or hub repository that `save_pretrained` or `push_to_hub` has written.
        checkpoint: Of the published ones: the dataset it was trained on; None takes BUSI. See `list_checkpoints`.
        fraction: Of the published ones: percentage of the training data, 10, 25, 50 or 100.
        revision: Branch, tag or commit of the hub repository.
        cache_dir: Of huggingface_hub; None means its default.
        token: For private or gated repositories; None means the one that `hf auth login` stored.
        local_files_only: Use files and cache alone, never the network.
        device: Where to; None means the CPU.
        dtype: Of the frozen CLIP's weights; None means as stored. Adapters and head stay in float32.
        tokenizer: Instead of the one that belongs to the model: a tokenizer, a folder or a hub name.
        clip: For what was saved without its CLIP: that CLIP, if it is not to be fetched.
        network: For checkpoints of the official code: sizes other than the published ones.

    Returns:
        In eval mode; its `provenance` says where it comes from.

    Raises:
        ValueError: If there is no such checkpoint or device, or a file is damaged, is no model, or does not fit.
        FileNotFoundError: If something does not exist, or is not in the cache and the hub cannot be reached.
        PermissionError: If the hub wants (another) token.
        ConnectionError: If the connection broke again and again, or a file arrived damaged.
        OSError: If the cache cannot be written to.
    """
    check_device(device)
    dtype = usable_dtype(dtype, device)
    cache = None if cache_dir is None else Path(cache_dir)
    hub = Hub(revision=revision, cache_dir=cache, token=token, local_files_only=local_files_only)
    local, repo = find_model(repo_or_folder, hub=hub), str(repo_or_folder)
    if checkpoint is None and repo != OFFICIAL_REPO:
        folder = local or hub.folder(repo, PATTERNS)
        if is_checkpoint_folder(folder):
            words = None if tokenizer is None else load_tokenizer(tokenizer, hub=hub)
            return load_checkpoint_folder(folder, clip=clip, tokenizer=words, hub=hub, device=device, dtype=dtype)
    if clip is not None:
        raise ValueError("clip=... is for what was saved without its CLIP; published checkpoints hold theirs")
    path, provenance = _locate(local, repo, checkpoint=checkpoint, fraction=fraction, hub=hub)
    words = load_tokenizer(tokenizer or OFFICIAL_TOKENIZER, hub=hub)
    converted = None if local else hub.assets()
    model = load_official(path, network=network or OfficialConfig(), device=device, dtype=dtype, converted=converted)
    model.tokenizer = words
    note_provenance(model, {**provenance, **model.provenance})
    return model


def load_official(
    path: Path,
    *,
    network: OfficialConfig,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    converted: Path | None = None,
) -> MedCLIPSeg:
    """A network of the official code from its .pth file, whose hash is checked if it is one of the hub's cache.

    `converted` is a folder for a safetensors copy, written if it can be, under the hash of the file. ValueError if the
    file is damaged, is no such checkpoint or does not fit.
    """
    model = network.build()
    expected = known_sha256(path)
    copy = None if converted is None or expected is None else converted / f"{expected}.safetensors"
    tensors = None
    if copy is not None and copy.is_file():
        try:
            tensors = check_tensors(read_tensors(copy, device=device, dtype=dtype), model.state_dict(), source=copy)
        except ValueError as error:
            logger.warning("%s; converting the checkpoint again", error)
    if tensors is None:
        digest = sha256(path)
        if expected not in (None, digest):
            discard(path)
            raise ValueError(
                f"{path} is damaged: its SHA-256 is {digest}, the hub says {expected}. It was taken out of the cache; "
                "load it again"
            )
        tensors, expected = check_tensors(read_official(path), model.state_dict(), source=path), digest
        if copy is not None and _write_copy(tensors, copy):
            del tensors  # gives the mapped pages back before others are read
            tensors = read_tensors(copy, device=device, dtype=dtype)
    load_meta_state(model, tensors, source=path)
    attach_official_config(model.clip, network)
    model.provenance = {"sha256": expected}
    cast(model, device=device, dtype=dtype)
    return model.eval()


def _write_copy(tensors: dict[str, Tensor], copy: Path) -> bool:
    """Whether the copy could be written. Of several processes the last one's stays, which equals the others'."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(copy, lambda path: write_tensors(path, tensors, metadata={"sha256": copy.stem}))
    except OSError as error:
        logger.warning("no fast copy of the checkpoint could be kept in %s (%s)", copy.parent, error)
        return False
    return True


def _locate(
    local: Path | None, repo: str, *, checkpoint: str | None, fraction: int, hub: Hub
) -> tuple[Path, dict[str, object]]:
    """A checkpoint file of the official code, and where it comes from."""
    if local is not None and local.is_file():
        if checkpoint is not None:
            raise ValueError(f"{local} is a single file, so there is no checkpoint {checkpoint!r} to choose")
        return local, {"file": local.name}
    entry = find_checkpoint(checkpoint, fraction=fraction)
    neither = f"{local or repo} holds neither a {CONFIG_FILE} that save_pretrained has written nor {entry.file}"
    dataset = entry.dataset
    if local is not None:
        if not (local / entry.file).is_file():
            raise FileNotFoundError(neither)
        return local / entry.file, entry.provenance
    try:
        path = hub.file(repo, entry.file)
    except FileNotFoundError as error:
        if checkpoint is None and repo != OFFICIAL_REPO:  # nobody asked for a published checkpoint
            raise FileNotFoundError(f"{repo} is not a model of this library, or cannot be found") from error
        raise
    if checkpoint is None:
        others = ", ".join(known.name for known in DATASETS if known is not dataset)
        logger.warning(
            f"no checkpoint was named: taking {dataset.name} ({dataset.modality}), {fraction}% of the data. Choose by "
            f"checkpoint=..., one of {others}, and fraction=...; list_checkpoints() shows them"
        )
    return path, {"repo": repo, "revision": hub.revision, **entry.provenance}
