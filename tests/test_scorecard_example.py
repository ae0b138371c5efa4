"""examples/scorecard.py from end to end, on a small model and small datasets of subjects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from example_model import save_model, script, write_image
from PIL import Image

from pvl_adapter.trust.scorer import Perceptron

pytest.importorskip("mapie", reason="calibrating needs pvl-adapter[trust]")
SUBJECTS = 24


def write_subjects(folder: Path, *, seed: int, named: bool = True) -> Path:
    """Two rows of each subject; the second has nothing to find."""
    lines = ["Image,Description,Ground Truth" + ",Subject" * named]
    random = np.random.default_rng(seed)
    for index in range(SUBJECTS):
        write_image(folder / "Val_Folder" / "img" / f"{index}.png", seed=seed + index, size=(32, 32, 3))
        (folder / "Val_Folder" / "label").mkdir(exist_ok=True)
        for kind, text in enumerate(("a tumor at the left", "one polyp")):
            mask = np.zeros((32, 32), dtype=np.uint8)
            y, x = random.integers(0, 16, 2)
            mask[y : y + 12, x : x + 12] = 255 * (kind == 0)
            Image.fromarray(mask).save(folder / "Val_Folder" / "label" / f"{index}_{kind}.png")
            lines.append(f"{index}.png,{text},{index}_{kind}.png" + f",subject {index}" * named)
    (folder / "Prompts_Folder").mkdir()
    (folder / "Prompts_Folder" / "Val_text.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def saved(open_clip_models, tmp_path_factory) -> Path:
    return save_model(open_clip_models["native"], tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_every_promise_is_judged_and_the_cases_are_kept(saved, tmp_path, monkeypatch):
    scorecard, learned = script("scorecard"), Perceptron.learn
    monkeypatch.setattr(Perceptron, "learn", lambda *args, **kind: learned(*args, **{**kind, "steps": 20}))  # quick
    home, other = (write_subjects(tmp_path / name, seed=seed) for name, seed in (("Home", 0), ("Other", 100)))
    command = [str(saved), "--data", str(home), "--elsewhere", str(other), "--output", str(tmp_path / "out")]
    command += ["--num-samples=2", "--splits=3", "--alpha=0.2", "--device=cpu", "--batch-size=16"]
    scorecard.main(command)

    content = json.loads((tmp_path / "out" / "trust.json").read_text())
    found, elsewhere = content["in domain"]["splits"]["0.2"], content["elsewhere"]["Other"]
    judged = SUBJECTS - round(0.3 * SUBJECTS)
    assert (content["in domain"]["subjects"], content["in domain"]["present"]) == (judged, judged)
    promised = {name: each["promised"] for name, each in found.items() if "promised" in each and "plain" not in name}
    assert len(promised) == 8
    judged_elsewhere = {name for name, each in elsewhere["figures"].items() if "verdict" in each}
    assert judged_elsewhere == promised.keys() - {"familiarity <= .05"}
    assert 0.0 <= found["outer: share missed"]["value"] <= 0.5
    assert elsewhere["rows"] == 2 * SUBJECTS
    assert elsewhere["unseen words"] == 0
    assert "| outer: share missed | 0.2 |" in (tmp_path / "out" / "trust.md").read_text()
    assert all(Image.open(tmp_path / "out" / name).width > 500 for name in ("trust.png", "trust_masks.png"))

    monkeypatch.setattr(scorecard, "predict_all", lambda *_: pytest.fail("predicted again"))
    scorecard.main(command)
    assert json.loads((tmp_path / "out" / "trust.json").read_text())["in domain"] == content["in domain"]


def test_subjects_must_be_known(saved, tmp_path, capsys):
    home = write_subjects(tmp_path / "Home", seed=0, named=False)
    command = [saved, "--data", home, "--output", tmp_path / "out", "--device=cpu"]
    with pytest.raises(SystemExit):
        script("scorecard").main(list(map(str, command)))
    said = capsys.readouterr().err
    assert "expected a column Subject" in said


def test_the_ratio_and_its_error_are_those_of_a_computation_by_hand():
    scorecard = script("scorecard")
    who, chosen = np.array([0, 0, 1, 2, 2]), np.array([True, True, True, True, False])
    pairs = scorecard.by_subject(who, chosen, np.array([1.0, 0.0, 0.5, 0.25, 9.0]), np.ones(5))
    value, error = scorecard.ratio(pairs)
    means = np.array([0.5, 0.5, 0.25])
    assert value == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / 3**0.5)


def test_of_an_order_the_largest_share_within_the_limit_is_kept():
    most_kept = script("scorecard_report").most_kept
    loss = np.array([0.9, 0.1, 0.2, 0.6])
    assert most_kept(loss, loss, 0.3) == 0.75
    assert most_kept(-loss, loss, 0.3) == 0.0
