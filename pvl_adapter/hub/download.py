"""Files from the Hugging Face hub, with errors that say what to do.

All errors are kinds of OSError. Nothing but complete files ever gets a place in the cache: huggingface_hub sees to it,
and tries a cut connection several times, going on where it was cut.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Hub:
    """How to reach the hub, and where its files are kept.

    Attributes:
        revision: Branch, tag or commit; None means the main branch.
        cache_dir: Of huggingface_hub; None means its default.
        token: For private or gated repositories; None means the one that `hf auth login` stored.
        local_files_only: Use the cache alone.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def file(self, repo: str, name: str, *, repo_type: str = "model") -> Path:
        """Path of a file of a repository, "model" or "dataset", in the cache, downloaded if it is not there yet.

        Raises:
            FileNotFoundError: If repository, revision or file do not exist, or the hub cannot be reached and the file
                is not in the cache.
            PermissionError: If the hub wants (another) token.
            ConnectionError: If the connection broke again and again.
            OSError: If the file cannot be written.
        """
        from huggingface_hub import hf_hub_download

        return Path(
            _explained(
                lambda: hf_hub_download(
                    repo,
                    name,
                    repo_type=repo_type,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    token=self.token,
                    local_files_only=self.local_files_only,
                ),
                what=f"{name} of {'the datasets of ' * (repo_type == 'dataset')}{repo}",
                hub=self,
            )
        )

    def has(self, repo: str, name: str) -> bool:
        """Whether a repository that can be reached, or is in the cache, holds a file."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            self.file(repo, name)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, EntryNotFoundError):  # the hub's answer, or the cache's if it is not asked
                return False
            raise
        return True

    def folder(self, repo: str, patterns: Sequence[str]) -> Path:
        """Path of a folder in the cache with those files of a repository that match; errors as for `file`."""
        from huggingface_hub import snapshot_download

        return Path(
            _explained(
                lambda: snapshot_download(
                    repo,
                    allow_patterns=list(patterns),
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    token=self.token,
                    local_files_only=self.local_files_only,
                ),
                what=repo,
                hub=self,
            )
        )

    def assets(self) -> Path:
        """Where files derived from downloads are kept."""
        from huggingface_hub import cached_assets_path

        beside = None if self.cache_dir is None else Path(self.cache_dir) / "assets"
        return cached_assets_path("pvl-adapter", namespace="released", subfolder="converted", assets_dir=beside)


def known_sha256(path: Path) -> str | None:
    """The hash that the hub gives for a file of the cache: large files are stored there under their own."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def discard(path: Path) -> None:
    """Take a damaged file out of the cache, so that it is downloaded anew."""
    for place in (path.resolve(), path):
        with suppress(OSError):
            place.unlink()


def _explained(download: Callable[[], _T], *, what: str, hub: Hub) -> _T:
    """Run a download; its errors say what was wanted, what happened and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    transport_error: Any = HfHubHTTPError.__bases__[0]  # of the HTTP library beneath huggingface_hub
    try:
        return download()
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{what} cannot be on the hub ({error}); give an existing file or folder, or owner/name of a repository"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{what} is gated: ask for access on its page, then run `hf auth login` or give token=..."
        ) from error
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 401:
            raise PermissionError(
                f"{what} was refused (401): the repository does not exist, or is private and wants a token; run "
                "`hf auth login` or give token=..."
            ) from error
        raise FileNotFoundError(f"{what} does not exist on the hub: there is no such repository") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{what} has no revision {hub.revision!r} on the hub") from error
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"{what} does not exist on the hub: the repository has no such file") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError) and not isinstance(cause, OfflineModeIsEnabled):
            raise _refusal(cause, what=what) from error
        raise FileNotFoundError(
            f"{what} is not in the cache, and the hub was not asked or could not be reached. Load it once with a "
            "network, or carry a folder over that save_pretrained or `python -m pvl_adapter convert` has written"
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(error, what=what) from error
    except transport_error as error:
        raise ConnectionError(
            f"the connection broke again and again while {what} was loaded ({first_line(error)}); load it again"
        ) from error
    except OSError as error:
        if error.errno is None:  # huggingface_hub's own, as when a file came shorter than announced
            raise ConnectionError(f"{what} did not arrive whole ({first_line(error)}); load it again") from error
        fix = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "make it writable"
        raise OSError(
            error.errno, f"{what} cannot be written to the cache ({error.strerror}); {fix}, or give another cache_dir"
        ) from error


def _refusal(error: Exception, *, what: str) -> OSError:
    """The error for an answer of the hub that is neither the file nor a plain absence."""
    response = getattr(error, "response", None)
    status = None if response is None else response.status_code
    if status in (401, 403):
        return PermissionError(f"{what} was refused ({status}): run `hf auth login`, or give a valid token=...")
    return ConnectionError(f"the hub could not deliver {what} ({first_line(error)}); load it again later")


def first_line(error: Exception) -> str:
    """Of an error's message; what libraries say after it is advice for their direct users."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
