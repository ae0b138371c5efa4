"""Say what a model is, without loading it: backbone, adapters, what it was trained on, what it promises.

    pvl-adapter info runs/MNI152-mni152-seed0/best
    pvl-adapter info TahaKoleilat/MedCLIPSeg --checkpoint Kvasir
    pvl-adapter info owner/name --json                    # a repository of the hub, as far as it is in the cache
    pvl-adapter info --devices                            # versions, and what there is to compute on

Only descriptions are read, no weights. An official .pth file is a pickle, which is not opened: its name and size are
all that is said.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import textwrap
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

from pvl_adapter.hub.catalogue import OFFICIAL_REPO, find_checkpoint
from pvl_adapter.hub.download import Hub, find_model, known_sha256

PACKAGES = ("pvl-adapter", "torch", "open_clip_torch", "transformers", "huggingface_hub", "numpy")
WEIGHTS, KIND = "model.safetensors", "pvl_adapter.MedCLIPSeg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="folder, .pth file or hub repository; without: versions")
    add("--checkpoint", help="of the published ones: the dataset it was trained on (BUSI)")
    add("--fraction", type=int, default=100, help="of the published ones: percent of the training data (%(default)s)")
    add("--json", action="store_true", help="print JSON")
    add("--devices", action="store_true", help="without a MODEL: list what there is to compute on (loads torch)")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.model and args.devices:
        parser.error("--devices says nothing of a model; leave one of them out")
    if args.model:
        known = describe(args.model, checkpoint=args.checkpoint, fraction=args.fraction)
    else:
        known = {"versions": versions(), **({"devices": devices()} if args.devices else {})}
    print(json.dumps(known, indent=2) if args.json else "\n".join(readable(known)))
    return 0


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Of Python and of packages; None of what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[str]:
    import torch

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    found = [f"cuda:{number}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for number, gpu in enumerate(gpus)]
    return [f"cpu: {torch.get_num_threads()} threads", *found, *["mps"] * torch.backends.mps.is_available()]


def describe(source: str, *, checkpoint: str | None = None, fraction: int = 100) -> dict[str, Any]:
    """What is known of a model, as JSON.

    Raises:
        FileNotFoundError: If there is none, or it is not in the cache.
        ValueError: If it is damaged, or there is no such checkpoint.
    """
    local = find_model(source, hub=Hub())
    known: dict[str, Any] = {"model": source, "kind": "a folder of this library", "location": None}
    path = local or in_cache(source)
    if path is not None and (path / WEIGHTS).is_file() and not checkpoint:
        known |= {"location": str(path), **_described(path / WEIGHTS)}
    elif path is not None and path.is_file():
        kind = "a .pth file of the official code" if zipfile.is_zipfile(path) else "no model of a kind that is known"
        known |= {"kind": kind, "location": str(path), "sha256": known_sha256(path)}
    else:
        entry = find_checkpoint(checkpoint, fraction=fraction)
        path = path / entry.file if path and (path / entry.file).is_file() else None
        if not path and not checkpoint and source != OFFICIAL_REPO:
            where = "holds no model" if local else "is not in the cache: load it once with a network"
            raise FileNotFoundError(f"{source} {where}; `pvl-adapter list` names the published ones")
        kind = "a published checkpoint of the official code" + ", not in the cache" * (not path)
        known |= {"kind": kind, "location": path and str(path)}
        known |= {"sha256": path and known_sha256(path), "provenance": entry.provenance}
    sizes: dict[str, int] = {}
    if path is not None:
        root = path if path.is_dir() else path.parent
        files = [file for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
        sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in files}
    return {**known, "files": sizes}


def in_cache(repo: str) -> Path | None:
    """The folder of a repository's main branch in the cache of huggingface_hub, whose own functions load much."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    branch = folder / "refs" / "main"
    snapshot = folder / "snapshots" / branch.read_text().strip() if branch.is_file() else None
    return snapshot if snapshot and snapshot.is_dir() else None


def _described(weights: Path) -> dict[str, Any]:
    """From the header of our safetensors file: a length of 8 bytes, then JSON."""
    try:
        with weights.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), weights.stat().st_size)))
        saved: dict[str, Any] = json.loads(header.pop("__metadata__")[KIND])
        numbers = {name: prod(tensor["shape"]) for name, tensor in header.items()}
        backbone, settings, adapters = saved["backbone"], saved["model"], saved["adapters"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{weights} is damaged, or was not saved by this library ({error!r})") from error
    adapter = re.compile(r"clip\.pvl_adapters\.(\d+)\.")
    places = {match[1] for name in numbers if (match := adapter.match(name))}
    parts = dict.fromkeys(("clip", "adapters", "head", "distilled"), 0)
    for name, count in numbers.items():
        parts["adapters" if adapter.match(name) else name.partition(".")[0]] += count
    shown = backbone.get("preprocess") or {}
    calibration = saved.get("calibration")
    return {
        "format_version": saved["version"],
        "whole": saved["whole"],
        "backbone": {
            **{name: backbone.get(name) for name in ("library", "name", "pretrained")},
            "image_size": _image_size(backbone),
            "context_length": settings["context_length"] or _context_length(backbone),
            "fingerprint": saved["backbone_fingerprint"],
        },
        "adapters": {**adapters, "count": len(places)},
        "parameters": {**parts, "trained": parts["adapters"] + parts["head"]},
        "preprocessing": {
            **{name: settings[name] for name in ("channel_order", "resize", "clean_prompts")},
            "image_mean": settings["image_mean"] or shown.get("mean"),
            "image_std": settings["image_std"] or shown.get("std"),
        },
        "provenance": saved["provenance"],
        "distilled": saved.get("distilled"),
        "calibration": calibration and summarized(calibration),
    }


def _image_size(backbone: Mapping[str, Any]) -> Any:
    """In pixels, a number or height and width; None if the description does not tell."""
    of = {"official": "network", "open_clip": "model", "transformers": "config"}.get(backbone.get("library", ""), "")
    sizes = backbone.get(of) or {}
    return (sizes.get("vision_config") or sizes.get("vision_cfg") or sizes).get("image_size")


def _context_length(backbone: Mapping[str, Any]) -> Any:
    """In tokens, likewise."""
    sizes = backbone.get("config") or backbone.get("model") or {}
    text = sizes.get("text_config") or sizes.get("text_cfg") or {}
    return text.get("context_length") or text.get("max_position_embeddings")


def summarized(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """A saved calibration without its scores: what it holds for, and what it promises in sentences."""
    names = ("alpha", "confidence", "loss_limit", "pixel_limit", "weights", "sampling", "facts")
    return {**{name: calibration[name] for name in names}, "promises": promises(calibration)}


def promises(calibration: Mapping[str, Any]) -> list[str]:
    """What a calibration, as `Calibration.to_dict` has it, promises and at what cost; see docs/trust.md."""
    facts, alpha, sure = calibration["facts"], percent(calibration["alpha"]), percent(calibration["confidence"])
    held = percent(1.0 - calibration["alpha"])
    sentences = {
        "outer_threshold": f"outer_mask misses at most {alpha} of what is to be found; it has "
        f"{facts['outer_area_over_truth']:.1f} times its area",
        "inner_threshold": f"at most {alpha} of inner_mask is something else; it holds "
        f"{percent(facts['inner_share_of_truth'])} of what is to be found",
        "absent": f"presence: at most {alpha} of what is not there is called present",
        "present": f"presence: at most {alpha} of what is there is called absent",
        "area_factor": f"area_interval holds the true area in {held} of the cases",
        "volume_factor": f"volume_interval holds the true volume of {held} of the subjects",
        "loss_threshold": f"cases not abstained from ({percent(facts['kept'])}) have a mean Dice of at least "
        f"{1.0 - calibration['loss_limit']:.4g}, with a confidence of {sure}",
        "pixel_threshold": f"at most {percent(calibration['pixel_limit'])} of the pixels not abstained from are wrong, "
        f"with a confidence of {sure}",
    }
    words = {"outer_threshold": "outer_mask", "inner_threshold": "inner_mask", "loss_threshold": "abstained"}
    words |= {"absent": "presence", "present": "presence", "pixel_threshold": "abstain()"}
    words |= {"area_factor": "area_interval", "volume_factor": "volume_interval"}
    none = list(dict.fromkeys(words[name] for name in sentences if calibration[name] is None))
    told = [sentence for name, sentence in sentences.items() if calibration[name] is not None]
    return told + ([f"nothing is promised of {', '.join(none)}: these subjects do not allow it"] if none else [])


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def readable(known: Mapping[str, Any], *, indent: str = "") -> list[str]:
    """Lines of at most 80 columns: numbers and words of an entry one after the other, its own entries below it."""
    lines: list[str] = []
    for name, value in known.items():
        below: dict[str, Any] = {}
        if name == "files":
            value = {file: f"{size / 1e6:,.3f} MB" for file, size in value.items()}
        elif isinstance(value, Mapping):
            below = {key: each for key, each in value.items() if isinstance(each, Mapping) or _is_text(each)}
            value = {key: each for key, each in value.items() if key not in below and each is not None}
        for number, part in enumerate(value if _is_text(value) else [value]):
            head = f"{indent + name.replace('_', ' ') if number == 0 else '':<16}"
            lines += textwrap.wrap(head + _words(part), 80, subsequent_indent=" " * 16, break_on_hyphens=False)
        lines += readable(below, indent=indent + "  ")
    return lines


def _is_text(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_words, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", str(value))  # a hash
