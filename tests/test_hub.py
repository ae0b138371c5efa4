"""Published weights by one call: from a hub, from its cache, from files, and through every fault on the way.

The hub is `hub_server`; a small network in the published layout stands in for the published one.
"""

from __future__ import annotations

import json
import logging
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


def released_checkpoint() -> dict[str, Any]:
    """As the released code saves it."""
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


CHECKPOINT = saved(released_checkpoint())


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


def logits(model: pvl.MedCLIPSeg) -> Tensor:
    """For the recorded image, words and draws."""
    noise = [(GOLDEN["noise.0"], GOLDEN["noise.1"]), (GOLDEN["noise.2"], GOLDEN["noise.3"])]
    with torch.no_grad():
        return model(GOLDEN["image"], GOLDEN["input_ids"], noise=noise).logits


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


def test_a_published_checkpoint_gives_the_recorded_logits(published, cache):
    model = load(cache, checkpoint="BUSI")

    assert_golden(model)
    assert not model.training
    assert len(model.state_dict()) == len(released_checkpoint()["model"])


def test_its_tokenizer_comes_along_and_no_other_weights(published, cache):
    model = load(cache)

    prediction = model.predict(torch.rand(1, 3, 32, 32), SENTENCE, num_samples=2)

    assert prediction.mask.shape == (1, 32, 32)
    assert prediction.probability.isfinite().all()
    assert model.tokenize(SENTENCE)["input_ids"].tolist() == [SENTENCE_IDS]
    assert published.downloads[f"{REPO}/BUSI/{WEIGHTS}"] == 1
    assert f"{OFFICIAL_TOKENIZER}/pytorch_model.bin" not in published.downloads


def test_the_default_is_busi_and_one_line_says_so(published, cache, caplog):
    with caplog.at_level(logging.INFO, logger="pvl_adapter"):
        model = load(cache)
        (line,) = caplog.messages
        load(cache, checkpoint="BUSI")
        assert caplog.messages == [line]

    assert model.provenance["checkpoint"] == "BUSI"
    for words in ("BUSI", "breast ultrasound", "checkpoint=", "fraction=", "Kvasir", "list_checkpoints()"):
        assert words in line


def test_a_model_says_where_it_comes_from(published, served, cache):
    for model in (load(cache), load(cache)):  # the second is from the converted copy
        origin = model.provenance
        assert (origin["repo"], origin["file"]) == (REPO, f"BUSI/{WEIGHTS}")
        assert origin["sha256"] == served.sha256
        assert (origin["checkpoint"], origin["fraction"]) == ("BUSI", 100)


FOLDERS = [
    "BUSI BUSI_50 BUSI_25 BUSI_10",
    "BTMRI BTMRI_50 BTMRI_25 BTMRI_10",
    "ISIC ISIC_50 ISIC_25 ISIC_10",
    "Kvasir Kvasir_50 Kvasir_25 Kvasir_10",
    "Covid19 Covid19_50 Covid19_25 Covid19_10",
    "EUS EUS_50 EUS_25 EUS_10",
]


def test_the_24_checkpoints_are_where_they_were_published():
    found = [
        pvl.hub.find_checkpoint(folders.split()[0], fraction=fraction).file
        for folders in FOLDERS
        for fraction in (100, 50, 25, 10)
    ]

    assert found == [f"{folder}/{WEIGHTS}" for folders in FOLDERS for folder in folders.split()]
    assert sorted(entry.file for entry in pvl.hub.CHECKPOINTS) == sorted(found)


@pytest.mark.parametrize(
    ("name", "fraction", "folder"),
    [("Kvasir", 100, "Kvasir"), ("covid19", 25, "Covid19_25"), ("EUS", 10, "EUS_10"), ("busi", 50.0, "BUSI_50")],
)
def test_a_checkpoint_is_asked_for_at_its_path(published, cache, name, fraction, folder):
    published.add(REPO, f"{folder}/{WEIGHTS}", CHECKPOINT)

    model = load(cache, checkpoint=name, fraction=fraction)

    assert_golden(model)
    assert model.provenance["file"] == f"{folder}/{WEIGHTS}"
    assert published.downloads[f"{REPO}/{folder}/{WEIGHTS}"] == 1
    assert published.downloads[f"{REPO}/BUSI/{WEIGHTS}"] == 0


def test_a_revision_may_be_named(published, cache):
    commit = published.commit(REPO)

    assert_golden(load(cache, revision=commit))  # which the tokenizer's repository does not have

    assert ("HEAD", f"{REPO}/resolve/{commit}/BUSI/{WEIGHTS}") in published.requests


def test_a_tokenizer_of_ones_own_takes_the_place_of_the_published_one(published, cache):
    model = load(cache, tokenizer=lambda sentences: torch.full((len(sentences), 12), 7))

    assert model.tokenize(["a", "b"]).tolist() == [[7] * 12] * 2
    assert not any(OFFICIAL_TOKENIZER in path for _, path in published.requests)


def test_the_frozen_clip_may_be_in_half_precision(published, cache):
    for kind in ("converted now", "converted before"):
        model = load(cache, device="cpu", dtype=torch.bfloat16)

        kinds = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        trained = {name for name in kinds if name.startswith(("clip.pvl_adapters.", "head."))}
        assert {kinds[name] for name in trained} == {torch.float32}, kind
        assert {kinds[name] for name in set(kinds) - trained} == {torch.bfloat16}, kind
        prediction = model.predict(torch.rand(1, 3, 32, 32), SENTENCE, num_samples=2)
        assert prediction.probability.isfinite().all()


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
picture = torch.linspace(0.0, 1.0, 3 * 32 * 32).reshape(1, 3, 32, 32)
draws = torch.Generator().manual_seed(0)
print(model.predict(picture, "A tumor on the left", num_samples=2, generator=draws).probability.double().sum().item())
"""


def test_a_fresh_process_without_a_network_predicts_from_the_cache(published, cache):
    model = load(cache)
    published.failing = 500
    picture = torch.linspace(0.0, 1.0, 3 * 32 * 32).reshape(1, 3, 32, 32)
    expected = model.predict(picture, SENTENCE, num_samples=2, generator=torch.Generator().manual_seed(0))
    published.requests.clear()

    printed = python(PREDICT, str(cache), json.dumps(TINY_RELEASED.to_dict()), HF_HUB_OFFLINE="1")

    assert float(printed) == pytest.approx(expected.probability.double().sum().item(), abs=1e-4)
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
    checkpoint = released_checkpoint()
    checkpoint["model"] = {name: 1.5 * tensor for name, tensor in checkpoint["model"].items()}
    published.add(REPO, f"BUSI/{WEIGHTS}", saved(checkpoint))

    assert not torch.allclose(logits(load(cache)), before, atol=1e-3)
    assert len(converted(cache)) == 2


# --- other places ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_file_of_ones_own(published, cache, tmp_path):
    file = tmp_path / "my.pth"
    file.write_bytes(CHECKPOINT)

    model = load(cache, file)

    assert_golden(model)
    assert list(tmp_path.rglob("*.safetensors")) == []  # nothing is written beside files of one's own
    assert not any(REPO in path for _, path in published.requests)
    with pytest.raises(ValueError, match=r"single file.*'BUSI'"):
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
def test_a_mirror_of_the_published_repository(published, cache, checkpoint):
    for folder in ("Kvasir", "BUSI"):
        published.add("someone/mirror", f"{folder}/{WEIGHTS}", CHECKPOINT)

    model = load(cache, "someone/mirror", checkpoint=checkpoint)

    assert_golden(model)
    assert model.provenance["repo"] == "someone/mirror"
    assert model.provenance["checkpoint"] == (checkpoint or "BUSI")
    assert published.downloads[f"{REPO}/BUSI/{WEIGHTS}"] == 0


@pytest.mark.parametrize("checkpoint", ["Kvasir", None])
@pytest.mark.parametrize("how", ["local_files_only", "offline"])
def test_a_cached_mirror_needs_no_hub(published, cache, checkpoint, how, monkeypatch):
    for folder in ("Kvasir", "BUSI"):
        published.add("someone/mirror", f"{folder}/{WEIGHTS}", CHECKPOINT)
    expected = logits(load(cache, "someone/mirror", checkpoint=checkpoint))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "offline")
    model = load(cache, "someone/mirror", checkpoint=checkpoint, local_files_only=how == "local_files_only")

    assert torch.equal(logits(model), expected)


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


def test_what_was_pushed_without_its_clip_takes_one_that_is_given(published, cache):
    model = load(cache)
    model.push_to_hub("me/part", whole=False, token="mine")
    clip = pvl.remove_adapters(load(cache).clip)

    again = pvl.from_pretrained("me/part", cache_dir=cache, clip=clip)

    assert torch.equal(logits(again), logits(model))
    sizes = {name: file.size for name, file in published.repos["me/part"].items()}
    model.push_to_hub("me/whole", token="mine")
    assert sizes["model.safetensors"] < published.repos["me/whole"]["model.safetensors"].size


def test_what_was_pushed_without_its_clip_fetches_it(published, cache):
    model = load(cache)
    model.push_to_hub("me/part", whole=False, token="mine")
    weights = pvl.remove_adapters(load(cache).clip).state_dict()
    backbone = {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}
    published.add(REPO, "checkpoints/unimed_clip_vit_b16.pt", saved(backbone))

    again = pvl.from_pretrained("me/part", cache_dir=cache)

    assert torch.equal(logits(again), logits(model))


# --- what does not exist ---------------------------------------------------------------------------------------------


def test_of_an_unknown_checkpoint_the_nearest_is_offered(published, cache):
    with pytest.raises(ValueError, match=r"'Kvasr'.*did you mean.*'Kvasir'.*fraction"):
        load(cache, checkpoint="Kvasr")
    with pytest.raises(ValueError, match=r"'Cars'.*BUSI, BTMRI, ISIC, Kvasir, Covid19, EUS"):
        load(cache, checkpoint="Cars")
    with pytest.raises(ValueError, match="there is no checkpoint ''"):
        load(cache, checkpoint="")

    assert published.requests == []


@pytest.mark.parametrize("fraction", [0, 33, 0.25, "25", None])
def test_a_fraction_that_was_not_published_is_refused(published, cache, fraction):
    with pytest.raises(ValueError, match=r"fraction.*10, 25, 50, 100"):
        load(cache, checkpoint="ISIC", fraction=fraction)

    assert published.requests == []


Change = Callable[[HubServer], object]
ABSENT: dict[str, tuple[Change, dict[str, Any], type[Exception], str]] = {
    "repository": (
        lambda hub: hub.repos.pop(REPO), {"token": "mine"}, FileNotFoundError, f"{REPO}.*no such repository"),
    "repository_as_nobody": (lambda hub: hub.repos.pop(REPO), {}, PermissionError, f"{REPO}.*does not exist.*token="),
    "file": (lambda hub: None, {"checkpoint": "EUS"}, FileNotFoundError, f"EUS/{WEIGHTS}.*no such file"),
    "revision": (lambda hub: None, {"revision": "v9"}, FileNotFoundError, "no revision 'v9'"),
    "no_token": (lambda hub: hub.tokens.update({REPO: "s3cret"}), {}, PermissionError, "private.*token="),
    "wrong_token": (
        lambda hub: hub.tokens.update({REPO: "s3cret"}), {"token": "mine"}, PermissionError, r"401.*valid token="),
    "gated": (lambda hub: hub.gated.add(REPO), {"token": "mine"}, PermissionError, "gated.*ask for access"),
    "down": (lambda hub: setattr(hub, "failing", 503), {}, ConnectionError, "could not deliver.*503.*later"),
    "offline": (lambda hub: None, {"local_files_only": True}, FileNotFoundError, "not in the cache.*carry a folder"),
    "tokenizer": (
        lambda hub: hub.repos.pop(OFFICIAL_TOKENIZER), {}, OSError, f"tokenizer is missing: {OFFICIAL_TOKENIZER}"),
    "no_such_name": (lambda hub: None, {"source": "a/b/c"}, FileNotFoundError, "a/b/c.*owner/name"),
    "no_such_folder": (lambda hub: None, {"source": "./nowhere"}, FileNotFoundError, "nowhere.*existing file"),
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


def test_an_offline_hub_and_an_empty_cache_are_told_apart_from_a_missing_file(published, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    for source in (REPO, "someone/mirror"):
        with pytest.raises(FileNotFoundError, match=f"of {source} is not in the cache"):
            load(cache, source)

    assert published.requests == []


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


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("cut_at", [0, 50_000])
def test_a_connection_that_is_always_cut_is_given_up(served, cache, cut_at):
    served.cut_at, served.cuts = cut_at, ALWAYS

    with pytest.raises(ConnectionError, match=f"connection broke.*BUSI/{WEIGHTS}.*load it again"):
        load(cache)

    assert_nothing_arrived(cache)
    served.cuts = 0
    assert_golden(load(cache))


def test_a_file_that_comes_short_is_refused(served, cache):
    served.lacking = 10_000

    with pytest.raises(ConnectionError, match=rf"BUSI/{WEIGHTS}.*did not arrive whole.*load it again"):
        load(cache)

    assert_nothing_arrived(cache)
    served.lacking = 0
    assert_golden(load(cache))


def test_a_file_of_other_bytes_is_refused_and_downloaded_again(published, served, cache):
    other = bytearray(CHECKPOINT)
    other[len(other) // 2] ^= 1  # still a good file for torch
    served.delivered = bytes(other)

    with pytest.raises(ValueError, match=r"damaged.*SHA-256.*load it again"):
        load(cache)

    assert_nothing_arrived(cache)
    served.delivered = None
    assert_golden(load(cache))
    assert published.downloads[f"{REPO}/BUSI/{WEIGHTS}"] == 2


@pytest.mark.usefixtures("_no_waiting")
def test_a_tokenizer_that_is_cut_off_is_fetched_the_next_time(published, cache):
    vocabulary = published.repos[OFFICIAL_TOKENIZER]["vocab.txt"]
    vocabulary.cuts = ALWAYS

    with pytest.raises(ConnectionError, match=f"tokenizer is missing.*{OFFICIAL_TOKENIZER}"):
        load(cache)

    assert_no_leftovers(cache)
    vocabulary.cuts = 0
    assert load(cache).tokenize(SENTENCE)["input_ids"].tolist() == [SENTENCE_IDS]


# --- bad files -------------------------------------------------------------------------------------------------------


class _RunsCode:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def _model(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], bytes]:
    """The good checkpoint with a change to its tensors."""

    def content(_: Path) -> bytes:
        checkpoint = released_checkpoint()
        change(checkpoint["model"])
        return saved(checkpoint)

    return content


PROJ = "vision_model.proj"
BAD: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "truncated": (lambda _: CHECKPOINT[: len(CHECKPOINT) // 2], "damaged or no torch file"),
    "tail_missing": (lambda _: CHECKPOINT[:-100], "damaged or no torch file"),
    "empty": (lambda _: b"", "damaged or no torch file"),
    "a_web_page": (lambda _: b"<html><body>Sign in to continue</body></html>" * 100, "damaged or no torch file"),
    "git_lfs_pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "damaged or no torch file"),
    "zip_of_nothing": (lambda _: b"PK\x05\x06" + bytes(18), "damaged or no torch file"),
    "missing_tensor": (_model(lambda model: model.pop(PROJ)), r"missing \['clip\.visual\.proj'\]"),
    "unexpected_tensor": (_model(lambda model: model.update(more=torch.zeros(2))), r"unexpected \['more'\]"),
    "wrong_shape": (
        _model(lambda model: model.update({PROJ: torch.zeros(32, 8)})), r"visual\.proj.*\(32, 8\).*\(32, 16\)"),
    "nan": (
        _model(lambda model: model.update({PROJ: torch.full((32, 16), torch.nan)})), rf"{PROJ}.*NaN or infinite"),
    "infinite": (
        _model(lambda model: model.update({PROJ: torch.full((32, 16), torch.inf)})), rf"{PROJ}.*NaN or infinite"),
    "no_tensors": (_model(lambda model: model.clear()), "expected tensors by name"),
    "integer_for_a_tensor": (_model(lambda model: model.update({PROJ: 3})), rf"floating-point tensor.*{PROJ}.*int"),
    "string_for_a_tensor": (_model(lambda model: model.update({PROJ: "x"})), rf"floating-point tensor.*{PROJ}.*str"),
    "whole_numbers": (
        _model(lambda model: model.update({PROJ: torch.zeros(32, 16, dtype=torch.long)})), rf"{PROJ}.*int64"),
    "number_as_a_name": (_model(lambda model: model.update({3: torch.zeros(2)})), "expected tensors by name"),
    "a_list": (lambda _: saved([1, 2, 3]), "expected a dict with the entry 'model', found a list"),
    "a_tensor": (lambda _: saved(torch.zeros(3)), "expected a dict with the entry 'model', found.*tensor"),
    "no_model": (lambda _: saved({"epoch": 3}), r"entry 'model', found a dict with \['epoch'\]"),
    "model_is_a_list": (lambda _: saved({"model": [torch.zeros(2)]}), "expected tensors by name, found a list"),
    "runs_code": (lambda mark: saved({"model": {}, "epoch": _RunsCode(mark)}), r"could run code.*nothing was run"),
    "runs_code_plain_pickle": (lambda mark: pickle.dumps(_RunsCode(mark), protocol=2), r"could run code"),
    "runs_code_by_another_opcode": (
        lambda mark: f"(S'touch {mark}'\nios\nsystem\n.".encode(), "damaged or no torch file"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_refused(published, cache, tmp_path, content, message):
    mark = tmp_path / "code_ran"
    bad = content(mark)
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


def test_a_checkpoint_of_other_sizes_is_refused(published, cache):
    with pytest.raises(ValueError, match="do not fit"):
        pvl.from_pretrained(REPO, cache_dir=cache)  # the published sizes

    assert_no_leftovers(cache)
    assert converted(cache) == []


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
    with full_disk(20_000), pytest.raises(OSError, match=r"cannot be written to the cache.*free some space"):
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
def test_a_cache_that_cannot_be_written_to_is_named(published, cache, shared_cache):
    load(cache)  # imports need reading rights

    with read_only(shared_cache), pytest.raises(OSError, match=r"cannot be written to the cache.*make it writable"):
        load(shared_cache)

    assert_nothing_arrived(shared_cache)
    assert_golden(load(shared_cache))


def test_a_read_only_cache_can_be_loaded_from(published, shared_cache, caplog):
    load(shared_cache)

    with read_only(shared_cache):
        assert_golden(load(shared_cache, checkpoint="BUSI"))
        assert_golden(load(shared_cache, checkpoint="BUSI", local_files_only=True))
    converted(shared_cache)[0].unlink()
    caplog.clear()
    with read_only(shared_cache):
        assert_golden(load(shared_cache, checkpoint="BUSI"))

    assert len(caplog.messages) == 1
    assert "no fast copy" in caplog.text
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
        torch.save({**released_checkpoint(), "model": tensors}, file)
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
