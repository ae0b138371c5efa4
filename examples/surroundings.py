"""What the examples write beside their figures: versions and commit."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of installed packages.

    Raises:
        SystemExit: If one is not.
    """
    try:
        return {name: version(name) for name in packages}
    except PackageNotFoundError as error:
        raise SystemExit(f'{error.name} is not installed: pip install "pvl-adapter[examples]"') from error


def git_commit() -> str | None:
    """Of this folder, "-dirty" if it has changes; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()
