"""CLIPs to put adapters into: the four of the paper, and any other of open_clip, by one function.

A loaded CLIP keeps a description of what it is (`describe_backbone`), so that `MedCLIPSeg.save_pretrained` can write it
down and `build_backbone` can make it again without a network.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pvl_adapter.hub.catalogue import OFFICIAL_REPO
from pvl_adapter.hub.download import Hub, first_line
from pvl_adapter.hub.official import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OFFICIAL_TOKENIZER,
    OfficialConfig,
    load_meta_state,
    state_dict,
    unpickle,
)
from pvl_adapter.hub.tokenizers import load_tokenizer
from pvl_adapter.hub.weights import check_device, check_sizes, check_tensors, hash_tensors
from pvl_adapter.kernels import usable_dtype
from pvl_adapter.lockstep import ADAPTERS
from pvl_adapter.tokenization import Tokenizer

_DESCRIPTION = "_pvl_backbone"  # the attribute in which a CLIP keeps its description
_NOT_LEARNED = ("input_resolution", "context_length", "vocab_size", "position_ids")  # integers among the weights


class _Source(NamedTuple):
    """Where a backbone comes from."""

    architecture: str | None  # open_clip's name of it; None means the official network's
    pretrained: str | None = None  # open_clip's name of its weights
    file: str | None = None  # its weights in the official repository, where open_clip does not have them


BACKBONES = {
    "UniMedCLIP": _Source(None, file="checkpoints/unimed_clip_vit_b16.pt"),  # ViT-B/16 and BiomedBERT
    "BiomedCLIP": _Source("hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"),
    "PubMedCLIP": _Source("ViT-B-32-quickgelu", file="checkpoints/PubMedCLIP_ViT32.pth"),
    "CLIP": _Source("ViT-B-16-quickgelu", "openai"),
}


class Backbone(NamedTuple):
    """A CLIP with what belongs to it."""

    clip: nn.Module  # in eval mode, ready for `inject_adapters`
    tokenizer: Tokenizer  # sentences to token ids [B, L], or to the mapping of a Hugging Face tokenizer
    preprocess: Callable[[Any], Tensor]
    """A PIL image to a tensor [3, H, W], as the CLIP was trained; `MedCLIPSeg.prepare` does not crop it."""


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
        name: One of the paper's: "UniMedCLIP", "BiomedCLIP", "PubMedCLIP" or "CLIP" (OpenAI's ViT-B/16); or a model of
            open_clip ("ViT-L-14", "hf-hub:owner/name").
        pretrained: With a model of open_clip: which weights, a tag or a file; None leaves them random.
        path: Of UniMedCLIP or PubMedCLIP: a weights file that is here already.
        tokenizer: Instead of the one that belongs to it: a tokenizer, a folder or a hub name.
        revision: Of the hub repository of UniMedCLIP and PubMedCLIP.
        cache_dir, token, local_files_only, device: As in `from_pretrained`; but for open_clip's models set
            HF_HUB_OFFLINE=1 instead of `local_files_only`.
        dtype: Of the weights; None means float32.

    Raises:
        ValueError: If the name is unknown, the device cannot be used, or a file is damaged or does not fit.
        OSError: If a file cannot be had; see `from_pretrained`.
    """
    check_device(device)
    dtype = usable_dtype(dtype, device)
    cache = None if cache_dir is None else Path(cache_dir)
    hub = Hub(revision=revision, cache_dir=cache, token=token, local_files_only=local_files_only)
    source = BACKBONES.get(name) or _Source(name, pretrained)
    if path is not None and source.file is None:
        raise ValueError(f"path is for UniMedCLIP and PubMedCLIP; give {name} its weights file as pretrained=...")
    if pretrained is not None and name in BACKBONES:
        raise ValueError(f"{name} has one set of weights only; pretrained is for models of open_clip")
    words = None if tokenizer is None else load_tokenizer(tokenizer, hub=hub)
    weights = Path(path) if path else hub.file(OFFICIAL_REPO, source.file) if source.file else None
    if source.architecture is not None:
        backbone = _from_open_clip(source.architecture, source.pretrained, cache=cache, tokenizer=words)
        if weights is not None:  # in OpenAI's names and half precision
            expected = backbone.clip.state_dict()
            backbone.clip.load_state_dict(check_tensors(_weights(weights), expected, source=weights))
    elif weights is not None:
        from open_clip import image_transform

        clip: Any = load_unimedclip(weights)
        preprocess = image_transform(clip.visual.image_size, is_train=False, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        backbone = Backbone(clip, words or load_tokenizer(OFFICIAL_TOKENIZER, hub=hub), preprocess)
    if name in BACKBONES:
        attach_backbone_config(backbone.clip, {**describe_backbone(backbone.clip), "name": name, "pretrained": None})
    backbone.clip.to(device=device, dtype=dtype)
    return backbone


def load_unimedclip(path: Path, *, network: OfficialConfig | None = None) -> nn.Module:
    """UniMedCLIP from its pickled weights file; ValueError if that is damaged or not of the sizes of `network`."""
    tensors = {}
    for name, tensor in _weights(path).items():
        renamed = name.removeprefix("module.").replace("text_encoder.", "text.", 1)  # as its authors call the tower
        if not renamed.startswith("text.transformer.pooler."):  # unused: the class token is taken as it is
            tensors[renamed] = tensor
    network = network or OfficialConfig()
    if network != OfficialConfig():
        check_sizes(network.to_dict(), tensors, source=path)
    clip = network.build_clip()
    load_meta_state(clip, tensors, source=path)
    attach_official_config(clip, network)
    return clip


def _weights(path: Path) -> dict[str, Tensor]:
    checkpoint = unpickle(path)
    tensors = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if isinstance(tensors, Mapping):
        tensors = {name: tensor for name, tensor in tensors.items() if not str(name).endswith(_NOT_LEARNED)}
    return state_dict(tensors, source=path)


def _from_open_clip(name: str, pretrained: str | None, *, cache: Path | None, tokenizer: Tokenizer | None) -> Backbone:
    """A model of open_clip; its errors of other kinds become ours."""
    import open_clip

    if not name.startswith(("hf-hub:", "local-dir:")) and name not in open_clip.list_models():
        known = f"{', '.join(BACKBONES)}, and the models of open_clip.list_models() and its hf-hub:owner/name"
        raise ValueError(f"there is no backbone {name!r}; known are {known}")
    is_file = pretrained is not None and Path(pretrained).is_file()
    tags = [] if pretrained is None else open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None and not is_file and pretrained.lower() not in (tag.lower() for tag in tags):
        raise ValueError(f"{name} has no weights {pretrained!r}; give a file that exists, or one of {tags}")
    cache_dir = None if cache is None else str(cache)
    options = {"pretrained": pretrained, "cache_dir": cache_dir, "pretrained_hf": False}
    try:
        clip, _, preprocess = open_clip.create_model_and_transforms(name, **options)
    except (RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        if is_file:
            raise ValueError(f"{pretrained} is damaged, or no weights of {name} ({first_line(error)})") from error
        fix = "load it once with a network, or give a weights file as pretrained=..."
        raise OSError(f"{name} cannot be had ({first_line(error)}); {fix}") from error
    if name.startswith("hf-hub:"):  # get_model_config knows no cache_dir
        file = Hub(cache_dir=cache).file(name.removeprefix("hf-hub:"), "open_clip_config.json")
        model = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
    else:
        model = open_clip.get_model_config(name)
    text = getattr(getattr(clip, "text", None), "config", None)
    description = {"library": "open_clip", "name": name, "pretrained": pretrained, "model": model}
    description |= {"preprocess": open_clip.get_model_preprocess_cfg(clip), "text": text and text.to_dict()}
    attach_backbone_config(clip, description)
    return Backbone(clip.eval(), tokenizer or open_clip.get_tokenizer(name, cache_dir=cache_dir), preprocess)


# ---- what a CLIP is, written down -----------------------------------------------------------------------------------


def attach_official_config(clip: nn.Module, network: OfficialConfig) -> None:
    description = {"library": "official", "network": network.to_dict(), "name": "UniMedCLIP", "pretrained": None}
    attach_backbone_config(clip, description)


def attach_backbone_config(clip: nn.Module, description: dict[str, Any]) -> None:
    setattr(clip, _DESCRIPTION, description)


def describe_backbone(clip: nn.Module) -> dict[str, Any]:
    """What a CLIP is, as JSON: enough to build it again with other weights; ValueError if it does not tell."""
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


def build_backbone(description: Mapping[str, Any], *, device: str = "cpu") -> nn.Module:
    """A CLIP from its description, whose weights are yet to be given; ValueError if none can be built.

    An official one always is on the meta device.
    """
    try:
        with torch.device(device):
            if description.get("library") == "official":
                clip = OfficialConfig.from_dict(description["network"]).build_clip()
            elif description.get("library") == "open_clip":
                clip = _build_open_clip(description, device=device)
            elif description.get("library") == "transformers":
                cls = _transformers_class(description)
                clip = cls(cls.config_class.from_dict(copy.deepcopy(description["config"])))  # which takes parts out
            else:
                raise ValueError(f"its kind is {description.get('library')!r}, not official, open_clip or transformers")
    except Exception as error:  # the libraries raise many kinds for values that they cannot use
        raise ValueError(f"no CLIP can be built from this description ({first_line(error)})") from error
    attach_backbone_config(clip, dict(description))
    return clip.eval()


def fetch_backbone(description: Mapping[str, Any], *, hub: Hub) -> nn.Module:
    """The described CLIP with its own published weights; ValueError if it is not told where they are."""
    name, pretrained = str(description.get("name") or ""), description.get("pretrained")
    published = pretrained or name in BACKBONES or name.startswith("hf-hub:")
    if not name or (description.get("library") == "open_clip" and not published):
        what = "holds adapters and head only, and does not tell where the weights of its CLIP are"
        raise ValueError(f"this folder {what}; give the CLIP as clip=...")
    elsewhere = replace(hub, revision=None)  # a revision is of the saved model's repository
    if description.get("library") == "official":
        weights = elsewhere.file(OFFICIAL_REPO, str(BACKBONES["UniMedCLIP"].file))
        return load_unimedclip(weights, network=OfficialConfig.from_dict(description["network"]))
    if description.get("library") == "transformers":
        return _transformers_class(description).from_pretrained(name).eval()
    return load_backbone(name, pretrained=pretrained, **vars(elsewhere)).clip


def fingerprint(clip: nn.Module) -> str:
    """Hash of a CLIP's own weights, rounded to bfloat16, of its class, and of where it has QuickGELU, not GELU."""
    quick = [name for name, module in clip.named_modules() if "quickgelu" in type(module).__name__.lower()]
    own = {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith(f"{ADAPTERS}.")}
    return hash_tensors(own, dtype=torch.bfloat16, prefix="".join([type(clip).__name__, *quick]))


def _transformers_class(description: Mapping[str, Any]) -> Any:
    import transformers

    cls = getattr(transformers, str(description["class"]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no model class {description['class']!r}; is the file newer?")
    return cls


def _build_open_clip(description: Mapping[str, Any], *, device: str) -> nn.Module:
    """By open_clip's own way for local folders, which takes a model's configuration from a file."""
    import open_clip

    model = copy.deepcopy(description["model"])
    with tempfile.TemporaryDirectory() as folder:
        if description["text"] is not None:
            text = Path(folder, "text")
            text.mkdir()
            (text / "config.json").write_text(json.dumps(description["text"]))
            model["text_cfg"]["hf_model_name"] = str(text)
        config = {"model_cfg": model, "preprocess_cfg": description["preprocess"]}
        Path(folder, "open_clip_config.json").write_text(json.dumps(config))
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # open_clip warns that there are no weights: they are yet to be given
        try:
            clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_hf=False, device=device)
        finally:
            logging.disable(before)
    if description["text"] is not None:
        clip.text.config._name_or_path = ""
    return clip
