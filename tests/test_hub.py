"""Published weights by one call: from a hub, from its cache, from files, and through every failure on the way.

The hub is `hub_server`; a small network in the published layout replaces the published one.
"""

from __future__ import annotations

import copy
import json
import mmap
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fakes import GOLDEN, TINY_RELEASED, official_checkpoint, published_sizes
from hub_server import HubServer
from support import full_disk
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.hub.official import OFFICIAL_TOKENIZER

REPO = "TahaKoleilat/MedCLIPSeg"
WEIGHTS = "trained_models/seed666/MedCLIPSeg_unimedclip_ViT-B-16_latest.pth"
BUSI = f"{REPO}/BUSI/{WEIGHTS}"
WORDS = ["a", "tumor", "on", "the", "left", "##s", "##side"]
SENTENCE = "A tumor on the left"
SENTENCE_IDS = [2, 5, 6, 7, 8, 9, 3, 0, 0, 0, 0, 0]


def saved(value: object) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


CHECKPOINT = saved(official_checkpoint())


def serve_tokenizer(hub: HubServer) -> None:
    """As BiomedBERT's repository holds it, beside weights that nobody needs."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary += [f"[unused{number}]" for number in range(TINY_RELEASED.vocab_size - len(vocabulary))]
    hub.add(OFFICIAL_TOKENIZER, "vocab.txt", "\n".join(vocabulary).encode())
    hub.add(OFFICIAL_TOKENIZER, "config.json", json.dumps({"model_type": "bert", "vocab_size": 64}).encode())
    hub.add(OFFICIAL_TOKENIZER, "tokenizer_config.json", json.dumps({"do_lower_case": True}).encode())
    hub.add(OFFICIAL_TOKENIZER, "pytorch_model.bin", b"not needed")


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
    folders = {
        (name, fraction): name if fraction == 100 else f"{name}_{fraction}"
        for name in ("BUSI", "BTMRI", "ISIC", "Kvasir", "Covid19", "EUS")
        for fraction in (100, 50, 25, 10)
    }

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


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_second_load_uses_the_converted_copy_and_leaves_it_alone(published, cache, monkeypatch):
    first = load(cache)
    (copy,) = converted(cache)
    before, downloads = copy.read_bytes(), published.downloads.copy()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the checkpoint was read again"))

    second = load(cache)

    assert published.downloads == downloads
    assert torch.equal(logits(second.eval()), logits(first))
    second.train()(GOLDEN["image"], GOLDEN["input_ids"]).logits.sum().backward()
    torch.optim.SGD([p for p in second.parameters() if p.requires_grad], lr=1.0).step()  # weights that are mapped
    assert copy.read_bytes() == before
    assert_golden(load(cache))


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


def test_a_new_commit_on_the_hub_is_fetched(published, cache):
    before = logits(load(cache))
    tensors = {name: 1.5 * tensor for name, tensor in official_checkpoint()["model"].items()}
    published.add(REPO, f"BUSI/{WEIGHTS}", saved({"model": tensors}))

    assert not torch.allclose(logits(load(cache)), before, atol=1e-3)
    assert len(converted(cache)) == 2


# --- other places ----------------------------------------------------------------------------------------------------


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


def test_a_local_copy_of_the_published_repository(published, cache, tmp_path):
    folder = tmp_path / "copy"
    (folder / f"EUS_10/{WEIGHTS}").parent.mkdir(parents=True)
    (folder / f"EUS_10/{WEIGHTS}").write_bytes(CHECKPOINT)

    model = load(cache, folder, checkpoint="EUS", fraction=10)

    assert_golden(model)
    assert model.provenance["checkpoint"] == "EUS"
    with pytest.raises(FileNotFoundError, match=f"BUSI/{WEIGHTS}"):
        load(cache, folder)


@pytest.mark.parametrize("checkpoint", ["Kvasir", None])
def test_a_mirror_of_the_published_repository_also_from_the_cache(published, cache, checkpoint):
    for folder in ("Kvasir", "BUSI"):
        published.add("someone/mirror", f"{folder}/{WEIGHTS}", CHECKPOINT)

    model = load(cache, "someone/mirror", checkpoint=checkpoint)
    cached = load(cache, "someone/mirror", checkpoint=checkpoint, local_files_only=True)

    assert_golden(model)
    assert torch.equal(logits(cached), logits(model))
    assert model.provenance["repo"] == "someone/mirror"
    assert model.provenance["checkpoint"] == (checkpoint or "BUSI")
    assert published.downloads[BUSI] == 0


def test_what_was_pushed_to_the_hub_is_loaded_by_its_name(published, cache):
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
    for given in (None, clip):  # fetched where it is not given
        assert torch.equal(logits(pvl.from_pretrained("me/part", cache_dir=cache, clip=given)), logits(model))


def test_adapters_are_loaded_from_the_hub(published, cache, tmp_path):
    clip = load(cache).clip
    published.add_folder("me/adapters", pvl.save_adapters(clip, tmp_path))
    fresh = pvl.remove_adapters(copy.deepcopy(clip))

    pvl.load_adapters(fresh, "me/adapters", revision=published.commit("me/adapters"))

    assert all(torch.equal(tensor, clip.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    with pytest.raises(OSError, match="me/nothing"):
        pvl.load_adapters(fresh, "me/nothing")


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


@pytest.mark.parametrize("exists", [True, False])
def test_a_mistyped_repository_does_not_speak_of_busi(published, cache, caplog, exists):
    if exists:
        published.add("someone/else", "pytorch_model.bin", b"not ours")

    with pytest.raises(OSError, match="someone/else") as raised:
        load(cache, "someone/else")

    assert "BUSI" not in f"{raised.value}{caplog.text}"


def test_a_device_that_is_not_there_is_refused_at_once(published, cache):
    for device in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match=device):
            load(cache, device=device)
        with pytest.raises(ValueError, match=device):
            pvl.load_backbone("UniMedCLIP", device=device)

    assert published.requests == []


Change = Callable[[HubServer], object]
PRIVATE = {"token": "mine"}
ABSENT: dict[str, tuple[Change, dict[str, Any], type[Exception], str]] = {
    "repository": (lambda hub: hub.repos.pop(REPO), PRIVATE, FileNotFoundError, f"{REPO}.*404.*names"),
    "repository_as_nobody": (lambda hub: hub.repos.pop(REPO), {}, PermissionError, f"{REPO}.*401.*token="),
    "file": (lambda hub: None, {"checkpoint": "EUS"}, FileNotFoundError, f"EUS/{WEIGHTS}.*404.*names"),
    "revision": (lambda hub: None, {"revision": "v9"}, FileNotFoundError, "v9.*names"),
    "no_token": (lambda hub: hub.tokens.update({REPO: "s3cret"}), {}, PermissionError, "401.*token="),
    "wrong_token": (lambda hub: hub.tokens.update({REPO: "s3cret"}), PRIVATE, PermissionError, "401.*token="),
    "gated": (lambda hub: hub.gated.add(REPO), PRIVATE, PermissionError, "gated.*ask for access"),
    "down": (lambda hub: setattr(hub, "failing", 503), {}, ConnectionError, "503.*later"),
    "offline": (lambda hub: None, {"local_files_only": True}, FileNotFoundError, "cache.*with a network"),
    "tokenizer": (lambda hub: hub.repos.pop(OFFICIAL_TOKENIZER), {}, OSError, f"tokenizer.*{OFFICIAL_TOKENIZER}"),
}  # fmt: skip


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize(("change", "options", "error", "message"), ABSENT.values(), ids=ABSENT)
def test_what_cannot_be_had_is_named_with_what_to_do(published, cache, change, options, error, message):
    repos = dict(published.repos)
    change(published)

    with pytest.raises(error, match=message):
        load(cache, **options)

    assert converted(cache) == []
    assert_nothing_half_done(cache, arrived="tokenizer" in message)
    published.reset()
    published.repos = repos
    assert_golden(load(cache))


def test_the_right_token_opens_a_private_repository(published, cache):
    published.tokens[REPO] = "s3cret"

    assert_golden(load(cache, token="s3cret"))


# --- a bad connection ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_waiting")
def test_a_cut_download_goes_on(published, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    served = published.repos[REPO][f"BUSI/{WEIGHTS}"]
    served.cut_at, served.cuts = 50_000, 1

    assert_golden(load(cache))

    assert published.downloads[BUSI] == 2
    assert_nothing_half_done(cache)


MIDDLE = len(CHECKPOINT) // 2
OTHER = CHECKPOINT[:MIDDLE] + bytes([CHECKPOINT[MIDDLE] ^ 1]) + CHECKPOINT[MIDDLE + 1 :]
DELIVERIES: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "always_cut": (WEIGHTS, {"cut_at": 50_000, "cuts": 1_000_000}, ConnectionError, WEIGHTS),
    "short": (WEIGHTS, {"lacking": 10_000}, ConnectionError, WEIGHTS),
    "other_bytes": (WEIGHTS, {"delivered": OTHER}, ValueError, "damaged.*SHA-256"),  # still a good file for torch
    "tokenizer": ("vocab.txt", {"cuts": 1_000_000}, ConnectionError, f"tokenizer.*{OFFICIAL_TOKENIZER}"),
}


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize(("name", "faults", "error", "message"), DELIVERIES.values(), ids=DELIVERIES)
def test_what_does_not_arrive_whole_is_refused_and_downloaded_again(published, cache, name, faults, error, message):
    files = {path: file for repo in published.repos.values() for path, file in repo.items()}
    file = next(file for path, file in files.items() if path.endswith(name))
    before = {fault: getattr(file, fault) for fault in faults}
    vars(file).update(faults)

    with pytest.raises(error, match=f"{message}.*load it again"):
        load(cache)

    assert converted(cache) == []
    assert_nothing_half_done(cache, arrived=name == "vocab.txt")
    vars(file).update(before)
    assert_golden(model := load(cache))
    assert model.tokenize(SENTENCE)["input_ids"].tolist() == [SENTENCE_IDS]


# --- bad files -------------------------------------------------------------------------------------------------------


class _RunsCode:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


PROJ = "vision_model.proj"


def with_tensors(**changed: Any) -> bytes:
    """The good checkpoint with other tensors; None takes one out."""
    tensors = {**official_checkpoint()["model"], **{PROJ if name == "proj" else name: t for name, t in changed.items()}}
    return saved({"model": {name: tensor for name, tensor in tensors.items() if tensor is not None}})


BAD: dict[str, tuple[bytes | Callable[[Path], bytes], str]] = {
    "truncated": (CHECKPOINT[: len(CHECKPOINT) // 2], "damaged or no torch file"),
    "empty": (b"", "damaged or no torch file"),
    "a_web_page": (b"<html><body>Sign in to continue</body></html>" * 100, "damaged or no torch file"),
    "missing_tensor": (with_tensors(proj=None), "1 missing: clip.visual.proj"),
    "unexpected_tensor": (with_tensors(more=torch.zeros(2)), "1 unexpected: more"),
    "wrong_shape": (with_tensors(proj=torch.zeros(32, 8)), r"visual\.proj.*\(32, 8\).*\(32, 16\)"),
    "nan": (with_tensors(proj=torch.full((32, 16), torch.nan)), f"{PROJ}.*NaN or infinite"),
    "whole_numbers": (with_tensors(proj=torch.zeros(32, 16, dtype=torch.long)), f"{PROJ}.*int64"),
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


# --- a bad disk ------------------------------------------------------------------------------------------------------


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


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Whoever runs this, root included, cannot write into the folder."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


@pytest.mark.usefixtures("_no_waiting")
def test_a_read_only_cache_is_named_and_can_be_loaded_from(published, cache, caplog):
    load(cache)  # imports need reading rights
    with tempfile.TemporaryDirectory() as folder:  # which other users can reach
        shared = Path(folder)
        with read_only(shared), pytest.raises(OSError, match=r"written to the cache.*writable"):
            load(shared)
        assert_nothing_half_done(shared, arrived=False)
        load(shared)
        for said in (0, 1):  # that there is no fast copy
            caplog.clear()
            with read_only(shared):
                assert_golden(load(shared, checkpoint="BUSI", local_files_only=True))
            assert len(caplog.messages) == said
            shutil.rmtree(shared / "assets")


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


# --- full size -------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, torch, transformers, open_clip.hf_model
import pvl_adapter as pvl

def kilobytes(entry):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(entry + ":"))

pvl.OfficialConfig().build()  # what is imported on the way
before = kilobytes("VmRSS")
model = pvl.from_pretrained(sys.argv[1], cache_dir=sys.argv[2])
peak = 1024 * (kilobytes("VmHWM") - before)
torch.manual_seed(0)
prediction = model.predict(torch.rand(1, 3, 224, 224), "A tumor on the left", num_samples=1)
tensors = model.state_dict()
numbers = sum(tensor.numel() for tensor in tensors.values())
sums = {name: tensors[name].double().sum().item() for name in sys.argv[3:]}
print(json.dumps([peak, len(tensors), numbers, sums, prediction.probability.double().mean().item()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_checkpoint_of_the_published_size(hub, cache, tmp_path):
    serve_tokenizer(hub)
    tensors = {name: torch.empty(shape).normal_(std=0.02) for name, shape in published_sizes().items()}
    some = [*list(tensors)[:3], *list(tensors)[100::200]]
    expected = {pvl.hub.official_to_ours(name): tensors[name].double().sum().item() for name in some}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    file = tmp_path / "full.pth"
    torch.save(official_checkpoint(tensors), file)
    del tensors
    with file.open("rb") as opened:
        hub.add(REPO, f"BUSI/{WEIGHTS}", memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)))

    probabilities = []
    for source, offline in ((REPO, "0"), (REPO, "1"), (str(file), "1")):
        command = [sys.executable, "-c", MEASURE, source, str(cache), *expected]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": offline}
        printed = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], stdout=-1, check=True).stdout
        peak, count, numbers, sums, probability = json.loads(printed)
        assert (count, numbers, sums) == (668, 214_580_757, expected)
        assert peak < 1.3 * size
        probabilities.append(probability)

    assert probabilities == [pytest.approx(probabilities[0], abs=1e-6)] * 3
    assert 0.0 <= probabilities[0] <= 1.0
    assert hub.downloads[BUSI] == len(converted(cache)) == 1
    assert_nothing_half_done(cache)
