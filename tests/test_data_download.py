"""Published datasets: from the hub into a folder, whole or not at all, and no zip writes where it should not."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from pathlib import Path

import pytest
from support import full_disk, kill_while
from test_data_checking import write_dataset

from pvl_adapter.__main__ import main
from pvl_adapter.data import SegmentationDataset, check_datasets, download_dataset
from pvl_adapter.data.download import HUB_DATASETS, unpack

REPO = "datasets/TahaKoleilat/MedCLIPSeg"
TABLE = "Prompts_Folder/Train_text.xlsx"


def zipped(entries: dict[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
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
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((folder / "Prompts_Folder").stat().st_mode)
    splits = [SegmentationDataset(folder, split) for split in ("train", "val", "test")]
    assert check_datasets(splits, progress=False) == []


def test_by_the_command_line(tmp_path, hub, sound, capsys):
    hub.add(REPO, "BUSI.zip", zipped(sound))
    main(["download", "BUSI", "--data-folder", str(tmp_path / "data")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "data" / "BUSI")
    assert contents(tmp_path / "data" / "BUSI", root="BUSI/") == sound
    with pytest.raises(SystemExit, match="error: there is no dataset 'BUSY' on the hub; did you mean 'BUSI'"):
        main(["download", "BUSY"])


def test_folders_get_the_official_case_of_letters(tmp_path, hub, sound):
    files = {str(name).replace("_Folder", "_folder").replace("/img/", "/IMG/"): data for name, data in sound.items()}
    hub.add(REPO, "BUSI.zip", zipped(files))
    assert contents(download(tmp_path), root="BUSI/") == sound


def test_what_is_there_is_left_alone(tmp_path, hub):
    there = write_dataset(tmp_path / "data" / "BUSI")
    before = contents(there)
    assert download(tmp_path) == there
    assert contents(there) == before
    assert hub.requests == []


def test_a_second_download_needs_no_hub(tmp_path, hub, sound):
    hub.add(REPO, "BUSI.zip", zipped(sound))
    download(tmp_path)
    hub.failing = 500
    again = download_dataset("BUSI", tmp_path / "more", cache_dir=tmp_path / "cache", local_files_only=True)
    assert contents(again, root="BUSI/") == sound


def test_something_else_in_its_place(tmp_path, hub):
    (tmp_path / "data" / "BUSI").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no Prompts_Folder; move it away"):
        download(tmp_path)


def test_names():
    assert len(HUB_DATASETS) == len(set(HUB_DATASETS)) == 15
    with pytest.raises(ValueError, match="EUS is not on the hub"):
        download_dataset("eus", "data")
    with pytest.raises(ValueError, match=r"no dataset 'Kvasi' on the hub; did you mean 'Kvasir'\? Published are BUSI,"):
        download_dataset("Kvasi", "data")


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


EVIL = {
    "parent": "../evil.png",
    "parent within": "BUSI/Train_Folder/../../../evil.png",
    "parent of Windows": "BUSI\\..\\..\\evil.png",
    "absolute": "/tmp/evil.png",
    "absolute of Windows": "\\evil.png",
    "drive letter": "C:/evil.png",
    "drive letter without slash": "c:evil.png",
    "stream of a file": "BUSI/Train_Folder/a.png:evil",
    "control character": "BUSI/Train_Folder/a\n.png",
    "a file twice": f"busi/{TABLE}",
}


@pytest.mark.parametrize("kind", EVIL)
def test_a_zip_that_would_write_elsewhere_is_refused(tmp_path, hub, sound, kind):
    hub.add(REPO, "BUSI.zip", zipped({**sound, EVIL[kind]: b"/etc/passwd"}))
    with pytest.raises(ValueError, match=r"not to be trusted: .*; nothing was unpacked"):
        download(tmp_path)
    assert left_over(tmp_path / "data") == []
    assert not list(tmp_path.rglob("evil*"))


def test_links_and_devices_become_plain_files(tmp_path, hub, sound):
    for kind in (stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o666):
        info = zipfile.ZipInfo(f"BUSI/Train_Folder/{kind}")
        info.create_system, info.external_attr = 3, kind << 16
        sound[info] = b"/etc/passwd"
    hub.add(REPO, "BUSI.zip", zipped(sound))
    found = [path for path in download(tmp_path).glob("Train_Folder/*") if path.suffix == "" and path.is_file()]
    assert [path.read_bytes() for path in found] == [b"/etc/passwd"] * 2
    assert not any(path.is_symlink() for path in found)


def test_a_zip_bomb(tmp_path, hub, sound, monkeypatch):
    hub.add(REPO, "BUSI.zip", zipped({**sound, "BUSI/Train_Folder/img/big.png": bytes(1 << 22)}))
    usage = type("Usage", (), {"free": (1 << 26) + (1 << 21)})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs 0.00 GB.*free some space"):
        download(tmp_path)
    assert left_over(tmp_path / "data") == []


def test_a_size_that_is_a_lie(tmp_path, hub, sound):
    content = bytearray(zipped({**sound, "BUSI/Train_Folder/img/big.png": bytes(1 << 22)}))
    declared = (1 << 22).to_bytes(4, "little")
    assert content.count(declared) == 2
    hub.add(REPO, "BUSI.zip", bytes(content).replace(declared, (9).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"damaged .*download it again"):
        download(tmp_path)
    assert left_over(tmp_path / "data") == []


def test_encrypted_entries(tmp_path, hub, sound):
    content = bytearray(zipped(sound))
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    hub.add(REPO, "BUSI.zip", bytes(content))
    with pytest.raises(ValueError, match="encrypted"):
        download(tmp_path)


def test_no_dataset(tmp_path, hub):
    hub.add(REPO, "BUSI.zip", zipped({"OTHER/readme.txt": b"hello"}))
    with pytest.raises(ValueError, match="expected BUSI/Prompts_Folder"):
        download(tmp_path)
    assert left_over(tmp_path / "data") == []


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.98])
def test_a_damaged_zip_is_fetched_again(tmp_path, hub, sound, keep):
    content = zipped(sound)
    hub.add(REPO, "BUSI.zip", content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"damaged .*download it again"):
        download(tmp_path)
    assert left_over(tmp_path / "data") == []
    hub.add(REPO, "BUSI.zip", content)
    assert contents(download(tmp_path), root="BUSI/") == sound


def test_a_changed_byte_is_noticed(tmp_path, hub, sound):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sound.items():
            archive.writestr(name, content)
    content = bytearray(buffer.getvalue())
    at = content.index(b"IDAT") + 30
    content[at] ^= 1
    hub.add(REPO, "BUSI.zip", bytes(content))
    with pytest.raises(ValueError, match=r"damaged .*CRC"):
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
