"""The published datasets from the Hugging Face hub, unpacked without trusting them."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from pvl_adapter.hub.catalogue import OFFICIAL_REPO
from pvl_adapter.image_files import reason

HUB_DATASETS = (
    *("BUSI", "BTMRI", "ISIC", "Kvasir", "Covid19", "BUSUC", "BUSBRA", "BUID", "UDIAT", "BRISC"),
    *("UWaterlooSkinCancer", "ColonDB", "ClinicDB", "CVC300", "BKAI"),
)
"""What the hub has as a zip: all that the paper uses but EUS."""

_OUTSIDE = re.compile(r"^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)")  # a path that leads out of the folder
_SPARE = 1 << 26  # bytes that stay free on the disk


def download_dataset(name: str, folder: str | os.PathLike[str], **options: Any) -> Path:
    """The folder of a published dataset, which is downloaded and unpacked if it is not there yet.

    Args:
        name: One of `HUB_DATASETS`, in any case of letters.
        folder: Where datasets are kept; made if it is missing. The dataset gets a folder in it once it is complete.
        options: Of `huggingface_hub.hf_hub_download`: revision, token, cache_dir, local_files_only, ...

    Raises:
        ValueError: If there is no such dataset, or its zip is damaged or not to be trusted.
        OSError: If the hub does not give it (huggingface_hub's own errors), or the disk is too small.
    """
    from filelock import FileLock
    from huggingface_hub import hf_hub_download

    known = next((each for each in HUB_DATASETS if each.casefold() == name.casefold()), None)
    if known is None:
        fix = "give one of them (EUS is to be had from its own authors, see arXiv 2602.20423)"
        raise ValueError(f"there is no dataset {name!r} on the hub, which has {', '.join(HUB_DATASETS)}; {fix}")
    target = Path(folder) / known
    if (target / "Prompts_Folder").is_dir():
        return target
    if target.exists():
        raise ValueError(f"{target} is there already, but has no Prompts_Folder; move it away, or give another folder")
    archive = Path(hf_hub_download(OFFICIAL_REPO, f"{known}.zip", repo_type="dataset", **options))
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{known}.lock"):  # of two processes one waits
        if not target.exists():
            unpack(archive, target)
    return target


def unpack(archive: Path, target: Path) -> None:
    """Unpack a dataset's zip beside its folder, which does not exist, and rename it when all of it is out.

    A damaged zip is removed, so that it is downloaded anew; errors as for `download_dataset`.
    """
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # from a process that was killed
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
            if outside := [name for name in names if _OUTSIDE.search(name)]:
                raise ValueError(f"{archive} is not to be trusted, it holds {outside[0]!r}; report it where you got it")
            size, free = sum(entry.file_size for entry in opened.infolist()), shutil.disk_usage(target.parent).free
            if size + _SPARE > free:
                need = f"needs {size / 1e9:.2f} GB, {target.parent} has {free / 1e9:.2f} GB"
                raise OSError(f"{archive} {need}; free some space, or give another folder")
            opened.extractall(temporary)  # each file at most of the size it states, its checksum compared
        found = [*temporary.glob("Prompts_Folder"), *temporary.glob("*/Prompts_Folder")]
        if not found:
            raise ValueError(f"{archive} is not a dataset: expected {target.name}/Prompts_Folder, got {names[:4]}")
        found[0].parent.rename(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        for path in (archive.resolve(), archive):  # of the cache: the file, and the link to it
            path.unlink(missing_ok=True)
        raise ValueError(f"{archive} is damaged or encrypted ({reason(error)}); download it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
