"""CLIPs to put adapters into: the four of the paper, and any other of open_clip, by one function.

A loaded CLIP remembers what it is (`describe_backbone`), so that `MedCLIPSeg.save_pretrained` can write it down and
`build_backbone` can make it again without a network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pvl_adapter.hub.adapter_folder import check_tensors
from pvl_adapter.hub.catalogue import OFFICIAL_REPO
from pvl_adapter.hub.download import Hub, first_line
from pvl_adapter.hub.official import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OFFICIAL_TOKENIZER,
    OfficialConfig,
    describe,
    load_meta_state,
    state_dict,
    unpickle,
)
from pvl_adapter.hub.tokenizers import load_tokenizer
from pvl_adapter.lockstep import ADAPTERS
from pvl_adapter.tokenization import Tokenizer

_DESCRIPTION = "_pvl_backbone"  # where a CLIP keeps what it is

OPEN_CLIP_NAMES: dict[str, tuple[str, str | None]] = {
    "CLIP": ("ViT-B-16-quickgelu", "openai"),
    "BiomedCLIP": ("hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", None),
}
"""Backbones of the paper that open_clip loads, with its names for model and weights."""

UNIMEDCLIP_FILE = "checkpoints/unimed_clip_vit_b16.pt"  # in the published repository

_NOT_LEARNED = ("input_resolution", "context_length", "vocab_size")  # numbers among the tensors of OpenAI's files


class Backbone(NamedTuple):
    """A CLIP with what belongs to it.

    Attributes:
        clip: In eval mode, ready for `inject_adapters`.
        tokenizer: Sentences to token ids [B, L], or to the mapping of a Hugging Face tokenizer.
        preprocess: A PIL image to a tensor [3, H, W], as the CLIP was trained (`MedCLIPSeg.prepare` does likewise, but
            keeps the whole picture instead of cropping it to a square).
    """

    clip: nn.Module
    tokenizer: Tokenizer
    preprocess: Callable[[Any], Tensor]


def load_backbone(
    name: str,
    *,
    pretrained: str | None = None,
    path: str | Path | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Backbone:
    """Load a CLIP that is ready for `inject_adapters`, with tokenizer and preprocessing.

    Args:
        name: One of the paper's: "UniMedCLIP" (ViT-B/16 and BiomedBERT), "BiomedCLIP", "PubMedCLIP" (ViT-B/32) or
            "CLIP" (OpenAI's ViT-B/16); or a model of open_clip ("ViT-L-14", "hf-hub:owner/name").
        pretrained: With a model of open_clip: which weights, a tag or a file; None leaves them random.
        path: Of UniMedCLIP or PubMedCLIP: a weights file that is here already.
        tokenizer: Instead of the one that belongs to it: a tokenizer, a folder or a hub name.
        revision: Of the hub repository of UniMedCLIP and PubMedCLIP.
        cache_dir: Of huggingface_hub; None means its default.
        token: For the hub.
        local_files_only: Use the cache alone; for open_clip's models set HF_HUB_OFFLINE=1 instead.
        device: Where to; None means the CPU.
        dtype: Of the weights; None means float32.

    Raises:
        ValueError: If the name is unknown, or a file is damaged or does not fit.
        OSError: If a file cannot be had; see `from_pretrained`.
    """
    hub = Hub(
        revision=revision, cache_dir=cache_dir and Path(cache_dir), token=token, local_files_only=local_files_only
    )
    if path is not None and name not in ("UniMedCLIP", "PubMedCLIP"):
        raise ValueError(f"path is for UniMedCLIP and PubMedCLIP; give {name} its weights file as pretrained=...")
    if pretrained is not None and name in (*OPEN_CLIP_NAMES, "UniMedCLIP", "PubMedCLIP"):
        raise ValueError(f"{name} has one set of weights only; pretrained is for models of open_clip")
    if name == "UniMedCLIP":
        weights = Path(path) if path else hub.file(OFFICIAL_REPO, UNIMEDCLIP_FILE)
        clip = load_unimedclip(weights)
        backbone = Backbone(clip, load_tokenizer(tokenizer or OFFICIAL_TOKENIZER, hub=hub), _preprocess(clip))
    elif name == "PubMedCLIP":
        weights = Path(path) if path else hub.file(OFFICIAL_REPO, "checkpoints/PubMedCLIP_ViT32.pth")
        words = None if tokenizer is None else load_tokenizer(tokenizer, hub=hub)
        backbone = _from_open_clip("ViT-B-32-quickgelu", None, cache_dir=cache_dir, tokenizer=words)
        _load_pubmedclip(backbone.clip, weights)
    else:
        import open_clip

        known = name in OPEN_CLIP_NAMES or name.startswith(("hf-hub:", "local-dir:")) or name in open_clip.list_models()
        if not known:
            raise ValueError(
                f"there is no backbone {name!r}; known are UniMedCLIP, BiomedCLIP, PubMedCLIP, CLIP, and the models of "
                "open_clip.list_models() and its hf-hub:owner/name"
            )
        words = None if tokenizer is None else load_tokenizer(tokenizer, hub=hub)
        backbone = _from_open_clip(*OPEN_CLIP_NAMES.get(name, (name, pretrained)), cache_dir=cache_dir, tokenizer=words)
    if name in (*OPEN_CLIP_NAMES, "UniMedCLIP", "PubMedCLIP"):
        attach_backbone_config(backbone.clip, {**describe_backbone(backbone.clip), "name": name, "pretrained": None})
    backbone.clip.to(device=device, dtype=dtype)
    return backbone


def load_unimedclip(path: Path, *, network: OfficialConfig | None = None) -> nn.Module:
    """UniMedCLIP from its weights file.

    Args:
        path: A pickled {"state_dict": ...}, its names with or without "module.".
        network: Its sizes, None means the published ones.

    Raises:
        ValueError: If the file is damaged or does not fit.
    """
    network = network or OfficialConfig()
    clip = network.build_clip()
    tensors = {}
    for name, tensor in _weights(path).items():
        renamed = name.removeprefix("module.").replace("text_encoder.", "text.", 1)  # as its authors call the tower
        if not renamed.startswith("text.transformer.pooler."):  # unused: the class token is taken as it is
            tensors[renamed] = tensor
    load_meta_state(clip, tensors, source=path)
    attach_official_config(clip, network)
    return clip


def _load_pubmedclip(clip: nn.Module, path: Path) -> None:
    """Fill OpenAI's ViT-B/32 with the weights of PubMedCLIP, which are in half precision and OpenAI's names."""
    expected = clip.state_dict()
    tensors = {name: tensor for name, tensor in _weights(path).items() if name not in _NOT_LEARNED}
    check_tensors(tensors, expected, source=path)
    clip.load_state_dict(tensors)


def _weights(path: Path) -> dict[str, Tensor]:
    checkpoint = unpickle(path)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} is no weights file: expected a dict of tensors, found {describe(checkpoint)}")
    tensors = checkpoint.get("state_dict", checkpoint)
    if isinstance(tensors, Mapping):
        integers = (*_NOT_LEARNED, "position_ids")  # told by the architecture
        tensors = {name: tensor for name, tensor in tensors.items() if not str(name).endswith(integers)}
    return state_dict(tensors, source=path)


def _from_open_clip(
    name: str, pretrained: str | None, *, cache_dir: str | Path | None, tokenizer: Tokenizer | None
) -> Backbone:
    """A model of open_clip; its errors of other kinds become ours."""
    import open_clip

    cache = None if cache_dir is None else str(cache_dir)
    file = pretrained is not None and Path(pretrained).is_file()
    tags = [] if pretrained is None else open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None and not file and pretrained.lower() not in (tag.lower() for tag in tags):
        raise ValueError(f"{name} has no weights {pretrained!r}; give a file that exists, or one of {tags}")
    try:
        clip, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, cache_dir=cache, pretrained_hf=False
        )
    except (RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        reason = first_line(error)
        if file:
            raise ValueError(f"{pretrained} is damaged, or holds no weights of {name} ({reason})") from error
        raise OSError(
            f"{name} cannot be had ({reason}). Load it once with a network, or give a weights file as pretrained=..."
        ) from error
    if name.startswith("hf-hub:"):
        model = json.loads(Path(_hub_config(name, cache_dir=cache_dir)).read_text())["model_cfg"]
    elif name.startswith("local-dir:"):
        model = json.loads((Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text())["model_cfg"]
    else:
        model = open_clip.get_model_config(name)
    text = getattr(getattr(clip, "text", None), "config", None)
    attach_backbone_config(
        clip,
        {
            "library": "open_clip",
            "name": name,
            "pretrained": pretrained,
            "model": model,
            "preprocess": open_clip.get_model_preprocess_cfg(clip),
            "text": None if text is None else text.to_dict(),
        },
    )
    if tokenizer is None:
        tokenizer = open_clip.get_tokenizer(name, cache_dir=cache)
    return Backbone(clip.eval(), tokenizer, preprocess)


def _hub_config(name: str, *, cache_dir: str | Path | None) -> Path:
    return Hub(cache_dir=cache_dir).file(name.removeprefix("hf-hub:"), "open_clip_config.json")


def _preprocess(clip: Any) -> Callable[[Any], Tensor]:
    from open_clip import image_transform

    return image_transform(clip.visual.image_size, is_train=False, mean=IMAGENET_MEAN, std=IMAGENET_STD)


# ---- what a CLIP is, written down -----------------------------------------------------------------------------------


def attach_backbone_config(clip: nn.Module, description: dict[str, Any]) -> None:
    """Attach a description to a CLIP."""
    setattr(clip, _DESCRIPTION, description)


def attach_official_config(clip: nn.Module, network: OfficialConfig) -> None:
    """Attach the description of the CLIP of a released network."""
    attach_backbone_config(
        clip, {"library": "released", "network": network.to_dict(), "name": "UniMedCLIP", "pretrained": None}
    )


def describe_backbone(clip: nn.Module) -> dict[str, Any]:
    """What a CLIP is, as JSON: enough to build it again with other weights.

    Raises:
        ValueError: If it does not tell.
    """
    if (description := getattr(clip, _DESCRIPTION, None)) is not None:
        return dict(description)
    from transformers import PreTrainedModel

    if isinstance(clip, PreTrainedModel):
        config = clip.config.to_dict()
        return {"library": "transformers", "class": type(clip).__name__, "config": config, "name": clip.name_or_path}
    raise ValueError(
        f"this {type(clip).__name__} does not tell which model of open_clip it is, so it cannot be built again; load "
        "it by pvl_adapter.load_backbone(...), or save adapters and head only (whole=False)"
    )


def build_backbone(description: Mapping[str, Any]) -> nn.Module:
    """A CLIP of the described kind, whose weights are yet to be given: on the meta device if it is a released one.

    Raises:
        ValueError: If the description is of no known kind.
    """
    library = description.get("library")
    if library == "released":
        clip = OfficialConfig.from_dict(description["network"]).build_clip()
    elif library == "open_clip":
        clip = _build_open_clip(description)
    elif library == "transformers":
        clip = _transformers_class(description).from_config_dict(description["config"])
    else:
        raise ValueError(f"the backbone is of the kind {library!r}, expected released, open_clip or transformers")
    attach_backbone_config(clip, dict(description))
    return clip.eval()


def fetch_backbone(description: Mapping[str, Any], *, hub: Hub) -> nn.Module:
    """The described CLIP with its own published weights.

    Raises:
        ValueError: If the description does not tell where they are.
    """
    name = description.get("name")
    if not name or (description.get("library") == "open_clip" and not _has_weights(description)):
        raise ValueError(
            "this folder holds adapters and head only, and does not tell where the weights of its CLIP are; give the "
            "CLIP as clip=..."
        )
    if description["library"] == "transformers":
        return _transformers_class(description).load(name)
    if description["library"] == "released":
        elsewhere = replace(hub, revision=None)  # it is of the saved model's repository
        weights = elsewhere.file(OFFICIAL_REPO, UNIMEDCLIP_FILE)
        return load_unimedclip(weights, network=OfficialConfig.from_dict(description["network"]))
    return load_backbone(
        name,
        pretrained=description.get("pretrained"),
        cache_dir=None if hub.cache_dir is None else Path(hub.cache_dir),
        token=hub.token,
        local_files_only=hub.local_files_only,
    ).clip


def fingerprint(clip: nn.Module) -> str:
    """A hash of a CLIP's own weights, the same in float32 and bfloat16; and of its class, and where it has QuickGELU,
    for equal weights make another network with GELU."""
    digest = hashlib.sha256(type(clip).__name__.encode())
    for name, module in clip.named_modules():
        if "quickgelu" in type(module).__name__.lower():
            digest.update(name.encode())
    for name, tensor in sorted(clip.state_dict().items()):
        if not name.startswith(f"{ADAPTERS}."):
            rounded = tensor.detach().to("cpu", torch.bfloat16) if tensor.is_floating_point() else tensor.cpu()
            digest.update(name.encode())
            digest.update(rounded.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _has_weights(description: Mapping[str, Any]) -> bool:
    name = description["name"]
    return bool(description.get("pretrained")) or name in (*OPEN_CLIP_NAMES, "PubMedCLIP") or name.startswith("hf-hub:")


class _TransformersClass(NamedTuple):
    cls: Any

    def from_config_dict(self, config: Mapping[str, Any]) -> nn.Module:
        return self.cls(self.cls.config_class.from_dict(dict(config)))

    def load(self, name: str) -> nn.Module:
        return self.cls.from_pretrained(name).eval()


def _transformers_class(description: Mapping[str, Any]) -> _TransformersClass:
    import transformers

    cls = getattr(transformers, str(description["class"]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no model class {description['class']!r}; is the file newer?")
    return _TransformersClass(cls)


def _build_open_clip(description: Mapping[str, Any]) -> nn.Module:
    """By open_clip's own way for local folders, which takes a model's configuration from a file."""
    import open_clip

    model = json.loads(json.dumps(description["model"]))
    with tempfile.TemporaryDirectory() as folder:
        if description["text"] is not None:
            text = Path(folder, "text")
            text.mkdir()
            (text / "config.json").write_text(json.dumps(description["text"]))
            model["text_cfg"]["hf_model_name"] = str(text)
        config = {"model_cfg": model, "preprocess_cfg": description["preprocess"]}
        Path(folder, "open_clip_config.json").write_text(json.dumps(config))
        with _without_warning("weights"):  # they are yet to be given
            clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_hf=False)
    if description["text"] is not None:
        clip.text.config._name_or_path = ""
    return clip


@contextmanager
def _without_warning(word: str) -> Iterator[None]:
    """Keep to itself what open_clip logs, by the root logger, about something."""

    def wanted(record: logging.LogRecord) -> bool:
        return word not in record.getMessage()

    logging.getLogger().addFilter(wanted)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(wanted)
