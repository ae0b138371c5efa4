"""`pvl-adapter list`, `info`, `convert`, `export`: what is published, what a model is, and a model made into a file."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from example_model import contents, refuse, run, save_model, write_image
from fakes import TINY_RELEASED, official_checkpoint, published_sizes, serve_tokenizer

import pvl_adapter as pvl
from pvl_adapter.cli import export, main
from pvl_adapter.hub import CHECKPOINTS
from pvl_adapter.hub.catalogue import OFFICIAL_REPO as REPO
from pvl_adapter.lockstep import lockstep_of

BUSI = CHECKPOINTS[0].file


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


def test_the_list_is_json_too(capsys):
    main(["list", "--json"])

    known = json.loads(capsys.readouterr().out)
    assert [(each["checkpoint"], each["fraction"]) for each in known] == [
        (each.dataset.name, each.fraction) for each in CHECKPOINTS
    ]
    assert ["scores" in each for each in known[:4]] == [True, False, False, False]
    assert (known[1]["file"], known[1]["train_images"], known[1]["modality"]) == (
        CHECKPOINTS[1].file,
        312,
        "breast ultrasound",
    )


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "pvl_adapter", "convert", str(tmp_path / "absent.pth"), str(tmp_path / "folder")]

    refused = subprocess.run(command, cwd=Path(pvl.__file__).parents[1], capture_output=True, text=True, check=False)

    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ")
    assert "absent.pth" in line


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("predikt", "there is no command 'predikt'; did you mean predict?"),
        ("segment a.png", "there is no command 'segment'; see pvl-adapter --help"),
        ("predict", "the following arguments are required: MODEL, INPUT; see pvl-adapter predict --help"),
        ("info --jsno", "unrecognized arguments: --jsno, did you mean --json?; see pvl-adapter info --help"),
        ("--versoin", "unrecognized arguments: --versoin, did you mean --version?; see pvl-adapter --help"),
        ("list 1 -x", "unrecognized arguments: 1 -x; see pvl-adapter list --help"),
        ("evaluate nowhere/x/y --data A", "nowhere/x/y does not exist"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_helps(capsys, command, said):
    (line,) = refuse(capsys, *command.split()).splitlines()
    assert line.startswith(f"error: {said}")


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -u -m pvl_adapter list --json | head -1; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], cwd=Path(pvl.__file__).parents[1], capture_output=True, text=True)
    assert (ran.returncode in (0, 141), ran.stdout, ran.stderr) == (True, "[\n", "")


HEAVY = {"torch", "numpy", "transformers", "open_clip", "huggingface_hub.file_download", "nibabel", "PIL"}


def test_what_computes_nothing_imports_nothing_heavy(saved):
    """`--help` of everything, what is refused, and `info` and `list`."""
    commands = [
        ["--help"],
        ["list"],
        ["list", "--json"],
        ["info"],
        ["info", str(saved)],
        ["info", REPO],
        ["info", "a/b"],
    ]
    commands += [[name, "--help"] for name in ("predict", "evaluate", "calibrate", "info", "export", "convert")]
    commands += [
        ["predict"],
        ["evaluate", str(saved)],
        ["calibrate", str(saved)],
        ["evaluate", "nowhere/x/y", "--data=A"],
    ]
    code = f"""
import sys
from pvl_adapter.cli import export, main
for command in {commands}:
    try:
        main(command)
    except SystemExit:
        pass
    assert not {HEAVY} & set(sys.modules), command
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


# --- info -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(open_clip_models, tmp_path_factory) -> Path:
    return save_model(open_clip_models["native"], tmp_path_factory.mktemp("runs") / "run" / "last")


@pytest.fixture
def info(capsys) -> Callable[..., dict[str, Any]]:
    """What `info --json` says."""

    def ask(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert run("info", *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return ask


def test_a_folder_is_described_as_its_model_is(saved, info, tmp_path):
    model = pvl.from_pretrained(saved)
    known = info(saved)

    assert (known["kind"], known["location"], known["whole"]) == ("a folder of this library", str(saved), True)
    assert known["adapters"] | {"layers": [0, 2], "dim": 8, "count": 2} == known["adapters"]
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert known["parameters"]["trained"] == trained
    assert sum(known["parameters"][part] for part in ("clip", "adapters", "head")) == pytest.approx(
        sum(tensor.numel() for tensor in model.state_dict().values())
    )
    assert known["backbone"]["image_size"] == list(model.image_size)
    assert known["backbone"]["context_length"] == lockstep_of(model.clip).towers.text.context_length(model.clip)
    assert known["preprocessing"]["image_mean"] == pytest.approx(model.clip.visual.preprocess_cfg["mean"])
    assert (known["calibration"], known["distilled"], known["provenance"]) == (None, None, {})
    assert known["files"] == {name: len(content) for name, (_, content) in contents(saved).items()}

    model.save_pretrained(tmp_path / "part", whole=False, model_card_kwargs={"training_data": "Ten rows."})
    part = info(tmp_path / "part")
    assert (part["whole"], part["parameters"]["clip"], part["provenance"]) == (False, 0, {"training_data": "Ten rows."})
    assert list(part) == list(known)


def test_a_hub_model_is_described_as_far_as_it_is_in_the_cache(saved, info, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    absent = info(REPO, "--checkpoint", "kvasir")
    assert absent["kind"] == "a published checkpoint of the official code, not in the cache"
    assert (absent["location"], absent["files"], absent["provenance"]["checkpoint"]) == (None, {}, "Kvasir")
    assert absent["provenance"]["scores"] == {"DSC % on Kvasir's test images, as a third party measured it": 89.17}
    assert "not in the cache" in refuse(capsys, "info", "owner/name")
    assert "did you mean 'Kvasir'" in refuse(capsys, "info", REPO, "--checkpoint", "Kvasr")

    for repo in ("owner/name", REPO):
        folder = tmp_path / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
    shutil.copytree(saved, tmp_path / "models--owner--name" / "snapshots" / "abc")
    blob, file = folder / "blobs" / ("0" * 64), folder / "snapshots" / "abc" / BUSI
    blob.parent.mkdir()
    torch.save(official_checkpoint(), blob)
    file.parent.mkdir(parents=True)
    file.symlink_to(blob)
    known, published = info("owner/name"), info(REPO)
    assert {**known, "model": "", "location": ""} == {**info(saved), "model": "", "location": ""}
    assert (published["sha256"], published["files"]) == ("0" * 64, {file.name: blob.stat().st_size})
    assert published["kind"] == "a published checkpoint of the official code"


def test_a_pickle_is_not_opened(info, tmp_path):
    assert info(official(tmp_path))["kind"] == "a .pth file of the official code"
    assert info(broken(tmp_path))["kind"] == "no model of a kind that is known"


def test_without_a_model_versions_are_named_and_devices_if_asked_for(info):
    assert info()["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert info("--devices")["devices"][0].startswith("cpu")


def test_what_is_no_model_is_named(saved, tmp_path, capsys):
    damaged = Path(shutil.copytree(saved, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"hello" * 50)
    for path, said in (
        (damaged, "model.safetensors is damaged"),
        (saved.parents[1], f"is no model, but holds some; give one of {saved}"),
        (tmp_path, "give one of"),
        (saved.parent / "las", f"did you mean {saved}"),
        (write_image(tmp_path / "images" / "a.png").parent, "holds no model"),
    ):
        (line,) = refuse(capsys, "info", path).splitlines()
        assert line.startswith("error: ")
        assert said in line


# --- export -----------------------------------------------------------------------------------------------------------


def test_the_difference_from_torch_is_told_and_a_large_one_refused(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda _: True)
    monkeypatch.setattr(pvl, "export_onnx", lambda _, file, **__: file.write_bytes(b"graph"), raising=False)
    for off, code in ((2e-6, 0), (2e-3, 2), (float("nan"), 2)):
        monkeypatch.setattr(export, "largest_difference", lambda *_, off=off: off)
        with nullcontext() if code == 0 else pytest.raises(SystemExit):
            assert run("export", saved, tmp_path / "model.onnx") == 0
        told = capsys.readouterr()
        assert f"differ by at most {off:.1e} from torch's" in told.out
        assert ("do not use" in told.err) == (code == 2)


@pytest.mark.slow
def test_a_model_is_exported_and_compared_with_torch(saved, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "new" / "model.onnx"
    assert run("export", saved, file) == 0
    (off,) = re.findall("differ by at most (.*) from torch's", capsys.readouterr().out)
    assert 0.0 <= float(off) < 1e-5

    model = pvl.from_pretrained(saved)
    with torch.no_grad():
        model.head.mask_head[-1].weight.mul_(1.5)
    assert export.largest_difference(model, file, "a tumor") > export.TOLERANCE
    monkeypatch.setattr(pvl, "export_onnx", lambda *_, **__: None, raising=False)  # leaves the file as it is
    monkeypatch.setattr(export, "load_model", lambda _: model)
    assert "do not use" in refuse(capsys, "export", saved, file)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named_before_a_model_is_loaded(saved, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(export, "find_spec", lambda found: None if found == name else True)
    monkeypatch.setattr(export, "load_model", lambda _: pytest.fail("a model was loaded"))
    assert refuse(capsys, "export", saved, tmp_path / "a.onnx") == (
        f'error: {name} not installed: pip install "pvl-adapter[onnx]"\n'
    )


# --- convert ----------------------------------------------------------------------------------------------------------


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


def test_a_checkpoint_is_converted(tmp_path, words, capsys, monkeypatch, info):
    monkeypatch.setattr("pvl_adapter.hub.loading.OfficialConfig", lambda: TINY_RELEASED)
    file = official(tmp_path)

    main(["convert", str(file), str(tmp_path / "folder"), "--tokenizer", str(words)])

    assert "needs no network" in capsys.readouterr().out
    converted, direct = pvl.from_pretrained(tmp_path / "folder"), pvl.from_pretrained(file, tokenizer=words)
    assert converted.config == direct.config
    assert converted.config.channel_order == "BGR"
    assert converted.provenance["file"] == "tiny.pth"
    backbone = info(tmp_path / "folder")["backbone"]
    assert (backbone["name"], backbone["image_size"], backbone["context_length"]) == ("UniMedCLIP", 32, 12)
    assert all(torch.equal(converted.state_dict()[name], tensor) for name, tensor in direct.state_dict().items())


# --- full size: 860 MB are written twice ------------------------------------------------------------------------------

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
