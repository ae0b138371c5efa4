"""manifest.json of `pvl-adapter predict`: what a run was made with, so that it can be repeated to equal bytes."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvl_adapter.atomic import write_atomically
from pvl_adapter.cli.info import versions
from pvl_adapter.cli.options import stop
from pvl_adapter.hub.download import sha256

if TYPE_CHECKING:
    import pvl_adapter as pvl
    from pvl_adapter.cli.run_log import Work

FORMAT = "pvl-adapter predict, 1"
MODEL = ("checkpoint", "fraction", "dtype")
PACKAGES = ("pvl-adapter", "torch", "open_clip_torch", "transformers", "numpy", "Pillow")
SETTINGS = ["num_samples", "threshold", "seed", "batch_size", "abstain", "maps", "overlay", "window", "axis", "slices"]
SETTINGS += ["largest_component", "fill_holes"]
"""Options that change what is written."""


class Repeat(argparse.Action):
    """--manifest, which stands for all arguments that must else be given."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.manifest = values
        for action in parser._actions:
            action.required = False


def take_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Put a manifest's arguments in their places; the user may only give those that do not change results."""
    names = ("model", "inputs", *MODEL, *SETTINGS, "text", "preset")
    if given := [name for name in names if getattr(args, name) != parser.get_default(name)]:
        parser.error(f"--manifest repeats a run with its own arguments; leave out the given {', '.join(given)}")
    try:
        args.repeated = json.loads(args.manifest.read_text(encoding="utf-8"))
        if args.repeated["format"] != FORMAT:
            raise ValueError(f"got format {args.repeated['format']}, expected {FORMAT}")
        for name, value in {**args.repeated["arguments"], **args.repeated["settings"]}.items():
            setattr(args, name, value)
        args.num_samples = str(args.num_samples)
        args.device = args.device or args.repeated["device"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--manifest {args.manifest} cannot be used ({error!r}); give the manifest.json of a run")


def model_facts(model: pvl.MedCLIPSeg, *, weights: str) -> dict[str, Any]:
    """Which model it is: weights, and calibration."""
    calibration = model.calibration and json.dumps(model.calibration.to_dict(), sort_keys=True)
    hashed = calibration and hashlib.sha256(calibration.encode()).hexdigest()
    return {"weights_sha256": weights, "calibration_sha256": hashed, "provenance": model.provenance}


def check(repeated: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """End with a message if the model or an input has changed since; warn of other versions."""
    for what in ("weights_sha256", "calibration_sha256"):
        if repeated["model"][what] != model[what]:
            then, now = (str(of[what])[:12] for of in (repeated["model"], model))
            stop(f"{what.partition('_')[0]} of the model have changed since the manifest: {then} then, {now} now")
    for entry in repeated["inputs"]:
        for file, hashed in entry["files"].items():
            try:
                if hashed == sha256(Path(file)):
                    continue
                changed = "has changed since the manifest"
            except OSError as error:
                changed = f"cannot be read ({error.strerror})"
            stop(f"the input {file} {changed}; put it back as it was, or predict anew without --manifest")
    if other := [name for name, number in versions(PACKAGES).items() if repeated["versions"].get(name) != number]:
        then = ", ".join(f"{name} {repeated['versions'].get(name)}" for name in other)
        print(f"other versions than the manifest's ({then}): bytes may differ", file=sys.stderr)


def works_of(repeated: Mapping[str, Any]) -> list[list[Work]]:
    """The batches of a manifest, without the inputs that have failed."""
    from pvl_adapter.cli.run_log import Work
    from pvl_adapter.data.inputs import Source
    from pvl_adapter.data.presets import Code, Label

    def label(of: dict[str, Any]) -> Label:
        codes = {name: of[name] and Code(*of[name]) for name in ("category", "kind")}
        return Label(**{**of, **codes, "color": tuple(of["color"])})

    labels = [tuple(map(label, each)) for each in repeated["labels"]]
    batches: dict[int, list[Work]] = {}
    for entry in (entry for entry in repeated["inputs"] if not entry["error"]):
        files, part = tuple(map(Path, entry["files"])), entry["part"] and tuple(entry["part"])
        source = Source(files, entry["kind"], entry["name"], entry["input"], part)
        batches.setdefault(entry["batch"], []).append(Work(source, labels[entry["labels"]], entry["name"], ""))
    return list(batches.values())


def write(
    output: Path,
    args: argparse.Namespace,
    *,
    facts: Mapping[str, Any],
    works: Sequence[Work],
    entries: Iterable[Mapping[str, Any] | None],
) -> None:
    """Write what a run was made with; entries are the lines of the log about the works, None of what is not done."""
    labels, batches, inputs = list[Any](), dict[Any, int](), list[dict[str, Any]]()
    places: dict[Any, int] = {}
    for work, entry in zip(works, entries, strict=True):
        if entry is None or entry["settings"] != work.settings:
            continue
        if work.labels not in places:
            places[work.labels] = len(labels)
            labels.append([dataclasses.asdict(label) for label in work.labels])
        place: dict[str, Any] = {
            "input": work.source.location,
            "kind": work.source.kind,
            "part": work.source.part,
            "name": work.name,
        }
        batch = batches.setdefault(tuple(entry["batch"]), len(batches))
        told = {
            name: entry[name] for name in ("seconds", "peak_memory_mb", "peak_gpu_memory_mb", "error") if name in entry
        }
        written = {name: hashed for name, (_, hashed) in entry["files"].items()}
        place |= {"labels": places[work.labels], "batch": batch, "files": entry["read"], **told, "written": written}
        inputs.append(place)
    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    manifest = {
        "format": FORMAT,
        "created": facts["created"],
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "model": facts["model"],
        "arguments": {"model": model, **{name: getattr(args, name) for name in MODEL}},
        "settings": facts["settings"],
        "device": facts["device"],
        "threads": facts["threads"],
        "machine": f"{platform.node()}, {platform.platform()}",
        "versions": versions(PACKAGES),
        "labels": labels,
        "inputs": inputs,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False, default=str) + "\n"
    write_atomically(output / "manifest.json", lambda path: path.write_text(text, encoding="utf-8"))


def peak_memory() -> dict[str, int]:
    """Of this process so far, in MB."""
    import torch

    peaks = {}
    if sys.platform != "win32":
        import resource

        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
        peaks["peak_memory_mb"] = round(kilobytes / 1024)
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return peaks
