"""The published datasets from the Hugging Face hub, unpacked without trusting them."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import zipfile
import zlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pvl_adapter.data.issues import listed, reason
from pvl_adapter.hub.catalogue import OFFICIAL_REPO
from pvl_adapter.hub.download import Hub, discard

HUB_DATASETS = (
    *("BUSI", "BTMRI", "ISIC", "Kvasir", "Covid19", "BUSUC", "BUSBRA", "BUID", "UDIAT", "BRISC"),
    *("UWaterlooSkinCancer", "ColonDB", "ClinicDB", "CVC300", "BKAI"),
)
"""What the hub has as a zip."""
ALL_DATASETS = (*HUB_DATASETS, "EUS")
"""All that the paper uses."""
EUS_IS_ELSEWHERE = (
    "EUS is not on the hub with the others; get it from its own authors (see the paper, arXiv 2602.20423), and put it "
    "into a folder EUS in the released layout"
)

_FOLDERS = {
    name.casefold(): name for name in ("Prompts_Folder", "Train_Folder", "Val_Folder", "Test_Folder", "img", "label")
}
_SPARE = 1 << 26  # bytes that stay free on the disk


def download_dataset(
    name: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A published dataset, downloaded and unpacked if it is not there yet.

    Args:
        name: One of `HUB_DATASETS`, in any case of letters.
        folder: Where datasets are kept; made if it is missing. The dataset gets a folder in it once it is complete.
        revision: Of the hub repository.
        token: For the hub.
        cache_dir: Of huggingface_hub, which keeps the zip; None means its default.
        local_files_only: Use that cache alone.

    Returns:
        The dataset's folder.

    Raises:
        ValueError: If there is no such dataset, or its zip is damaged or not to be trusted.
        OSError: If it cannot be had, or the disk is too small; see `from_pretrained`.
    """
    published = _find(name)
    parent = Path(folder)
    target = parent / published
    if _is_complete(target):
        return target
    from filelock import FileLock

    hub = Hub(revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    archive = hub.file(OFFICIAL_REPO, f"{published}.zip", repo_type="dataset")
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(parent / f".{published}.lock"):  # of two processes one waits
            if not _is_complete(target):
                unpack(archive, target)
    except _DamagedError as error:
        discard(archive)
        raise ValueError(str(error)) from error
    return target


def unpack(archive: Path, target: Path) -> None:
    """Unpack a dataset's zip beside its place, and move it there when all of it is out.

    Args:
        archive: Holds the content of the dataset's folder, directly or in one folder of its name.
        target: The dataset's folder, which does not exist; no other process may be at it.

    Raises:
        ValueError: If the zip is damaged, or holds anything but plain files with names that stay within.
        OSError: If it does not fit on the disk.
    """
    temporary = target.with_name(f".{target.name}.part")
    try:
        if temporary.exists():  # of a process that was killed
            shutil.rmtree(temporary)
        temporary.mkdir()
        with zipfile.ZipFile(archive) as opened:
            entries = _entries(opened, archive=archive, name=target.name)
            size, free = sum(entry.info.file_size for entry in entries), shutil.disk_usage(target.parent).free
            if size + _SPARE > free:
                raise OSError(
                    f"{archive.name} would unpack to {size / 1e9:.2f} GB, {target.parent} has {free / 1e9:.2f} GB "
                    "free; free some space, or give another folder"
                )
            for entry in entries:
                file = temporary.joinpath(*entry.parts)
                file.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(entry.info) as packed, file.open("xb") as unpacked:  # reading checks the CRC
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
        temporary.replace(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _DamagedError(f"{archive} is damaged ({reason(error)}); download it again") from error
    except OSError as error:
        if error.errno is None:  # our own
            raise
        if error.errno == errno.EINVAL:  # a place before the beginning was looked up
            raise _DamagedError(f"{archive} is damaged; download it again") from error
        raise OSError(
            error.errno, f"{target} cannot be written ({error.strerror}); free some space, or give another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _DamagedError(ValueError):
    """A zip that is to be downloaded again."""


@dataclass(frozen=True)
class _Entry:
    info: zipfile.ZipInfo
    parts: tuple[str, ...]


def _entries(opened: zipfile.ZipFile, *, archive: Path, name: str) -> list[_Entry]:
    """The files of a zip and where they go, all checked before any is written."""
    entries = []
    for info in opened.infolist():
        plain = info.filename.replace("\\", "/")
        parts = tuple(part for part in plain.split("/") if part not in ("", "."))
        problem = _objection(info, plain, parts)
        if problem:
            raise ValueError(
                f"{archive} is not to be trusted: its entry {info.filename!r} {problem}; nothing was unpacked. "
                "Download it again, and report it if that does not help"
            )
        if not (info.is_dir() or plain.endswith("/")) and "__MACOSX" not in parts and parts[-1] != ".DS_Store":
            entries.append(_Entry(info, parts))
    roots = {entry.parts[0].casefold() for entry in entries if len(entry.parts) > 1}
    depth = 1 if roots == {name.casefold()} else 0
    placed = [
        _Entry(
            entry.info, tuple(_FOLDERS.get(part.casefold(), part) for part in entry.parts[depth:-1]) + entry.parts[-1:]
        )
        for entry in entries
        if len(entry.parts) > depth
    ]
    if not any(entry.parts[0] == "Prompts_Folder" for entry in placed):
        found = listed(sorted({entry.parts[0] for entry in entries})) or "nothing"
        raise ValueError(f"{archive} holds no dataset: found {found}, expected {name}/Prompts_Folder/...")
    if len({entry.parts for entry in placed}) < len(placed):
        raise ValueError(f"{archive} is not to be trusted: it holds a file twice; nothing was unpacked")
    return placed


def _objection(info: zipfile.ZipInfo, plain: str, parts: tuple[str, ...]) -> str:
    """Why an entry is not unpacked; empty if it may be."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    if plain.startswith("/") or re.match(r"[A-Za-z]:", plain):
        return "has an absolute path"
    if ".." in parts:
        return "leads out of the folder"
    if not parts or any(ord(letter) < 32 for letter in plain) or any(":" in part for part in parts):
        return "has no usable name"
    if kind == stat.S_IFLNK:
        return "is a link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is no plain file"
    if info.flag_bits & 1:
        return "is encrypted"
    return ""


def _find(name: str) -> str:
    """A dataset's name as the hub has it."""
    names = {known.casefold(): known for known in HUB_DATASETS}
    if name.casefold() == "eus":
        raise ValueError(EUS_IS_ELSEWHERE)
    if name.casefold() not in names:
        near = get_close_matches(name.casefold(), names, n=1)
        meant = f"did you mean {names[near[0]]!r}? " if near else ""
        raise ValueError(f"there is no published dataset {name!r}; {meant}Published are {', '.join(HUB_DATASETS)}")
    return names[name.casefold()]


def _is_complete(target: Path) -> bool:
    """Whether a dataset is there.

    Raises:
        ValueError: If something else is in its place.
    """
    if (target / "Prompts_Folder").is_dir():
        return True
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} is there already, but has no Prompts_Folder; move it away, or give another folder")
    return False
