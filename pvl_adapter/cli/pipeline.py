"""Predicts batches of inputs while the next are read and the last are written.

Threads read and write: Pillow, zlib and numpy let others run while they decode, resize and compress (two threads on two
cores are 1.9 times as fast as one), and nothing has to be sent to another process. Several processes share the work by
their logs, see `pvl_adapter.cli.run_log`.
"""

from __future__ import annotations

import errno
import math
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import pvl_adapter as pvl
from pvl_adapter.cli.manifest import peak_memory
from pvl_adapter.cli.run_log import RunLog, Work
from pvl_adapter.data.results import Result, ResultOptions
from pvl_adapter.data.scans import InputOptions, InputVolume, open_input
from pvl_adapter.hub.download import sha256
from pvl_adapter.image_files import reason
from pvl_adapter.images import to_pil

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a full disk, quota or file."""


@dataclass
class Opened:
    """An input that was read.

    Attributes:
        work: What is asked of it.
        volume: Its slices.
        read: SHA-256 of its files.
        seconds: What it has taken so far.
        images: Of an input of one slice, that slice.
        prepared: The same as the network takes it; None of an input of several.
        batch: The inputs that it was predicted with.
    """

    work: Work
    volume: InputVolume
    read: dict[str, str]
    seconds: float
    images: tuple[Image.Image, ...] = ()
    prepared: torch.Tensor | None = None
    batch: list[str] = field(default_factory=list)


class Pipeline:
    """Reads, predicts and writes.

    Args:
        model: Predicts.
        log: Says what is free to be done, and is told what is done.
        how: How inputs are read, and results written.
        sampling: Arguments of `MedCLIPSeg.predict`.
        batch_size: Of the slices of a volume.
        threads: That read, and as many that write.
    """

    def __init__(
        self,
        model: pvl.MedCLIPSeg,
        log: RunLog,
        how: tuple[InputOptions, ResultOptions],
        *,
        sampling: Mapping[str, Any],
        batch_size: int,
        threads: int,
    ) -> None:
        self.model, self.log, self.sampling = model, log, sampling
        self.input_options, self.result_options = how
        self.batch_size, self.threads = batch_size, threads
        self.readers, self.writers = (ThreadPoolExecutor(threads, name) for name in ("read", "write"))
        self.writing: deque[Future[None]] = deque()

    def run(self, batches: Iterable[Sequence[Work]], *, done: set[str], bar: tqdm) -> None:
        """Predict what is free of the batches and not `done`; of a batch all inputs are predicted, whatever is done.

        Raises:
            OSError: If the disk is full.
        """
        self.bar = bar
        claims = ((batch, self.log.claim([work for work in batch if work.id not in done])) for batch in batches)
        jobs = (((batch, mine), [partial(self.open, work) for work in batch]) for batch, mine in claims if mine)
        try:
            for (batch, mine), futures in ahead(self.readers, jobs):
                self.predict(batch, futures, mine={work.id for work in mine})
            self.wait(0)
        finally:
            self.readers.shutdown(cancel_futures=True)
            self.writers.shutdown(cancel_futures=True)

    def predict(self, batch: Sequence[Work], futures: Sequence[Future[Opened]], *, mine: set[str]) -> None:
        together = []
        for work, future in zip(batch, futures, strict=True):
            try:
                opened = future.result()
            except Exception as error:  # whatever a file causes, the others are predicted
                if work.id in mine:
                    self.fail(work, error)
                continue
            if opened.prepared is not None:
                together.append(opened)
            elif work.id in mine:
                self.predict_volume(opened)
        for opened, prediction in self.predict_together(together):
            if opened.work.id not in mine:
                continue
            if isinstance(prediction, Exception):
                self.fail(opened.work, prediction)
            else:
                self.write(opened, partial(self.result_of, opened, prediction))

    def predict_together(self, opened: list[Opened]) -> list[tuple[Opened, pvl.Prediction | Exception]]:
        """Inputs of one slice; each by itself if they fail together."""
        if not opened:
            return []
        started, names = time.perf_counter(), [each.work.source.location for each in opened]
        try:
            prepared = torch.cat([each.prepared for each in opened if each.prepared is not None])
            sentences = [label.sentence for each in opened for label in each.work.labels]
            images = tuple(image for each in opened for image in each.images)
            predicted = replace(self.model.predict(prepared, sentences, prepared=True, **self.sampling), images=images)
        except Exception as error:
            return [(opened[0], error)] if len(opened) == 1 else [self.predict_together([each])[0] for each in opened]
        for each in opened:
            each.seconds += (time.perf_counter() - started) / len(opened)
            each.batch = names
        if len(opened) == 1:  # of one or several sentences
            return [(opened[0], predicted)]
        return [(each, predicted[index : index + 1]) for index, each in enumerate(opened)]

    def predict_volume(self, opened: Opened) -> None:
        started, work, volume = time.perf_counter(), opened.work, opened.volume
        sentences = [label.sentence for label in work.labels]
        size = self.batch_size if len(sentences) == 1 else 1  # sentences of one image share its part of the network
        parts = [volume.keys[start : start + size] for start in range(0, len(volume.keys), size)]
        try:
            result = Result(volume, work.labels, self.result_options)
            jobs = ((keys, [partial(self.read, volume, keys)]) for keys in parts)
            for keys, (read,) in ahead(self.readers, jobs):
                images, prepared = read.result()
                texts = sentences * len(keys)
                predicted = self.model.predict(prepared, texts, prepared=True, **self.sampling)
                result.add(keys, replace(predicted, images=images))
                self.bar.set_postfix_str(f"{work.source.name} {volume.keys.index(keys[-1]) + 1}/{len(volume.keys)}")
        except Exception as error:  # as above
            self.fail(work, error)
            return
        opened.seconds += time.perf_counter() - started
        opened.batch = [work.source.location]
        self.write(opened, lambda: result)

    def open(self, work: Work) -> Opened:
        started = time.perf_counter()
        volume = open_input(work.source, self.input_options)
        opened = Opened(work, volume, {str(file): sha256(file) for file in work.source.files}, 0.0)
        if len(volume.keys) == 1:
            opened.images, opened.prepared = self.read(volume, volume.keys)
        opened.seconds = time.perf_counter() - started
        return opened

    def read(self, volume: InputVolume, keys: Sequence[Any]) -> tuple[tuple[Image.Image, ...], torch.Tensor]:
        images = to_pil([volume.read(key) for key in keys])
        return images, self.model.prepare(images)

    def result_of(self, opened: Opened, prediction: pvl.Prediction) -> Result:
        result = Result(opened.volume, opened.work.labels, self.result_options)
        result.add(opened.volume.keys, prediction)
        return result

    def write(self, opened: Opened, result: Callable[[], Result]) -> None:
        """In another thread; waits if many results are not written yet."""
        self.writing.append(self.writers.submit(self.finish, opened, result))
        self.wait(2 * self.threads)

    def wait(self, most: int) -> None:
        while len(self.writing) > most:
            self.writing.popleft().result()

    def finish(self, opened: Opened, made: Callable[[], Result]) -> None:
        started, work = time.perf_counter(), opened.work
        try:
            result = made()
            files, notes = self.store(work, result), "; ".join(result.notes)
            stems, rows = result.stems(work.name), []
            owners = {name: [stem for stem in stems if name.startswith((f"{stem}_", f"{stem}."))] for name in files}
            for k, (label, stem) in enumerate(zip(work.labels, stems, strict=True)):
                listed = [name for name, owner in owners.items() if stem in owner or not owner]  # all share a label map
                measured = {name: formatted(value) for name, value in result.measures(k).items()}
                rows.append({"sentence": label.sentence, "name": stem, "files": "; ".join(listed), **measured})
        except Exception as error:
            self.fail(work, error)
            return
        entry = {"batch": opened.batch, "note": notes, "error": "", **peak_memory()}
        entry["seconds"] = round(opened.seconds + time.perf_counter() - started, 3)
        self.add(work, {**entry, "rows": rows, "read": opened.read, "files": files})

    def fail(self, work: Work, error: Exception) -> None:
        """Note the reason; raises the error if the disk is full, which ends the run."""
        if isinstance(error, OSError) and error.errno in FULL:
            raise error
        said = reason(error, most=1000)
        self.bar.write(f"failed: {work.source.location}: {said}", file=sys.stderr)
        rows = [{"sentence": label.sentence} for label in work.labels]
        self.add(work, {"batch": [], "error": said, "rows": rows, "read": {}, "files": {}})

    def add(self, work: Work, entry: dict[str, Any]) -> None:
        self.log.add(work, {"name": work.name, "stems": work.stems, "settings": work.settings, **entry})
        self.bar.update()

    def store(self, work: Work, result: Result) -> dict[str, tuple[int, str]]:
        """Write all files of a result, and remove those of an earlier one; returns size and SHA-256 of each."""
        output, files = self.log.output, dict[str, tuple[int, str]]()
        (output / work.name).parent.mkdir(parents=True, exist_ok=True)
        self.log.staging.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.log.staging) as folder:
            result.write(Path(folder), Path(work.name).name)
            for file in sorted(Path(folder).iterdir()):
                name = Path(work.name).with_name(file.name).as_posix()
                files[name] = file.stat().st_size, sha256(file)
            for name in files:
                (Path(folder) / Path(name).name).replace(output / name)
        for name in self.log.files_before(work) - set(files):
            (output / name).unlink(missing_ok=True)
        return files


def ahead(
    pool: ThreadPoolExecutor, jobs: Iterable[tuple[Any, Sequence[Callable[[], Any]]]]
) -> Iterator[tuple[Any, Any]]:
    """Each job's label and the futures of its calls; while one is used, the next are on their way."""
    waiting: deque[tuple[Any, list[Future[Any]]]] = deque()
    for label, calls in jobs:
        waiting.append((label, [pool.submit(call) for call in calls]))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def formatted(value: Any) -> str:
    """A number of review.csv; NaN is not known."""
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return "" if math.isnan(value) else f"{round(float(value), 6):.12g}"
    return str(value)
