"""`pvl-adapter calibrate`, and what `evaluate`, `info` and `predict` then say of the promises."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from example_model import contents, refuse, rows_of, run, save_model, write_image
from PIL import Image
from support import full_disk

import pvl_adapter as pvl
from pvl_adapter.cli.evaluation_report import cells, promises
from pvl_adapter.trust.scorer import Perceptron

pytest.importorskip("mapie")
TEXTS = ("a tumor at the left", "no polyp")
OPTIONS = ("--alpha", 0.2, "--loss-limit", 0.95, "--pixel-limit", 0.95, "--num-samples", 2)


def write_table(folder: Path, *, count: int = 20, seed: int = 0, subject: str = "Subject") -> Path:
    """Of each subject one image with something to find, and a sentence about what is not there."""
    lines = [f"Image,Description,Ground Truth,{subject}\n"]
    for number in range(count):
        write_image(folder / f"{number}.png", seed=100 * seed + number)
        mask = np.zeros((40, 56), np.uint8)
        mask[5 : 20 + number % 9, number : 30 + number] = 255
        for text, levels in zip(TEXTS, (mask, np.zeros_like(mask)), strict=True):
            name = f"{number}_{text.split()[1]}_mask.png"
            Image.fromarray(levels).save(folder / name)
            lines.append(f"{number}.png,{text},{name},s{number}\n")
    (folder / "table.csv").write_text("".join(lines))
    return folder / "table.csv"


@pytest.fixture(scope="module")
def saved(open_clip_models, tmp_path_factory) -> Path:
    return save_model(open_clip_models["native"], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Promises hold whatever the scores are worth."""
    learn = Perceptron.learn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Perceptron, "learn", lambda *given, **how: learn(*given, **{**how, "steps": 10}))
        yield


@pytest.fixture
def model(saved, tmp_path) -> Path:
    """A copy, to be calibrated."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def calibrated(saved, table, tmp_path_factory) -> Path:
    model = Path(shutil.copytree(saved, tmp_path_factory.mktemp("calibrated") / "model"))
    assert run("calibrate", model, "--table", table, *OPTIONS) == 0
    return model


def test_the_calibration_is_saved_with_the_unchanged_model(saved, calibrated):
    before, after = pvl.from_pretrained(saved), pvl.from_pretrained(calibrated)

    assert before.calibration is None
    made = after.calibration
    assert (made.alpha, made.loss_limit, made.pixel_limit) == (0.2, 0.95, 0.95)
    assert made.sampling == {"num_samples": "2", "antithetic": True, "threshold": 0.5}
    assert (made.facts["subjects"], made.facts["learned_on"], made.facts["dataset"]) == (14, 6, "table")
    assert all(bool((after.state_dict()[name] == value).all()) for name, value in before.state_dict().items())
    assert set(contents(calibrated)) == set(contents(saved))
    image = np.zeros((40, 56), np.uint8)
    assert after.predict(image, TEXTS[0], num_samples=2).outer_mask.shape == (1, *after.image_size)
    with pytest.warns(UserWarning, match="calibrated for predict"):
        assert after.predict(image, TEXTS[0], num_samples=4).outer_mask is None


def test_a_few_lines_say_what_is_promised_and_at_what_cost(model, table, capsys):
    run("calibrate", model, "--table", table, *OPTIONS)
    told = capsys.readouterr().out
    run("info", model, "--json")
    known = json.loads(capsys.readouterr().out)["calibration"]
    run("info", model)
    shown = capsys.readouterr().out

    assert "6 subjects taught the scores; 14 others, 28 cases" in told
    assert f"saved in {model}; it holds for --num-samples 2 --threshold 0.5" in told
    assert len(told.splitlines()) <= 12
    assert all(sentence in told for sentence in known["promises"])
    assert known["promises"][0].startswith("outer_mask misses at most 20% of what is to be found")
    assert (known["alpha"], known["facts"]["subjects"], known["sampling"]["num_samples"]) == (0.2, 14, "2")
    assert max(map(len, shown.splitlines())) <= 80
    assert "outer_mask misses" in shown


def test_evaluate_compares_what_was_promised_with_what_was_seen(calibrated, tmp_path, capsys):
    others = write_table(tmp_path / "others", count=8, seed=1)
    command = ["evaluate", calibrated, "--table", others, "--output"]
    run(*command, tmp_path / "out", "--num-samples", 2)

    model, lines = pvl.from_pretrained(calibrated), rows_of(tmp_path / "out" / "per_image.csv")
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    images, texts = ([line[name] for line in lines] for name in ("image", "text"))
    found = model.predict([others.parent / name for name in images], texts, num_samples=2)
    truth = pvl.prepare_masks([others.parent / line["mask"] for line in lines], size=model.image_size)
    missed = (truth & ~found.outer_mask).sum(dim=(1, 2)) / truth.sum(dim=(1, 2))
    wrong = (found.inner_mask & ~truth).sum(dim=(1, 2)) / found.inner_mask.sum(dim=(1, 2)).clamp_min(1)
    called = [verdict == "present" for verdict in found.presence.verdict]
    kept = [1.0 - float(line["dsc"]) for line, left in zip(lines, found.abstained, strict=True) if not left]
    seen = content["results"][0]["promises"]
    assert seen["outer_missed"]["mean"] == pytest.approx(missed[::2].mean().item(), abs=1e-6)
    assert seen["inner_wrong"]["mean"] == pytest.approx(wrong.mean().item(), abs=1e-6)
    assert seen["called_present"]["mean"] == pytest.approx(np.mean(called[1::2]))
    assert seen["abstained"]["mean"] == pytest.approx(found.abstained.double().mean().item())
    assert seen["kept_loss"]["mean"] == pytest.approx(np.mean(kept), abs=0.05)  # of masks at the network's size
    limits = {name: each["at_most"] for name, each in seen.items()}
    assert limits == {
        **dict.fromkeys(("outer_missed", "inner_wrong", "called_present", "called_absent", "outside_interval"), 0.2),
        **{"kept_loss": 0.95, "kept_pixels_wrong": 0.95, "abstained": None, "flagged": None},
    }
    assert [line["outer_missed"] == "" for line in lines] == [False, True] * 8
    assert "structure outside outer_mask, promised at most 20 |" in (tmp_path / "out" / "summary.md").read_text()

    limits, result = SimpleNamespace(alpha=0.2, loss_limit=0.1, pixel_limit=0.1), content["results"][0]
    for count, broken in ((9, False), (10, True)):
        rows = [{"image": "", "subject": f"s{number % count}", "outer_missed": 0.5} for number in range(20)]
        shown = cells({**result, "promises": promises(rows, limits)})
        assert shown["structure outside outer_mask, promised at most 20"].startswith("**50.00") == broken

    capsys.readouterr()
    run(*command, tmp_path / "other", "--num-samples", 1, "--limit", 2)
    assert "no promise is judged: the model was calibrated for predict(num_samples=2" in capsys.readouterr().err
    assert json.loads((tmp_path / "other" / "summary.json").read_text())["results"][0]["promises"] == {}


def test_a_model_without_a_folder_is_saved_whole_and_adapters_alone_stay_so(
    saved, table, tmp_path, monkeypatch, open_clip_models
):
    run("calibrate", saved, "--table", table, *OPTIONS, "--output", tmp_path / "new")
    assert pvl.from_pretrained(tmp_path / "new").calibration is not None
    assert pvl.from_pretrained(saved).calibration is None

    model = pvl.from_pretrained(saved)
    clip = model.clip
    model.save_pretrained(tmp_path / "part", whole=False)
    monkeypatch.setattr(
        "pvl_adapter.cli.calibrate.load_model", lambda args: (setattr(args, "num_samples", 2), model)[1]
    )
    run("calibrate", tmp_path / "part", "--table", table, *OPTIONS)
    pvl.remove_adapters(clip)
    assert pvl.from_pretrained(tmp_path / "part", clip=clip).calibration is not None
    with warnings.catch_warnings():
        assert (tmp_path / "part" / "model.safetensors").stat().st_size < (saved / "model.safetensors").stat().st_size


def test_what_cannot_be_calibrated_is_named_in_one_line_and_nothing_is_changed(
    model, table, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before, few = contents(model), write_table(tmp_path / "few", count=5)
    nobody = write_table(tmp_path / "nobody", subject="Site")
    for command, named in (
        ([model, "--table", few], "expected at least 3 of those and 4 more for alpha=0.2"),
        ([model, "--table", nobody], "no column Subject"),
        ([model, "--table", table, "--alpha", 1.5], "alpha is 1.5"),
        ([model, "--table", table, "--output", model], "holds a model already"),
        ([model, "--table", table, "--dtype", "bfloat16"], "--dtype"),
        (["owner/name", "--table", table], "--output"),
        ([model.parent, "--table", table], f"give one of {model}"),
        (["nowhere/x/y", "--table", table], "nowhere"),
        ([model, "--data", tmp_path / "few", tmp_path / "nobody", "--prompts", "original"], "Prompts_Folder"),
    ):
        said = refuse(capsys, "calibrate", *OPTIONS, *command).splitlines()
        assert any(named in line and "error: " in "".join(said) for line in said), (command, said)
        assert contents(model) == before
    assert run("calibrate", model, "--table", nobody, "--by", "image", *OPTIONS) == 0


def test_a_full_disk_and_an_interrupt_leave_the_model_as_it_was(model, table, capsys, monkeypatch):
    before = contents(model)
    with full_disk(20_000):
        assert "cannot be written" in refuse(capsys, "calibrate", model, "--table", table, *OPTIONS)
    assert contents(model) == before

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pvl.MedCLIPSeg, "predict", interrupted)
    capsys.readouterr()
    assert run("calibrate", model, "--table", table, *OPTIONS) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert contents(model) == before
