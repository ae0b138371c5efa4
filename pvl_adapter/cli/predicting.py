"""How `pvl-adapter predict` goes through its inputs: what is done is skipped, what fails is noted, the rest goes on."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

import pvl_adapter as pvl
from pvl_adapter.cli.options import hash_of, load_model, stop
from pvl_adapter.cli.review import Review, digest
from pvl_adapter.data.inputs import KNOWN, Source, find_sources
from pvl_adapter.data.issues import listed
from pvl_adapter.data.presets import labels_of
from pvl_adapter.data.results import Result, ResultOptions, slug
from pvl_adapter.data.scans import InputOptions, open_input
from pvl_adapter.image_files import reason


def run(args: argparse.Namespace) -> int:
    """Predict all inputs that are not done; returns the exit code."""
    sources = sources_of(args)
    model = load_model(args)
    args.model_hash = hash_of(model)[:16]
    try:
        review = Review(args.output)
        questions: dict[tuple[str, str], tuple[Source, dict[str, Any]]] = {}
        for source in sources:
            sentences, settings = source.texts or args.text, settings_of(source, args)
            for text in sentences:
                name = source.name + (f"_{slug(text)}" if len(sentences) > 1 else "")
                row = review.new_row(source.location, text, name=name, settings=settings)
                questions.setdefault((source.location, text), (source, row))
        todo = [(source, row) for source, row in questions.values() if args.overwrite or not review.is_done(row)]
        counts = Counter({"predicted": 0, "failed": 0, "done before": len(questions) - len(todo)})
        try:
            with tqdm(total=len(questions), initial=len(questions) - len(todo), unit="input") as bar:
                for source, row in todo:
                    filled = predict(model, source, row, args, bar=bar)
                    counts["failed" if filled["error"] else "predicted"] += 1
                    review.add(filled)
                    bar.update()
        finally:
            review.write()
    except (OSError, ValueError) as error:  # of review.csv; those of inputs are in it
        stop(error)
    print(f"{', '.join(f'{count} {what}' for what, count in counts.items())}; see {args.output / 'review.csv'}")
    return int(bool(counts["failed"]))


def sources_of(args: argparse.Namespace) -> list[Source]:
    try:
        sources, skipped = find_sources(args.inputs, output=args.output)
    except (OSError, ValueError) as error:
        stop(error)
    if skipped:
        print(f"skipped, not an input: {listed(skipped)}", file=sys.stderr)
    if leftover := sorted(map(str, args.output.rglob(".*.part"))):
        print(f"left by a killed run, delete it if none is going on: {listed(leftover)}", file=sys.stderr)
    if not sources:
        stop(f"{', '.join(args.inputs)} holds no input; known are {', '.join(KNOWN)} and DICOM files")
    if not args.text and not all(source.texts for source in sources):
        stop("--text is missing: say what is to be found, or give a table with a sentence for each input")
    return sources


def settings_of(source: Source, args: argparse.Namespace) -> str:
    """Changes with everything that changes what is written."""
    files = [(file.stat().st_size, file.stat().st_mtime_ns) for file in source.files if file.is_file()]
    names = ("num_samples", "threshold", "seed", "abstain", "maps", "window", "axis", "slices", "model_hash")
    return digest([files, *(getattr(args, name) for name in names)])


def predict(
    model: pvl.MedCLIPSeg, source: Source, row: dict[str, Any], args: argparse.Namespace, *, bar: tqdm
) -> dict[str, Any]:
    """The filled line of review.csv, with the reason if the input failed."""
    started, text = time.perf_counter(), row["sentence"]
    sampling = {name: getattr(args, name) for name in ("num_samples", "threshold", "seed")}
    try:
        axes = (args.axis,) if args.axis else ()
        volume = open_input(source, InputOptions(args.window, axes, args.slices, args.output))
        options = ResultOptions(args.threshold, args.abstain, args.maps, model_hash=args.model_hash)
        result = Result(volume, labels_of([text]), options)
        for start in range(0, len(volume.keys), args.batch_size):
            keys = volume.keys[start : start + args.batch_size]
            bar.set_postfix_str(f"{source.name} {start}/{len(volume.keys)}")
            prediction = model.predict([volume.read(key) for key in keys], [text] * len(keys), **sampling)
            result.add(keys, prediction)
        files = write(result, args.output / row["name"])
        names = "; ".join(file.relative_to(args.output).as_posix() for file in files)
        measured = {name: formatted(value) for name, value in result.measures(0).items()}
        filled = {**measured, "files": names, "note": "; ".join(volume.notes)}
    except Exception as error:  # whatever a file causes, the others are predicted
        filled = {"error": reason(error, most=1000)}
        tqdm.write(f"failed: {row['input']}: {filled['error']}", file=sys.stderr)
    return row | filled | {"seconds": round(time.perf_counter() - started, 3)}


def write(result: Result, path: Path) -> list[Path]:
    """Write the files of a result, whose names begin with `path`: all of them, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".part") as folder:
        result.write(Path(folder), path.name)
        files, moved = sorted(Path(folder).iterdir()), list[Path]()
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            for file in files:
                moved.append(file.replace(path.parent / file.name))
        except OSError as error:
            raise OSError(f"{error}; without the others there are {listed(moved) or 'no files'}") from error
    return moved


def formatted(value: float | str) -> str:
    if isinstance(value, (str, bool)):
        return str(value)
    return "" if math.isnan(value) else f"{round(value, 6):.12g}"
