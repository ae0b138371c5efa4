"""The code of README.md and of the pages in docs/ is run, block after block, as a reader would type it."""

from __future__ import annotations

import re
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch

import pvl_adapter as pvl
from pvl_adapter.hub.official import OfficialConfig, load_meta_state

ROOT = Path(__file__).parent.parent


def released_with_random_weights(*args: object, **kwargs: object) -> pvl.MedCLIPSeg:
    """The published network, without its weights."""
    model = OfficialConfig().build()
    load_meta_state(
        model, {name: 0.02 * torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}, source="here"
    )
    model.tokenizer = lambda sentences: torch.ones(len(sentences), 256, dtype=torch.long)
    return model


PAGES = ["README.md", ".github/CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python\n" in (ROOT / page).read_text(encoding="utf-8")]
SLOW = {"docs/adapt.md", "docs/onnx.md", "docs/predict.md"}  # seconds each
ELSEWHERE = {"docs/app.md"}  # its client needs a page that is open: tests/test_app.py


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else [])
        for each in WITH_CODE
        if each not in ELSEWHERE
    ],
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pvl, "from_pretrained", released_with_random_weights)  # there is no network in tests
    monkeypatch.setattr(torch.onnx, "export", partial(torch.onnx.export, optimize=False))  # takes half the time
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        offline = block.replace(', pretrained="openai"', "")
        exec(compile(offline, f"{page} block {number}", "exec"), namespace)


@pytest.mark.parametrize("command", re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S))
def test_the_set_up_commands_name_what_exists(command):
    """They are run on a fresh machine by .ci/run; here only what they name is checked."""
    extras = re.findall(r'"\.\[(\w+)\]"', command)
    assert extras
    assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M) for extra in extras)
    assert all((ROOT / path).is_file() for path in re.findall(r"\S+\.py", command))


def test_the_table_of_extras_is_that_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "install.md").read_text(encoding="utf-8"), re.M)
    assert sorted(table) == sorted(extras)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    """Those to other sites are looked at before a release."""
    made = {"benchmarks.md"}  # by docs/conf.py
    for target in re.findall(r"\]\((?!http|#)([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists() or target in made, target
