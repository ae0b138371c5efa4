"""Writing files in one step: whatever happens, they hold their old content or the new one, complete."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file of the same name, then move it to `path` in one step."""
    with staging_folder(path.parent, name=path.name) as temporary:
        write(temporary / path.name)
        _flush(temporary / path.name)
        (temporary / path.name).replace(path)


@contextmanager
def replace_files(folder: Path, *, truth: str) -> Iterator[Path]:
    """A temporary folder whose files are moved into `folder` together, if the block ends without an error.

    A process may be killed at any moment. A reader then finds the old files or the new ones, provided that it follows
    the file `truth`, and takes the other files beside it for copies that may be missing. So new subfolders come first
    (the old files must not need what they replace), then the old copies go, and `truth` is replaced in one step.
    `folder` is made if it is missing, and removed again after an error.
    """
    made = [missing for missing in (folder, *folder.parents) if not missing.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with staging_folder(folder, name=truth) as new:
            yield new
            files = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
            nested = [file for file in files if len(file.parts) > 1]
            copies = [file for file in files if file.name != truth and file not in nested]
            for file in nested:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (new / file).replace(folder / file)
            for copy in copies:
                (folder / copy).unlink(missing_ok=True)
            _flush(new / truth)
            for file in (Path(truth), *copies):
                (new / file).replace(folder / file)
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextmanager
def staging_folder(parent: Path, *, name: str) -> Iterator[Path]:
    """A temporary folder in `parent`, removed afterwards as those of the same name that killed processes have left."""
    for left in parent.glob(f".{glob.escape(name)}.*.part"):
        with suppress(OSError):
            if (lock := _lock(left, wait=False)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
    while True:
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=".part"))
        with suppress(FileNotFoundError):  # another process has removed it before it was locked
            lock = _lock(temporary, wait=True)
            if temporary.exists():
                break
            if lock is not None:
                os.close(lock)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.exists():
            logger.warning("%s could not be removed; remove it by hand", temporary)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A handle that locks a folder until it is closed or the process ends; None if the lock cannot be had."""
    if sys.platform == "win32":  # has no locks on folders, so nothing counts as abandoned there
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or the file system has no locks
        os.close(handle)
        return None
    return handle


def _flush(file: Path) -> None:
    """Wait until a file is on the disk, so that a power failure does not leave an empty one in its place."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
