"""Published weights by one call: from a hub, from its cache, from files, and through every failure on the way.

The hub is `hub_server`; a small network in the published layout replaces the published one.
"""

from __future__ import annotations

import copy
import os
import pickle
import time
import traceback
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fakes import GOLDEN, TINY_RELEASED, official_checkpoint, serve_tokenizer
from hub_server import HubServer
from support import full_disk
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.hub.official import OFFICIAL_TOKENIZER

REPO = "TahaKoleilat/MedCLIPSeg"
WEIGHTS = "trained_models/seed666/MedCLIPSeg_unimedclip_ViT-B-16_latest.pth"
BUSI = f"{REPO}/BUSI/{WEIGHTS}"
SENTENCE = "A tumor on the left"
SENTENCE_IDS = [2, 5, 6, 7, 8, 9, 3, 0, 0, 0, 0, 0]


def saved(value: object) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


CHECKPOINT = saved(official_checkpoint())
TENSORS = official_checkpoint()["model"]


@pytest.fixture
def published(hub: HubServer) -> HubServer:
    """The hub with a BUSI checkpoint and the tokenizer."""
    serve_tokenizer(hub)
    hub.add(REPO, f"BUSI/{WEIGHTS}", CHECKPOINT)
    return hub


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def _no_waiting(monkeypatch) -> None:
    """The client tries again at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def load(cache: Path, source: str | Path = REPO, **options: Any) -> pvl.MedCLIPSeg:
    return pvl.from_pretrained(source, **{"cache_dir": cache, "network": TINY_RELEASED, **options})


def logits(model: pvl.MedCLIPSeg, dtype: torch.dtype = torch.float32) -> Tensor:
    """For the recorded image, words and draws."""
    noise = [pvl.NoisePair(image=GOLDEN[f"noise.{k + 1}"], text=GOLDEN[f"noise.{k}"]) for k in (0, 2)]
    with torch.no_grad():
        return model(GOLDEN["image"].to(dtype), GOLDEN["input_ids"], noise=noise).logits


def assert_golden(model: pvl.MedCLIPSeg) -> None:
    torch.testing.assert_close(logits(model), GOLDEN["seg_logits"], atol=1e-5, rtol=0.0)


def converted(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def snapshots(cache: Path) -> list[Path]:
    return sorted(cache.glob("models--*/snapshots/*/**/*.pth"))


def assert_nothing_half_done(cache: Path, *, arrived: bool = True) -> None:
    assert not [path for path in cache.rglob("*") if path.suffix == ".incomplete" or ".part" in path.name]
    assert arrived or not converted(cache) + snapshots(cache)


# --- the published checkpoints ---------------------------------------------------------------------------------------


def test_a_published_checkpoint_gives_the_recorded_logits(published, cache, caplog):
    model = load(cache)

    (line,) = caplog.messages  # which checkpoint was taken, for none was named
    assert all(word in line for word in ("BUSI", "breast ultrasound", "checkpoint=", "fraction=", "Kvasir"))
    assert_golden(model)
    assert not model.training
    assert model.tokenize(SENTENCE)["input_ids"].tolist() == [SENTENCE_IDS]
    assert model.predict([torch.rand(3, 32, 32)], SENTENCE, num_samples=2).probability.isfinite().all()
    assert published.downloads[BUSI] == 1
    assert f"{OFFICIAL_TOKENIZER}/pytorch_model.bin" not in published.downloads
    again = load(cache, checkpoint="BUSI")  # from the converted copy
    assert caplog.messages == [line]
    assert again.provenance == model.provenance
    sha256 = published.repos[REPO][f"BUSI/{WEIGHTS}"].sha256
    facts = {"repo": REPO, "file": f"BUSI/{WEIGHTS}", "sha256": sha256, "checkpoint": "BUSI", "fraction": 100}
    assert facts.items() <= model.provenance.items()


def test_the_24_checkpoints_are_where_they_were_published():
    names = ("BUSI", "BTMRI", "ISIC", "Kvasir", "Covid19", "EUS")
    folders = {(name, n): name if n == 100 else f"{name}_{n}" for name in names for n in (100, 50, 25, 10)}

    found = {key: pvl.hub.find_checkpoint(key[0].lower(), fraction=float(key[1])).file for key in folders}

    assert found == {key: f"{folder}/{WEIGHTS}" for key, folder in folders.items()}
    assert [entry.file for entry in pvl.hub.CHECKPOINTS] == list(found.values())


def test_a_checkpoint_is_asked_for_at_its_path_and_revision(published, cache):
    published.add(REPO, f"Covid19_25/{WEIGHTS}", CHECKPOINT)
    commit = published.commit(REPO)  # which the tokenizer's repository does not have

    assert_golden(load(cache, checkpoint="covid19", fraction=25, revision=commit))

    assert ("HEAD", f"{REPO}/resolve/{commit}/Covid19_25/{WEIGHTS}") in published.requests
    assert published.downloads[BUSI] == 0


def test_the_frozen_clip_may_be_in_half_precision(published, cache):
    for kind in ("converted now", "converted before"):
        model = load(cache, device="cpu", dtype=torch.bfloat16)

        kinds = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        trained = {name for name in kinds if name.startswith(("clip.pvl_adapters.", "head."))}
        assert {kinds[name] for name in trained} == {torch.float32}, kind
        assert {kinds[name] for name in set(kinds) - trained} == {torch.bfloat16}, kind
        assert logits(model, dtype=torch.bfloat16).isfinite().all()


def test_the_second_load_uses_the_converted_copy_and_leaves_it_alone(published, cache, monkeypatch):
    first = load(cache)
    (copy,) = converted(cache)
    before, downloads = copy.read_bytes(), published.downloads.copy()
    native = torch.load
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the checkpoint was read again"))

    second = load(cache)

    assert published.downloads == downloads
    assert torch.equal(logits(second.eval()), logits(first))
    second.train()(GOLDEN["image"], GOLDEN["input_ids"]).logits.sum().backward()
    torch.optim.SGD([p for p in second.parameters() if p.requires_grad], lr=1.0).step()  # weights that are mapped
    assert copy.read_bytes() == before
    assert_golden(load(cache))
    published.add(REPO, f"BUSI/{WEIGHTS}", saved({"model": {name: 2 * t for name, t in TENSORS.items()}}))
    monkeypatch.setattr(torch, "load", native)
    assert not torch.allclose(logits(load(cache)), logits(first), atol=1e-3)  # of a new commit


@pytest.mark.usefixtures("_no_waiting")
def test_the_cache_is_enough_without_the_hub(published, cache, monkeypatch):
    expected = logits(load(cache))
    published.requests.clear()

    assert torch.equal(logits(load(cache, local_files_only=True)), expected)
    assert published.requests == []
    published.failing = 503
    assert torch.equal(logits(load(cache)), expected)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(load(cache)), expected)


def test_a_checkpoint_file_of_ones_own(published, cache, tmp_path):
    file = tmp_path / "my.pth"
    file.write_bytes(CHECKPOINT)

    model = load(cache, file, tokenizer=lambda sentences: torch.full((len(sentences), 12), 7))

    assert model.tokenize(["a", "b"]).tolist() == [[7] * 12] * 2
    assert list(tmp_path.rglob("*.safetensors")) == []  # nothing is written beside files of one's own
    assert published.requests == []
    with pytest.raises(ValueError, match="BUSI"):
        load(cache, file, checkpoint="BUSI")
    file.write_bytes(b"")  # as when a training writes its newest state over the file it began with
    assert_golden(model)


@pytest.mark.parametrize("checkpoint", ["EUS", None])
def test_a_copy_of_the_published_repository_elsewhere(published, cache, tmp_path, checkpoint):
    """In a folder, or under another name: from the hub or from the cache."""
    file = f"{checkpoint or 'BUSI'}/{WEIGHTS}"
    (tmp_path / "copy" / file).parent.mkdir(parents=True)
    (tmp_path / "copy" / file).write_bytes(CHECKPOINT)
    published.add("someone/mirror", file, CHECKPOINT)

    for source, offline in ((tmp_path / "copy", False), ("someone/mirror", False), ("someone/mirror", True)):
        model = load(cache, source, checkpoint=checkpoint, local_files_only=offline)
        assert_golden(model)
        assert model.provenance["checkpoint"] == (checkpoint or "BUSI")

    assert model.provenance["repo"] == "someone/mirror"
    assert published.downloads[BUSI] == 0
    with pytest.raises(FileNotFoundError, match=f"Kvasir/{WEIGHTS}"):
        load(cache, tmp_path / "copy", checkpoint="Kvasir")


def test_what_was_pushed_to_the_hub_is_loaded_by_its_name(published, cache, tmp_path):
    model = load(cache)

    address = model.push_to_hub("me/whole", token="mine")
    model.push_to_hub("me/part", whole=False, token="mine")
    published.requests.clear()
    again = pvl.from_pretrained("me/whole", cache_dir=cache)

    assert "me/whole" in address
    assert torch.equal(logits(again), logits(model))
    assert again.provenance["checkpoint"] == "BUSI"
    assert again.tokenize(SENTENCE)["input_ids"].tolist() == [SENTENCE_IDS]
    assert all("me/whole" in path for _, path in published.requests)  # it needs nothing else
    clip = pvl.remove_adapters(again.clip)
    backbone = {"state_dict": {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}}
    published.add(REPO, "checkpoints/unimed_clip_vit_b16.pt", saved(backbone))
    published.add_folder("me/adapters", pvl.save_adapters(model.clip, tmp_path / "adapters"))
    fresh = pvl.load_adapters(copy.deepcopy(clip), "me/adapters", revision=published.commit("me/adapters"))
    assert all(torch.equal(tensor, model.clip.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    for given in (None, clip):  # fetched where it is not given
        assert torch.equal(logits(pvl.from_pretrained("me/part", cache_dir=cache, clip=given)), logits(model))


# --- what does not exist ---------------------------------------------------------------------------------------------


def test_of_an_unknown_checkpoint_the_nearest_is_offered(published, cache):
    for name, found in (("Kvasr", "did you mean 'Kvasir'"), ("Cars", "BUSI, BTMRI, ISIC"), ("", "BUSI, BTMRI, ISIC")):
        with pytest.raises(ValueError, match=f"{name!r}.*{found}"):
            load(cache, checkpoint=name)
    for fraction in (0, 33, 0.25, "25", None):
        with pytest.raises(ValueError, match="10, 25, 50, 100"):
            load(cache, checkpoint="ISIC", fraction=fraction)

    assert published.requests == []


@pytest.mark.parametrize(
    ("source", "meant"),
    [("./runs/best", "runs/Best"), ("runs/best", "runs/Best"), ("rums/Best", "runs"), ("rus", "runs"),
     ("{}/runs/Bet", "runs/Best"), ("~/nowhere", None), ("a/b/c", None), (Path("owner/name"), None)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("load", [pvl.from_pretrained, lambda path: pvl.load_adapters(torch.nn.Module(), path)])
def test_a_mistyped_folder_is_not_asked_of_the_hub(published, tmp_path, monkeypatch, source, meant, load, caplog):
    (tmp_path / "runs" / "Best").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if source == "rums/Best":  # nothing of it exists, so it could be a repository
        source = "rums/Best/x"
    source = source.format(tmp_path) if isinstance(source, str) else source

    with pytest.raises(FileNotFoundError, match=str(source)) as raised:
        load(source)

    assert meant is None or str(tmp_path / meant) in str(raised.value)
    assert "BUSI" not in f"{raised.value}{caplog.text}"
    assert published.requests == []


def test_a_device_that_is_not_there_is_refused_at_once(published, cache):
    for device in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match=device):
            load(cache, device=device)
        with pytest.raises(ValueError, match=device):
            pvl.load_backbone("UniMedCLIP", device=device)

    assert published.requests == []


def damage(name: str, **faults: Any) -> Callable[[HubServer], None]:
    """Of the delivery of a file."""
    return lambda hub: vars(next(f for r in hub.repos.values() for p, f in r.items() if name in p)).update(faults)


MIDDLE = len(CHECKPOINT) // 2
OTHER = CHECKPOINT[:MIDDLE] + bytes([CHECKPOINT[MIDDLE] ^ 1]) + CHECKPOINT[MIDDLE + 1 :]  # torch can read it
PRIVATE, ELSE = {"token": "mine"}, {"source": "someone/else"}
FAILURES: dict[str, tuple[Callable[[HubServer], object], dict[str, Any], type[Exception], str]] = {
    "repository": (lambda hub: hub.repos.pop(REPO), PRIVATE, FileNotFoundError, f"{REPO}.*404.*names"),
    "repository_as_nobody": (lambda hub: hub.repos.pop(REPO), {}, PermissionError, f"{REPO}.*401.*token="),
    "mistyped_repository": (lambda hub: None, ELSE, OSError, "^(?!.*BUSI).*someone/else"),
    "not_ours": (lambda hub: hub.add("someone/else", "model.bin", b"x"), ELSE, OSError, "^(?!.*BUSI).*someone/else"),
    "file": (lambda hub: None, {"checkpoint": "EUS"}, FileNotFoundError, f"EUS/{WEIGHTS}.*404.*names"),
    "revision": (lambda hub: None, {"revision": "v9"}, FileNotFoundError, "v9.*names"),
    "no_token": (lambda hub: hub.tokens.update({REPO: "s3cret"}), {}, PermissionError, "401.*token="),
    "wrong_token": (lambda hub: hub.tokens.update({REPO: "s3cret"}), PRIVATE, PermissionError, "401.*token="),
    "gated": (lambda hub: hub.gated.add(REPO), PRIVATE, PermissionError, "gated.*ask for access"),
    "down": (lambda hub: setattr(hub, "failing", 503), {}, ConnectionError, "503.*later"),
    "offline": (lambda hub: None, {"local_files_only": True}, FileNotFoundError, "cache.*with a network"),
    "tokenizer": (lambda hub: hub.repos.pop(OFFICIAL_TOKENIZER), {}, OSError, f"tokenizer.*{OFFICIAL_TOKENIZER}"),
    "cut": (damage("BUSI", cut_at=50_000, cuts=10**6), {}, ConnectionError, f"{WEIGHTS}.*load it again"),
    "short": (damage("BUSI", lacking=10_000), {}, ConnectionError, f"{WEIGHTS}.*load it again"),
    "other_bytes": (damage("BUSI", delivered=OTHER), {}, ValueError, "damaged.*SHA-256.*load it again"),
    "cut_tokenizer": (damage("vocab.txt", cuts=10**6), {}, ConnectionError, f"tokenizer.*{OFFICIAL_TOKENIZER}.*again"),
}  # fmt: skip


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize(("change", "options", "error", "message"), FAILURES.values(), ids=FAILURES)
def test_what_cannot_be_had_whole_is_named_with_what_to_do(published, cache, change, options, error, message):
    change(published)

    with pytest.raises(error, match=message):
        load(cache, **options)

    assert converted(cache) == []
    assert_nothing_half_done(cache, arrived="tokenizer" in message)
    published.reset()
    serve_tokenizer(published)
    published.add(REPO, f"BUSI/{WEIGHTS}", CHECKPOINT)
    published.tokens[REPO] = "right"
    assert_golden(model := load(cache, token="right"))
    assert model.tokenize(SENTENCE)["input_ids"].tolist() == [SENTENCE_IDS]


# --- bad files -------------------------------------------------------------------------------------------------------


class _RunsCode:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


PROJ = "vision_model.proj"


def with_proj(*tensor: Tensor, **more: Tensor) -> bytes:
    """The good checkpoint with another tensor, or none, as the image tower's projection."""
    others = {name: tensor for name, tensor in TENSORS.items() if name != PROJ}
    return saved({"model": {**others, **dict(zip([PROJ], tensor, strict=False)), **more}})


BAD: dict[str, tuple[bytes | Callable[[Path], bytes], str]] = {
    "truncated": (CHECKPOINT[:MIDDLE], "damaged or no torch file"),
    "empty": (b"", "damaged or no torch file"),
    "a_web_page": (b"<html><body>Sign in to continue</body></html>" * 100, "damaged or no torch file"),
    "missing_tensor": (with_proj(), "1 missing: clip.visual.proj"),
    "unexpected_tensor": (with_proj(TENSORS[PROJ], more=torch.zeros(2)), "1 unexpected: more"),
    "wrong_shape": (with_proj(torch.zeros(32, 8)), r"visual\.proj.*\(32, 8\).*\(32, 16\)"),
    "nan": (with_proj(torch.full((32, 16), torch.nan)), f"{PROJ}.*NaN or infinite"),
    "whole_numbers": (with_proj(torch.zeros(32, 16, dtype=torch.long)), f"{PROJ}.*int64"),
    "number_as_a_name": (saved({"model": {3: torch.zeros(2)}}), "expected tensors by name"),
    "no_model": (saved({"epoch": 3}), r"entry 'model', found \['epoch'\]"),
    "runs_code": (lambda mark: saved({"model": {}, "epoch": _RunsCode(mark)}), "could run code.*nothing was run"),
    "runs_code_plain_pickle": (lambda mark: pickle.dumps(_RunsCode(mark), protocol=2), "could run code"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_refused(published, cache, tmp_path, content, message):
    mark = tmp_path / "code_ran"
    bad = content(mark) if callable(content) else content
    published.add(REPO, f"BUSI/{WEIGHTS}", bad)
    file = tmp_path / "local.pth"
    file.write_bytes(bad)

    for source in (REPO, file):
        with pytest.raises(ValueError, match=message):
            load(cache, source)

    assert not mark.exists()
    assert file.read_bytes() == bad
    assert converted(cache) == []
    assert_nothing_half_done(cache)
    published.add(REPO, f"BUSI/{WEIGHTS}", CHECKPOINT)
    assert_golden(load(cache))


def test_a_damaged_converted_copy_is_made_again(published, cache):
    expected = logits(load(cache))
    (copy,) = converted(cache)
    content, downloads = copy.read_bytes(), published.downloads.copy()

    for keep in (0, len(content) // 2, len(content) - 1):
        copy.write_bytes(content[:keep])
        assert torch.equal(logits(load(cache)), expected)
        assert copy.stat().st_size == len(content)

    assert published.downloads == downloads
    assert_nothing_half_done(cache)


def test_if_the_disk_is_full_nothing_half_written_stays(published, cache):
    with full_disk(20_000), pytest.raises(OSError, match=r"written to the cache.*free some space"):
        load(cache)

    assert_nothing_half_done(cache, arrived=False)
    assert_golden(load(cache))


def test_if_there_is_no_room_for_a_converted_copy_the_model_works_all_the_same(published, cache, caplog):
    huggingface_hub.hf_hub_download(REPO, f"BUSI/{WEIGHTS}", cache_dir=cache)

    with full_disk(20_000):
        model = load(cache, checkpoint="BUSI")

    assert_golden(model)
    (line,) = caplog.messages
    assert "no fast copy" in line
    assert_nothing_half_done(cache)
    assert converted(cache) == []
    assert_golden(load(cache))
    assert len(converted(cache)) == 1


def test_processes_that_load_at_once_do_not_disturb_each_other(published, cache, tmp_path):
    load(tmp_path / "other")  # so that a child only loads
    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            try:
                assert_golden(load(cache))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)

    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]

    assert len(converted(cache)) == len(snapshots(cache)) == 1
    assert_nothing_half_done(cache)
    assert_golden(load(cache))
