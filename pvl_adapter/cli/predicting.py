"""What a run of `pvl-adapter predict` asks of which input, in which batches, and how it ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import torch
from tqdm import tqdm

from pvl_adapter.cli import manifest
from pvl_adapter.cli.options import hash_of, load_model, local_rank, stop
from pvl_adapter.cli.pipeline import FULL, Pipeline
from pvl_adapter.cli.review import check_review, summary, write_review
from pvl_adapter.cli.run_log import RunLog, Work, digest
from pvl_adapter.data.inputs import KNOWN, Source, find_sources
from pvl_adapter.data.issues import listed
from pvl_adapter.data.presets import Label, labels_of, read_preset
from pvl_adapter.data.results import ResultOptions
from pvl_adapter.data.scans import InputOptions

Question = tuple[Source, tuple[Label, ...]]


def run(args: argparse.Namespace) -> int:
    """Predict all inputs that are not done; returns the exit code."""
    settings = {name: getattr(args, name) for name in manifest.SETTINGS}
    try:
        check_review(args.output)
        questions = [] if args.repeated else questions_of(args)
    except (OSError, ValueError) as error:
        stop(error)
    share_processors()
    model = load_model(args)
    facts: dict[str, Any] = {"model": manifest.model_facts(model, weights=hash_of(model)), "settings": settings}
    if args.repeated:
        manifest.check(args.repeated, facts["model"])
        torch.set_num_threads(args.repeated["threads"])
    facts |= {"device": model.device.type, "threads": torch.get_num_threads()}
    kept = {**settings, "batch_size": None}  # which changes the rounding alone
    run_id = digest([facts["model"]["weights_sha256"], facts["model"]["calibration_sha256"], kept])
    log = RunLog(args.output)
    facts["created"] = log.begun(run_id, args.repeated and args.repeated["created"])
    batches = manifest.works_of(args.repeated) if args.repeated else batches_of(questions, log, args.batch_size)
    batches = [[replace(work, settings=settings_of(work, run_id)) for work in batch] for batch in batches]
    works = [work for batch in batches for work in batch]
    done = {work.id for work in works if not args.overwrite and log.is_done(work)}
    todo = [batch for batch in batches if not done.issuperset(work.id for work in batch)]
    todo.sort(key=lambda batch: -sum(size_of(work) for work in batch))  # so that all processes end at the same time
    how = options_of(args, model_hash=facts["model"]["weights_sha256"][:16], created=facts["created"])
    sampling = {name: getattr(args, name) for name in ("num_samples", "threshold", "seed")}
    pipeline = Pipeline(model, log, how, sampling=sampling, batch_size=args.batch_size, threads=args.threads)
    full = ""
    try:
        with tqdm(total=len(works), initial=len(done), unit="input", disable=args.quiet or local_rank() > 0) as bar:
            pipeline.run(todo, done=done, bar=bar)
    except OSError as error:
        if error.errno not in FULL:
            raise
        full = error.strerror or str(error)
    finally:
        with log.ending(works) as others:
            entries = [log.entries.get(work.rows[0]) for work in works]
            try:
                write_review(args.output, log.entries)
                manifest.write(args.output, args, facts=facts, works=works, entries=entries)
            except OSError as error:
                full = full or str(error)
    if full:
        print(
            f"error: {full}: make room in {args.output}; what is finished stays, and the same command goes on",
            file=sys.stderr,
        )
        return 1
    if others:  # a launcher would end them if this process told of a failure
        print(f"{others} inputs are left to other processes; the last one lists all", file=sys.stderr)
        return 0
    print(summary(log.entries, works, done_before=len(done), output=args.output))
    return int(any(entry is None or bool(entry["error"]) for entry in entries))


def questions_of(args: argparse.Namespace) -> list[Question]:
    """All inputs and what is asked of them, sorted by input."""
    sources, skipped = find_sources(args.inputs, output=args.output)
    if skipped:
        print(f"skipped, not an input: {listed(skipped)}", file=sys.stderr)
    if not sources:
        raise ValueError(f"{', '.join(args.inputs)} holds no input; known are {', '.join(KNOWN)} and DICOM files")
    asked = read_preset(args.preset) if args.preset else labels_of(args.text)
    if not asked and not all(source.texts for source in sources):
        raise ValueError("--text is missing: say what is to be found, or give a table with a sentence for each input")
    questions = [(source, labels_of(source.texts) if source.texts else asked) for source in sources]
    distinct = {(source.location, labels): (source, labels) for source, labels in questions}
    return sorted(
        distinct.values(), key=lambda question: (question[0].location, [label.sentence for label in question[1]])
    )


def batches_of(questions: Sequence[Question], log: RunLog, size: int) -> list[list[Work]]:
    """Named, and grouped: up to `size` files of one sentence, or one volume, or one input of several sentences."""
    taken: dict[str, set[tuple[str, str]]] = {}  # which rows have files of a name
    for row, entry in log.entries.items():
        for name in entry["stems"]:
            taken.setdefault(name.lower(), set()).add(row)
    together, alone = list[Work](), list[list[Work]]()
    for source, labels in questions:
        work = Work(source, labels, source.name, "")
        before = {log.entries[row]["name"] for row in work.rows if row in log.entries}
        name = before.pop() if len(before) == 1 else source.name
        work = replace(work, name=name)
        if any(taken.get(stem.lower(), set()) - set(work.rows) for stem in work.stems):
            work = replace(work, name=f"{name}-{digest((source.location, *work.rows))[:8]}")
        for stem in work.stems:
            taken.setdefault(stem.lower(), set()).update(work.rows)
        whole_volume = source.kind == "nifti" and source.part is None
        if whole_volume or len(source.files) > 1 or len(labels) > 1:
            alone.append([work])
        else:
            together.append(work)
    return [*alone, *(together[start : start + size] for start in range(0, len(together), size))]


def settings_of(work: Work, run_id: str) -> str:
    """Changes with everything that changes what is written."""
    files = [(file.stat().st_size, file.stat().st_mtime_ns) for file in work.source.files if file.is_file()]
    return digest([files, work.labels, run_id])


def size_of(work: Work) -> int:
    return sum(file.stat().st_size for file in work.source.files if file.is_file()) * len(work.labels)


def options_of(args: argparse.Namespace, *, model_hash: str, created: str) -> tuple[InputOptions, ResultOptions]:
    axes = {None: (), "all": ("x", "y", "z")}.get(args.axis, (args.axis,))
    numbers = args.slices and slice(*(int(number) if number else None for number in args.slices.split(":")))
    window = args.window and tuple(args.window)
    names = ("threshold", "abstain", "maps", "largest_component", "fill_holes", "overlay")
    written = {name: getattr(args, name) for name in names}
    written |= {"model_hash": model_hash, "created": datetime.fromisoformat(created)}

    return InputOptions(window, axes, numbers, args.output / ".runs"), ResultOptions(**written)


def share_processors() -> None:
    """Processes of one launcher divide the cores, unless their number is set."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
