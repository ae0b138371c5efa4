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
"""What the hub has as a zip: all that the paper uses but EUS."""
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
    from filelock import FileLock
    from huggingface_hub import hf_hub_download

    names = {known.casefold(): known for known in HUB_DATASETS}
    if name.casefold() not in names:
        near = [f"did you mean {names[match]!r}? " for match in get_close_matches(name.casefold(), names, n=1)]
        fix = (
            EUS_IS_ELSEWHERE if name.casefold() == "eus" else f"{''.join(near)}Published are {', '.join(HUB_DATASETS)}"
        )
        raise ValueError(f"there is no dataset {name!r} on the hub; {fix}")
    target = Path(folder) / names[name.casefold()]
    if _is_complete(target):
        return target
    archive = Path(hf_hub_download(OFFICIAL_REPO, f"{target.name}.zip", repo_type="dataset", **options))
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):  # of two processes one waits
        if not _is_complete(target):
            unpack(archive, target)
    return target


def unpack(archive: Path, target: Path) -> None:
    """Unpack a dataset's zip beside its folder, which does not exist, and rename it when all of it is out.

    Raises:
        ValueError: If the zip is damaged, when it is removed to be downloaded anew, or not to be trusted.
        OSError: If it does not fit on the disk.
    """
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # from a process that was killed
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _entries(opened, archive=archive, name=target.name)
            size, free = sum(entry.file_size for entry in entries), shutil.disk_usage(target.parent).free
            if size + _SPARE > free:
                need = f"needs {size / 1e9:.2f} GB, {target.parent} has {free / 1e9:.2f} GB"
                raise OSError(f"{archive.name} {need}; free some space, or give another folder")
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
    """The files of a zip, renamed as in the dataset's folder, all checked before any is written.

    Of links and devices zipfile makes plain files.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    infos = [info for info in opened.infolist() if not info.is_dir() and not _JUNK.search(info.filename)]
    roots = {info.filename.partition("/")[0].casefold() for info in infos if "/" in info.filename}
    for info in infos:
        plain = info.filename.replace("\\", "/")
        parts = [_FOLDERS.get(part.casefold(), part) for part in plain.split("/")]
        path = "/".join(parts[1:] if roots == {name.casefold()} else parts)
        if plain.startswith("/") or ".." in parts or re.search(r"[\0-\x1f:]", plain) or path in entries:
            what = f"its entry {info.filename!r} leads out of the folder, has no usable name or is there twice"
            raise ValueError(
                f"{archive} is not to be trusted: {what}; nothing was unpacked. Report it where you got it"
            )
        if path:
            info.filename, entries[path] = path, info
    if not any(path.startswith("Prompts_Folder/") for path in entries):
        raise ValueError(f"{archive} does not hold a dataset: expected {name}/Prompts_Folder/..., got {sorted(roots)}")
    return list(entries.values())


def _is_complete(target: Path) -> bool:
    """Whether a dataset is there; raises ValueError if something else is."""
    if (target / "Prompts_Folder").is_dir():
        return True
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} is there already, but has no Prompts_Folder; move it away, or give another folder")
    return False
