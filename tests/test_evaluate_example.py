"""examples/evaluate.py from end to end, on a small model and small datasets."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from example_model import refuse, script, small_segmenter
from PIL import Image
from support import full_disk
from torchmetrics.functional.classification import binary_calibration_error

import pvl_adapter as pvl
from pvl_adapter import metrics

evaluate = script("evaluate")

TEXTS = ("a tumor at the left", "one polyp", "no tumor", "a tumor at the right")
SIZES = ((40, 60), (40, 60), (32, 48), (90, 33))  # of images; rows 0 and 1 are about one
FIGURES = ("reliability.png", "risk_coverage.png")


@pytest.fixture(scope="module")
def model(open_clip_models) -> pvl.MedCLIPSeg:
    return small_segmenter(open_clip_models["native"])


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("model"))


def write_dataset(
    folder: Path, *, seed: int = 0, empty: Sequence[int] = (2,), designs: Sequence[str] = ("original",)
) -> Path:
    """Four rows about three images, in the official layout."""
    random = np.random.default_rng(seed)
    test, prompts = folder / "Test_Folder", folder / "Prompts_Folder"
    for part in (test / "img", test / "label", prompts):
        part.mkdir(parents=True)
    for index, size in enumerate(SIZES):
        if index != 1:
            picture = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(picture).save(test / "img" / f"case_{index}.png")
        mask = np.zeros(size, dtype=np.uint8)
        if index not in empty:
            mask[size[0] // 4 : size[0] // 2, size[1] // (index + 2) :] = 255
        Image.fromarray(mask).save(test / "label" / f"mask_{index}.png")
    for design in designs:
        with (prompts / f"Test_text_{design}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["Image", "Description", "Ground Truth"])
            for index, text in enumerate(TEXTS):
                image = f"case_{0 if index == 1 else index}.png"
                writer.writerow([image, text if design == "original" else f"one {text}", f"mask_{index}.png"])
    return folder


def summary_of(folder: Path, name: str = "summary.json") -> dict[str, Any]:
    """Strict JSON: NaN is none."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the summary")

    return json.loads((folder / name).read_text(), parse_constant=refuse)


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A (with an absent target), B (of nothing but absent targets)."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "A", designs=("original", "contradictory"))
    write_dataset(folder / "B", seed=3, empty=(0, 1, 2, 3), designs=("original", "contradictory"))
    return folder


@pytest.fixture(scope="module")
def finished(saved, data, tmp_path_factory) -> Path:
    """Both datasets under two designs."""
    output = tmp_path_factory.mktemp("finished")
    before = content_of(saved), content_of(data)
    evaluate.main(arguments(saved, data, output, "--data", "A", "B", "--prompts", "original", "contradictory"))
    assert (content_of(saved), content_of(data)) == before  # only read
    return output


def arguments(saved: Path, data: Path, output: Path, *more: str) -> list[str]:
    """Of dataset A and 4 samples, unless there is more."""
    which = [] if {"--data", "--table"} & set(more) else ["--data", "A"]
    samples = [] if "--num-samples" in more else ["--num-samples", "4"]
    return [str(saved), "--data-folder", str(data), "--output", str(output), *which, *samples, *more]


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    return lambda arguments: refuse("evaluate", capsys, *arguments)


@pytest.fixture
def no_predictions(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was predicted")

    monkeypatch.setattr(pvl.MedCLIPSeg, "predict", refuse)


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(saved, data) -> list[dict[str, Any]]:
    """What the model itself says of dataset A's rows, brought to the labels' sizes by hand."""
    names = [("case_0.png", 0), ("case_0.png", 1), ("case_2.png", 2), ("case_3.png", 3)]
    folder = data / "A" / "Test_Folder"
    prediction = pvl.from_pretrained(saved).predict(
        [folder / "img" / name for name, _ in names], list(TEXTS), num_samples=4
    )
    found = []
    for index, (name, number) in enumerate(names):
        truth = np.array(Image.open(folder / "label" / f"mask_{number}.png")) > 127
        small = prediction.mask[index].numpy()
        rows, columns = (
            [place * given // wanted for place in range(wanted)]
            for wanted, given in zip(truth.shape, small.shape, strict=True)
        )
        maps = {
            of: F.interpolate(getattr(prediction, of)[index][None, None], size=truth.shape, mode="bilinear")[0, 0]
            for of in ("probability", "uncertainty")
        }
        found.append(
            {
                "image": name,
                "mask": small[rows][:, columns],
                "truth": truth,
                "review_score": prediction.review_score[index].item(),
                "max_probability": prediction.probability[index].max().item(),
                "mean_uncertainty": prediction.uncertainty[index].mean().item(),
                "standard_error": prediction.standard_error[index].max().item(),
                **maps,
            }
        )
    return found


def test_each_line_is_what_the_model_says(finished, expected):
    lines = lines_of(finished)[:4]

    for line, row, text in zip(lines, expected, TEXTS, strict=True):
        mask, truth = row["mask"], row["truth"]
        hit, found, there = (int(part.sum()) for part in (mask & truth, mask, truth))
        assert (line["dataset"], line["prompts"], line["image"], line["text"]) == ("A", "original", row["image"], text)
        assert line["positive"] == str(there > 0)
        assert int(line["num_samples"]) == 4
        figures = {
            "dsc": 2 * hit / (found + there),
            "iou": hit / (found + there - hit),
            "nsd": metrics.surface_dice(mask, truth),
            "nsd_released": metrics.released_surface_dice(mask, truth),
            "area_fraction": there / truth.size,
            "predicted_fraction": found / truth.size,
            **{name: row[name] for name in ("review_score", "max_probability", "mean_uncertainty", "standard_error")},
        }
        for name, value in figures.items():
            assert float(line[name]) == pytest.approx(value, abs=1e-6), name
    assert [line["mask"] for line in lines] == [f"mask_{index}.png" for index in range(4)]
    assert 0.0 < float(lines[0]["dsc"]) < 1.0


def test_the_summary_is_of_its_rows_and_of_all_pixels(finished, expected):
    result = summary_of(finished)["results"][0]
    scores = [float(line["dsc"]) for line in lines_of(finished)[:4]]
    dsc = result["metrics"]["dsc"]

    assert (result["dataset"], result["prompts"], result["n"], result["n_positive"]) == ("A", "original", 4, 3)
    assert dsc["mean"] == pytest.approx(np.mean(scores))
    assert min(scores) <= dsc["low"] < dsc["mean"] < dsc["high"] <= max(scores)
    assert result["metrics"]["dsc_positive"]["mean"] == pytest.approx(np.mean([scores[index] for index in (0, 1, 3)]))

    probability = torch.cat([row["probability"].flatten() for row in expected])
    truth = torch.cat([torch.from_numpy(row["truth"]).flatten() for row in expected])
    ece = binary_calibration_error(probability, truth.int(), n_bins=15)
    assert result["calibration"]["ece"] == pytest.approx(ece.item(), abs=1e-5)
    assert result["calibration"]["brier"] == pytest.approx(((probability - truth.float()) ** 2).mean().item(), abs=1e-6)
    assert sum(result["calibration"]["pixels"]) == len(truth)

    uncertainty = torch.cat([row["uncertainty"].flatten() for row in expected])
    wrong = np.concatenate([(row["mask"] != row["truth"]).ravel() for row in expected])
    pixels, rows = result["risk_coverage"]["pixels"], result["risk_coverage"]["rows"]
    assert pixels["aurc"] == pytest.approx(metrics.risk_coverage(uncertainty, wrong).aurc, abs=1e-3)
    assert pixels["random_aurc"] == pytest.approx(wrong.mean())
    ranked = sorted(range(4), key=lambda index: expected[index]["review_score"])
    kept = [np.mean([1.0 - scores[index] for index in ranked[: count + 1]]) for count in range(4)]
    assert rows["aurc"] == pytest.approx(np.mean(kept), abs=1e-6)
    absent, others = expected[2]["max_probability"], [expected[index]["max_probability"] for index in (0, 1, 3)]
    assert result["absent_auroc"]["one_minus_max_probability"] == pytest.approx(
        np.mean([absent < other for other in others]), abs=1e-6
    )


def test_everything_is_written_in_order(finished):
    content = summary_of(finished)
    order = [(result["dataset"], result["prompts"]) for result in content["results"]]
    lines = lines_of(finished)

    assert order == [(name, design) for name in "AB" for design in ("original", "contradictory")]
    assert [(line["dataset"], line["prompts"]) for line in lines] == [each for each in order for _ in range(4)]
    assert [line["text"] for line in lines[4:8]] == [f"one {text}" for text in TEXTS]
    for name in (*FIGURES, *(f"examples_{name}_{design}.png" for name, design in order)):
        assert Image.open(finished / name).size[0] > 300
    assert len(list(finished.iterdir())) == 9
    table = [line for line in (finished / "summary.md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 4
    assert f"{100 * content['results'][0]['metrics']['dsc']['mean']:.2f}" in table[2]
    assert content["settings"]["num_samples"] == 4
    assert {"torch", "pvl-adapter", "monai"} <= set(content["versions"])


def test_nothing_but_absent_targets(finished):
    result = summary_of(finished)["results"][2]

    assert (result["dataset"], result["n_positive"]) == ("B", 0)
    assert result["metrics"]["dsc_positive"] == {"mean": None, "low": None, "high": None}
    assert set(result["absent_auroc"].values()) == {None}
    assert "| - |" in (finished / "summary.md").read_text()


def test_batches_and_workers_change_nothing_and_the_tolerance_one_score(saved, data, finished, tmp_path):
    evaluate.main(arguments(saved, data, tmp_path, "--batch-size", "3", "--workers", "1", "--tolerance", "6"))
    for line, other in zip(lines_of(tmp_path), lines_of(finished), strict=False):
        for name in ("dsc", "nsd_released", "mean_uncertainty", "review_score"):
            assert float(line[name]) == pytest.approx(float(other[name]), abs=2e-3), name
        assert float(line["nsd"]) > float(other["nsd"]) or line["positive"] == "False"


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (["--num-samples", "auto"], lambda content: content["results"][0]["mean_num_samples"] >= 2),
        (["--num-samples", "0"], lambda content: content["results"][0]["mean_standard_error"] is None),
        (["--dtype", "bfloat16"], lambda content: content["settings"]["dtype"] == "bfloat16"),
        (["--limit", "2"], lambda content: [result["n"] for result in content["results"]] == [2]),
        (["--threshold", "0.999"], lambda content: content["results"][0]["metrics"]["dsc"]["mean"] == 0.25),
    ],
    ids=["auto", "mean pass", "bfloat16", "limit", "threshold"],
)
def test_options(saved, data, tmp_path, options, check):
    evaluate.main(arguments(saved, data, tmp_path, *options))

    assert check(summary_of(tmp_path))


def test_ones_own_table(saved, data, finished, tmp_path):
    folder, table = data / "A" / "Test_Folder", tmp_path / "mine.csv"
    table.write_text(f"image,text,mask\ncase_3.png,{TEXTS[3]},mask_3.png\n")
    options = ["--table", str(table), "--images", str(folder / "img"), "--masks", str(folder / "label")]
    evaluate.main(arguments(saved, data, tmp_path / "out", *options))
    (line,) = lines_of(tmp_path / "out")
    assert line["dataset"] == "mine"
    assert float(line["dsc"]) == pytest.approx(float(lines_of(finished)[3]["dsc"]), abs=2e-3)


def test_rows_that_cannot_be_predicted_are_listed_and_the_others_scored(
    saved, data, finished, tmp_path, monkeypatch, refused
):
    """The network gives NaN for images of some sizes."""
    predict, broken = pvl.MedCLIPSeg.predict, {SIZES[3]}

    def faulty(self: pvl.MedCLIPSeg, images: Any, *args: Any, **kwargs: Any) -> pvl.Prediction:
        weight = next(self.head.parameters())
        before = weight.detach().clone()
        weight.data *= float("nan") if broken & {image.shape[:2] for image in images} else 1.0
        try:
            return predict(self, images, *args, **kwargs)
        finally:
            weight.data.copy_(before)

    monkeypatch.setattr(pvl.MedCLIPSeg, "predict", faulty)
    assert evaluate.main(arguments(saved, data, tmp_path)) == 1
    assert not (tmp_path / "summary.json").exists()  # nothing takes it for finished
    summary, lines = summary_of(tmp_path, "incomplete.json"), lines_of(tmp_path)
    assert (summary["results"][0]["n"], summary["results"][0]["n_failed"]) == (3, 1)
    assert [(row["image"], "NaN" in row["error"]) for row in summary["failed"]] == [("case_3.png", True)]
    assert [bool(line["error"]) for line in lines] == [False, False, False, True]
    for line, other in zip(lines[:3], lines_of(finished), strict=False):
        assert float(line["dsc"]) == pytest.approx(float(other["dsc"]), abs=2e-3)
    assert "1 rows" in (tmp_path / "summary.md").read_text()
    broken.update(SIZES)
    assert "NaN" in refused(arguments(saved, data, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


# --- what is finished, interrupted or wrong --------------------------------------------------------------------------


def test_what_is_finished_is_not_repeated(saved, data, finished, no_predictions, capsys):
    before = content_of(finished)
    evaluate.main(arguments(saved, data, finished, "--data", "A", "B", "--prompts", "original", "contradictory"))

    assert "evaluated before" in capsys.readouterr().out
    assert content_of(finished) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--seed", "1"], "seed"), (["--num-samples", "6"], "num_samples"), (["--prompts", "original"], "data")],
)
def test_another_evaluation_is_not_overwritten_unasked(saved, data, finished, no_predictions, refused, options, named):
    before = content_of(finished)
    both = ["--data", "A", "B", *([] if "--prompts" in options else ["--prompts", "original", "contradictory"])]
    said = refused(arguments(saved, data, finished, *both, *options))
    assert all(each in said for each in (named, "--output", "--overwrite"))
    assert content_of(finished) == before


def test_other_weights_or_rows_are_another_evaluation(saved, data, tmp_path, refused):
    mine, model = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "model"
    command = arguments(Path(shutil.copytree(saved, model)), mine, tmp_path / "out", "--num-samples", "0")
    evaluate.main(command)
    table = mine / "A" / "Prompts_Folder" / "Test_text_original.csv"
    text = table.read_text()
    table.write_text(text.replace("one polyp", "two polyps"))
    assert "other data)" in refused(command)
    table.write_text(text)
    changed = pvl.from_pretrained(saved)
    next(changed.head.parameters()).data += 0.5
    shutil.rmtree(model)
    changed.save_pretrained(model)
    assert "other weights)" in refused(command)


def test_an_interrupted_run_leaves_what_was_there(saved, data, tmp_path, monkeypatch):
    evaluate.main(arguments(saved, data, tmp_path, "--num-samples", "0"))
    before = content_of(tmp_path)
    monkeypatch.setattr(pvl.Prediction, "to_dict", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(arguments(saved, data, tmp_path, "--seed", "1", "--overwrite"))
    assert content_of(tmp_path) == before


def test_a_full_disk_leaves_no_summary(saved, data, tmp_path, refused):
    """Nothing that a study or a later run could take for finished; the same command then works."""
    evaluate.main(arguments(saved, data, tmp_path, "--num-samples", "0"))
    command = arguments(saved, data, tmp_path, "--seed", "1", "--overwrite")
    with full_disk(3000):
        assert "cannot be written" in refused(command)
    assert not (tmp_path / "summary.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    evaluate.main(command[:-1])
    assert summary_of(tmp_path)["settings"]["seed"] == 1


def test_all_faults_are_listed_before_anything_is_computed(saved, data, tmp_path, no_predictions, refused):
    mine = tmp_path / "data"
    write_dataset(mine / "A")
    write_dataset(mine / "B", seed=3)
    (mine / "A" / "Test_Folder" / "img" / "case_2.png").unlink()
    Image.new("L", (5, 5)).save(mine / "A" / "Test_Folder" / "label" / "mask_3.png")
    (mine / "B" / "Test_Folder" / "img" / "case_0.png").write_bytes(b"no image")
    said = refused(arguments(saved, mine, tmp_path / "out", "--data", "A", "B"))
    for each in ("case_2.png", "missing", "case_3.png", "5 x 5", "A/test", "B/test", "case_0.png"):
        assert each in said
    assert not list((tmp_path / "out").iterdir())


def test_warnings_about_the_data_are_printed_and_kept(saved, data, tmp_path, capsys):
    evaluate.main(arguments(saved, data, tmp_path, "--data", "B", "--num-samples", "0"))
    warnings = summary_of(tmp_path)["warnings"]
    assert len(warnings) == 3  # of the row that says "no tumor" there is none
    assert all("mask is empty" in warning for warning in warnings)
    assert "2 more" in capsys.readouterr().err


def test_a_missing_library_is_named(saved, data, tmp_path, monkeypatch, refused):
    monkeypatch.delitem(sys.modules, "scoring", raising=False)
    monkeypatch.delitem(sys.modules, "pvl_adapter.metrics", raising=False)
    monkeypatch.delattr(pvl, "metrics", raising=False)
    monkeypatch.setitem(sys.modules, "monai", None)
    said = refused(arguments(saved, data, tmp_path))
    assert "monai" in said
    assert "pip install" in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data", "A", "--table", "x.csv"], "--table"),
        (["--num-samples", "many"], "--num-samples is many"),
        (["--threshold", "2"], "--threshold is 2.0"),
        (["--tolerance", "nan"], "--tolerance is nan"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--prompts", "original", "original"], "each design once"),
        (["--prompts", "contradictory", "--split", "val"], "--split"),
        (["--images", "here"], "--table"),
        (["--data", "C"], "'C'"),
        (["--data", "A", "B", "A"], "different names"),
        (["--prompts", "overdescriptive"], "Test_text_overdescriptive"),
        (["--prompts", "poetic"], "poetic"),
        (["--split", "val"], "Val"),
        (["--device", "abacus"], "abacus"),
        (["--checkpoint", "BUSI"], "BUSI"),
        (["--table", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_cannot_be_evaluated_is_named(saved, data, tmp_path, no_predictions, refused, options, named):
    assert named in refused(arguments(saved, data, tmp_path, *options))
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_kept(saved, data, tmp_path, no_predictions, refused):
    (tmp_path / "summary.json").write_text("[1, 2")
    said = refused(arguments(saved, data, tmp_path))
    assert "summary.json" in said
    assert "--output" in said
    assert (tmp_path / "summary.json").read_text() == "[1, 2"
    assert "choose another folder" in refused(arguments(saved, data, tmp_path / "summary.json"))
