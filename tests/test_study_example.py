"""examples/study.py and examples/train_semi.py: what is missing runs, and what was scored is reported."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from statistics import fmean, harmonic_mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from brain_slices import ROOT, forget_accelerator, interrupted_at, script, write_brain_slices
from safetensors.torch import load_file

study, train, train_semi = map(script, ("study", "train", "train_semi"))
RECIPE = """
backbone = "small-patch-16"
epochs = 1
batch_size = 2
lr = 2e-3
adapters = { dim = 16 }
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    forget_accelerator()


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
        model, results = Path(line[line.index("evaluate") + 1]), []
        for place in range(line.index("--output") - line.index("--data") - 1):
            value = 0.9 - 0.1 * place - (0.05 if "contradictory" in line else 0.0) - (0.2 if "_10" in str(model) else 0)
            results.append({"metrics": {"dsc": {"mean": value - 0.01 * int(model.parent.name[-1])}}})  # the seed
        (folder / "summary.json").write_text(json.dumps({"results": results}))

    monkeypatch.setattr(study.Study, "run", run)
    return commands


@pytest.mark.slow
def test_runs_a_study_from_nothing(
    data: Path, command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Really: two trainings (with other backbones) and their evaluations, as a user would."""
    line = ["backbones", *command, "--backbones", "small-patch-16", "small-patch-8"]
    line += ["--evaluate-args=--num-samples 0", "--train-args=--cpu --workers 0"]
    study.main(line)
    assert capfd.readouterr().out.count("train.py --data") == 2
    table = json.loads((tmp_path / "studies" / "backbones.json").read_text())["table"]
    assert list(table) == ["small-patch-16", "small-patch-8"]
    for run, figures in zip(("recipe", "small-patch-8"), table.values(), strict=True):
        path = tmp_path / "studies" / "evaluations" / f"Brain-{run}-seed0-on-Brain+Other-original" / "summary.json"
        first, second = (100 * result["metrics"]["dsc"]["mean"] for result in json.loads(path.read_text())["results"])
        assert figures == {"ID": [first], "OOD": [second], "HM": [pytest.approx(harmonic_mean([first, second]))]}
    study.main(line)
    assert "train.py" not in capfd.readouterr().out  # nothing is run twice


def test_all_is_one_study_after_the_other(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_runs(monkeypatch)
    monkeypatch.setattr(study.few_labels_study, "run", lambda _: (tmp_path / "few labels").touch())
    study.main(["all", *command, "--seeds=2"])
    for name in study.STUDIES:
        assert (tmp_path / "studies" / f"{name}.md").is_file()
    assert (tmp_path / "few labels").exists()


def test_studies_share_trainings(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_runs(monkeypatch)
    for name in ("domain-generalization", "prompt-designs", "data-efficiency"):
        study.main([name, *command, "--launch=torchrun"])
    trainings = [line for line in commands if "train.py" in line[1]]
    assert len(trainings) == 4  # all rows, and 10, 25, 50%
    assert all(line[:2] == ["torchrun", str(ROOT / "examples" / "train.py")] for line in trainings)
    assert len({line[line.index("--output") + 1] for line in commands}) == len(commands)


def test_tables_are_means_over_datasets_and_seeds(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_runs(monkeypatch)
    study.main(["prompt-designs", *command, "--seeds=3"])
    folder = tmp_path / "studies"
    table = json.loads((folder / "prompt-designs.json").read_text())["table"]
    assert table["original"]["ID"] == pytest.approx([90, 89, 88])
    assert table["original"]["OOD"] == pytest.approx([80, 79, 78])
    assert table["contradictory"]["HM"] == pytest.approx([harmonic_mean([85 - s, 75 - s]) for s in range(3)])
    with (folder / "prompt-designs.csv").open() as file:
        head, first, *_ = csv.reader(file)
    assert (head, first[:2]) == (["", "ID", "OOD", "HM"], ["original", "89.00 ± 1.00"])
    assert "| original | 89.00 ± 1.00 |" in (folder / "prompt-designs.md").read_text()
    assert (folder / "prompt-designs.png").stat().st_size > 1000


def test_the_papers_suite_stands_beside_the_published_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_runs(monkeypatch)
    for name in ("data-efficiency", "domain-generalization"):
        study.main([name, "--suite=paper", f"--output={tmp_path}", "--seeds=1"])
    trainings = [line for line in commands if "train.py" in line[1]]
    assert len(trainings) == 24  # those of the second study are among them
    assert all("released" in line and "666" in line for line in trainings)
    assert sum("--epochs" in line for line in trainings) == 4  # EUS
    with (tmp_path / "data-efficiency.csv").open() as file:
        head, *lines = csv.reader(file)
    assert head[-1] == "mean (paper)"
    assert [line[-1] for line in lines] == ["81.10", "85.08", "87.18", "88.66"]
    assert "| 89.11 | 79.02 | 83.76 |" in (tmp_path / "domain-generalization.md").read_text()
    content = json.loads((tmp_path / "domain-generalization.json").read_text())["table"]
    outside = [row["OOD"][0] for name, row in content.items() if "OOD" in row and name != "all"]
    assert len(outside) == 10
    assert content["all"]["OOD"] == [pytest.approx(fmean(outside))]


def test_goes_on_where_it_failed(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(monkeypatch, fail="pvl_adapter evaluate")
    with pytest.raises(SystemExit, match="failed"):
        study.main(["domain-generalization", *command])
    run = tmp_path / "studies" / "runs" / "Brain-recipe-seed0"
    (run / "scores.json").unlink()
    (run / "checkpoints" / "000000100").mkdir(parents=True)  # killed while it trained
    commands = fake_runs(monkeypatch)
    study.main(["domain-generalization", *command])
    assert "--resume" in commands[0]
    assert (tmp_path / "studies" / "domain-generalization.md").exists()


@pytest.mark.parametrize(("argument", "fact"), [("--group=Brain", "Brain"), ("--seeds=0", "--seeds is 0")])
def test_refuses_bad_arguments(argument: str, fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        study.main(["backbones", argument])
    assert fact in capsys.readouterr().err


# ---- semi-supervised ------------------------------------------------------------------------------------------------


def run_semi(data: Path, output: Path, *options: str) -> dict[str, torch.Tensor]:
    """Weights of the saved teacher."""
    forget_accelerator()
    line = [
        f"--data={data / 'Brain'}",
        "--fraction=50",
        "--decay=0.5",
        f"--recipe={data / 'quick.toml'}",
        "--cpu",
        "--workers=0",
    ]
    train_semi.main(*train_semi.parse([*line, f"--output={output}", *options]))
    return load_file(output / "last" / "model.safetensors")


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def semi(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], int]:
    """Weights of a teacher that nothing disturbed, and how often it was the running mean of its student."""
    update, count = train_semi.SemiTrainer.update_teacher, []

    def followed(self: Any) -> None:
        before = self.teacher.head.mask_head[0].weight.detach().clone()
        update(self)
        count.append(None)
        decay = min(0.5, 1 - 1 / (len(count) + 1))
        expected = decay * before + (1 - decay) * self.network.head.mask_head[0].weight
        torch.testing.assert_close(self.teacher.head.mask_head[0].weight, expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_semi.SemiTrainer, "update_teacher", followed)
        weights = run_semi(data, tmp_path_factory.mktemp("semi"))
    forget_accelerator()
    return weights, len(count)


def test_semi_supervised_training_learns_from_the_other_images_and_not_from_their_masks(
    data: Path, semi: tuple[dict[str, torch.Tensor], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = semi
    assert not same(run_semi(data, tmp_path / "alone", "--consistency=0"), expected)
    monkeypatch.setattr(train, "read_row", train.read_row.__wrapped__)
    spoiled = tmp_path / "spoiled"
    shutil.copytree(data, spoiled)
    few = (data / "Brain" / "Prompts_Folder" / "Train_text_50.csv").read_text()
    labels = list((spoiled / "Brain" / "Train_Folder" / "label").iterdir())
    given = next(path for path in labels if path.name in few)
    others = [path for path in labels if path.name not in few]
    assert len(others) == 6
    for path in others:
        shutil.copy(given, path)
    assert same(run_semi(spoiled, tmp_path / "again"), expected)


def test_semi_supervised_training_resumes_exactly(
    data: Path, semi: tuple[dict[str, torch.Tensor], int], tmp_path: Path
) -> None:
    with interrupted_at(train_semi.SemiTrainer, step=3):
        run_semi(data, tmp_path, "--checkpoint-every=1")
    assert same(run_semi(data, tmp_path, "--checkpoint-every=1", "--resume"), semi[0])


def test_the_teacher_is_the_running_mean_of_the_student(semi: tuple[dict[str, torch.Tensor], int]) -> None:
    assert semi[1] == 3


def test_uncertain_pixels_count_less() -> None:
    probability, uncertainty = torch.tensor([[[1.0, 0.5]]]), torch.tensor([[[0.0, 0.6931472]]])
    teacher = SimpleNamespace(probability=probability, uncertainty=uncertainty)
    disagreement = train_semi.disagreement(torch.zeros(1, 1, 2), teacher)
    assert disagreement.item() == pytest.approx(0.25, abs=1e-6)  # of the first pixel alone


def test_semi_supervised_training_wants_fewer_labels_than_rows(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--fraction 10, 25 or 50"):
        train_semi.main(*train_semi.parse([f"--data={data / 'Brain'}", f"--output={tmp_path}"]))
