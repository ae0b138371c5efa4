"""examples/train.py: it trains as its recipes say, writes what it promises, and resumes exactly where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from brain_slices import ROOT, forget_accelerator, interrupted_at, script, write_brain_slices
from PIL import Image
from safetensors.torch import load_file
from test_goldens import assert_forward_equal, load, released_model

import pvl_adapter as pvl

train = script("train")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # sums depend on the number of threads
FEW = ["--fraction=50", "--batch-size=6"]  # one step an epoch
RECIPE = """
backbone = "small-patch-16"
epochs = 2
batch_size = 4
lr = 2e-3
warmup = 2
[adapters]
dim = 32
[augmentation]
degrees = 15
scale = 0.1
brightness = 0.1
"""


@pytest.fixture(autouse=True)
def _new_accelerator() -> Iterator[None]:
    yield
    forget_accelerator()


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brain_slices(tmp_path_factory.mktemp("data") / "Brain")


@pytest.fixture(scope="module")
def command(brain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    recipe = tmp_path_factory.mktemp("recipe") / "quick.toml"
    recipe.write_text(RECIPE)
    return [f"--data={brain}", f"--recipe={recipe}", "--cpu", "--workers=0"]


@pytest.fixture(scope="module")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    run(*command, f"--output={folder}")
    return folder


def run(*command: str) -> None:
    train.main(train.parse(command))


def newest(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and weights of the newest checkpoint."""
    checkpoint = train.checkpoints(folder)[-1]
    return int(checkpoint.name), load_file(checkpoint / "model.safetensors")


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, expected: Path) -> None:
    """Losses, scores and weights agree without any tolerance."""
    assert log_of(folder) == log_of(expected)
    files = [Path(each, "model.safetensors") for each in ("best", "last", "checkpoints/000000006")]
    for file in files if (expected / files[-1]).is_file() else files[:-1]:
        got, wanted = load_file(folder / file), load_file(expected / file)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


# ---- recipes --------------------------------------------------------------------------------------------------------


def test_released_recipe_has_the_released_loss_and_rate() -> None:
    args, golden = train.parse(["--data=BUSI", "--recipe=released"]), load("medclipseg_tiny_train")
    model = released_model(golden, load("medclipseg_tiny"))
    out = model(golden["image"], golden["input_ids"], noise=golden.noise_pairs())
    loss = pvl.SegmentationLoss(**args.loss)
    terms = loss(out.logits, golden["mask"], patch_tokens=out.patch_tokens, text_embeds=out.text_embeds)
    assert_forward_equal(terms.total, golden["total_loss"])
    assert args.lr == 3e-4


def rates(*options: str, steps: int, per_epoch: int) -> list[float]:
    args = train.parse(["--data=BUSI", *options])
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule, found = train.schedule(optimizer, args, steps_per_epoch=per_epoch), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_learning_rate_is_the_released_cosine_or_rises_first() -> None:
    found = rates("--recipe=released", steps=100, per_epoch=7)  # stepped once an epoch
    np.testing.assert_allclose(found, 1e-4 + 2e-4 * (1 + np.cos(np.pi * np.arange(100) / 100)) / 2, rtol=1e-9)
    found = rates("--epochs=4", "--lr=1", "--lr-min=0.1", "--warmup=9", "--lr-by=step", steps=101, per_epoch=25)
    assert found[:10] == pytest.approx(np.linspace(0.1, 1.0, 10))
    assert all(np.diff(found[10:]) < 0)
    assert found[100] == pytest.approx(0.1)


def augment(recipe: str, image: torch.Tensor, mask: torch.Tensor, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
    transform = train.augmentation(**train.parse(["--data=BUSI", f"--recipe={recipe}"]).augmentation)
    rows = train.Rows([[{"image": image, "mask": mask, "text": ""}]], transform)
    row = rows[draw, 0]
    assert (row["image"].dtype, row["mask"].dtype) == (torch.uint8, torch.bool)
    return row["image"], row["mask"]


def test_released_augmentation_turns_half_of_the_images_by_whole_degrees() -> None:
    image, mask = torch.randint(1, 256, (3, 128, 128), dtype=torch.uint8), torch.rand(128, 128) > 0.5
    whole = Image.fromarray(image.permute(1, 2, 0).numpy())
    turned = {angle: np.array(whole.rotate(angle, Image.Resampling.NEAREST)) for angle in range(-20, 21)}
    angles = []
    for draw in range(120):
        got, got_mask = augment("released", image, mask, draw)
        agreement = {angle: (got.permute(1, 2, 0).numpy() == each).mean() for angle, each in turned.items()}
        angles.append(max(agreement, key=agreement.get))
        assert agreement[angles[-1]] > 0.99  # ties between neighbours fall either way; zero outside, as Pillow's
        expected = Image.fromarray(mask.numpy().astype(np.uint8)).rotate(angles[-1], Image.Resampling.NEAREST)
        assert (got_mask.numpy() == np.array(expected)).mean() > 0.99
    assert 40 <= angles.count(0) <= 85  # half, and every 41st angle is 0
    assert min(angles) < -15 < 15 < max(angles)


def test_default_augmentation_stays_within_its_ranges_and_never_mirrors() -> None:
    image = torch.zeros(3, 96, 96, dtype=torch.uint8)
    image[:, 30:40, 60:80] = 200  # to the upper right, wider than high
    for draw in range(50):
        got, mask = augment("default", image, image[0] > 0, draw)
        y, x = torch.nonzero(mask, as_tuple=True)
        assert y.float().mean() < 48 < x.float().mean()
        assert 200 * 0.8**2 <= len(y) <= 200 * 1.2**2
        assert 200 * 0.9 - 1 <= got.max() <= 200 * 1.1 + 1
        assert (got[0][mask] > 0.4 * got.max()).float().mean() > 0.98  # image and mask move together


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("speed = 3", "speed"),
        ("lr = -1", "lr is -1"),
        ("lr = = 1", "bad.toml"),
        ("[adapters]\nwidth = 3", "width"),
        ("[model]\nresize = 'nearest'", "resize is 'nearest'"),
        ("[loss]\nfocal = 1", "focal"),
        ("[augmentation]\nmirror = true", "mirror"),
        ("backbone = 'ViT-B-32'", "ViT-B-32 would have random weights"),
        ("batch_size = 5\naccumulate = 2", "--batch-size is 5"),
        ("data = ['nowhere']", "nowhere"),
        ("lr = 1e30\nbatch_size = 4", "try a smaller --lr"),
    ],
)
def test_refuses_a_bad_recipe(
    brain: Path, tmp_path: Path, text: str, fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = f"backbone = 'small-patch-16'\n{text}" if "backbone" not in text else text
    (tmp_path / "bad.toml").write_text(first if "data" in text else f"data = ['{brain}']\n{first}")
    with pytest.raises(SystemExit) as caught:
        run(f"--recipe={tmp_path / 'bad.toml'}", "--cpu", "--workers=0", f"--output={tmp_path / 'run'}")
    assert fact in f"{caught.value}{capsys.readouterr().err}"


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_writes_models_scores_log_and_figures(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"]["backbone"] == "small-patch-16"
    assert config["settings"]["adapters"] == {"dim": 32}
    assert "torch" in config["versions"]
    scores, log = json.loads((finished / "scores.json").read_text()), log_of(finished)
    assert scores["random_clip"]
    assert scores["steps"] == 6
    assert [entry["epoch"] for entry in log] == [1, 2]
    assert scores["best_val_dice"] == max(entry["val_dice"] for entry in log)
    assert log[1]["total"] < log[0]["total"]
    for name in ("curves", "examples"):
        with Image.open(finished / "figures" / f"{name}.png") as figure:
            assert min(figure.size) > 200
    assert len(train.checkpoints(finished)) == 2
    weights = newest(finished)[1]
    parameters = [name for name in weights if "pvl_adapters" in name or name.startswith("head.")]
    assert len(parameters) > 20
    assert sum(tensor.numel() for name, tensor in weights.items() if name not in parameters) < 5000  # a buffer


def test_rows_of_the_examples_figure_stand_level(finished: Path, brain: Path) -> None:
    model = pvl.from_pretrained(finished / "best")
    rows = train.Rows([train.SegmentationDataset(brain, "val", size=model.image_size)])
    figure = train.draw_examples(model, rows)
    figure.draw_without_rendering()
    axes = [axis for axis in figure.axes if axis.images and axis.get_position().height > 0.05]
    bottoms = sorted(axis.get_position().y0 for axis in axes)
    assert len(axes) == 4 * 4
    assert np.ptp(np.reshape(bottoms, (4, 4)), axis=1).max() < 1e-3


def test_saved_models_predict_with_the_validated_dice(finished: Path, brain: Path) -> None:
    model = pvl.from_pretrained(finished / "best")
    rows = list(train.Rows([train.SegmentationDataset(brain, "val", size=model.image_size)]))
    masks = [model.predict(row["image"], row["text"], num_samples=0).mask[0] for row in rows]
    pairs = [(mask.numpy(), row["mask"].numpy()) for mask, row in zip(masks, rows, strict=True)]
    dice = [2 * (mask & label).sum() / (mask.sum() + label.sum()) for mask, label in pairs]
    assert np.mean(dice) == pytest.approx(json.loads((finished / "scores.json").read_text())["best_val_dice"], abs=1e-3)


def test_workers_change_nothing(command: list[str], finished: Path, tmp_path: Path) -> None:
    run(*command[:-1], "--workers=2", f"--output={tmp_path}")
    assert_same_run(tmp_path, finished)


def test_resumes_exactly_after_an_interruption(command: list[str], finished: Path, tmp_path: Path) -> None:
    with interrupted_at(train.Trainer, step=6):  # in the second epoch, one step after a checkpoint
        run(*command, "--checkpoint-every=2", f"--output={tmp_path}")
    assert newest(tmp_path)[0] == 4
    run(*command, "--resume", f"--output={tmp_path}")
    assert_same_run(tmp_path, finished)


@pytest.mark.slow  # after an interruption it is tried always
def test_resumes_exactly_after_a_kill(command: list[str], finished: Path, tmp_path: Path) -> None:
    """A process killed while it writes one checkpoint after another leaves a whole one."""
    options = [*command, "--checkpoint-every=1", f"--output={tmp_path}"]
    line = [sys.executable, str(ROOT / "examples/train.py"), *options]
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300.0
    while process.poll() is None and not train.checkpoints(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert 1 <= newest(tmp_path)[0] <= 6
    run(*options, "--resume")
    assert_same_run(tmp_path, finished)


@pytest.mark.slow
def test_two_processes_train_as_one(command: list[str], tmp_path: Path) -> None:
    """All rows in a batch. The gates are closed, so that nothing depends on what the adapters sample."""
    recipe = tmp_path / "whole.toml"
    recipe.write_text(
        f"{RECIPE.partition('[aug')[0]}".replace("batch_size = 4", "batch_size = 12") + "gate_init = -30.0"
    )
    options = [command[0], f"--recipe={recipe}", *command[2:]]
    run(*options, f"--output={tmp_path / 'one'}")
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two += [str(ROOT / "examples" / "train.py"), *options, f"--output={tmp_path / 'two'}"]
    ran = subprocess.run(two, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "config.json").read_text())["settings"]["processes"] == 2
    (first, second), (first_two, second_two) = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for name in ("dice", "bce", "contrastive", "total"):
        assert first_two[name] == pytest.approx(first[name], rel=1e-5)
        assert second_two[name] == pytest.approx(second[name], rel=1e-4)  # Adam turns rounding into whole steps


def test_computing_in_another_way_gives_about_the_same(command: list[str], finished: Path, tmp_path: Path) -> None:
    """Not the contrastive loss, which sees a part of the batch at a time."""
    run(*command, "--accumulate=2", "--mixed-precision=bf16", "--epochs=1", f"--output={tmp_path}")
    (got,), expected = log_of(tmp_path), log_of(finished)
    assert got["step"] == 3
    assert got["dice"] == pytest.approx(expected[0]["dice"], rel=0.05)
    assert newest(tmp_path)[1]["head.mask_head.0.weight"].dtype == torch.float32


def test_stops_early(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = iter([0.5, 0.7, 0.6, 0.6, 0.9])
    monkeypatch.setattr(train.Trainer, "validate", lambda self: next(dice))
    run(*command, "--epochs=9", "--patience=2", *FEW, f"--output={tmp_path}")
    assert len(log_of(tmp_path)) == 4
    assert json.loads((tmp_path / "scores.json").read_text())["best_val_dice"] == 0.7
    assert (tmp_path / "best").is_dir()


@pytest.mark.parametrize("name", ["released", "default", "brains", "mni152"])
def test_every_recipe_trains(name: str, brain: Path, tmp_path: Path) -> None:
    quick = ["--backbone=small-patch-16", "--epochs=1", "--cpu", "--workers=0", *FEW]
    run(f"--data={brain}", f"--recipe={name}", *quick, f"--output={tmp_path}")
    saved, released = pvl.from_pretrained(tmp_path / "last"), name == "released"
    assert saved.config.channel_order == ("BGR" if released else "RGB")
    assert saved.config.resize == ("opencv_bilinear" if released else "bicubic")
    assert saved.config.context_length == (48 if released else None)
    adapters = json.loads((tmp_path / "last" / "config.json").read_text())["adapters"]
    assert (adapters["mask_padding"], adapters["tower_dropout"]) == (not released, released)


def test_own_tables_and_a_tracker(brain: Path, command: list[str], tmp_path: Path) -> None:
    folder = brain / "Train_Folder"
    lines = (brain / "Prompts_Folder" / "Train_text.csv").read_text().splitlines()[1:]
    records = [json.dumps(dict(zip(("image", "text", "mask"), row.split(","), strict=True))) for row in lines]
    (tmp_path / "mine.jsonl").write_text("\n".join(records))
    own = [f"--table={tmp_path / 'mine.jsonl'}", f"--images={folder / 'img'}", f"--masks={folder / 'label'}"]
    run(*own, *command[1:], "--epochs=1", "--tracker=tensorboard", f"--output={tmp_path / 'run'}")
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["best_val_dice"] is None  # nothing to validate on
    assert not (tmp_path / "run" / "best").exists()
    assert pvl.from_pretrained(tmp_path / "run" / "last").image_size == (96, 96)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_names_every_issue_of_the_data_before_it_computes(brain: Path, command: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "Broken"
    shutil.copytree(brain, broken)
    image, other = sorted((broken / "Train_Folder" / "img").iterdir())[:2]
    image.unlink()
    other.write_bytes(other.read_bytes()[:100])
    with pytest.raises(SystemExit) as caught:
        run(f"--data={broken}", *command[1:], f"--output={tmp_path / 'run'}")
    assert image.name in str(caught.value)
    assert other.name in str(caught.value)
    assert not (tmp_path / "run").exists()


# ---- command line ---------------------------------------------------------------------------------------------------


def test_help_needs_no_slow_imports(tmp_path: Path) -> None:
    for package in ("torch", "transformers", "matplotlib", "nibabel", "pvl_adapter"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('too slow')")
    for name in ("train", "train_semi", "study", "make_brains"):
        command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--help"]
        ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert b"usage" in ran.stdout


def test_resuming_refuses_other_settings(command: list[str], finished: Path) -> None:
    with pytest.raises(SystemExit, match=r"batch_size is 3, expected 4; seed is 1, expected 0"):
        run(*command, "--batch-size=3", "--seed=1", "--resume", f"--output={finished}")
    assert newest(finished)[0] == 6


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    command: list[str], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    damaged = train.checkpoints(tmp_path / "run")[-1]
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_1.pkl"):
        content = (damaged / name).read_bytes()
        (damaged / name).write_bytes(content[:100])
        with pytest.raises(SystemExit, match=f"{damaged.name} is damaged"):
            run(*command, "--resume", f"--output={tmp_path / 'run'}")
        (damaged / name).write_bytes(content)
        forget_accelerator()
    shutil.rmtree(damaged)
    run(*command, "--resume", f"--output={tmp_path / 'run'}")
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--batch-size=0"], "batch_size is 0"),
        (["--lr=nan"], "lr is nan"),
        (["--recipe=perfect"], "brains, default, few_labels, mni152, released"),
        (["--resume"], "no checkpoint"),
        (["--output={finished}"], "--resume"),
        (["--fraction=30"], "30"),
        (["--table=a.csv", "--data=B"], "--table and --data"),
        (["--data=B", "--masks=m"], "--masks belongs to --table"),
    ],
)
def test_refuses_bad_arguments(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], fact: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.parse([f"--output={tmp_path}", *(each.format(finished=finished) for each in arguments)])
    assert fact in capsys.readouterr().err
