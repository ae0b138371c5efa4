"""What tests of examples/train.py and study.py share: a small dataset of real slices, and how to import a script."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
for needed in ("nilearn", "torchmetrics", "torchvision", "matplotlib", "tqdm", "accelerate", "monai"):
    pytest.importorskip(needed, reason="the examples need pvl-adapter[examples]")

from accelerate.state import AcceleratorState  # noqa: E402
from nilearn import datasets  # noqa: E402

TISSUES = {"grey matter": datasets.load_mni152_gm_template, "white matter": datasets.load_mni152_wm_template}
HEIGHTS = {"Train": range(60, 120, 10), "Val": range(65, 85, 10), "Test": range(85, 115, 10)}
DESIGNS = ("original", "contradictory", "missing_location", "overdescriptive", "underdescriptive")


def script(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module(name)


def forget_accelerator() -> None:
    """Accelerate keeps the settings of a process's first run for all others."""
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def interrupted_at(trainer: type, *, step: int) -> Iterator[None]:
    """Ctrl-C when a trainer computes the losses of a step."""
    losses, steps = trainer.losses, []

    def interrupted(*args: Any) -> Any:
        steps.append(args)
        if len(steps) == step:
            raise KeyboardInterrupt
        return losses(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def write_brain_slices(folder: Path) -> Path:
    """Axial slices of the MNI152 template, each asked for its grey and its white matter: 12, 4 and 6 rows."""
    scan = np.asarray(datasets.load_mni152_template(resolution=2).dataobj)
    maps = {name: np.asarray(load(resolution=2).dataobj) > 0.5 for name, load in TISSUES.items()}
    prompts = folder / "Prompts_Folder"
    prompts.mkdir(parents=True)
    for split, heights in HEIGHTS.items():
        rows = []
        for z in (height // 2 for height in heights):
            _write(folder / f"{split}_Folder" / "img" / f"{z}.png", scan[:, :, z] * 255.0)
            for name, tissue in maps.items():
                mask = f"{z}_{name.partition(' ')[0]}.png"
                _write(folder / f"{split}_Folder" / "label" / mask, tissue[:, :, z] * 255.0)
                rows.append((f"{z}.png", f"the {name} in this slice", mask))
        if split == "Test":
            tables = {f"Test_text_{design}": rows for design in DESIGNS}
        else:
            tables = {f"{split}_text": rows, f"{split}_text_50": rows[: len(rows) // 2]}
        for stem, content in tables.items():
            with (prompts / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("Image", "Description", "Ground Truth"), *content])
    return folder


def _write(path: Path, levels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rot90(levels.clip(0, 255)).astype(np.uint8)).save(path)
