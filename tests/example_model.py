"""What tests of the command line share: a small segmenter, test images, and runs of commands."""

from __future__ import annotations

import csv
import importlib
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import randomise

import pvl_adapter as pvl
from pvl_adapter.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "a tumor at the left"


def save_model(name: str, folder: Path, *, weight: float | None = None) -> Path:
    """A segmenter on a small CLIP of the fixture `open_clip_models`; one `weight` of its head may be given.

    Its masks cover part of every image, and it is not equally sure of all pixels.
    """
    torch.manual_seed(0)
    backbone = pvl.load_backbone(name)
    pvl.inject_adapters(backbone.clip, pvl.PVLConfig(layers=(0, 2), dim=8))
    randomise(backbone.clip.pvl_adapters)
    model = pvl.MedCLIPSeg(backbone.clip, tokenizer=backbone.tokenizer).eval()
    randomise(model.head, seed=1)
    if weight is not None:
        next(model.head.parameters()).data[0] = weight
    return model.save_pretrained(folder)


def script(name: str) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def run(*arguments: object) -> int:
    """Runs a command; returns its exit code."""
    return main(list(map(str, arguments)))


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command, checks that it ends with exit code 2, and returns what it says."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@dataclass
class Predict:
    """Runs `pvl-adapter predict` with a trained model; says what it should find."""

    trained: Path
    out: Path
    capsys: pytest.CaptureFixture[str]

    @cached_property
    def model(self) -> pvl.MedCLIPSeg:
        return pvl.from_pretrained(self.trained)

    def __call__(self, *arguments: object, code: int = 0, texts: tuple[str, ...] = (TEXT,)) -> list[dict[str, str]]:
        """Checks the exit code, and returns the lines of review.csv."""
        command = [self.trained, *arguments, "--device=cpu", "--num-samples=2", f"--output={self.out}"]
        assert run("predict", *command, *(("--text", *texts) if texts else ())) == code
        return rows_of(self.out / "review.csv")

    def refused(self, *arguments: object, model: object = None) -> str:
        """What it says when it ends with exit code 2."""
        return refuse(self.capsys, "predict", model or self.trained, f"--output={self.out}", *arguments)

    def predicted(self, image: Any, *, text: str = TEXT) -> pvl.Prediction:
        """Of an image by itself."""
        return self.model.predict(image, text, num_samples=2)

    def expected(self, image: Any, *, text: str = TEXT) -> dict[str, np.ndarray]:
        """Its maps at its own size."""
        return self.predicted(image, text=text).at_original_size(0)


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of each file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def noise(*shape: int, seed: int = 0, most: int = 256, dtype: Any = np.uint8) -> np.ndarray:
    """Smooth enough to have regions."""
    coarse = np.random.default_rng(seed).integers(0, most, [-(-size // 4) for size in shape])
    for axis, size in enumerate(shape):
        coarse = coarse.repeat(4, axis=axis).take(range(size), axis=axis)
    return coarse.astype(dtype)


def write_image(path: Path, *, seed: int = 0, size: tuple[int, ...] = (40, 56)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*size, seed=seed)).save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.array(opened)
