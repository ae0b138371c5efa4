"""Published datasets: from the hub into a folder, whole or not at all, and no zip writes where it should not."""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import full_disk, kill_while
from test_data_checking import write_dataset

from pvl_adapter.__main__ import main
from pvl_adapter.data import SegmentationDataset, check_datasets, download_dataset
from pvl_adapter.data.download import unpack

REPO = "datasets/TahaKoleilat/MedCLIPSeg"
BIG = "BUSI/Train_Folder/img/big.png"
Files = dict[str | zipfile.ZipInfo, bytes]


def zipped(entries: Files, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def contents(folder: Path) -> Files:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {f"BUSI/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}


@pytest.fixture
def sound(tmp_path: Path) -> Files:
    """What the zip of a dataset holds."""
    return contents(write_dataset(tmp_path / "made" / "BUSI"))


def download(tmp_path: Path, name: str = "BUSI", **options: object) -> Path:
    return download_dataset(name, tmp_path / "data", cache_dir=tmp_path / "cache", **options)


def left_over(folder: Path) -> list[str]:
    """What lies there but a lock."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.is_dir() else []


@pytest.mark.parametrize("root", ["BUSI/", "", "busi/"])
def test_download(tmp_path, hub, sound, root):
    hub.add(REPO, "BUSI.zip", zipped({str(name).replace("BUSI/", root, 1): data for name, data in sound.items()}))
    with ThreadPoolExecutor(4) as pool:  # at once
        (folder,) = set(pool.map(lambda _: download(tmp_path, "busi"), range(4)))
    assert folder == tmp_path / "data" / "BUSI"
    assert contents(folder) == sound
    assert left_over(tmp_path / "data") == ["BUSI"]
    assert check_datasets([SegmentationDataset(folder, split) for split in ("train", "val", "test")]) == []
    hub.failing = 500  # what is there is left alone, and the zip is in the cache
    assert download(tmp_path) == folder
    again = download_dataset("BUSI", tmp_path / "more", cache_dir=tmp_path / "cache", local_files_only=True)
    assert contents(again) == sound


def test_by_the_command_line(tmp_path, hub, sound, capsys):
    hub.add(REPO, "BUSI.zip", zipped(sound))
    main(["download", "BUSI", "--data-folder", str(tmp_path / "data")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "data" / "BUSI")
    with pytest.raises(SystemExit):
        main(["download", "BUSY"])
    assert re.search(r"'BUSY'.*BUSI.*Kvasir.*EUS", capsys.readouterr().err)


def test_what_is_in_the_way_and_what_the_hub_says_reach_the_user(tmp_path, hub, sound):
    hub.add(REPO, "README.md", b"")
    with pytest.raises(OSError, match=r"BUSI\.zip"):
        download(tmp_path)
    hub.add(REPO, "BUSI.zip", zipped(sound))
    hub.tokens[REPO] = "secret"
    with pytest.raises(OSError, match=r"[Rr]epository"):
        download(tmp_path)
    (tmp_path / "data" / "BUSI").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no Prompts_Folder; move it away"):
        download(tmp_path)
    (tmp_path / "data" / "BUSI").rmdir()
    assert download(tmp_path, token="secret").is_dir()


# ---- zips that are not to be trusted --------------------------------------------------------------------------------


def with_entry(name: str) -> Callable[[Files], bytes]:
    return lambda sound: zipped({**sound, name: b"evil"})


def size_that_is_a_lie(sound: Files) -> bytes:
    return zipped({**sound, BIG: bytes(1 << 22)}).replace((1 << 22).to_bytes(4, "little"), (9).to_bytes(4, "little"))


def encrypted(sound: Files) -> bytes:
    content = bytearray(zipped(sound))
    content[content.index(b"PK\1\2") + 8] |= 1
    return bytes(content)


def changed_byte(sound: Files) -> bytes:
    content = bytearray(zipped(sound, zipfile.ZIP_STORED))
    content[content.index(b"IDAT") + 30] ^= 1
    return bytes(content)


BAD: dict[str, tuple[Callable[[Files], bytes], str]] = {  # the zip, and what the error must say
    "parent": (with_entry("../evil.png"), "not to be trusted"),
    "parent within": (with_entry("BUSI/Train_Folder/../../../evil.png"), "not to be trusted"),
    "parent of Windows": (with_entry("BUSI\\..\\..\\evil.png"), "not to be trusted"),
    "absolute": (with_entry("/tmp/evil.png"), "not to be trusted"),
    "drive letter": (with_entry("C:/evil.png"), "not to be trusted"),
    "another dataset": (lambda sound: zipped({"OTHER/readme.txt": b"hello"}), "expected BUSI/Prompts_Folder"),
    "a size that is a lie": (size_that_is_a_lie, "damaged"),
    "encrypted": (encrypted, "encrypted"),
    "changed byte": (changed_byte, "damaged"),
    "empty": (lambda sound: b"", "damaged"),
    "truncated": (lambda sound: zipped(sound)[: len(zipped(sound)) // 3], "damaged"),
    "without its end": (lambda sound: zipped(sound)[:-30], "damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_zip_leaves_nothing_and_a_damaged_one_is_fetched_again(tmp_path, hub, sound, kind):
    make, facts = BAD[kind]
    hub.add(REPO, "BUSI.zip", make(sound))
    with pytest.raises(ValueError, match=rf"BUSI\.zip.*{facts}"):
        download(tmp_path)
    assert left_over(tmp_path / "data") == []
    assert not list(tmp_path.rglob("evil*"))
    if "damaged" in facts:
        hub.add(REPO, "BUSI.zip", zipped(sound))
        assert contents(download(tmp_path)) == sound


def test_a_link_becomes_a_plain_file(tmp_path, sound):
    link = zipfile.ZipInfo("BUSI/Train_Folder/link")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    (tmp_path / "BUSI.zip").write_bytes(zipped({**sound, link: b"/etc/passwd"}))
    unpack(tmp_path / "BUSI.zip", tmp_path / "BUSI")
    assert not (tmp_path / "BUSI/Train_Folder/link").is_symlink()


def test_a_zip_bomb(tmp_path, hub, sound, monkeypatch):
    hub.add(REPO, "BUSI.zip", zipped({**sound, BIG: bytes(1 << 22)}))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": (1 << 26) + (1 << 21)}))
    with pytest.raises(OSError, match=r"BUSI.zip needs .* GB.*free some space"):
        download(tmp_path)
    assert left_over(tmp_path / "data") == []


def test_a_killed_download_and_a_full_disk_leave_no_half_dataset(tmp_path, sound):
    archive, target = tmp_path / "BUSI.zip", tmp_path / "data" / "BUSI"
    archive.write_bytes(zipped({**sound, BIG: os.urandom(1 << 16)}))
    target.parent.mkdir()
    kill_while(lambda: unpack(archive, target), room=1 << 15)
    assert len(left_over(target.parent)) == 1  # the half, under another name
    with full_disk(1 << 15), pytest.raises(OSError):  # noqa: PT011  the system's own words
        unpack(archive, target)
    assert left_over(target.parent) == []
    unpack(archive, target)
    assert left_over(target.parent) == ["BUSI"]
    assert len(contents(target)) == len(sound) + 1
