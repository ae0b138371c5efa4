"""`pvl-adapter evaluate` from end to end, on a small model and small datasets."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_model import contents, refuse, rows_of, run, save_model, write_image
from matplotlib.figure import Figure
from PIL import Image
from support import full_disk
from torch.nn.functional import binary_cross_entropy
from torchmetrics.functional.classification import binary_calibration_error

import pvl_adapter as pvl
from pvl_adapter.cli import evaluation_report
from pvl_adapter.trust import scores

TEXTS = ("a tumor at the left", "one polyp", "no tumor", "a tumor at the right")
IMAGES = ("case_0.png", "case_0.png", "case_2.png", "case_3.png")
SIZES = ((40, 60), (40, 60), (32, 48), (90, 33))


def write_dataset(folder: Path, *, seed: int = 0, empty: tuple[int, ...] = (2,)) -> Path:
    """Four rows about three images, under two prompt designs, in the official layout."""
    prompts = folder / "Prompts_Folder"
    prompts.mkdir(parents=True)
    for index, (size, image) in enumerate(zip(SIZES, IMAGES, strict=True)):
        write_image(folder / "Test_Folder" / "img" / image, seed=seed + index, size=(*size, 3))
        mask = np.zeros(size, dtype=np.uint8)
        if index not in empty:
            mask[size[0] // 4 : size[0] // 2, size[1] // (index + 2) :] = 255
        (folder / "Test_Folder" / "label").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "Test_Folder" / "label" / f"mask_{index}.png")
    for design, before in (("original", ""), ("contradictory", "one ")):
        rows = [f"{image},{before}{TEXTS[index]},mask_{index}.png\n" for index, image in enumerate(IMAGES)]
        (prompts / f"Test_text_{design}.csv").write_text("Image,Description,Ground Truth\n" + "".join(rows))
    return folder


@pytest.fixture(scope="module")
def saved(open_clip_models, tmp_path_factory) -> Path:
    return save_model(open_clip_models["native"], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A (with an absent target), B (of nothing but absent targets)."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "A")
    write_dataset(folder / "B", seed=3, empty=(0, 1, 2, 3))
    return folder


def arguments(saved: Path, data: Path, output: Path, *more: object) -> list[str]:
    """Of dataset A and 4 samples, unless there is more."""
    which = [] if {"--data", "--table"} & set(more) else ["--data", "A"]
    return list(
        map(str, ["evaluate", saved, "--data-folder", data, "--output", output, *which, "--num-samples", 4, *more])
    )


BOTH = ("--data", "A", "B", "--prompts", "original", "contradictory")


@pytest.fixture(scope="module")
def finished(saved, data, tmp_path_factory) -> Path:
    """Both datasets under two designs."""
    output = tmp_path_factory.mktemp("finished")
    assert run(*arguments(saved, data, output, *BOTH)) == 0
    return output


@pytest.fixture
def _empty_figures(monkeypatch) -> None:
    """In a fraction of the time."""
    monkeypatch.setattr(evaluation_report, "draw_examples", lambda *_: Figure())


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    return lambda arguments: refuse(capsys, *arguments)


def summary_of(folder: Path, name: str = "summary.json") -> dict[str, Any]:
    """Strict JSON: NaN is none."""
    return json.loads((folder / name).read_text(), parse_constant=lambda constant: pytest.fail(constant))


def test_scores_equal_a_computation_by_hand(saved, data, finished):
    folder, lines = data / "A" / "Test_Folder", rows_of(finished / "per_image.csv")
    prediction = pvl.from_pretrained(saved).predict([folder / "img" / name for name in IMAGES], TEXTS, num_samples=4)
    maps = [prediction.at_original_size(index) for index in range(4)]
    truths = [np.array(Image.open(folder / "label" / f"mask_{index}.png")) > 127 for index in range(4)]
    dsc = []
    for index, (row, truth, line) in enumerate(zip(maps, truths, lines, strict=False)):
        hit, found, there = (int(part.sum()) for part in (row["mask"] & truth, row["mask"], truth))
        dsc.append(2 * hit / (found + there))
        figures = {
            "dsc": dsc[-1],
            "iou": hit / (found + there - hit),
            "nsd": scores.surface_dice(row["mask"], truth),
            "nsd_released": scores.released_surface_dice(row["mask"], truth),
            "area_fraction": there / truth.size,
            "brier": np.square(row["probability"] - truth).mean(),
            "review_score": prediction.review_score[index].item(),
            "max_probability": prediction.probability[index].max().item(),
            "mean_uncertainty": prediction.uncertainty[index].mean().item(),
            "standard_error": prediction.standard_error[index].max().item(),
        }
        assert {name: float(line[name]) for name in figures} == pytest.approx(figures, abs=1e-6)
        assert (line["image"], line["text"], line["positive"]) == (IMAGES[index], TEXTS[index], str(there > 0))
    assert 0.0 < dsc[0] < 1.0

    result = summary_of(finished)["results"][0]
    assert (result["n"], result["n_positive"]) == (4, 3)
    interval = result["metrics"]["dsc"]
    assert interval["mean"] == pytest.approx(np.mean(dsc))
    assert min(dsc) <= interval["low"] < interval["mean"] < interval["high"] <= max(dsc)
    assert result["metrics"]["dsc_positive"]["mean"] == pytest.approx(np.mean([dsc[index] for index in (0, 1, 3)]))

    probability, uncertainty, mask = (
        np.concatenate([row[name].ravel() for row in maps]) for name in ("probability", "uncertainty", "mask")
    )
    truth = np.concatenate([truth.ravel() for truth in truths])
    flat = torch.from_numpy(probability), torch.from_numpy(truth).float()
    ece, nll = binary_calibration_error(flat[0], flat[1].int(), n_bins=15), binary_cross_entropy(*flat)
    assert result["calibration"]["ece"] == pytest.approx(ece.item(), abs=1e-5)
    assert result["calibration"]["nll"] == pytest.approx(nll.item(), abs=1e-5)
    assert result["calibration"]["brier"] == pytest.approx(np.square(probability - truth).mean(), abs=1e-6)
    of_pixels = scores.risk_coverage(uncertainty, mask != truth)
    assert result["risk_coverage"]["pixels"]["aurc"] == pytest.approx(of_pixels.aurc, abs=1e-3)
    risks = [1.0 - dsc[index] for index in prediction.review_score.argsort()]
    of_rows = np.mean([np.mean(risks[: count + 1]) for count in range(4)])
    assert result["risk_coverage"]["rows"]["aurc"] == pytest.approx(of_rows, abs=1e-6)
    largest = prediction.probability.flatten(1).max(dim=1).values.tolist()
    wins = np.mean([largest[2] < largest[index] for index in (0, 1, 3)])
    assert result["absent_auroc"]["one_minus_max_probability"] == pytest.approx(wins, abs=1e-6)


def test_rows_of_one_subject_are_drawn_together():
    rows = [{"dsc": value, "image": f"{value}.png", "subject": "one"} for value in (0.2, 0.4)]
    found = evaluation_report.mean(rows, "dsc")
    assert found["low"] == found["high"] == found["mean"]


def test_everything_is_written_in_order(finished):
    content, lines = summary_of(finished), rows_of(finished / "per_image.csv")
    order = [(name, design) for name in "AB" for design in ("original", "contradictory")]
    assert [(result["dataset"], result["prompts"]) for result in content["results"]] == order
    assert [(line["dataset"], line["prompts"]) for line in lines] == [each for each in order for _ in range(4)]
    figures = {"reliability.png", "risk_coverage.png", *(f"examples_{name}_{design}.png" for name, design in order)}
    assert set(contents(finished)) == {"summary.json", "summary.md", "per_image.csv", *figures}
    absent = content["results"][2]  # of targets that are all absent
    assert (absent["n_positive"], absent["metrics"]["dsc_positive"]["mean"]) == (0, None)
    assert set(absent["absent_auroc"].values()) == {None}


@pytest.mark.usefixtures("_empty_figures")
@pytest.mark.parametrize(
    ("options", "check"),
    [
        (["--num-samples", "auto"], lambda content: content["results"][0]["mean_num_samples"] >= 2),
        (
            ["--num-samples", "0", "--limit", "2"],
            lambda content: (content["results"][0]["mean_standard_error"], content["results"][0]["n"]) == (None, 2),
        ),
        (["--threshold", "0.999"], lambda content: content["results"][0]["metrics"]["dsc"]["mean"] == 0.25),
        (["--data", "B"], lambda content: len(content["warnings"]) == 3),  # none of the row that says "no tumor"
    ],
)
def test_options(saved, data, tmp_path, options, check):
    assert run(*arguments(saved, data, tmp_path, *options)) == 0
    assert check(summary_of(tmp_path))


@pytest.mark.usefixtures("_empty_figures")
def test_batches_workers_and_ones_own_table_change_nothing_and_the_tolerance_one_score(saved, data, finished, tmp_path):
    folder, table = data / "A" / "Test_Folder", tmp_path / "mine.csv"
    shutil.copy(data / "A" / "Prompts_Folder" / "Test_text_original.csv", table)
    options = ["--table", table, "--images", folder / "img", "--masks", folder / "label", "--tolerance", 6]
    run(*arguments(saved, data, tmp_path, *options, "--batch-size", 3, "--workers", 1))
    for line, other in zip(rows_of(tmp_path / "per_image.csv"), rows_of(finished / "per_image.csv"), strict=False):
        for name in ("dsc", "nsd_released", "mean_uncertainty", "review_score"):
            assert float(line[name]) == pytest.approx(float(other[name]), abs=2e-3), name
        assert float(line["nsd"]) > float(other["nsd"]) or line["positive"] == "False"


@pytest.mark.usefixtures("_empty_figures")
def test_rows_that_cannot_be_predicted_are_listed_and_the_others_scored(
    saved, data, tmp_path, monkeypatch, refused, open_clip_models
):
    predict = pvl.MedCLIPSeg.predict

    def faulty(self: pvl.MedCLIPSeg, images: Any, *args: Any, **options: Any) -> pvl.Prediction:
        if any(image.shape[:2] == SIZES[3] for image in images):
            raise ValueError("the network gives NaN")  # as `predict` says
        return predict(self, images, *args, **options)

    monkeypatch.setattr(pvl.MedCLIPSeg, "predict", faulty)
    assert run(*arguments(saved, data, tmp_path)) == 1
    assert not (tmp_path / "summary.json").exists()  # nothing takes it for finished
    summary = summary_of(tmp_path, "incomplete.json")
    assert (summary["results"][0]["n"], summary["results"][0]["n_failed"]) == (3, 1)
    assert [(row["image"], "NaN" in row["error"]) for row in summary["failed"]] == [("case_3.png", True)]
    assert [bool(line["error"]) for line in rows_of(tmp_path / "per_image.csv")] == [False, False, False, True]
    broken = save_model(open_clip_models["native"], tmp_path / "model", weight=float("nan"))
    assert "NaN" in refused(arguments(broken, data, tmp_path / "out"))
    assert not contents(tmp_path / "out")


def test_what_is_finished_is_not_repeated_or_overwritten_unasked(
    saved, data, finished, refused, monkeypatch, tmp_path, open_clip_models
):
    monkeypatch.setattr(pvl.MedCLIPSeg, "predict", lambda *_, **__: pytest.fail("something was predicted"))
    before, rows = contents(finished), Path(shutil.copytree(data, tmp_path / "rows"))
    model = save_model(open_clip_models["native"], tmp_path / "model", weight=0.5)
    table = rows / "A" / "Prompts_Folder" / "Test_text_original.csv"
    table.write_text(table.read_text().replace("one polyp", "two polyps"))
    assert run(*arguments(saved, data, finished, *BOTH)) == 0
    for command, named in (
        (arguments(saved, data, finished, *BOTH, "--seed", 1), "seed"),
        (arguments(saved, rows, finished, *BOTH), "data"),
        (arguments(model, data, finished, *BOTH), "model, weights"),
    ):
        said = refused(command)
        assert all(each in said for each in (f"other {named})", "--output", "--overwrite"))
    assert contents(finished) == before


@pytest.mark.usefixtures("_empty_figures")
def test_a_full_disk_leaves_no_summary(saved, data, tmp_path, refused):
    """Nothing that a study or a later run could take for finished; the same command then works."""
    run(*arguments(saved, data, tmp_path, "--num-samples", 0, "--limit", 1))
    command = arguments(saved, data, tmp_path, "--seed", 1, "--limit", 2, "--overwrite")
    with full_disk(3000):
        assert "cannot be written" in refused(command)
    assert not [name for name in contents(tmp_path) if name == "summary.json" or name.endswith(".part")]
    run(*command[:-1])
    assert summary_of(tmp_path)["settings"]["seed"] == 1


def test_all_issues_are_listed_at_once(saved, tmp_path, refused):
    a, b = (write_dataset(tmp_path / "data" / name) / "Test_Folder" for name in "AB")
    (a / "img" / "case_2.png").unlink()
    (b / "img" / "case_0.png").write_bytes(b"no image")
    said = refused(arguments(saved, tmp_path / "data", tmp_path / "out", "--data", "A", "B"))
    assert all(each in said for each in ("case_2.png", "missing", "A/test", "B/test", "case_0.png"))


@pytest.mark.parametrize(
    "options",
    [
        "--table=x.csv --data A",
        "--tolerance=nan",
        "--limit=0",
        "--prompts original original",
        "--split=val --prompts contradictory",
        "--images=here",
        "--data A C",
        "--data A B A",
        "--table nowhere.csv",
        "--output=somebody-elses",
    ],
)
def test_what_cannot_be_evaluated_is_named_and_foreign_files_are_kept(
    saved, data, tmp_path, refused, options, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / "somebody-elses" / "summary.json"
    foreign.parent.mkdir()
    foreign.write_text("[1, 2")
    said = refused(arguments(saved, data, tmp_path / "out", *options.split())).splitlines()[-1]
    named = {"--data A C": "'C'", "--table nowhere.csv": "nowhere.csv"}.get(options, re.split("[= ]", options)[0])
    assert named in said
    assert set(contents(tmp_path)) == {"somebody-elses/summary.json"}
    assert foreign.read_text() == "[1, 2"
