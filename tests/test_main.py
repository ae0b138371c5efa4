"""`python -m pvl_adapter`: what is published, and a published file made into a folder."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes import TINY_RELEASED

import pvl_adapter as pvl
from pvl_adapter.__main__ import main
from pvl_adapter.hub import CHECKPOINTS, OFFICIAL_ADAPTER_PARTS
from pvl_adapter.hub.official import OFFICIAL_NAMES


def official_name(name: str) -> str:
    """The official code's name of one of our tensors."""
    for official, ours in OFFICIAL_NAMES:
        if name.startswith(ours):
            renamed = official + name.removeprefix(ours)
            if official == "pvl_adapters.":
                for part, our_part in OFFICIAL_ADAPTER_PARTS:
                    renamed = renamed.replace(our_part, part)
            return renamed
    raise AssertionError(name)


def write_official(path: Path, network: pvl.OfficialConfig) -> Path:
    """A checkpoint as the official code writes it, with values of no training."""
    tensors = {
        official_name(name): torch.full(tensor.shape, 0.01) for name, tensor in network.build().state_dict().items()
    }
    torch.save({"model": tensors, "epoch": 3, "optimizer": {}, "scheduler": {}, "best_loss": 0.5}, path)
    return path


def test_the_published_checkpoints_are_listed(capsys):
    main(["list"])

    lines = capsys.readouterr().out.splitlines()
    for checkpoint in CHECKPOINTS:
        dataset = checkpoint.dataset
        rows = [line for line in lines if line.split()[:2] == [dataset.name, str(checkpoint.fraction)]]
        assert len(rows) == 1
        assert dataset.modality in rows[0]
        assert (f"{dataset.dsc:.2f}" in rows[0]) == (checkpoint.fraction == 100) if dataset.dsc else True
    assert 'from_pretrained("TahaKoleilat/MedCLIPSeg", checkpoint=..., fraction=...)' in lines[0]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    command = [sys.executable, "-m", "pvl_adapter", *map(str, arguments)]
    return subprocess.run(command, cwd=Path(pvl.__file__).parent.parent, capture_output=True, text=True, check=False)


def test_it_runs_as_a_module(tmp_path):
    listed, refused = run("list"), run("convert", tmp_path / "absent.pth", tmp_path / "folder")

    assert (listed.returncode, listed.stderr) == (0, "")
    assert "BUSI" in listed.stdout
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ")
    assert "absent.pth" in line


def test_listing_and_help_need_no_torch():
    """Where the package itself does not import it."""
    code = f"""
import runpy, sys, types
package = types.ModuleType("pvl_adapter")
package.__path__ = [{str(Path(pvl.__file__).parent)!r}]
sys.modules["pvl_adapter"] = package
sys.argv = ["pvl_adapter", "list"]
runpy.run_module("pvl_adapter.__main__", run_name="__main__")
assert not {{"torch", "transformers", "open_clip"}} & set(sys.modules), "imported at the start"
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["train"], "'train'"),
        (["convert", "x.pth"], "folder"),
        (["list", "BUSI"], "BUSI"),
    ],
    ids=["nothing", "unknown", "no_folder", "too_much"],
)
def test_wrong_arguments_end_with_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "usage: python -m pvl_adapter" in error
    assert message in error


def broken(folder: Path) -> Path:
    (folder / "broken.pth").write_bytes(b"hello" * 50)
    return folder / "broken.pth"


def unreadable(folder: Path) -> Path:
    (folder / "loop.pth").symlink_to(folder / "loop.pth")
    return folder / "loop.pth"


REFUSALS: dict[str, tuple[Callable[[Path], Path], str | None, str]] = {
    "other_sizes": (lambda folder: write_official(folder / "tiny.pth", TINY_RELEASED), "words", "tiny.pth.*shape"),
    "absent": (lambda folder: folder / "absent.pth", "words", "absent.pth"),
    "folder": (lambda folder: folder, "words", "no file"),
    "damaged": (broken, "words", "broken.pth is damaged"),
    "unreadable": (unreadable, "words", "loop.pth"),
    "no_tokenizer": (lambda folder: write_official(folder / "tiny.pth", TINY_RELEASED), None, "tokenizer"),
    "not_a_tokenizer": (lambda folder: write_official(folder / "tiny.pth", TINY_RELEASED), ".", "tokenizer"),
}


@pytest.mark.parametrize(("make", "tokenizer", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_converted_is_named_in_one_message(tmp_path, words, make, tokenizer, message):
    file, folder = make(tmp_path), tmp_path / "new" / "folder"
    given = [] if tokenizer is None else ["--tokenizer", str(words if tokenizer == "words" else tmp_path)]

    with pytest.raises(SystemExit, match=f"^error: .*{message}") as ended:
        main(["convert", str(file), str(folder), *given])

    assert isinstance(ended.value.code, str)  # printed to stderr, with exit code 1
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("error", "ends"),
    [(pvl.UnsupportedModelError("a ResNet"), SystemExit), (TypeError("a bug"), TypeError)],
    ids=["unsupported", "bug"],
)
def test_an_unsupported_model_is_one_message_and_a_bug_is_not(tmp_path, monkeypatch, error, ends):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pvl_adapter.hub.loading.from_pretrained", fail)

    with pytest.raises(ends, match=str(error)):
        main(["convert", str(broken(tmp_path)), str(tmp_path / "folder")])


@pytest.mark.slow
def test_a_network_of_the_published_sizes_is_converted(tmp_path, words, capsys):
    """860 MB are written twice."""
    file = write_official(tmp_path / "latest.pth", pvl.OfficialConfig())

    main(["convert", str(file), str(tmp_path / "folder"), "--tokenizer", str(words)])

    assert "needs no network" in capsys.readouterr().out
    converted = pvl.from_pretrained(tmp_path / "folder")
    direct = pvl.from_pretrained(file, tokenizer=words)
    assert converted.config == direct.config
    assert dataclasses.asdict(converted.config)["channel_order"] == "BGR"
    assert converted.provenance["file"] == "latest.pth"
    for name, tensor in direct.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    assert torch.equal(converted.tokenize("a tumor")["input_ids"], direct.tokenize("a tumor")["input_ids"])
