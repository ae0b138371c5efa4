"""The notebooks of the documentation run from the first cell to the last, on few subjects and a small model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from example_model import save_model

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"


@pytest.mark.parametrize(
    "name", ["uncertainty", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adapters", "calibrated"))]
)
def test_a_notebook_runs(name, open_clip_models, tmp_path, monkeypatch):
    for folder in ("docs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PVL_SMALL", "1")
    monkeypatch.setenv("PVL_MODEL", str(save_model(open_clip_models["bert"], tmp_path / "model")))
    namespace: dict[str, object] = {}
    for number, cell in enumerate(json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            code = re.sub("^%.*", "", "".join(cell["source"]), flags=re.MULTILINE)
            exec(compile(code, f"{name} cell {number}", "exec"), namespace)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_outputs_are_small_and_without_errors(file):
    assert file.stat().st_size < 500_000
    assert '"output_type": "error"' not in file.read_text(encoding="utf-8")
