"""Files and folders by name: on this machine, or from the Hugging Face hub through its cache.

huggingface_hub keeps only complete files, and resumes a connection that was cut. Here its errors become Python's own.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pvl_adapter.hub.catalogue import OFFICIAL_REPO

_T = TypeVar("_T")


@dataclass(frozen=True)
class Hub:
    """How to reach the hub, and where its files are kept; attributes as the arguments of `from_pretrained`."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def file(self, repo: str, name: str) -> Path:
        """Path of a file in the cache, downloaded if it is not there yet.

        Raises:
            FileNotFoundError: If it does not exist, or is not in the cache and the hub cannot be reached.
            PermissionError: If the hub wants (another) token.
            ConnectionError: If the connection broke again and again.
            OSError: If the file cannot be written.
        """
        from huggingface_hub import hf_hub_download

        return Path(_explained(hf_hub_download, repo, name, what=f"{name} of {repo}", **vars(self)))

    def folder(self, repo: str, patterns: Sequence[str]) -> Path:
        """Path of a folder in the cache with those files that match, if any; errors as for `file`."""
        from huggingface_hub import snapshot_download

        return Path(_explained(snapshot_download, repo, allow_patterns=list(patterns), what=repo, **vars(self)))

    def assets(self) -> Path:
        """Where files derived from downloads are kept."""
        from huggingface_hub import cached_assets_path

        beside = None if self.cache_dir is None else Path(self.cache_dir) / "assets"
        return cached_assets_path("pvl-adapter", namespace="released", subfolder="converted", assets_dir=beside)


def find_local(source: str | os.PathLike[str], *, hub: Hub, with_owner: bool = True) -> Path | None:
    """The file or folder `source` on this machine; None if it can only name a repository of the hub, "owner/name".

    `with_owner` is False for tokenizers, whose repositories may be a bare "name".

    Raises:
        FileNotFoundError: If it looks like a path, but is not there. The hub is then not asked.
    """
    path, text = Path(source).expanduser(), os.fspath(source)
    if path.exists():
        return path
    slashes = text.count("/")
    only_a_path = not isinstance(source, str) or text.startswith((".", "/", "~")) or "\\" in text or slashes > 1
    half_there = not only_a_path and slashes == 1 and path.parent.is_dir()
    hub_is_meant = text == OFFICIAL_REPO or hub.revision is not None or not with_owner
    if not only_a_path and (hub_is_meant or (slashes == 1 and not half_there)):
        return None
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    names = {entry.name.lower(): entry.name for entry in parent.iterdir()} if os.access(parent, os.R_OK) else {}
    near = [str(parent / names[match]) for match in get_close_matches(missing.lower(), names, cutoff=0.5)]
    raise FileNotFoundError(
        f"{source} does not exist: {parent} has no {missing}"
        + (f", did you mean {' or '.join(near)}?" if near else ".")
        + " Give a file or folder that exists, or the owner/name of a repository of the hub"
        + (' (where a folder has the owner\'s name, with revision="main")' if half_there else "")
    )


def find_model(source: str | os.PathLike[str], *, hub: Hub) -> Path | None:
    """`find_local` of a model; FileNotFoundError too for a folder that holds none, but folders that do."""
    path = find_local(source, hub=hub)
    if path is None or path.is_file() or (path / "model.safetensors").is_file():
        return path
    if found := [str(file.parent) for deep in ("*", "*/*") for file in sorted(path.glob(f"{deep}/model.safetensors"))]:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise FileNotFoundError(f"{source} is no model, but holds some; give one of {', '.join(found[:4])}{more}")
    return path


def known_sha256(path: Path) -> str | None:
    """The hash that the hub gives for a file of the cache: large files are stored there under their own."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(path: Path) -> None:
    """Take a damaged file out of the cache, so that it is downloaded anew."""
    for file in (path.resolve(), path):
        with suppress(OSError):
            file.unlink()


def first_line(error: Exception) -> str:
    """Of an error's message; what libraries say after it is advice for their direct users."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _explained(download: Callable[..., _T], *args: Any, what: str, **options: Any) -> _T:
    """Run a download; its errors become the builtin ones, with the hub's message, what was wanted and what to do."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    transport_error: Any = HfHubHTTPError.__bases__[0]  # of the HTTP library beneath huggingface_hub
    try:
        return download(*args, **options)
    except (OSError, transport_error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            fix = "free some space, make the cache writable, or give another cache_dir"
            raise OSError(error.errno, f"{what} cannot be written to the cache ({error.strerror}); {fix}") from error
        local = isinstance(error, LocalEntryNotFoundError)
        cause = error.__cause__ or error if local else error
        kind: type[OSError] = ConnectionError
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            kind, fix = PermissionError, "ask for access on its page, run `hf auth login`, or give a valid token=..."
        elif status == 404 or (isinstance(error, EntryNotFoundError) and not local):
            kind, fix = FileNotFoundError, "check the names of repository, revision and file"
        elif isinstance(cause, OfflineModeIsEnabled) or (local and not isinstance(cause, HfHubHTTPError)):
            fix = "it is not in the cache: load it once with a network, or copy a saved folder"
            kind = FileNotFoundError
        else:
            fix = "load it again later"
        raise kind(f"{what} could not be loaded ({' '.join(str(cause).split())}); {fix}") from error
