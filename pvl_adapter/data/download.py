"""The published datasets from the Hugging Face hub, unpacked without trusting them."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
import zlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pvl_adapter.hub.catalogue import OFFICIAL_REPO
from pvl_adapter.image_files import reason

HUB_DATASETS = (
    *("BUSI", "BTMRI", "ISIC", "Kvasir", "Covid19", "BUSUC", "BUSBRA", "BUID", "UDIAT", "BRISC"),
    *("UWaterlooSkinCancer", "ColonDB", "ClinicDB", "CVC300", "BKAI"),
)
"""What the hub has as a zip."""
ALL_DATASETS = (*HUB_DATASETS, "EUS")
"""All that the paper uses."""
EUS_IS_ELSEWHERE = (
    "EUS is not on the hub with the others; get it from its own authors (see the paper, arXiv 2602.20423), and put it "
    "into a folder EUS in the official layout"
)

_FOLDERS = {
    name.casefold(): name for name in ("Prompts_Folder", "Train_Folder", "Val_Folder", "Test_Folder", "img", "label")
}
_JUNK = re.compile(r"(^|/)(__MACOSX/|\.DS_Store$)")
_SPARE = 1 << 26  # bytes that stay free on the disk


def download_dataset(name: str, folder: str | os.PathLike[str], **options: Any) -> Path:
    """A published dataset, downloaded and unpacked if it is not there yet.

    Args:
        name: One of `HUB_DATASETS`, in any case of letters.
        folder: Where datasets are kept; made if it is missing. The dataset gets a folder in it once it is complete.
        options: Of `huggingface_hub.hf_hub_download`: revision, token, cache_dir, local_files_only, ...

    Returns:
        The dataset's folder.

    Raises:
        ValueError: If there is no such dataset, or its zip is damaged or not to be trusted.
        OSError: If the hub does not give it (huggingface_hub's own errors), or the disk is too small.
    """
    names = {known.casefold(): known for known in HUB_DATASETS}
    if name.casefold() == "eus":
        raise ValueError(EUS_IS_ELSEWHERE)
    if name.casefold() not in names:
        near = get_close_matches(name.casefold(), names, n=1)
        meant = f"did you mean {names[near[0]]!r}? " if near else ""
        raise ValueError(f"there is no published dataset {name!r}; {meant}Published are {', '.join(HUB_DATASETS)}")
    target = Path(folder) / names[name.casefold()]
    if _is_complete(target):
        return target
    from filelock import FileLock
    from huggingface_hub import hf_hub_download

    archive = Path(hf_hub_download(OFFICIAL_REPO, f"{target.name}.zip", repo_type="dataset", **options))
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):  # of two processes one waits
        if not _is_complete(target):
            unpack(archive, target)
    return target


def unpack(archive: Path, target: Path) -> None:
    """Unpack a dataset's zip beside its folder, and rename it when all of it is out.

    A damaged zip is removed, so that it is downloaded anew.

    Args:
        archive: Holds the content of the dataset's folder, directly or in one folder of its name.
        target: The dataset's folder, which does not exist; no other process may write to it.

    Raises:
        ValueError: If the zip is damaged, or an entry would be unpacked outside of the folder.
        OSError: If it does not fit on the disk.
    """
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # from a process that was killed
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _entries(opened, archive=archive, name=target.name)
            size, free = sum(entry.file_size for entry in entries), shutil.disk_usage(target.parent).free
            if size + _SPARE > free:
                raise OSError(
                    f"{archive.name} would unpack to {size / 1e9:.2f} GB, {target.parent} has {free / 1e9:.2f} GB; "
                    "free some space, or give another folder"
                )
            for entry in entries:
                opened.extract(entry, temporary)  # at most the announced size, and its checksum is compared
        temporary.rename(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        for path in (archive.resolve(), archive):  # of the cache: the file, and the link to it
            path.unlink(missing_ok=True)
        raise ValueError(f"{archive} is damaged or encrypted ({reason(error)}); download it again") from error
    except OSError as error:
        if error.errno is None:
            raise
        fix = "free some space, or give another folder"
        raise OSError(error.errno, f"{target} cannot be written ({error.strerror}); {fix}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _entries(opened: zipfile.ZipFile, *, archive: Path, name: str) -> list[zipfile.ZipInfo]:
    """The files of a zip, named as in the dataset's folder, all checked before any is written.

    zipfile writes plain files only, also for links and devices.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    infos = [info for info in opened.infolist() if not info.is_dir() and not _JUNK.search(info.filename)]
    roots = {info.filename.partition("/")[0].casefold() for info in infos if "/" in info.filename}
    for info in infos:
        plain = info.filename.replace("\\", "/")
        parts = [_FOLDERS.get(part.casefold(), part) for part in plain.split("/")]
        if plain.startswith("/") or ".." in parts or re.search(r"[\0-\x1f:]", plain):
            raise ValueError(
                f"{archive} is not to be trusted: its entry {info.filename!r} leads out of the folder or has no usable "
                "name; nothing was unpacked. Report it where you got it"
            )
        info.filename = "/".join(parts[1:] if roots == {name.casefold()} else parts)
        if info.filename in entries:
            raise ValueError(f"{archive} is not to be trusted: it holds {info.filename!r} twice; nothing was unpacked")
        if info.filename:
            entries[info.filename] = info
    if not any(path.startswith("Prompts_Folder/") for path in entries):
        raise ValueError(f"{archive} does not hold a dataset: expected {name}/Prompts_Folder/..., got {sorted(roots)}")
    return list(entries.values())


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
