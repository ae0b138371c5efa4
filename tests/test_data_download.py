"""Published datasets: from the hub into a folder, whole or not at all, and no zip writes where it should not."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import full_disk, kill_while
from test_data_checking import write_dataset

from pvl_adapter.__main__ import main
from pvl_adapter.data import SegmentationDataset, check_datasets, download_dataset
from pvl_adapter.data.download import unpack

REPO = "datasets/TahaKoleilat/MedCLIPSeg"
TABLE = "Prompts_Folder/Train_text.xlsx"


def zipped(entries: dict[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def contents(folder: Path, *, root: str = "") -> dict[str | zipfile.ZipInfo, bytes]:
    return {
        f"{root}{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def sound(tmp_path: Path) -> dict[str | zipfile.ZipInfo, bytes]:
    """What the zip of a dataset holds."""
    return contents(write_dataset(tmp_path / "made" / "BUSI"), root="BUSI/")


def download(tmp_path: Path, name: str = "BUSI", **options: object) -> Path:
    return download_dataset(name, tmp_path / "data", cache_dir=tmp_path / "cache", **options)


def left_over(folder: Path) -> list[str]:
    """What lies there but a lock."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.is_dir() else []


@pytest.mark.parametrize("root", ["BUSI/", "", "busi/"])
def test_download(tmp_path, hub, sound, root):
    files = {str(name).replace("BUSI/", root, 1): content for name, content in sound.items()}
    files |= {"__MACOSX/BUSI/._a.png": b"junk", f"{root}.DS_Store": b"junk", f"{root}Train_Folder/": b""}
    hub.add(REPO, "BUSI.zip", zipped(files))
    folder = download(tmp_path, "busi")
    assert folder == tmp_path / "data" / "BUSI"
    assert contents(folder, root="BUSI/") == sound
    assert left_over(tmp_path / "data") == ["BUSI"]
    splits = [SegmentationDataset(folder, split) for split in ("train", "val", "test")]
    assert check_datasets(splits, progress=False) == []
    hub.failing = 500  # what is there is left alone, and the zip is in the cache
    assert download(tmp_path) == folder
    again = download_dataset("BUSI", tmp_path / "more", cache_dir=tmp_path / "cache", local_files_only=True)
    assert contents(again, root="BUSI/") == sound


def test_by_the_command_line(tmp_path, hub, sound, capsys):
    hub.add(REPO, "BUSI.zip", zipped(sound))
    main(["download", "BUSI", "--data-folder", str(tmp_path / "data")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "data" / "BUSI")
    for name, facts in {"BUSY": "'BUSY'.*did you mean 'BUSI'.*Kvasir", "eus": "EUS is not on the hub"}.items():
        with pytest.raises(SystemExit, match=facts):
            main(["download", name])


def test_folders_get_the_official_case_and_links_become_plain_files(tmp_path, hub, sound):
    files = {str(name).replace("_Folder", "_folder").replace("/img/", "/IMG/"): data for name, data in sound.items()}
    link = zipfile.ZipInfo("BUSI/Train_Folder/link")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    hub.add(REPO, "BUSI.zip", zipped({**files, link: b"/etc/passwd"}))
    folder = download(tmp_path)
    assert not (folder / "Train_Folder/link").is_symlink()
    assert contents(folder, root="BUSI/") == {**sound, link.filename: b"/etc/passwd"}


def test_something_else_in_its_place(tmp_path, hub):
    (tmp_path / "data" / "BUSI").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no Prompts_Folder; move it away"):
        download(tmp_path)


def test_what_the_hub_says_reaches_the_user(tmp_path, hub, sound):
    hub.add(REPO, "README.md", b"")
    with pytest.raises(OSError, match=r"BUSI\.zip"):
        download(tmp_path)
    hub.tokens[REPO] = "secret"
    with pytest.raises(OSError, match=r"[Rr]epository"):
        download(tmp_path)
    hub.add(REPO, "BUSI.zip", zipped(sound))
    assert download(tmp_path, token="secret").is_dir()
    with pytest.raises(FileNotFoundError):
        download(tmp_path, "ISIC", local_files_only=True)


# ---- zips that are not to be trusted --------------------------------------------------------------------------------

Files = dict[str | zipfile.ZipInfo, bytes]
BIG = "BUSI/Train_Folder/img/big.png"


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
    "absolute of Windows": (with_entry("\\evil.png"), "not to be trusted"),
    "drive letter": (with_entry("C:/evil.png"), "not to be trusted"),
    "drive letter without slash": (with_entry("c:evil.png"), "not to be trusted"),
    "stream of a file": (with_entry("BUSI/Train_Folder/a.png:evil"), "not to be trusted"),
    "control character": (with_entry("BUSI/Train_Folder/a\n.png"), "not to be trusted"),
    "a file twice": (with_entry(f"busi/{TABLE}"), "not to be trusted"),
    "another dataset": (lambda sound: zipped({"OTHER/readme.txt": b"hello"}), "expected BUSI/Prompts_Folder"),
    "a size that is a lie": (size_that_is_a_lie, "damaged"),
    "encrypted": (encrypted, "encrypted"),
    "changed byte": (changed_byte, "damaged .*CRC"),
    "empty": (lambda sound: b"", "damaged"),
    "a third": (lambda sound: zipped(sound)[: len(zipped(sound)) // 3], "damaged"),
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
        assert contents(download(tmp_path), root="BUSI/") == sound


def test_a_zip_bomb(tmp_path, hub, sound, monkeypatch):
    hub.add(REPO, "BUSI.zip", zipped({**sound, BIG: bytes(1 << 22)}))
    usage = type("Usage", (), {"free": (1 << 26) + (1 << 21)})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"BUSI.zip needs .* GB.*free some space"):
        download(tmp_path)
    assert left_over(tmp_path / "data") == []


# ---- whole or not at all --------------------------------------------------------------------------------------------


def test_a_killed_download_leaves_no_half_dataset(tmp_path, sound):
    archive = tmp_path / "BUSI.zip"
    archive.write_bytes(zipped({**sound, "BUSI/Train_Folder/img/big.png": os.urandom(1 << 16)}))
    target = tmp_path / "data" / "BUSI"
    target.parent.mkdir()
    kill_while(lambda: unpack(archive, target), room=1 << 15)
    assert not target.exists()
    assert len(left_over(target.parent)) == 1  # the half, under another name
    unpack(archive, target)
    assert left_over(target.parent) == ["BUSI"]
    assert len(contents(target)) == len(sound) + 1


def test_a_full_disk_leaves_nothing(tmp_path, sound):
    archive = tmp_path / "BUSI.zip"
    archive.write_bytes(zipped({**sound, "BUSI/Train_Folder/img/big.png": os.urandom(1 << 16)}))
    (tmp_path / "data").mkdir()
    with full_disk(1 << 15), pytest.raises(OSError, match=r"cannot be written .*; free some space"):
        unpack(archive, tmp_path / "data" / "BUSI")
    assert left_over(tmp_path / "data") == []


def test_two_downloads_at_once(tmp_path, hub, sound):
    from concurrent.futures import ThreadPoolExecutor

    hub.add(REPO, "BUSI.zip", zipped(sound))
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: download(tmp_path), range(4)))
    assert set(folders) == {tmp_path / "data" / "BUSI"}
    assert contents(folders[0], root="BUSI/") == sound
    assert left_over(tmp_path / "data") == ["BUSI"]
