"""examples/study.py and examples/train_semi.py: what is missing runs, and what was scored is reported."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("nilearn", "torchmetrics", "matplotlib", "tqdm", "accelerate", "monai"):
    pytest.importorskip(needed, reason="the examples need pvl-adapter[examples]")

from accelerate.state import AcceleratorState  # noqa: E402
from brain_slices import write_brain_slices  # noqa: E402

import pvl_adapter as pvl  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import study  # noqa: E402
import train_semi  # noqa: E402
from training import tensors  # noqa: E402

RECIPE = """
backbone = "small-patch-16"
dim = 16
epochs = 1
batch_size = 2
lr = 2e-3
"""


@pytest.fixture(autouse=True)
def _new_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets and a recipe."""
    folder = tmp_path_factory.mktemp("data")
    write_brain_slices(folder / "Brain")
    shutil.copytree(folder / "Brain", folder / "Other")
    (folder / "quick.toml").write_text(RECIPE)
    return folder


@pytest.fixture
def command(data: Path, tmp_path: Path) -> list[str]:
    recipe = data / "quick.toml"
    return [f"--data-folder={data}", f"--recipe={recipe}", "--group=Brain,Other", f"--output={tmp_path / 'studies'}"]


def fake_runs(monkeypatch: pytest.MonkeyPatch, *, fail: str | None = None) -> list[list[str]]:
    """Trainings and evaluations that only write what is read of them; the Dice tells which it was."""
    commands: list[list[str]] = []

    def run(self: study.Study, line: list[str]) -> None:
        commands.append(line)
        if fail is not None and fail in " ".join(line):
            raise SystemExit("failed")
        folder = Path(line[line.index("--output") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if "train" in line[1]:
            (folder / "scores.json").write_text("{}")
            return
        names = [Path(name).name for name in line[line.index("--data") + 1 : line.index("--output")]]
        model = Path(line[2])
        results = []
        for place, name in enumerate(names):
            value = 0.9 - 0.1 * place - (0.05 if "contradictory" in line else 0.0) - (0.2 if "_10" in str(model) else 0)
            value -= 0.01 * int(model.parent.name[-1])  # the seed
            results.append({"dataset": name, "prompts": "original", "metrics": {"dsc": {"mean": value}}})
        (folder / "summary.json").write_text(json.dumps({"results": results}))

    monkeypatch.setattr(study.Study, "_run", run)
    return commands


def test_runs_a_study_from_nothing(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Really: two trainings (with other backbones) and their evaluations, as a user would."""
    line = [
        "backbones",
        f"--data-folder={data}",
        f"--recipe={data / 'quick.toml'}",
        "--group=Brain,Other",
        "--backbones",
        "small-patch-16",
        "small-patch-8",
        "--evaluate-args=--num-samples 0",
        "--train-args=--cpu",
        f"--output={tmp_path}",
    ]
    study.main(line)
    printed = capfd.readouterr().out
    assert printed.count("train.py --data") == 2
    content = json.loads((tmp_path / "backbones.json").read_text())
    assert list(content["table"]) == ["small-patch-16", "small-patch-8"]
    for run, figures in zip(("recipe", "small-patch-8"), content["table"].values(), strict=True):
        path = tmp_path / "evaluations" / f"Brain-{run}-seed0-on-Brain+Other-original" / "summary.json"
        first, second = (100 * result["metrics"]["dsc"]["mean"] for result in json.loads(path.read_text())["results"])
        assert figures == {"ID": [first], "OOD": [second], "HM": [pytest.approx(harmonic_mean([first, second]))]}
    configuration = json.loads((tmp_path / "runs" / "Brain-small-patch-8-seed0" / "config.json").read_text())
    assert configuration["recipe"]["backbone"] == "small-patch-8"

    study.main(line)
    assert "train.py" not in capfd.readouterr().out  # nothing is run twice


def test_studies_share_trainings(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_runs(monkeypatch)
    for name in ("domain-generalization", "prompt-designs", "data-efficiency"):
        study.main([name, *command])
    trainings = [line for line in commands if "train.py" in line[1]]
    assert len(trainings) == 4  # all rows, and 10, 25, 50%
    assert len({line[line.index("--output") + 1] for line in commands}) == len(commands)


def test_tables_are_means_over_datasets_and_seeds(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_runs(monkeypatch)
    study.main(["prompt-designs", *command, "--seeds=3"])
    table = json.loads((tmp_path / "studies" / "prompt-designs.json").read_text())["table"]
    assert table["original"]["ID"] == pytest.approx([90, 89, 88])
    assert table["original"]["OOD"] == pytest.approx([80, 79, 78])
    assert table["contradictory"]["HM"] == pytest.approx([harmonic_mean([85 - s, 75 - s]) for s in range(3)])
    with (tmp_path / "studies" / "prompt-designs.csv").open() as file:
        head, *lines = csv.reader(file)
    assert head == ["", "ID", "OOD", "HM"]
    assert lines[0][:2] == ["original", "89.00 ± 1.00"]
    assert "| original | 89.00 ± 1.00 |" in (tmp_path / "studies" / "prompt-designs.md").read_text()
    assert (tmp_path / "studies" / "prompt-designs.png").stat().st_size > 1000


def test_the_papers_suite_stands_beside_the_published_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = fake_runs(monkeypatch)
    for name in ("data-efficiency", "domain-generalization"):
        study.main([name, "--suite=paper", f"--output={tmp_path}", "--seeds=1"])
    trainings = [line for line in commands if "train.py" in line[1]]
    assert len(trainings) == 24  # those of the second study are among them
    assert all("released" in line and "666" in line for line in trainings)
    assert sum("--epochs" in line for line in trainings) == 4  # EUS
    evaluations = [line for line in commands if "evaluate.py" in line[1]]
    assert all(Path(line[2]).name == "last" for line in evaluations)
    with (tmp_path / "data-efficiency.csv").open() as file:
        head, *lines = csv.reader(file)
    assert head[-1] == "mean (paper)"
    assert [line[-1] for line in lines] == ["81.10", "85.08", "87.18", "88.66"]
    generalization = (tmp_path / "domain-generalization.md").read_text()
    assert "89.11" in generalization
    assert "79.02" in generalization
    assert "83.76" in generalization
    content = json.loads((tmp_path / "domain-generalization.json").read_text())["table"]
    outside = [row["OOD"][0] for name, row in content.items() if "OOD" in row and name != "all"]
    assert len(outside) == 10
    assert content["all"]["OOD"] == [pytest.approx(fmean(outside))]


def test_goes_on_where_it_failed(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(monkeypatch, fail="evaluate.py")
    with pytest.raises(SystemExit, match="failed"):
        study.main(["domain-generalization", *command])
    assert not (tmp_path / "studies" / "domain-generalization.md").exists()
    run = tmp_path / "studies" / "runs" / "Brain-recipe-seed0"
    (run / "scores.json").unlink()
    (run / "checkpoint.pt").touch()  # killed while it trained
    commands = fake_runs(monkeypatch)
    study.main(["domain-generalization", *command])
    assert "--resume" in commands[0]
    assert (tmp_path / "studies" / "domain-generalization.md").exists()


def test_a_command_that_fails_ends_the_study_with_its_code(command: list[str], data: Path) -> None:
    with pytest.raises(SystemExit, match="ended with code 1; mend that"):
        study.main(["domain-generalization", *command, "--train-args=--backbone nothing"])


def test_other_launchers(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_runs(monkeypatch)
    study.main(["domain-generalization", *command, "--launch=torchrun"])
    assert commands[0][:2] == ["torchrun", str(EXAMPLES / "train.py")]
    assert commands[1][:2] == [sys.executable, str(EXAMPLES / "evaluate.py")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group=Brain"], "--group Brain names one dataset"),
        (["--seeds=0"], "--seeds is 0, expected 1 or more"),
    ],
)
def test_refuses_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        study.main(["backbones", *arguments])
    assert message in capsys.readouterr().err


# ---- semi-supervised ------------------------------------------------------------------------------------------------


@pytest.fixture
def semi(data: Path, tmp_path: Path) -> list[str]:
    recipe = data / "quick.toml"
    return [f"--data={data / 'Brain'}", "--fraction=50", f"--recipe={recipe}", "--cpu", f"--output={tmp_path / 'semi'}"]


def test_semi_supervised_training_never_reads_the_other_masks(
    semi: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_semi.main([*semi, "--epochs=2"])
    expected = pvl.from_pretrained(tmp_path / "semi" / "last")

    few = (data / "Brain" / "Prompts_Folder" / "Train_text_50.csv").read_text()
    read = train_semi.SemiSupervised.__init__

    def spoiled(self: Any, *args: Any, rows: Any, **settings: Any) -> None:
        for row, (_, _, mask) in enumerate(rows.names):
            if mask not in few:
                rows.masks[row] = ~rows.masks[row]
        read(self, *args, rows=rows, **settings)

    monkeypatch.setattr(train_semi.SemiSupervised, "__init__", spoiled)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_semi.main([*semi[:-1], "--epochs=2", f"--output={tmp_path / 'spoiled'}"])
    got = pvl.from_pretrained(tmp_path / "spoiled" / "last")
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensors(got)[name], tensor), name


def test_unlabelled_pictures_change_the_training_and_can_be_left_out(semi: list[str], tmp_path: Path) -> None:
    train_semi.main(semi)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_semi.main([*semi[:-1], "--consistency=0", f"--output={tmp_path / 'alone'}"])
    both = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("semi", "alone")]
    assert any(not torch.equal(both[0]["trainable"][name], both[1]["trainable"][name]) for name in both[0]["trainable"])


def test_semi_supervised_training_resumes_exactly(
    semi: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_semi.main([*semi, "--epochs=2"])
    take_step, steps = train_semi.SemiSupervised.take_step, []

    def interrupted(*args: Any) -> Any:
        steps.append(args)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return take_step(*args)

    again = [*semi[:-1], "--epochs=2", f"--output={tmp_path / 'again'}", "--checkpoint-every=1"]
    monkeypatch.setattr(train_semi.SemiSupervised, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_semi.main(again)
    monkeypatch.undo()
    train_semi.main([*again, "--resume"])
    got, expected = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("again", "semi"))
    for part in ("trainable", "teacher"):
        assert got[part].keys() == expected[part].keys()
        assert all(torch.equal(got[part][name], tensor) for name, tensor in expected[part].items())


def test_the_teacher_is_the_running_mean_of_the_student(semi: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = train_semi.SemiSupervised.take_step
    students: list[np.ndarray] = []
    expected: list[np.ndarray] = []

    def followed(self: Any, batch: list[int]) -> Any:
        name = next(iter(tensors(self.model)))
        before = tensors(self.teacher)[name].numpy().copy()
        losses = take_step(self, batch)
        students.append(tensors(self.model)[name].numpy().copy())
        decay = min(0.5, 1 - 1 / (len(students) + 1))
        expected.append(decay * before + (1 - decay) * students[-1])
        np.testing.assert_allclose(tensors(self.teacher)[name].numpy(), expected[-1], atol=1e-6)
        return losses

    monkeypatch.setattr(train_semi.SemiSupervised, "take_step", followed)
    train_semi.main([*semi, "--decay=0.5"])
    assert len(students) == 3


def test_doubtful_pixels_count_less() -> None:
    logits = torch.zeros(1, 1, 2)
    sure = pvl.Prediction.__new__(pvl.Prediction)
    object.__setattr__(sure, "probability", torch.tensor([[[1.0, 0.5]]]))
    object.__setattr__(sure, "uncertainty", torch.tensor([[[0.0, np.log(2.0)]]]))
    assert train_semi.disagreement(logits, sure).item() == pytest.approx(0.25, abs=1e-6)  # of the first pixel alone


def test_semi_supervised_training_wants_fewer_labels_than_rows(
    data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_semi.main([f"--data={data / 'Brain'}", f"--output={tmp_path}"])
    assert "--fraction is 100, expected 10, 25 or 50" in capsys.readouterr().err
