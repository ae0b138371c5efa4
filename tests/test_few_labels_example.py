"""examples/pretrain_clip.py, few_labels.py and the study that runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from brain_slices import ROOT, forget_accelerator, interrupted_at, script
from PIL import Image
from safetensors.torch import load_file

import pvl_adapter as pvl

pretrain, few_labels, study = map(script, ("pretrain_clip", "few_labels", "study"))
PLACES = {"left": slice(60, 90), "right": slice(6, 36)}  # of the patient, in a picture of 96 x 96
PRETRAINING = ["--model=tiny", "--batch-size=8", "--steps=20", "--checkpoint-every=10", "--lr=3e-3", "--held-out=3"]
METHODS = [
    *("adapters", "unet-text"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("one-way", "hard-targets", "lora", "unet", "head")),
]


def brain(random: np.random.Generator, side: str) -> np.ndarray:
    picture = random.integers(0, 60, (96, 96)).astype(np.uint8)
    picture[30:60, PLACES[side]] += 150
    return picture


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with something bright on one side, and what is true of them."""
    folder, random = tmp_path_factory.mktemp("captions"), np.random.default_rng(0)
    lines = []
    for number in range(24):
        side = ("left", "right")[number % 2]
        Image.fromarray(brain(random, side)).save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "subject": number, "present": [f"{side} putamen"]}
        lines.append(
            {**line, "whole": [f"axial slice with {side} putamen"], "texts": [f"the {side} putamen", "a brain"]}
        )
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of subjects in the released layout."""
    data = tmp_path_factory.mktemp("data")
    for name in ("Colin27", "MNI152", "INIA19"):
        folder, random = data / f"{name}_subjects", np.random.default_rng(1)
        (folder / "Prompts_Folder").mkdir(parents=True)
        for split, table in (("Train", "Train_text"), ("Val", "Val_text"), ("Test", "Test_text_original")):
            lines = ["Image,Description,Ground Truth,Subject"]
            for part in ("img", "label"):
                (folder / f"{split}_Folder" / part).mkdir(parents=True)
            for number in range(4):
                side = ("left", "right")[number % 2]
                mask = np.zeros((96, 96), np.uint8)
                mask[30:60, PLACES[side]] = 255
                for asked, truth in ((side, mask), ({"left": "right", "right": "left"}[side], 0 * mask)):
                    Image.fromarray(brain(random, side)).save(folder / f"{split}_Folder/img/{number}.png")
                    Image.fromarray(truth).save(folder / f"{split}_Folder/label/{number}_{asked}.png")
                    lines.append(f"{number}.png,the {asked} putamen,{number}_{asked}.png,subject_{number}")
            (folder / "Prompts_Folder" / f"{table}.csv").write_text("\n".join(lines))
    return data


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    forget_accelerator()


def pretraining(captions: Path, output: Path, *more: str) -> None:
    line = [f"--data={captions}", f"--output={output}", *PRETRAINING, *more]
    pretrain.main(pretrain.parse(line))


TINY = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 96},
    "text_cfg": {"layers": 3, "width": 32, "heads": 2, "context_length": 16, "vocab_size": 49408},
}


@pytest.fixture(scope="module")
def clip(captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP after a few steps."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny.json")
    pretraining(captions, folder / "clip")
    return folder / "clip"


def test_a_clip_is_loaded_by_its_folder(clip: Path) -> None:
    loaded = pvl.load_backbone(f"local-dir:{clip}")
    saved = load_file(clip / "open_clip_model.safetensors")
    for name, tensor in loaded.clip.state_dict().items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)
    assert not (clip / "checkpoint.pt").exists()
    with torch.no_grad():
        embeds = loaded.clip.encode_text(loaded.tokenizer(["a brain", "the left putamen", "the right putamen"]))
    torch.testing.assert_close(embeds.norm(dim=-1).mean(), torch.tensor(1.0))


def test_train_takes_it_by_its_folder_and_saves_it_with_the_model(clip: Path, subjects: Path, tmp_path: Path) -> None:
    train, run = few_labels.train, tmp_path / "run"
    line = [f"--data={subjects / 'Colin27_subjects'}", f"--backbone={clip}", "--recipe=few_labels", f"--output={run}"]
    train.main(train.parse([*line, "--epochs=1", "--workers=0", "--cpu"]))
    model = pvl.from_pretrained(run / "last")
    weight = load_file(clip / "open_clip_model.safetensors")["visual.conv1.weight"]
    torch.testing.assert_close(model.clip.visual.conv1.weight.detach(), weight, rtol=0, atol=0)


@pytest.mark.slow
def test_a_clip_learns_what_is_true_of_pictures(captions: Path, clip: Path, tmp_path: Path) -> None:
    pretraining(captions, tmp_path, "--steps=120")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["pictures"] == 8  # of every three subjects one
    assert scores["presence_auroc"] > 0.9


def test_a_stopped_pretraining_goes_on_to_the_same_weights(captions: Path, clip: Path, tmp_path: Path) -> None:
    line = captions, tmp_path
    drawn, draw = [], pretrain.draw_step

    def stop(*args: Any) -> Any:
        drawn.append(args)
        if len(drawn) == 17:
            raise KeyboardInterrupt
        return draw(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "draw_step", stop)
        with pytest.raises(KeyboardInterrupt):
            pretraining(*line)
    with pytest.raises(SystemExit):  # that there is a checkpoint is not passed over
        pretraining(*line)
    pretraining(*line, "--resume")
    one, other = (load_file(folder / "open_clip_model.safetensors") for folder in (clip, tmp_path))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Two batches are an epoch."""
    monkeypatch.setattr(few_labels, "EPOCH", 2)
    recipe = tmp_path / "quick.toml"
    recipe.write_text('backbone = "small-patch-16"\nbatch_size = 4\nlr = 2e-3\nadapters = { dim = 16 }\n')
    return ["--labelled=2", "--steps=4", "--test-subjects=2", f"--recipe={recipe}", "--workers=0", "--cpu"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_is_scored_everywhere(
    method: str, subjects: Path, clip: Path, quick: list[str], tmp_path: Path
) -> None:
    line = [
        method,
        *quick,
        f"--data={subjects / 'Colin27_subjects'}",
        f"--backbone={clip}",
        f"--output={tmp_path / 'run'}",
    ]
    few_labels.main(*few_labels.parse(line))
    found = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (found["rows"], found["steps"]) == (4, 4)  # of two subjects, with one present and one absent row each
    assert list(found["tests"]) == ["Colin27_subjects", *few_labels.FAULTS, "MNI152_subjects", "INIA19_subjects"]
    for test in found["tests"].values():
        assert test["rows"] == 4
        assert len(test["subjects"]) == 2
        assert 0.0 <= test["dsc"] <= 1.0
        assert 0.0 <= test["ece"] <= 1.0


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_scores(
    subjects: Path, clip: Path, quick: list[str], tmp_path: Path
) -> None:
    line = ["adapters", *quick, f"--data={subjects / 'Colin27_subjects'}", f"--backbone={clip}"]
    few_labels.main(*few_labels.parse([*line, f"--output={tmp_path / 'undisturbed'}"]))
    with interrupted_at(few_labels.FewLabels, step=4):
        few_labels.main(*few_labels.parse([*line, f"--output={tmp_path / 'stopped'}"]))
    few_labels.main(*few_labels.parse([*line, f"--output={tmp_path / 'stopped'}", "--resume"]))
    one, other = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("undisturbed", "stopped"))
    assert one["tests"] == other["tests"]


def test_methods_change_what_they_say(subjects: Path, clip: Path) -> None:
    """One-way leaves the text as it was; the head and LoRA leave the adapters without effect."""
    line = [f"--data={subjects / 'Colin27_subjects'}", f"--backbone={clip}", "--recipe=few_labels", "--output=none"]
    image, text = torch.randint(0, 255, (1, 3, 96, 96), dtype=torch.uint8), ["the left putamen"]
    embeds = {}
    for method in ("adapters", "one-way", "head", "lora"):
        args = few_labels.train.parse(line)
        args.method = method
        model = few_labels.build(args).eval()
        with torch.no_grad():
            joint = pvl.encode(model.clip, model.prepare(image), model.tokenize(text))
            with pvl.disable_adapters(model.clip):
                alone = model.clip.encode_text(model.tokenize(text))
        embeds[method] = float((joint.text_embeds - alone).abs().max())
    assert embeds["adapters"] > 1e-2
    assert embeds["one-way"] == embeds["head"] == embeds["lora"] < 1e-5


def test_the_study_runs_what_is_missing_and_reports_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, subjects: Path
) -> None:
    commands: list[list[str]] = []

    def run(self: Any, command: list[Any]) -> None:
        line = list(map(str, command))
        commands.append(line)
        folder = Path(line[line.index("--output") + 1])
        folder.mkdir(parents=True)
        if "few_labels.py" not in line[1]:
            (folder / "scores.json").touch()
            return
        labelled, seed = (int(line[line.index(f"--{name}") + 1]) for name in ("labelled", "seed"))
        dsc = 0.5 + 0.1 * (line[2] == "adapters") + 0.01 * labelled
        test = dict.fromkeys(("dsc", "nsd", "ece", "aurc", "absent_auroc"), dsc)
        test["subjects"] = {str(subject): dsc for subject in range(8)}
        scores = {
            "labelled": labelled,
            "seed": seed,
            "tests": dict.fromkeys(("A_subjects", "noise", "B_subjects"), test),
        }
        (folder / "scores.json").write_text(json.dumps(scores))

    monkeypatch.setattr(study.Study, "run", run)
    line = ["few-labels", f"--data-folder={subjects}", f"--output={tmp_path}", "--seeds=2", "--labelled", "1", "3"]
    study.main([*line, "--ways", "adapters", "unet"])
    assert [Path(each[1]).stem for each in commands] == ["pretrain_clip", *["few_labels"] * 8]
    study.main([*line, "--ways", "adapters"])
    assert len(commands) == 9  # nothing is run twice
    text = (tmp_path / "few-labels.md").read_text()
    assert "| adapters | 61.0 ± 0.0 | 63.0 ± 0.0 |" in text
    assert "| unet | 1 | +10.0 | 16 |" in text  # of the first call
    assert (tmp_path / "few-labels.png").stat().st_size > 10_000
