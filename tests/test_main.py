"""`python -m pvl_adapter`: what is published, and a published file made into a folder."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import TINY_RELEASED

import pvl_adapter as pvl
from pvl_adapter.__main__ import main
from pvl_adapter.hub import CHECKPOINTS, OFFICIAL_ADAPTER_PARTS
from pvl_adapter.hub.official import OFFICIAL_NAMES


def released_name(name: str) -> str:
    """The released code's name of one of our tensors."""
    for released, ours in OFFICIAL_NAMES:
        if name.startswith(ours):
            renamed = released + name.removeprefix(ours)
            if released == "pvl_adapters.":
                for part, our_part in OFFICIAL_ADAPTER_PARTS:
                    renamed = renamed.replace(our_part, part)
            return renamed
    raise AssertionError(name)


def write_released(path: Path, network: pvl.OfficialConfig) -> Path:
    """A checkpoint as the released code writes it, with values of no training."""
    tensors = {
        released_name(name): torch.full(tensor.shape, 0.01) for name, tensor in network.build().state_dict().items()
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


def test_it_runs_as_a_module(tmp_path):
    root = Path(pvl.__file__).parent.parent
    command = [sys.executable, "-m", "pvl_adapter", "list"]

    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)

    assert "BUSI" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["train"], "invalid choice: 'train'"),
        (["convert"], "required: checkpoint, folder"),
        (["convert", "x.pth"], "required: folder"),
        (["list", "BUSI"], "unrecognized arguments: BUSI"),
    ],
    ids=["nothing", "unknown", "no_files", "no_folder", "too_much"],
)
def test_wrong_arguments_end_with_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "usage: python -m pvl_adapter" in error
    assert message in error


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--help"])

    assert ended.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # lines may break anywhere
    assert "--tokenizer" in text
    assert "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract" in text


def refused(*arguments: Any, tmp_path: Path) -> str:
    """The message that the conversion ends with; nothing may be written."""
    folder = tmp_path / "new" / "folder"
    with pytest.raises(SystemExit) as ended:
        main(["convert", *map(str, (arguments[0], folder, *arguments[1:]))])

    assert not folder.parent.exists()
    assert isinstance(ended.value.code, str)  # printed to stderr, with exit code 1
    assert ended.value.code.startswith("error: ")
    return ended.value.code


def test_a_network_of_other_sizes_is_not_converted(tmp_path, words):
    file = write_released(tmp_path / "tiny.pth", TINY_RELEASED)

    message = refused(file, "--tokenizer", words, tmp_path=tmp_path)

    assert "tiny.pth do not fit: missing" in message
    assert "has shape" in message


def test_a_file_that_is_not_there_is_not_converted(tmp_path, words):
    message = refused(tmp_path / "absent.pth", "--tokenizer", words, tmp_path=tmp_path)

    assert "there is no file" in message
    assert "absent.pth" in message


def test_a_folder_is_not_converted(tmp_path, words):
    assert "there is no file" in refused(tmp_path, "--tokenizer", words, tmp_path=tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello" * 50], ids=["empty", "text"])
def test_a_damaged_file_is_not_converted(tmp_path, words, content):
    (tmp_path / "broken.pth").write_bytes(content)

    assert "broken.pth is damaged" in refused(tmp_path / "broken.pth", "--tokenizer", words, tmp_path=tmp_path)


def test_without_its_tokenizer_nothing_is_converted(tmp_path):
    file = write_released(tmp_path / "tiny.pth", TINY_RELEASED)

    message = refused(file, tmp_path=tmp_path)

    assert "the tokenizer is missing" in message
    assert "tokenizer=..." in message or "--tokenizer" in message


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    file = write_released(tmp_path / "tiny.pth", TINY_RELEASED)
    (tmp_path / "empty").mkdir()

    assert "empty holds no tokenizer" in refused(file, "--tokenizer", tmp_path / "empty", tmp_path=tmp_path)


def test_the_exit_code_of_a_failure_is_not_zero(tmp_path):
    root = Path(pvl.__file__).parent.parent
    command = [sys.executable, "-m", "pvl_adapter", "convert", tmp_path / "absent.pth", tmp_path / "folder"]

    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no file")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_network_of_the_published_sizes_is_converted(tmp_path, words, capsys):
    """860 MB are written twice."""
    file = write_released(tmp_path / "latest.pth", pvl.OfficialConfig())

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
