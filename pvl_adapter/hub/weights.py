"""Our safetensors files: tensors, and in the metadata the description of the model that they belong to.

That description is the truth. A JSON file beside the weights repeats it for people to read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pvl_adapter.lockstep import ADAPTERS

_COUNTS = re.compile(r"(layers|depths?|blocks|stages|experts|labels|upscale)$")
_SIZES = re.compile(r"(dim|width|size|length|positions|embeddings|intermediate|channels)$")
_FIX = "save or fetch the folder again, or remove the JSON file: what counts is in the weights"


def is_frozen(name: str) -> bool:
    """Whether a tensor of `MedCLIPSeg.state_dict()` is the CLIP's own."""
    return name.startswith("clip.") and not name.startswith(f"clip.{ADAPTERS}.")


def write_described(weights: Path, config: Path, tensors: Mapping[str, Tensor], *, kind: str, description: Any) -> None:
    """Write tensors with their description, in the metadata under `kind`, and its readable copy `config`."""
    text = json.dumps(description, indent=2, default=float) + "\n"  # scores may be numpy's numbers
    write_tensors(weights, tensors, metadata={kind: text})
    config.write_text(text, encoding="utf-8")


def read_description(weights: Path, config: Path, *, kind: str, entries: tuple[str, ...]) -> dict[str, Any]:
    """What `write_described` wrote, else FileNotFoundError or ValueError; `config` may be missing, but not differ."""
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; save or fetch the folder again")
    with _opened(weights) as opened:
        text = (opened.metadata() or {}).get(kind)
    if text is None:
        raise ValueError(f"{weights} was not saved by this library, or for another purpose: it has no {kind!r} entry")
    try:
        description: Any = json.loads(text)
        missing = [entry for entry in entries if entry not in description]
        same = not config.is_file() or _sorted(config.read_text(encoding="utf-8")) == _sorted(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{config}, or the description in {weights}, is damaged ({error}); {_FIX}") from error
    if not same:
        raise ValueError(f"{config} was edited, or is of another save than {weights}; {_FIX}")
    if missing:
        raise ValueError(f"the description in {weights} lacks {missing}; is the file newer?")
    return dict(description)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write safetensors, those that share memory once each; OSError if that fails, as on a full disk."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        separate[name] = own.clone() if own.data_ptr() in seen else own
        seen.add(own.data_ptr())
    path.touch()
    mode = path.stat().st_mode  # as the umask says; safetensors makes a file that only its owner can read
    try:
        save_file(separate, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}); free some space, or choose another folder") from error
    path.chmod(mode)


def read_tensors(
    path: Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Mapped from the file on the CPU, else moved one after another, the frozen CLIP's cast to `dtype`."""
    target = torch.device(device or "cpu")
    with _opened(path) as opened:
        names = list(opened.keys())
        if target.type == "cpu" and dtype is None:
            return {name: opened.get_tensor(name) for name in names}
    tensors = {}
    for name in names:
        with _opened(path) as opened:  # opened anew, so that the pages read are given back
            tensor = opened.get_tensor(name)
            cast = dtype if is_frozen(name) and tensor.is_floating_point() else None
            tensors[name] = tensor.to(target, cast or tensor.dtype, copy=True)
    return tensors


def check_tensors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: object) -> dict[str, Tensor]:
    """`got` with its gates in the expected shape: published ones are scalars, ours hold one element.

    Raises:
        ValueError: If names or shapes differ, or which hold whole numbers; the message names them.
    """
    fitting = dict(got)
    misfits: list[str] = []
    for name in sorted(got.keys() & expected.keys()):
        tensor, like = got[name], expected[name]
        if name.endswith(".gate") and tensor.numel() == like.numel() == 1:
            fitting[name] = tensor = tensor.reshape(like.shape)
        if tensor.shape != like.shape:
            misfits.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
        elif tensor.is_floating_point() != like.is_floating_point():
            misfits.append(f"{name} is of {tensor.dtype}, expected {like.dtype}")
    missing, unexpected = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    problems = {"missing": missing, "unexpected": unexpected, "misfits": misfits}
    if parts := [f"{len(found)} {kind}: {'; '.join(found[:3])}" for kind, found in problems.items() if found]:
        raise ValueError(f"the tensors of {source} do not fit: {', '.join(parts)}")
    return fitting


def check_sizes(description: Any, tensors: Mapping[str, Tensor], *, source: object, name: str = "") -> None:
    """Raise ValueError, before memory is spent, for a description of more or larger layers than a file can hold."""
    if isinstance(description, Mapping):
        for key, value in description.items():
            check_sizes(value, tensors, source=source, name=f"{name}.{key}".lstrip("."))
    elif isinstance(description, (list, tuple)):
        for value in (len(description), *description[: len(tensors)]):
            check_sizes(value, tensors, source=source, name=name)
    elif isinstance(description, int):
        largest = max((tensor.numel() for tensor in tensors.values()), default=0)
        if description > (len(tensors) if _COUNTS.search(name) else largest if _SIZES.search(name) else description):
            raise ValueError(
                f"{source}: {name} is {description}, but the file has only {len(tensors)} tensors of at most {largest} "
                "numbers"
            )


def hash_tensors(tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32, prefix: str = "") -> str:
    """SHA-256 of names and values, floating-point ones after rounding to `dtype`."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(tensors.items()):
        rounded = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        digest.update(name.encode())
        digest.update(rounded.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_device(device: torch.device | str | None) -> None:
    """Raise ValueError for a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device is {str(device)!r}, not usable here ({reason}); try device='cpu'") from error


def _sorted(text: str) -> str:  # as text, for NaN differs from itself
    return json.dumps(json.loads(text), sort_keys=True)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); save or fetch it again") from error
