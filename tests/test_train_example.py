"""examples/train.py: it trains as its recipes say, writes what it promises, and goes on exactly where it stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_goldens import assert_forward_equal, assert_gradients_equal, load, parameter_gradients, released_model

for needed in ("nilearn", "torchmetrics", "matplotlib", "tqdm", "accelerate"):
    pytest.importorskip(needed, reason="the examples need pvl-adapter[examples]")

from accelerate.state import AcceleratorState  # noqa: E402
from brain_slices import write_brain_slices  # noqa: E402

import pvl_adapter as pvl  # noqa: E402
from pvl_adapter.hub.official import rename_official  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import rows  # noqa: E402
import train  # noqa: E402
import training  # noqa: E402
from recipe import Recipe  # noqa: E402

RECIPE = """
backbone = "small-patch-16"
dim = 32
epochs = 2
batch_size = 4
lr = 2e-3
warmup_steps = 2
rotate_probability = 1.0
rotate_degrees = 15
scale = 0.1
contrast = 0.1
"""


@pytest.fixture(autouse=True)
def _new_accelerator() -> Iterator[None]:
    """Accelerate keeps the settings of a process's first run for all others."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brain_slices(tmp_path_factory.mktemp("data") / "Brain")


@pytest.fixture(scope="module")
def command(brain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    recipe = tmp_path_factory.mktemp("recipe") / "quick.toml"
    recipe.write_text(RECIPE)
    return [f"--data={brain}", f"--recipe={recipe}", "--cpu"]


@pytest.fixture(scope="module")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    train.main([*command, f"--output={folder}"])
    return folder


def checkpoint(folder: Path, name: str = "checkpoint.pt") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=True)


def assert_same_run(folder: Path, expected: Path) -> None:
    """Losses, scores and weights agree without any tolerance."""
    assert (folder / "log.jsonl").read_text() == (expected / "log.jsonl").read_text()
    for name in ("checkpoint.pt", "best.pt"):
        got, wanted = checkpoint(folder, name), checkpoint(expected, name)
        assert got["trainable"].keys() == wanted["trainable"].keys()
        for parameter, tensor in wanted["trainable"].items():
            assert torch.equal(got["trainable"][parameter], tensor), parameter
    for name in ("best", "last"):
        got, wanted = (load_file(each / name / "model.safetensors") for each in (folder, expected))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[parameter], wanted[parameter]) for parameter in wanted)


# ---- recipes --------------------------------------------------------------------------------------------------------


def test_released_recipe_takes_the_released_step() -> None:
    """Losses and gradients of the recorded step, and then what Adam does with them at the released rate."""
    recipe = Recipe.read("released")
    golden, tiny = load("medclipseg_tiny_train"), load("medclipseg_tiny")
    model = released_model(golden, tiny).train()
    optimizer = recipe.optimizer(training.trainable(model).values())

    out = model(golden["image"], golden["input_ids"], noise=golden.noise_pairs())
    terms = recipe.loss()(out.logits, golden["mask"], patch_tokens=out.patch_tokens, text_embeds=out.text_embeds)
    terms.total.backward()
    assert_forward_equal(terms.total, golden["total_loss"])
    gradients = parameter_gradients(model)
    assert_gradients_equal(gradients, rename_official(golden.under("grad.")))

    before = training.tensors(model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    optimizer.step()
    for name, tensor in training.tensors(model).items():
        gradient = gradients[name]
        step = 3e-4 * gradient / (gradient.abs() + 1e-8)  # Adam's first, by its equations
        torch.testing.assert_close(tensor, before[name] - step, rtol=0, atol=1e-7)


def test_released_learning_rate_is_the_released_cosine() -> None:
    recipe = Recipe.read("released")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=1e-4)
    for epoch in range(100):
        for step in (0, 3, 6):  # of seven
            got = recipe.lr_at(7 * epoch + step, steps_per_epoch=7)
            assert got == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert recipe.batch_size == 24


def test_learning_rate_by_steps_warms_up_and_ends_at_its_minimum() -> None:
    recipe = Recipe(backbone="CLIP", epochs=4, lr=1.0, lr_min=0.1, warmup_steps=9)
    rates = [recipe.lr_at(step, steps_per_epoch=25) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert all(np.diff(rates[:10]) > 0)
    assert all(np.diff(rates[10:]) < 0)
    assert rates[100] == pytest.approx(0.1)


def test_released_augmentation_turns_half_of_the_pictures_by_whole_degrees() -> None:
    recipe = Recipe.read("released")
    size = 224
    image = torch.randint(1, 256, (3, size, size), dtype=torch.uint8)
    mask = torch.rand(size, size) > 0.5
    turned: dict[int, int] = {}
    pictures = {
        angle: torch.from_numpy(
            np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).rotate(angle, Image.Resampling.NEAREST))
        ).permute(2, 0, 1)
        for angle in range(-20, 21)
    }
    same = 0
    for draw in range(120):
        got, got_mask = rows.augment(image[None], mask[None], recipe, random=np.random.default_rng(draw))
        if torch.equal(got[0], image.float()):
            assert torch.equal(got_mask[0], mask)
            same += 1
            continue
        agreement = {angle: (got[0] == picture).float().mean().item() for angle, picture in pictures.items()}
        angle = max(agreement, key=agreement.get)
        assert agreement[angle] > 0.99  # ties between neighbours fall either way; zero outside, as Pillow's
        expected = Image.fromarray(mask.numpy().astype(np.uint8)).rotate(angle, Image.Resampling.NEAREST)
        assert (got_mask[0].numpy() == np.array(expected)).mean() > 0.99
        turned[angle] = turned.get(angle, 0) + 1
    assert 40 <= same <= 85  # half, and every 41st angle is 0
    assert len(turned) > 20
    assert min(turned) < -15
    assert max(turned) > 15


def test_default_augmentation_stays_within_its_ranges_and_never_mirrors() -> None:
    recipe = Recipe.read("default")
    image = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    image[:, :, 30:40, 60:80] = 200  # to the upper right, wider than high
    mask = image[:, 0] > 0
    for draw in range(50):
        got, got_mask = rows.augment(image, mask, recipe, random=np.random.default_rng(draw))
        y, x = torch.nonzero(got_mask[0], as_tuple=True)
        assert y.float().mean() < 48 < x.float().mean()
        assert 200 * 0.8**2 <= len(y) <= 200 * 1.2**2
        assert 200 * 0.9 - 1 <= got.max() <= 200 * 1.1 + 1
        middle = got[0, 0][got_mask[0]].float()
        assert (middle > 0.4 * got.max()).all()  # picture and mask move together


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backbone = 'CLIP'\nspeed = 3", "unknown settings ['speed']"),
        ("backbone = 'CLIP'\nlr = -1", "lr is -1, expected a number above 0"),
        ("backbone = 'CLIP'\nlr_by = 'day'", "lr_by is 'day', expected one of epoch, step"),
        ("lr = 1", "backbone"),
        ("lr = = 1", "is no TOML"),
    ],
)
def test_refuses_a_bad_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.toml") as caught:
        Recipe.read(str(tmp_path / "bad.toml"))
    assert message in str(caught.value)


def test_names_the_recipes_there_are() -> None:
    with pytest.raises(ValueError, match="expected one of brains, default, released"):
        Recipe.read("perfect")


@pytest.mark.parametrize("name", ["brains", "default", "released"])
def test_options_override_a_recipe(name: str) -> None:
    recipe = Recipe.read(name, epochs=3, lr=None)
    assert recipe.epochs == 3
    assert recipe.lr == Recipe.read(name).lr


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_writes_models_scores_log_and_figures(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"]["backbone"] == "small-patch-16"
    assert {"versions", "commit", "command", "device", "seed", "rows", "frozen_weights"} <= set(config)
    scores = json.loads((finished / "scores.json").read_text())
    assert "RANDOM" in scores["note"]
    assert scores["epochs"] == 2
    assert scores["steps"] == 6
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2]
    assert scores["best_val_dice"] == max(entry["val_dice"] for entry in log)
    assert log[1]["total"] < log[0]["total"]
    for name in ("curves", "examples"):
        with Image.open(finished / "figures" / f"{name}.png") as figure:
            assert min(figure.size) > 200
    saved = checkpoint(finished)
    assert all("pvl_adapters" in name or name.startswith("head.") for name in saved["trainable"])  # no frozen weights


def test_saved_models_predict_with_the_validated_dice(finished: Path, brain: Path) -> None:
    model = pvl.from_pretrained(finished / "best")
    dice = []
    for line in (brain / "Prompts_Folder" / "Val_text.csv").read_text().splitlines()[1:]:
        image, text, label = line.split(",")
        mask = model.predict(brain / "Val_Folder" / "img" / image, text, num_samples=0).mask[0]
        truth = Image.open(brain / "Val_Folder" / "label" / label).resize((96, 96), Image.Resampling.NEAREST)
        both = (mask.numpy() & (np.array(truth) > 127)).sum()
        dice.append(2 * both / (mask.sum().item() + (np.array(truth) > 127).sum()))
    best = json.loads((finished / "scores.json").read_text())["best_val_dice"]
    assert np.mean(dice) == pytest.approx(best, abs=0.02)  # nearest neighbours of Pillow and OpenCV differ a little


def test_resumes_exactly_after_an_interruption(
    command: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step, steps = training.Training.take_step, []

    def interrupted(*args: Any) -> Any:
        steps.append(args)
        if len(steps) == 6:  # in the second epoch, one step after a checkpoint
            raise KeyboardInterrupt
        return take_step(*args)

    monkeypatch.setattr(training.Training, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*command, "--checkpoint-every=2", f"--output={tmp_path}"])
    monkeypatch.undo()
    assert checkpoint(tmp_path)["step"] == 4
    train.main([*command, "--resume", f"--output={tmp_path}"])
    assert_same_run(tmp_path, finished)


def run_and_kill(command: list[str], folder: Path, *, after: float) -> None:
    """Run, on from the checkpoint if there is one, until another is written and then for a while, and kill."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as this process: sums depend on the number of threads
    line = [sys.executable, str(EXAMPLES / "train.py"), *command, "--checkpoint-every=1", f"--output={folder}"]
    path = folder / "checkpoint.pt"
    before = path.stat().st_mtime_ns if path.exists() else None
    if before is not None:
        line.append("--resume")
    process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300.0
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.stat().st_mtime_ns != before:
            break
        time.sleep(0.01)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_resumes_exactly_after_a_kill(command: list[str], finished: Path, tmp_path: Path) -> None:
    """A process killed while it writes one checkpoint after another leaves a whole one."""
    run_and_kill(command, tmp_path, after=0.2)
    assert 1 <= checkpoint(tmp_path)["step"] <= 6
    train.main([*command, "--resume", "--checkpoint-every=1", f"--output={tmp_path}"])
    assert_same_run(tmp_path, finished)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(command: list[str], tmp_path: Path) -> None:
    longer = [*command, "--epochs=120"]
    train.main([*longer, f"--output={tmp_path / 'whole'}"])
    chance = random.Random(0)
    steps = []
    for _ in range(20):
        run_and_kill(longer, tmp_path / "killed", after=chance.uniform(0.0, 1.5))
        steps.append(checkpoint(tmp_path / "killed")["step"])  # never unreadable
        if (tmp_path / "killed" / "best.pt").exists():
            checkpoint(tmp_path / "killed", "best.pt")
    print(f"steps after each kill: {steps}, of 360")
    assert steps[-1] < 360
    train.main([*longer, "--resume", f"--output={tmp_path / 'killed'}"])
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_two_processes_train_as_one(command: list[str], finished: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*line, str(EXAMPLES / "train.py"), *command, f"--output={tmp_path}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads((tmp_path / "config.json").read_text())["processes"] == 2
    for got, expected in zip(log_of(tmp_path), log_of(finished), strict=True):
        assert got == pytest.approx(expected, rel=2e-3)
    got, expected = checkpoint(tmp_path)["trainable"], checkpoint(finished)["trainable"]
    for name, tensor in expected.items():  # Adam turns the smallest gradients into whole steps
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-3)


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_batch_in_parts_gives_the_same_dice_loss(command: list[str], finished: Path, tmp_path: Path) -> None:
    """Before the first step nothing can differ but the contrastive loss, which sees a part at a time."""
    train.main([*command, "--accumulate=2", "--epochs=1", f"--output={tmp_path}"])
    whole, parts = (log_of(folder)[0] for folder in (finished, tmp_path))
    assert parts["dice"] == pytest.approx(whole["dice"], rel=0.05)
    assert parts["bce"] == pytest.approx(whole["bce"], rel=0.05)


def test_frozen_weights_in_bfloat16(command: list[str], finished: Path, tmp_path: Path) -> None:
    train.main([*command, "--mixed-precision=bf16", f"--output={tmp_path}"])
    for low, full in zip(log_of(tmp_path), log_of(finished), strict=True):
        assert low["total"] == pytest.approx(full["total"], rel=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint(tmp_path)["trainable"].values())


def test_stops_early_and_without_validation(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = iter([0.5, 0.7, 0.6, 0.6, 0.9])
    monkeypatch.setattr(training.Training, "validate", lambda self: next(dice))
    train.main([*command, "--epochs=9", "--patience=2", f"--output={tmp_path}"])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["epochs"] == 4
    assert scores["stopped_early"]
    assert scores["best_val_dice"] == 0.7
    assert checkpoint(tmp_path, "best.pt")["trainable"].keys() == checkpoint(tmp_path)["trainable"].keys()


@pytest.mark.parametrize("name", ["released", "default", "brains"])
def test_every_recipe_trains(name: str, brain: Path, tmp_path: Path) -> None:
    few = ["--backbone=small-patch-16", "--epochs=1", "--batch-size=4", "--cpu"]
    train.main([f"--data={brain}", f"--recipe={name}", *few, f"--output={tmp_path}"])
    recipe, saved = Recipe.read(name), pvl.from_pretrained(tmp_path / "last")
    assert saved.config.channel_order == recipe.channel_order
    assert saved.config.resize == recipe.resize
    assert saved.config.context_length == (48 if recipe.pad_to_context else None)
    adapters = json.loads((tmp_path / "last" / "config.json").read_text())["adapters"]
    assert (adapters["mask_padding"], adapters["tower_dropout"]) == (recipe.mask_padding, recipe.tower_dropout)


def test_own_tables_and_a_tracker(brain: Path, command: list[str], tmp_path: Path) -> None:
    folder = brain / "Train_Folder"
    lines = (brain / "Prompts_Folder" / "Train_text.csv").read_text().splitlines()[1:]
    records = [json.dumps(dict(zip(("image", "text", "mask"), row.split(","), strict=True))) for row in lines]
    (tmp_path / "mine.jsonl").write_text("\n".join(records))
    train.main(
        [
            f"--table={tmp_path / 'mine.jsonl'}",
            f"--images={folder / 'img'}",
            f"--masks={folder / 'label'}",
            *command[1:],
            "--epochs=1",
            "--tracker=tensorboard",
            f"--output={tmp_path / 'run'}",
        ]
    )
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["best_val_dice"] is None  # no rows to validate on
    assert not (tmp_path / "run" / "best").exists()
    assert pvl.from_pretrained(tmp_path / "run" / "last").image_size == (96, 96)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_names_every_fault_before_it_computes(brain: Path, command: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "Broken"
    shutil.copytree(brain, broken)
    image, label = sorted((broken / "Train_Folder" / "img").iterdir())[:2]
    image.unlink()
    label.write_bytes(label.read_bytes()[:100])
    with pytest.raises(SystemExit) as caught:
        train.main([f"--data={broken}", *command[1:], f"--output={tmp_path / 'run'}"])
    assert image.name in str(caught.value)
    assert label.name in str(caught.value)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_refuses_other_settings(command: list[str], finished: Path) -> None:
    before = (finished / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"recipe is .*seed is 1, expected 0.*another --output"):
        train.main([*command, "--batch-size=3", "--seed=1", "--resume", f"--output={finished}"])
    assert (finished / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("kept", [0, 10, 100_000, -1], ids=lambda kept: f"{kept}_bytes")
def test_refuses_a_damaged_checkpoint(finished: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((finished / "checkpoint.pt").read_bytes()[:kept])
    with pytest.raises(SystemExit, match=r"checkpoint.pt is damaged \(.+\)\. Delete it"):
        train.read_checkpoint(path)


def test_refuses_a_foreign_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="was not written by this script"):
        train.read_checkpoint(tmp_path / "checkpoint.pt")


def test_stops_at_a_loss_that_is_not_finite(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recipe, "lr_at", lambda *args, **kwargs: 1e30)
    with pytest.raises(SystemExit, match="try a smaller --lr"):
        train.main([*command, f"--output={tmp_path}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs=x"], "invalid int value: 'x'"),
        (["--accumulate=0"], "--accumulate is 0, expected 1 or more"),
        (["--resume"], "--resume found no"),
        (["--fraction=30"], "invalid choice: 30"),
        (["--table=a.csv", "--data=B"], "--table and --data exclude each other"),
    ],
)
def test_refuses_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main([*arguments, f"--output={tmp_path}"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size=0"], "batch_size is 0, expected a number above 0"),
        (["--lr=nan"], "lr is nan, expected a number above 0"),
        (["--backbone=ViT-Z"], "there is no backbone 'ViT-Z'"),
        (["--batch-size=5", "--accumulate=2"], "can be divided by 2"),
    ],
)
def test_refuses_what_cannot_be_trained(command: list[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main([*command, *arguments, f"--output={tmp_path}"])
    assert message in str(caught.value)


def test_does_not_overwrite_a_run(command: list[str], finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main([*command, f"--output={finished}"])
    assert "go on from it with --resume" in capsys.readouterr().err
