"""Files a second of `pvl-adapter predict` with a network that takes no time, against the old way, in one run.

    python benchmarks/throughput.py     # 3 minutes on 2 cores; writes results/throughput.json

Pictures of 512 x 512 with speckle; maps as smooth as a network's. The old way takes one picture at a time in one thread
and writes compressed float maps, and waits for the disk after each file. The new one runs by itself and as one and two
processes of `accelerate launch`; from the first picture read to review.csv, without starting and loading. The profile
says what processor time goes into, in one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from harness import write
from PIL import Image

import pvl_adapter as pvl
from pvl_adapter.atomic import write_atomically
from pvl_adapter.cli import main, pipeline, predicting
from pvl_adapter.prediction import FLOAT_MAPS, _levels, overlay

TEXT = "the bright region at the left"
OLD, NEW = 40, 320  # pictures


def write_pictures(folder: Path, count: int) -> None:
    for index in range(count):
        random = np.random.default_rng(index)
        coarse = Image.fromarray(random.integers(0, 256, (32, 32), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((512, 512), Image.Resampling.BICUBIC), dtype=float)
        speckled = 0.7 * smooth + random.normal(20.0, 18.0, smooth.shape)
        Image.fromarray(speckled.clip(0, 255).astype(np.uint8)).save(folder / f"{index:04d}.png")


def instant_model(size: int) -> pvl.MedCLIPSeg:
    """A network that takes images of `size` and answers at once, always the same."""
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 32, "image_size": size}
    text = {"layers": 1, "width": 64, "heads": 2, "context_length": 16, "vocab_size": 49408}
    torch.manual_seed(0)
    model = pvl.MedCLIPSeg(pvl.inject_adapters(open_clip.CLIP(64, vision, text), pvl.PVLConfig(layers=(0,), dim=8)))
    once = model.eval().predict(Image.new("L", (size, size)), TEXT, num_samples=2)
    logits = F.interpolate(4.0 * torch.randn(1, 1, 14, 14), size=(size, size), mode="bicubic")[0] - 6.0
    probability = logits.sigmoid()
    uncertainty = torch.special.entr(probability) + torch.special.entr(1.0 - probability)
    maps = {name: uncertainty * (0.3 + 0.1 * index) for index, name in enumerate(FLOAT_MAPS)}
    maps |= {"mask": probability > 0.5, "probability": probability, "uncertainty": uncertainty}
    once = replace(once, images=(), **maps)

    def answer(images: Any, texts: Any, **_: Any) -> pvl.Prediction:
        own = {name: value for name, value in vars(once).items() if isinstance(value, torch.Tensor)}
        many = {name: value.expand(len(texts), *value.shape[1:]) for name, value in own.items()}
        logits = type(once.logits)(*(value.expand(len(texts), *value.shape[1:]) for value in once.logits))
        return replace(once, **many, logits=logits, texts=tuple(texts))

    model.predict = answer
    return model


def old_way(model: pvl.MedCLIPSeg, pictures: list[Path], output: Path) -> None:
    """As `predict` and `Prediction.save` did it."""
    for path in pictures:
        picture = Image.fromarray(np.asarray(Image.open(path))).convert("RGB")
        model.prepare([picture])
        predicted = replace(model.predict([picture], [TEXT]), images=(picture,))
        maps = {name: getattr(predicted, name)[0].numpy() for name in ("mask", *FLOAT_MAPS)}
        with (output / f"{path.stem}.npz").open("wb") as file:
            np.savez_compressed(file, **maps)
            os.fsync(file.fileno())
        whole = predicted.at_original_size(0, names=["mask", "probability", "uncertainty"])
        images = {name: _levels(values, name) for name, values in whole.items()}
        images["overlay"] = overlay(picture, whole)
        for name, image in images.items():
            save = lambda file, image=image: image.save(file, format="PNG", compress_level=1)  # noqa: E731
            write_atomically(output / f"{path.stem}_{name}.png", save)


def new_way(model: pvl.MedCLIPSeg, pictures: Path, output: Path) -> dict[str, float]:
    """By the command; says when it began, when it ended, and what processor time it took."""
    times: dict[str, float] = {}
    run = pipeline.Pipeline.run

    def timed(*args: Any, **kwargs: Any) -> None:
        times["began"], times["processor"] = time.time(), -time.process_time()
        run(*args, **kwargs)

    with (
        mock.patch.object(predicting, "load_model", return_value=model),
        mock.patch.object(pipeline.Pipeline, "run", timed),
    ):
        code = main(["predict", str(pictures), str(pictures), "--text", TEXT, "--output", str(output), "--quiet"])
    if code:
        raise SystemExit(code)
    return {**times, "ended": time.time(), "processor": times["processor"] + time.process_time()}


def launched(processes: int, size: int, pictures: Path, folder: Path) -> float:
    """Seconds of the command in several processes."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines=1", "--mixed_precision=no"]
    launch += [f"--num_processes={processes}", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
    output = folder / f"output{processes}"
    own = [__file__, "--rank", str(size), str(pictures), str(output)]
    subprocess.run([*launch, *own], check=True, stdout=subprocess.DEVNULL)
    ranks = [json.loads(file.read_text()) for file in folder.glob(f"output{processes}.rank*.json")]
    return max(rank["ended"] for rank in ranks) - min(rank["began"] for rank in ranks)


@contextmanager
def counted(seconds: Counter[str], calls: dict[str, tuple[Any, str]]) -> Iterator[None]:
    """Adds up the processor time of some calls, each without those of the others inside it."""
    inside: list[float] = []

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            started = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.thread_time() - started
                seconds[name] += spent - inside.pop()
                if inside:
                    inside[-1] += spent

        return timed

    patches = [mock.patch.object(of, name, wrapped(what, getattr(of, name))) for what, (of, name) in calls.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def profile(model: pvl.MedCLIPSeg, pictures: Path, output: Path) -> dict[str, float]:
    """Milliseconds of processor time for a picture, by what they are spent on; of one thread, so that times add up."""
    from pvl_adapter.data import results, scans

    seconds: Counter[str] = Counter()
    calls = {
        "decode": (scans, "read_image"),
        "resize and normalise": (model, "prepare"),
        "write PNG of maps": (scans, "write_image"),
        "write JPEG of overlays": (results, "write_image"),
        "tint the overlay": (results, "overlay"),
        "sums and areas": (results.Result, "add"),
        "SHA-256": (pipeline, "sha256"),
        "log": (pipeline.RunLog, "add"),
        "the rest of writing": (pipeline.Pipeline, "finish"),
        "the rest of reading": (pipeline.Pipeline, "open"),
    }
    pool = pipeline.ThreadPoolExecutor

    class Here(pool):  # type: ignore[misc, valid-type]
        """Runs calls at once, in the thread that submits them."""

        def submit(self, call: Any, *args: Any) -> Any:
            future: Any = pipeline.Future()
            future.set_result(call(*args))
            return future

    with mock.patch.object(pipeline, "ThreadPoolExecutor", Here), counted(seconds, calls):
        new_way(model, pictures, output)
    count = len(list(pictures.iterdir()))
    return {name: round(1000.0 * spent / count, 2) for name, spent in seconds.most_common()}


def compared(size: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    pictures, few = folder / "pictures", folder / "few"
    model = instant_model(size)
    (folder / "old").mkdir()
    started = time.perf_counter()
    old_way(model, sorted(few.iterdir()), folder / "old")
    rates = {"old": OLD / (time.perf_counter() - started)}
    times = new_way(model, pictures, folder / "new")
    seconds = times["ended"] - times["began"]
    rates["new"] = NEW / seconds
    for processes in (1, 2):
        rates[f"new, accelerate launch, {processes} processes"] = NEW / launched(processes, size, pictures, folder)
    written = list((folder / "new").rglob("*.png"))
    return {
        "network_size": size,
        "pictures_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "times_as_fast": round(rates["new"] / rates["old"], 1),
        "old_mb_per_picture": round(sum(file.stat().st_size for file in (folder / "old").iterdir()) / OLD / 1e6, 2),
        "new_mb_per_picture": round(sum(file.stat().st_size for file in written) / NEW / 1e6, 2),
        "cores_busy": round(times["processor"] / seconds, 2),
        "ms_of_one_core_per_picture": profile(model, few, folder / "profiled"),
    }


def figures() -> None:
    sizes = {}
    for size in (224, 320, 512):  # the published one, the one of 3.5 MB a picture, and the pictures' own
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for part, count in (("few", OLD), ("pictures", NEW)):
                (folder / part).mkdir()
                write_pictures(folder / part, count)
            sizes[f"network of {size}"] = compared(size, folder)
    write("throughput", {"pictures": {"old": OLD, "new": NEW, "size": 512}, **sizes})


def rank(size: int, pictures: Path, output: Path) -> None:
    """What each process of `accelerate launch` does."""
    times = new_way(instant_model(size), pictures, output)
    Path(f"{output}.rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(times))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", nargs=3, metavar=("SIZE", "PICTURES", "OUTPUT"), help=argparse.SUPPRESS)
    if given := parser.parse_args().rank:
        rank(int(given[0]), Path(given[1]), Path(given[2]))
    else:
        figures()
