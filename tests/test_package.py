"""The package itself: what it exports, and that importing it is light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pvl_adapter as pvl


def test_importing_the_package_imports_no_clip_library_and_warns_of_nothing():
    code = (
        "import sys, pvl_adapter;"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'open_clip', 'transformers', 'timm'}))"
    )

    root = Path(pvl.__file__).parents[1]
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)

    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_exports_are_sorted_and_complete():
    assert list(pvl.__all__) == sorted(pvl.__all__)
    assert len(set(pvl.__all__)) == len(pvl.__all__)


@pytest.mark.parametrize("name", pvl.__all__)
def test_every_export_is_there_and_documented(name):
    assert getattr(pvl, name).__doc__


def test_types_are_published():
    assert (Path(pvl.__file__).parent / "py.typed").is_file()
