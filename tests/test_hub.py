"""Published weights by one call: from a hub, from its cache, from files, and through every failure on the way.

The hub is `hub_server`; a small network in the published layout replaces the published one.
"""

from __future__ import annotations

import copy
import json
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
from fakes import TINY_RELEASED
from hub_server import ALWAYS, HubServer, ServedFile
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from support import full_disk
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.hub.official import OFFICIAL_TOKENIZER

REPO = "TahaKoleilat/MedCLIPSeg"
WEIGHTS = "trained_models/seed666/MedCLIPSeg_unimedclip_ViT-B-16_latest.pth"
GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = load_file(GOLDENS / "medclipseg_tiny.safetensors")
WORDS = ["a", "tumor", "on", "the", "left", "##s", "##side"]
SENTENCE = "A tumor on the left"
SENTENCE_IDS = [2, 5, 6, 7, 8, 9, 3, 0, 0, 0, 0, 0]


def official_checkpoint() -> dict[str, Any]:
    """As the official code saves it."""
    tensors = {name.removeprefix("checkpoint."): GOLDEN[name] for name in GOLDEN if name.startswith("checkpoint.")}
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}
    return {
        "model": tensors,
        "epoch": 3,
        "optimizer": {"state": state, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]},
        "scheduler": {"T_max": 100, "last_epoch": 3, "_last_lr": [1e-4]},
        "best_loss": 0.5,
    }


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
def served(published: HubServer) -> ServedFile:
    """The BUSI checkpoint on the hub."""
    return published.repos[REPO][f"BUSI/{WEIGHTS}"]


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


def assert_no_leftovers(cache: Path) -> None:
    assert [path for path in cache.rglob("*") if path.suffix in (".part", ".incomplete") or ".part" in path.name] == []


def assert_nothing_arrived(cache: Path) -> None:
    assert_no_leftovers(cache)
    assert snapshots(cache) == []
    assert converted(cache) == []


# --- the published checkpoints ---------------------------------------------------------------------------------------


def test_a_published_checkpoint_gives_the_recorded_logits(published, served, cache, caplog):
    model = load(cache)

    (line,) = caplog.messages  # which checkpoint was taken, for none was named
    assert all(word in line for word in ("BUSI", "breast ultrasound", "checkpoint=", "fraction=", "Kvasir"))
    assert_golden(model)
    assert not model.training
    assert len(model.state_dict()) == len(official_checkpoint()["model"])
    assert model.tokenize(SENTENCE)["input_ids"].tolist() == [SENTENCE_IDS]
    prediction = model.predict([torch.rand(3, 32, 32)], SENTENCE, num_samples=2)
    assert prediction.probability.isfinite().all()
    assert published.downloads[f"{REPO}/BUSI/{WEIGHTS}"] == 1
    assert f"{OFFICIAL_TOKENIZER}/pytorch_model.bin" not in published.downloads
    again = load(cache, checkpoint="BUSI")  # from the converted copy
    assert caplog.messages == [line]
    assert again.provenance == model.provenance
    facts = {"repo": REPO, "file": f"BUSI/{WEIGHTS}", "sha256": served.sha256, "checkpoint": "BUSI", "fraction": 100}
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
    assert published.downloads[f"{REPO}/BUSI/{WEIGHTS}"] == 0


def test_the_frozen_clip_may_be_in_half_precision(published, cache):
    for kind in ("converted now", "converted before"):
        model = load(cache, device="cpu", dtype=torch.bfloat16)

        kinds = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        trained = {name for name in kinds if name.startswith(("clip.pvl_adapters.", "head."))}
        assert {kinds[name] for name in trained} == {torch.float32}, kind
        assert {kinds[name] for name in set(kinds) - trained} == {torch.bfloat16}, kind
        assert logits(model, dtype=torch.bfloat16).isfinite().all()


def test_a_loaded_model_can_be_trained(published, cache):
    model = load(cache).train()

    model(GOLDEN["image"], GOLDEN["input_ids"]).logits.sum().backward()

    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = converted(cache)[0].read_bytes()
    torch.optim.SGD(model.parameters(), lr=1.0).step()  # weights mapped from a file are the process's own
    assert converted(cache)[0].read_bytes() == before
    assert_golden(load(cache))


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_second_load_downloads_nothing_and_uses_the_converted_copy(published, cache, monkeypatch):
    first = load(cache)
    (copy,) = converted(cache)
    downloads = published.downloads.copy()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the checkpoint was read again"))

    second = load(cache)

    assert published.downloads == downloads
    assert converted(cache) == [copy]
    assert torch.equal(logits(second), logits(first))
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)


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


PREDICT = """
import json, sys, torch
import pvl_adapter as pvl
network = pvl.OfficialConfig.from_dict(json.loads(sys.argv[2]))
model = pvl.from_pretrained("TahaKoleilat/MedCLIPSeg", cache_dir=sys.argv[1], network=network)
image = [torch.linspace(0.0, 1.0, 3 * 32 * 32).reshape(3, 32, 32)]
print(model.predict(image, "A tumor on the left", num_samples=2).probability.double().sum().item())
"""


def test_a_fresh_process_without_a_network_predicts_from_the_cache(published, cache):
    model = load(cache)
    published.failing = 500
    image = [torch.linspace(0.0, 1.0, 3 * 32 * 32).reshape(3, 32, 32)]
    expected = model.predict(image, SENTENCE, num_samples=2).probability.double().sum().item()
    published.requests.clear()

    printed = python(PREDICT, str(cache), json.dumps(TINY_RELEASED.to_dict()), HF_HUB_OFFLINE="1")

    assert float(printed) == pytest.approx(expected, abs=1e-4)
    assert published.requests == []


def python(code: str, *arguments: str, **environment: str) -> str:
    """What a process of its own prints."""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_new_commit_on_the_hub_is_fetched(published, cache):
    before = logits(load(cache))
    checkpoint = official_checkpoint()
    checkpoint["model"] = {name: 1.5 * tensor for name, tensor in checkpoint["model"].items()}
    published.add(REPO, f"BUSI/{WEIGHTS}", saved(checkpoint))

    assert not torch.allclose(logits(load(cache)), before, atol=1e-3)
    assert len(converted(cache)) == 2


# --- other places ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_file_of_ones_own(published, cache, tmp_path):
    file = tmp_path / "my.pth"
    file.write_bytes(CHECKPOINT)

    model = load(cache, file, tokenizer=lambda sentences: torch.full((len(sentences), 12), 7))

    assert_golden(model)
    assert model.tokenize(["a", "b"]).tolist() == [[7] * 12] * 2
    assert list(tmp_path.rglob("*.safetensors")) == []  # nothing is written beside files of one's own
    assert published.requests == []
    with pytest.raises(ValueError, match="BUSI"):
        load(cache, file, checkpoint="BUSI")


def test_a_model_is_untouched_by_what_becomes_of_its_file(published, cache, tmp_path):
    """As when a training writes its newest state over the file it began with."""
    file = tmp_path / "latest.pth"
    file.write_bytes(CHECKPOINT)
    model = load(cache, file)

    file.write_bytes(b"")

    assert_golden(model)
    file.write_bytes(CHECKPOINT)
    model = load(cache, file)
    torch.save({"model": model.state_dict()}, file)
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
@pytest.mark.parametrize("how", ["local_files_only", "offline"])
def test_a_mirror_of_the_published_repository_also_from_the_cache(published, cache, checkpoint, how, monkeypatch):
    for folder in ("Kvasir", "BUSI"):
        published.add("someone/mirror", f"{folder}/{WEIGHTS}", CHECKPOINT)

    model = load(cache, "someone/mirror", checkpoint=checkpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "offline")
    cached = load(cache, "someone/mirror", checkpoint=checkpoint, local_files_only=how == "local_files_only")

    assert_golden(model)
    assert torch.equal(logits(cached), logits(model))
    assert model.provenance["repo"] == "someone/mirror"
    assert model.provenance["checkpoint"] == (checkpoint or "BUSI")
    assert published.downloads[f"{REPO}/BUSI/{WEIGHTS}"] == 0


def test_what_was_pushed_to_the_hub_is_loaded_by_its_name(published, cache):
    model = load(cache)

    address = model.push_to_hub("me/whole", token="mine")
    published.requests.clear()
    again = pvl.from_pretrained("me/whole", cache_dir=cache)

    assert "me/whole" in address
    assert torch.equal(logits(again), logits(model))
    assert again.provenance["checkpoint"] == "BUSI"
    assert again.tokenize(SENTENCE)["input_ids"].tolist() == [SENTENCE_IDS]
    assert all("me/whole" in path for _, path in published.requests)  # it needs nothing else


@pytest.mark.parametrize("given", [True, False], ids=["given", "fetched"])
def test_what_was_pushed_without_its_clip_takes_it_or_fetches_it(published, cache, given):
    model = load(cache)
    model.push_to_hub("me/part", whole=False, token="mine")
    clip = pvl.remove_adapters(load(cache).clip)
    backbone = {"state_dict": {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}}
    published.add(REPO, "checkpoints/unimed_clip_vit_b16.pt", saved(backbone))

    again = pvl.from_pretrained("me/part", cache_dir=cache, clip=clip if given else None)

    assert torch.equal(logits(again), logits(model))


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


@pytest.mark.parametrize("how", ["online", "offline"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_mistyped_repository_does_not_speak_of_busi(published, cache, caplog, monkeypatch, how, exists):
    if exists:
        published.add("someone/else", "pytorch_model.bin", b"not ours")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "offline")

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

    with pytest.raises(error, match=message) as raised:
        load(cache, **options)

    assert isinstance(raised.value, OSError)
    assert_no_leftovers(cache)
    assert converted(cache) == []
    assert snapshots(cache) == [] or "tokenizer" in message
    published.reset()
    published.repos = repos
    assert_golden(load(cache))


def test_the_right_token_opens_a_private_repository(published, cache):
    published.tokens[REPO] = "s3cret"

    assert_golden(load(cache, token="s3cret"))


# --- a bad connection ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_waiting")
def test_a_cut_download_goes_on_where_it_stopped(published, served, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    served.cut_at, served.cuts = 50_000, 1

    assert_golden(load(cache))

    assert published.downloads[f"{REPO}/BUSI/{WEIGHTS}"] == 2
    first, second = published.ranges[:2]
    assert (first, second) == (0, 50_000)
    assert_no_leftovers(cache)


OTHER = bytes([*CHECKPOINT[: len(CHECKPOINT) // 2], CHECKPOINT[len(CHECKPOINT) // 2] ^ 1,
               *CHECKPOINT[len(CHECKPOINT) // 2 + 1 :]])  # fmt: skip
DELIVERIES: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "always_cut": (WEIGHTS, {"cut_at": 50_000, "cuts": ALWAYS}, ConnectionError, WEIGHTS),
    "cut_at_once": (WEIGHTS, {"cut_at": 0, "cuts": ALWAYS}, ConnectionError, WEIGHTS),
    "short": (WEIGHTS, {"lacking": 10_000}, ConnectionError, WEIGHTS),
    "other_bytes": (WEIGHTS, {"delivered": OTHER}, ValueError, "damaged.*SHA-256"),  # still a good file for torch
    "tokenizer": ("vocab.txt", {"cuts": ALWAYS}, ConnectionError, f"tokenizer.*{OFFICIAL_TOKENIZER}"),
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

    assert_no_leftovers(cache)
    assert converted(cache) == []
    assert snapshots(cache) == [] or name == "vocab.txt"
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
    "tail_missing": (CHECKPOINT[:-100], "damaged or no torch file"),
    "empty": (b"", "damaged or no torch file"),
    "a_web_page": (b"<html><body>Sign in to continue</body></html>" * 100, "damaged or no torch file"),
    "zip_of_nothing": (b"PK\x05\x06" + bytes(18), "damaged or no torch file"),
    "missing_tensor": (with_tensors(proj=None), "1 missing: clip.visual.proj"),
    "unexpected_tensor": (with_tensors(more=torch.zeros(2)), "1 unexpected: more"),
    "wrong_shape": (with_tensors(proj=torch.zeros(32, 8)), r"visual\.proj.*\(32, 8\).*\(32, 16\)"),
    "nan": (with_tensors(proj=torch.full((32, 16), torch.nan)), f"{PROJ}.*NaN or infinite"),
    "infinite": (with_tensors(proj=torch.full((32, 16), torch.inf)), f"{PROJ}.*NaN or infinite"),
    "string_for_a_tensor": (with_tensors(proj="x"), f"floating-point tensor.*{PROJ}.*str"),
    "whole_numbers": (with_tensors(proj=torch.zeros(32, 16, dtype=torch.long)), f"{PROJ}.*int64"),
    "no_tensors": (saved({"model": {}}), "expected tensors by name"),
    "number_as_a_name": (saved({"model": {3: torch.zeros(2)}}), "expected tensors by name"),
    "a_list": (saved([1, 2, 3]), "entry 'model', found list"),
    "no_model": (saved({"epoch": 3}), r"entry 'model', found \['epoch'\]"),
    "model_is_a_list": (saved({"model": [torch.zeros(2)]}), "expected tensors by name, found a list"),
    "runs_code": (lambda mark: saved({"model": {}, "epoch": _RunsCode(mark)}), "could run code.*nothing was run"),
    "runs_code_plain_pickle": (lambda mark: pickle.dumps(_RunsCode(mark), protocol=2), "could run code"),
    "runs_code_by_another_opcode": (lambda mark: f"(S'touch {mark}'\nios\nsystem\n.".encode(), "damaged or no torch"),
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
    assert_no_leftovers(cache)
    assert converted(cache) == []
    published.add(REPO, f"BUSI/{WEIGHTS}", CHECKPOINT)
    assert_golden(load(cache))


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.999])
def test_a_damaged_converted_copy_is_made_again(published, cache, keep):
    expected = logits(load(cache))
    (copy,) = converted(cache)
    content, tensors = copy.read_bytes(), load_bytes(copy.read_bytes())
    copy.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    downloads = published.downloads.copy()

    assert torch.equal(logits(load(cache)), expected)

    again = load_file(copy)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert published.downloads == downloads
    assert_no_leftovers(cache)


# --- a bad disk ------------------------------------------------------------------------------------------------------


def test_if_the_disk_is_full_nothing_half_written_stays(published, cache):
    with full_disk(20_000), pytest.raises(OSError, match=r"written to the cache.*free some space"):
        load(cache)

    assert_nothing_arrived(cache)
    assert_golden(load(cache))


def test_if_there_is_no_room_for_a_converted_copy_the_model_works_all_the_same(published, cache, caplog):
    huggingface_hub.hf_hub_download(REPO, f"BUSI/{WEIGHTS}", cache_dir=cache)

    with full_disk(20_000):
        model = load(cache, checkpoint="BUSI")

    assert_golden(model)
    (line,) = caplog.messages
    assert "no fast copy" in line
    assert_no_leftovers(cache)
    assert converted(cache) == []
    assert_golden(load(cache))
    assert len(converted(cache)) == 1


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Whoever runs this, root included, cannot write into the folder."""
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*")) if not path.is_symlink()}
    for path, mode in modes.items():
        path.chmod(0o555 if path.is_dir() else mode & ~0o222 | 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def shared_cache() -> Iterator[Path]:
    """A cache that other users can read."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


@pytest.mark.usefixtures("_no_waiting")
def test_a_read_only_cache_is_named_and_can_be_loaded_from(published, cache, shared_cache, caplog):
    load(cache)  # imports need reading rights
    with read_only(shared_cache), pytest.raises(OSError, match=r"written to the cache.*writable"):
        load(shared_cache)
    assert_nothing_arrived(shared_cache)
    load(shared_cache)
    caplog.clear()

    for copies in (1, 0):
        with read_only(shared_cache):
            assert_golden(load(shared_cache, checkpoint="BUSI", local_files_only=True))
        assert len(caplog.messages) == 1 - copies  # that there is no fast copy
        for copy_ in converted(shared_cache):
            copy_.unlink()

    assert_no_leftovers(shared_cache)


def test_processes_that_load_at_once_do_not_disturb_each_other(published, cache, tmp_path):
    load(tmp_path / "other")  # so that a child only loads
    gate, opener = os.pipe()
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            failed = True
            try:
                os.close(opener)
                os.read(gate, 1)
                torch.save(logits(load(cache)), tmp_path / f"{number}.pt")
                failed = False
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(failed)
        children.append(child)
    os.close(gate)
    os.close(opener)

    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]

    for number in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{number}.pt"), GOLDEN["seg_logits"], atol=1e-5, rtol=0.0)
    assert len(converted(cache)) == 1
    assert len(snapshots(cache)) == 1
    assert_no_leftovers(cache)
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
peak = kilobytes("VmHWM") - before
torch.manual_seed(0)
prediction = model.predict(torch.rand(1, 3, 224, 224), "A tumor on the left", num_samples=1)
tensors = model.state_dict()
print(json.dumps({
    "peak": 1024 * peak,
    "tensors": len(tensors),
    "parameters": sum(tensor.numel() for tensor in tensors.values()),
    "sums": {name: tensors[name].double().sum().item() for name in sys.argv[3:]},
    "probability": prediction.probability.double().mean().item(),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_checkpoint_of_the_published_size(hub):
    layout = json.loads((GOLDENS / "published_checkpoint_layout.json").read_text())["tensors"]
    some = {name: pvl.hub.official_to_ours(name) for name in [*list(layout)[:3], *list(layout)[100::200]]}
    serve_tokenizer(hub)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        tensors = {name: torch.empty(shape).normal_(std=0.02) for name, (shape, _) in layout.items()}
        sums = {ours: tensors[name].double().sum().item() for name, ours in some.items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        file = Path(folder) / "full.pth"
        torch.save({**official_checkpoint(), "model": tensors}, file)
        del tensors
        hub.add(REPO, f"BUSI/{WEIGHTS}", file)

        runs = []
        for source, offline in ((REPO, "0"), (REPO, "1"), (str(file), "1")):
            runs.append(json.loads(python(MEASURE, source, str(cache), *sums, HF_HUB_OFFLINE=offline)))
            print(f"peak memory: {runs[-1]['peak'] / size:.2f} of the tensors' {size / 2**20:.0f} MiB")

        assert len(converted(cache)) == 1
        assert_no_leftovers(cache)
        assert hub.downloads[f"{REPO}/BUSI/{WEIGHTS}"] == 1

    for run in runs:
        assert (run["tensors"], run["parameters"]) == (668, 214_580_757)
        assert run["sums"] == sums
        assert 0.0 <= run["probability"] <= 1.0
        assert run["peak"] < 1.3 * size
        assert run["probability"] == pytest.approx(runs[0]["probability"], abs=1e-6)
