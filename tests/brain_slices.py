"""A small dataset of real slices in the released layout, for the tests of the examples."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from nilearn import datasets
from PIL import Image

TISSUES = {"grey matter": datasets.load_mni152_gm_template, "white matter": datasets.load_mni152_wm_template}
HEIGHTS = {"Train": range(60, 120, 10), "Val": range(65, 85, 10), "Test": range(85, 115, 10)}
DESIGNS = ("original", "contradictory", "missing_location", "overdescriptive", "underdescriptive")


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
