"""`pvl-adapter list`, `convert`: what is published, and a published file made into a folder."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes import TINY_RELEASED, official_checkpoint, published_sizes, serve_tokenizer

import pvl_adapter as pvl
from pvl_adapter.cli import main
from pvl_adapter.hub import CHECKPOINTS
from pvl_adapter.hub.catalogue import OFFICIAL_REPO as REPO


def official(folder: Path) -> Path:
    torch.save(official_checkpoint(), folder / "tiny.pth")
    return folder / "tiny.pth"


def broken(folder: Path) -> Path:
    (folder / "broken.pth").write_bytes(b"hello" * 50)
    return folder / "broken.pth"


def test_the_published_checkpoints_are_listed(capsys):
    main(["list"])

    lines = capsys.readouterr().out.splitlines()
    for checkpoint in CHECKPOINTS:
        dataset = checkpoint.dataset
        (row,) = (line for line in lines if line.split()[:2] == [dataset.name, str(checkpoint.fraction)])
        assert dataset.modality in row
        assert (f"{dataset.dsc:.2f}" in row) == (checkpoint.fraction == 100) if dataset.dsc else True
    assert 'from_pretrained("TahaKoleilat/MedCLIPSeg", checkpoint=..., fraction=...)' in lines[0]


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "pvl_adapter", "convert", str(tmp_path / "absent.pth"), str(tmp_path / "folder")]

    refused = subprocess.run(command, cwd=Path(pvl.__file__).parents[1], capture_output=True, text=True, check=False)

    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ")
    assert "absent.pth" in line


def test_listing_needs_no_torch():
    code = """
import sys
from pvl_adapter.cli import main
main(["list"])
assert not {"torch", "transformers", "open_clip"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


REFUSALS: dict[str, tuple[Callable[[Path], Path], str | None, str]] = {
    "other_sizes": (official, "words", "tiny.pth.*shape"),
    "absent": (lambda folder: folder / "absent.pth", "words", "absent.pth"),
    "folder": (lambda folder: folder, "words", "no file"),
    "damaged": (broken, "words", "broken.pth is damaged"),
    "no_tokenizer": (official, None, "tokenizer"),
    "not_a_tokenizer": (official, ".", "tokenizer"),
}


@pytest.mark.parametrize(("make", "tokenizer", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_converted_is_named_in_one_message(tmp_path, words, make, tokenizer, message, capsys):
    file, folder = make(tmp_path), tmp_path / "new" / "folder"
    given = [] if tokenizer is None else ["--tokenizer", str(words if tokenizer == "words" else tmp_path)]

    with pytest.raises(SystemExit) as ended:
        main(["convert", str(file), str(folder), *given])

    assert ended.value.code == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err, re.MULTILINE)
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("error", "ends"), [(pvl.UnsupportedModelError("a ResNet"), SystemExit), (TypeError("a bug"), TypeError)], ids=str
)
def test_an_unsupported_model_is_one_message_and_a_bug_is_not(tmp_path, monkeypatch, error, ends):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pvl_adapter.hub.loading.from_pretrained", fail)

    with pytest.raises(ends):
        main(["convert", str(broken(tmp_path)), str(tmp_path / "folder")])


def test_a_checkpoint_is_converted(tmp_path, words, capsys, monkeypatch):
    monkeypatch.setattr("pvl_adapter.hub.loading.OfficialConfig", lambda: TINY_RELEASED)
    file = official(tmp_path)

    main(["convert", str(file), str(tmp_path / "folder"), "--tokenizer", str(words)])

    assert "needs no network" in capsys.readouterr().out
    converted, direct = pvl.from_pretrained(tmp_path / "folder"), pvl.from_pretrained(file, tokenizer=words)
    assert converted.config == direct.config
    assert converted.config.channel_order == "BGR"
    assert converted.provenance["file"] == "tiny.pth"
    assert all(torch.equal(converted.state_dict()[name], tensor) for name, tensor in direct.state_dict().items())


# --- full size: 860 MB are written twice ------------------------------------------------------------------------------

BUSI = CHECKPOINTS[0].file
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
def test_a_checkpoint_of_the_published_size(hub, tmp_path):
    serve_tokenizer(hub)
    cache, file = tmp_path / "cache", tmp_path / "full.pth"
    tensors = {name: torch.empty(shape).normal_(std=0.02) for name, shape in published_sizes().items()}
    some = [*list(tensors)[:3], *list(tensors)[100::200]]
    expected = {pvl.hub.official_to_ours(name): tensors[name].double().sum().item() for name in some}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    torch.save(official_checkpoint(tensors), file)
    del tensors
    with file.open("rb") as opened:
        hub.add(REPO, BUSI, memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)))

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
    assert hub.downloads[f"{REPO}/{BUSI}"] == len(list(cache.rglob("*.safetensors"))) == 1
