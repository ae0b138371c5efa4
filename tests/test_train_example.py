"""examples/train.py: it runs, writes what it promises, and goes on exactly where it stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

for needed in ("nilearn", "torchmetrics", "matplotlib", "tqdm"):
    pytest.importorskip(needed, reason="the example needs pvl-adapter[examples]")

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"
QUICK = ["--steps=4", "--batch-size=2", "--num-samples=1", "--device=cpu"]
TARGETS = ("grey matter", "white matter", "whole brain")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    example.main([*QUICK, f"--output={folder}"])
    return folder


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_run(folder: Path, expected: Path) -> None:
    """Losses, weights and generators agree without any tolerance."""
    got, wanted = checkpoint(folder), checkpoint(expected)
    assert got["losses"] == wanted["losses"]
    assert (folder / "losses.jsonl").read_text() == (expected / "losses.jsonl").read_text()
    assert got["trainable"].keys() == wanted["trainable"].keys()
    for name, tensor in wanted["trainable"].items():
        assert torch.equal(got["trainable"][name], tensor), name
    for name in ("random", "batches"):
        assert torch.equal(got[name], wanted[name]), name


def test_writes_scores_picture_losses_and_checkpoint(finished: Path) -> None:
    scores = json.loads((finished / "scores.json").read_text())
    assert "RANDOM" in scores["note"]
    for phrasing in ("seen_phrasing", "unseen_phrasing"):
        assert set(scores[phrasing]["dice"]) == set(TARGETS)
        assert all(0.0 <= value <= 1.0 for value in scores[phrasing]["dice"].values())
        assert 0.0 <= scores[phrasing]["wrong_tissue"] <= 1.0
    assert scores["settings"]["steps"] == 4
    assert {"slices", "trainable_parameters", "seconds", "versions", "commit", "device", "num_samples"} <= set(scores)

    with Image.open(finished / "brain.png") as picture:
        assert min(picture.size) > 500

    losses = [json.loads(line) for line in (finished / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [1, 2, 3, 4]
    saved = checkpoint(finished)
    assert saved["losses"] == losses
    assert saved["trainable"]
    assert all("pvl_adapters" in name or name.startswith("head.") for name in saved["trainable"])  # no frozen weights


def test_held_out_slices_have_no_neighbour_in_training(finished: Path) -> None:
    slices = json.loads((finished / "scores.json").read_text())["slices"]
    distances = [abs(train - held_out) for train in slices["train_mm"] for held_out in slices["held_out_mm"]]
    assert min(distances) == 4


def test_resumes_exactly_after_an_interruption(
    example: ModuleType, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch, calls = example.draw_batch, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:  # two steps are saved by now, and a third one taken that is not
            raise KeyboardInterrupt
        return draw_batch(*args, **kwargs)

    command = [*QUICK, "--checkpoint-every=2", f"--output={tmp_path}"]
    monkeypatch.setattr(example, "draw_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        example.main(command)
    monkeypatch.undo()
    assert len(checkpoint(tmp_path)["losses"]) == 2
    example.main([*command, "--resume"])
    assert_same_run(tmp_path, finished)


def test_resumes_exactly_after_a_kill(example: ModuleType, finished: Path, tmp_path: Path) -> None:
    """A process killed while it writes one checkpoint after another leaves a whole one."""
    command = [*QUICK, "--checkpoint-every=1", f"--output={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as this process: sums depend on the number of threads
    process = subprocess.Popen([sys.executable, SCRIPT, *command], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300.0
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(checkpoint(tmp_path)["losses"]) <= 4
    example.main([*command, "--resume"])
    assert_same_run(tmp_path, finished)


def test_refuses_other_settings(example: ModuleType, finished: Path) -> None:
    before = (finished / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"batch_size is 3, expected 2; .*seed is 1, expected 0.*another --output"):
        example.main([*QUICK, "--batch-size=3", "--seed=1", "--resume", f"--output={finished}"])
    assert (finished / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("kept", [0, 10, 100_000, -1], ids=lambda kept: f"{kept}_bytes")
def test_refuses_a_damaged_checkpoint(example: ModuleType, finished: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((finished / "checkpoint.pt").read_bytes()[:kept])
    with pytest.raises(SystemExit, match=r"checkpoint.pt is damaged \(.+\)\. Delete it"):
        example.read_checkpoint(path)


def test_refuses_a_foreign_checkpoint(example: ModuleType, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="was not written by this script"):
        example.read_checkpoint(tmp_path / "checkpoint.pt")


def test_does_not_overwrite_a_run(example: ModuleType, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main([*QUICK, f"--output={finished}"])
    assert "go on from it with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--steps=0", "--steps is 0, expected a number above 0"),
        ("--steps=x", "invalid int value: 'x'"),
        ("--lr=nan", "--lr is nan, expected a number above 0"),
        ("--clip=ViT-B-16", "expected --pretrained with an open_clip name"),
        ("--pretrained=openai", "expected --pretrained with an open_clip name"),
        ("--resume", "--resume found no"),
        ("--device=abacus", "--device abacus cannot be used"),
    ],
)
def test_refuses_bad_arguments(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main([argument, f"--output={tmp_path}"])
    assert message in capsys.readouterr().err


def open_clip_arguments(folder: Path) -> list[str]:
    """A small model under a name of its own, with its weights in a file."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
    }
    (folder / "tiny-train-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-train-test.json")
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "weights.pt")
    return ["--clip=tiny-train-test", f"--pretrained={folder / 'weights.pt'}"]


def hugging_face_arguments(folder: Path) -> list[str]:
    """A small model and a tokenizer of letters, as `save_pretrained` leaves them."""
    letters = {letter: index for index, letter in enumerate(["<pad>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 28)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = CLIPTextConfig(**tower, vocab_size=29, max_position_embeddings=64, eos_token_id=28, pad_token_id=0)
    vision = CLIPVisionConfig(**tower, image_size=32, patch_size=8)
    both = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(both).save_pretrained(folder)
    return [f"--clip={folder}"]


@pytest.mark.parametrize("arguments", [open_clip_arguments, hugging_face_arguments])
def test_other_clips_work_the_same_way(example: ModuleType, tmp_path: Path, arguments: Any) -> None:
    model = tmp_path / "model"
    model.mkdir()
    command = [*QUICK, "--steps=2", *arguments(model), f"--output={tmp_path / 'run'}"]
    example.main(command)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["note"] is None
    assert set(scores["seen_phrasing"]["dice"]) == set(TARGETS)
    example.main([*command, "--resume"])  # the same weights are found again


@pytest.mark.slow
def test_default_run_reaches_the_promised_scores(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, f"--output={tmp_path}"], check=True)
    scores = json.loads((tmp_path / "scores.json").read_text())
    # A phrasing never seen does a little worse (grey matter 0.83) and is reported, not promised.
    grey, white, brain = (scores["seen_phrasing"]["dice"][target] for target in TARGETS)
    assert grey >= 0.85
    assert white >= 0.80
    assert brain >= 0.95
    assert all(scores[phrasing]["wrong_tissue"] < 0.4 for phrasing in ("seen_phrasing", "unseen_phrasing"))
