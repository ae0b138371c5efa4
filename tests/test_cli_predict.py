"""`pvl-adapter predict` on images: maps in their own geometry, failures reported, finished work kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_model import TEXT, Predict, contents, noise, pixels, refuse, rows_of, run, save_model, write_image
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import full_disk, kill_while

import pvl_adapter as pvl
from pvl_adapter.cli.pipeline import Pipeline
from pvl_adapter.data import read_image

pytest.importorskip("highdicom")  # of which not every Python has a build


def results(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Files of results, without what is told of the run."""
    told = ("review.csv", "manifest.json")
    return {name: file for name, file in contents(folder).items() if name not in told and not name.startswith(".runs/")}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in results(folder).items()}


def assert_masks(rows: list[dict[str, str]], predict: Predict) -> None:
    """The mask of every line of review.csv is that of its input and sentence."""
    for row in rows:
        mask = pixels(predict.out / f"{row['name']}_mask.png") > 0
        np.testing.assert_array_equal(mask, predict.expected(row["input"], text=row["sentence"])["mask"])


@pytest.mark.parametrize("kind", ["grey.png", "deep.png", "colour.tif"])
def test_an_image_gets_maps_in_its_own_geometry(kind, predict, tmp_path):
    path, deep, shape = tmp_path / kind, "deep" in kind, (40, 56, 3) if "colour" in kind else (40, 56)
    Image.fromarray(noise(*shape, most=4000 if deep else 256, dtype=np.uint16 if deep else np.uint8)).save(path)

    (row,) = predict(path, "--abstain=0.5", *["--maps"] * deep)
    maps, name = predict.expected(read_image(path)), path.stem
    np.testing.assert_array_equal(pixels(predict.out / f"{name}_mask.png"), maps["mask"] * np.uint8(255))
    np.testing.assert_array_equal(pixels(predict.out / f"{name}_abstain.png") > 0, maps["uncertainty"] > 0.5)
    for of, most in (("probability", 1.0), ("uncertainty", np.log(2.0))):
        np.testing.assert_allclose(pixels(predict.out / f"{name}_{of}.png") / 65535 * most, maps[of], atol=1e-5)

    small = predict.predicted(read_image(path))
    assert (predict.out / f"{name}.npz").exists() == deep
    if deep:
        with np.load(predict.out / f"{name}.npz") as saved:
            np.testing.assert_allclose(saved["probability"], maps["probability"], atol=1e-5)
    assert (row["sentence"], row["input"], row["num_samples"]) == (TEXT, str(path), "2")
    assert (int(row["found_pixels"]), row["found_mm2"], row["found_ml"]) == (maps["mask"].sum(), "", "")
    for column, value in {
        "max_probability": small.probability.max(),
        "mean_uncertainty": small.uncertainty.mean(),
        "abstained_fraction": (small.uncertainty > 0.5).float().mean(),
        "review_score": small.review_score[0],
    }.items():
        assert float(row[column]) == pytest.approx(value.item(), abs=1e-5), column
    assert set(row["files"].split("; ")) == set(results(predict.out))


def test_a_folder_is_read_and_what_is_not_an_input_is_named(predict, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("0.png", "1.png", "2.gif", "3.webp"):
        write_image(folder / name, seed=int(name[0]))
    broken = folder / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    Image.new("L", (8, 8)).save(folder / "4.gif", save_all=True, append_images=[Image.new("L", (8, 8), 255)])
    (folder / "notes.txt").write_text("not an input")
    rows, said = predict(folder, code=1), capsys.readouterr().err
    assert {Path(row["input"]).name for row in rows[:4]} == {"0.png", "2.gif", "3.webp", "4.gif"}
    assert [Path(row["input"]).name for row in rows if row["error"]] == ["1.png"]
    with Image.open(predict.out / "4_mask.tif") as pages:  # all frames, not the first in silence
        assert pages.n_frames == 2
    assert all(name in said for name in ("notes.txt", "1.png"))
    write_image(broken)  # what has failed is tried again
    rows = predict(folder, f"{folder / '4.gif'}#frame=1")
    assert not any(row["error"] for row in rows)


def test_nan_in_the_network_is_a_failure_not_an_empty_mask(predict, open_clip_models, tmp_path):
    predict.trained = save_model(open_clip_models["bert"], tmp_path / "broken", weight=float("nan"))
    rows = predict(*(write_image(tmp_path / f"{seed}.png", seed=seed) for seed in range(2)), code=1)
    assert ["NaN" in row["error"] for row in rows] == [True, True]
    assert not results(predict.out)


def test_the_review_is_sorted_and_does_not_depend_on_the_order(predict, tmp_path):
    paths = [write_image(tmp_path / "in" / f"{seed}.png", seed=seed) for seed in range(4)]
    rows = predict(tmp_path / "in", texts=(TEXT, "one polyp"))
    scores = [float(row["review_score"]) for row in rows]
    assert (len(rows), scores) == (8, sorted(scores, reverse=True))
    again = predict(*reversed(paths), "--overwrite", texts=("one polyp", TEXT))
    measured = ("input", "sentence", "review_score", "found_pixels", "standard_error")
    assert [[row[name] for name in measured] for row in again] == [[row[name] for name in measured] for row in rows]


def test_results_of_one_name_do_not_overwrite_each_other(predict, tmp_path):
    """Inputs of one name, in two calls with one output folder, and sentences that make poor file names."""
    names = ("a/same.png", "b/same.png", "a/same.bmp", "a/deeper/same.png")
    paths = [write_image(tmp_path / name, seed=seed) for seed, name in enumerate(names)]
    texts = (TEXT, "a tumor " * 30 + "left", "a tumor " * 30 + "right", "Ümlaut: a/b?")
    predict(paths[0])
    rows = predict(paths[1], tmp_path / "a", texts=texts)
    assert {(row["input"], row["sentence"]) for row in rows} == {(str(path), text) for path in paths for text in texts}
    assert len({row["name"].lower() for row in rows}) == 16
    assert max(len(row["name"]) for row in rows) < 80
    assert_masks(rows, predict)


def test_a_table_asks_each_image_its_own_sentence(predict, tmp_path):
    for seed, name in enumerate(("a.png", "sub/b.png")):
        write_image(tmp_path / name, seed=seed)
    asked = {("a.png", TEXT), ("sub/b.png", "one polyp"), ("a.png", "one polyp"), ("missing.png", TEXT)}
    (tmp_path / "questions.csv").write_text("image,text\n" + "".join(f"{image},{text}\n" for image, text in asked))
    rows = predict(tmp_path / "questions.csv", texts=(), code=1)
    assert {(Path(row["input"]).relative_to(tmp_path).as_posix(), row["sentence"]) for row in rows} == asked
    assert "missing.png" in rows[-1]["error"]
    assert_masks(rows[:-1], predict)


def changed(before: dict, folder: Path) -> set[str]:
    """First letters of the results that were written again."""
    after = results(folder)
    return {name[0] for name in before if after.get(name, (0,))[0] != before[name][0]}


def test_finished_work_is_kept_and_only_changed_inputs_are_predicted(predict, tmp_path):
    """The output folder lies within the input folder, and is not an input."""
    for seed in range(3):
        write_image(tmp_path / f"{seed}.png", seed=seed)
    first, before = predict(tmp_path), results(predict.out)
    assert predict(tmp_path) == first
    assert not changed(before, predict.out)
    (predict.out / "0_mask.png").unlink()
    write_image(tmp_path / "1.png", seed=7)
    predict(tmp_path)
    assert changed(before, predict.out) == {"0", "1"}
    assert_masks(rows_of(predict.out / "review.csv"), predict)
    for settings in (["--threshold=0.6"], ["--seed=1"], ["--abstain=0.3"], ["--maps"], [], ["--overwrite"]):
        last = results(predict.out)
        predict(tmp_path, *settings)
        assert changed(last, predict.out) == {"0", "1", "2"}
    assert set(results(predict.out)) == set(before)  # maps that are no longer asked for do not stay


@pytest.mark.parametrize("killed", [False, True], ids=["full disk", "killed"])
def test_what_was_done_before_the_end_is_kept_and_no_result_is_half_written(killed, predict, tmp_path, capsys):
    for seed in range(2):
        write_image(tmp_path / "in" / f"{seed}.png", seed=seed)
    write_image(tmp_path / "in" / "2-large.png", size=(300, 400))
    if killed:
        kill_while(lambda: predict(tmp_path / "in", "--threads=1"), room=60_000)
        assert list((predict.out / ".runs").glob("*.part/*/*"))
    else:
        with full_disk(60_000):
            assert len(predict(tmp_path / "in", "--threads=1", code=1)) == 2
        assert "the same command goes on" in capsys.readouterr().err.splitlines()[-1]
    with (predict.out / ".runs" / "0.jsonl").open("a") as log:
        log.write('{"id": "cut o')  # as by a power failure
    before = results(predict.out)
    assert {name[0] for name in before} == {"0", "1"}
    assert not any(row["error"] for row in predict(tmp_path / "in"))
    assert not changed(before, predict.out)
    assert not list((predict.out / ".runs").glob("*.part"))

    gone_on, predict.out = predict.out, tmp_path / "undisturbed"
    predict(tmp_path / "in")
    assert bytes_of(gone_on) == bytes_of(predict.out)


def test_processes_divide_the_work_and_take_over_what_a_killed_one_has_begun(predict, tmp_path, monkeypatch, capsys):
    paths = [write_image(tmp_path / "in" / f"{seed}.png", seed=seed) for seed in range(6)]
    arguments = (tmp_path / "in", "--batch-size=1", "--threads=1")
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:  # the first process hangs in its second input
        finish, finished = Pipeline.finish, []

        def hang(*args: Any) -> None:
            if finished:
                os.write(writer, b"!")
                time.sleep(1000)
            finished.append(finish(*args))

        monkeypatch.setattr(Pipeline, "finish", hang)
        predict(*arguments)
    try:
        os.read(reader, 1)
        rows = predict(*arguments)
        assert 2 <= len(rows) < len(paths)  # what the first has begun is left to it
        assert "left to other processes" in capsys.readouterr().err
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    before = results(predict.out)
    assert len(predict(*arguments)) == len(paths)
    assert not changed(before, predict.out)
    together, predict.out = predict.out, tmp_path / "alone"
    predict(*arguments)
    assert bytes_of(together) == bytes_of(predict.out)


def test_batches_do_not_depend_on_what_is_done(predict, tmp_path, monkeypatch):
    seen, original = [], pvl.MedCLIPSeg.predict

    def noted(self, images: Any, *args: Any, **kwargs: Any) -> pvl.Prediction:
        seen.append(len(images))
        return original(self, images, *args, **kwargs)

    monkeypatch.setattr(pvl.MedCLIPSeg, "predict", noted)
    for seed in range(7):
        write_image(tmp_path / "in" / f"{seed}.png", seed=seed)
    predict(tmp_path / "in", "--batch-size=3")
    before, lost = bytes_of(predict.out), ("1_mask.png", "6_overlay.jpg")
    for name in lost:
        (predict.out / name).unlink()
    (predict.out / "0_mask.png").write_bytes(b"other")
    predict(tmp_path / "in", "--batch-size=3")
    assert sorted(seen) == [1, 1, 3, 3, 3]
    assert bytes_of(predict.out) == before


def test_a_batch_that_fails_is_predicted_one_by_one(predict, tmp_path, monkeypatch):
    original = pvl.MedCLIPSeg.predict

    def small(self, images: Any, *args: Any, **kwargs: Any) -> pvl.Prediction:
        if len(images) > 1 or images.mean() > 0.5:
            raise RuntimeError("out of memory")
        return original(self, images, *args, **kwargs)

    monkeypatch.setattr(pvl.MedCLIPSeg, "predict", small)
    for seed in range(3):
        write_image(tmp_path / "in" / f"{seed}.png", seed=seed)
    Image.new("L", (30, 30), 255).save(tmp_path / "in" / "white.png")
    rows = predict(tmp_path / "in", code=1)
    assert [(Path(row["input"]).name, row["error"]) for row in rows if row["error"]] == [("white.png", "out of memory")]
    assert len(rows) == 4


def test_the_order_of_sentences_does_not_matter_and_a_preset_takes_their_place(predict, tmp_path):
    path = write_image(tmp_path / "one.png")
    texts, found = (TEXT, "one polyp", "the left"), []
    for number, order in enumerate(itertools.permutations(texts)):
        predict.out = tmp_path / str(number)
        predict(path, texts=order)
        found.append(bytes_of(predict.out))
    assert all(each == found[0] for each in found)
    preset = tmp_path / "preset.csv"
    preset.write_text("sentence,name\n" + "".join(f"{text},{name}\n" for name, text in zip("abc", texts, strict=True)))
    rows = predict(path, "--preset", preset, texts=())
    assert {row["sentence"] for row in rows} == set(texts)
    assert_masks(rows, predict)


def test_a_manifest_repeats_a_run_to_equal_bytes(predict, tmp_path, capsys):
    for seed in range(5):
        write_image(tmp_path / "in" / f"{seed}.png", seed=seed)
    broken = tmp_path / "in" / "broken.png"
    broken.write_bytes(b"no image")
    predict(tmp_path / "in", "--batch-size=2", "--threshold=0.4", "--slices=0:9", "--seed=3", code=1)
    manifest, again = predict.out / "manifest.json", tmp_path / "again"
    told = json.loads(manifest.read_text())
    assert {entry["input"]: bool(entry["error"]) for entry in told["inputs"]} == {
        str(path): path == broken for path in (tmp_path / "in").iterdir()
    }
    for entry in told["inputs"]:
        for name, hashed in entry["written"].items():
            assert hashlib.sha256((predict.out / name).read_bytes()).hexdigest() == hashed
    broken.unlink()
    assert run("predict", "--manifest", manifest, "--output", again) == 0
    assert bytes_of(again) == bytes_of(predict.out)
    repeated = json.loads((again / "manifest.json").read_text())
    assert (repeated["created"], repeated["settings"]) == (told["created"], told["settings"])

    refused = ["predict", "--manifest", manifest, "--output", tmp_path / "third"]
    assert "seed" in refuse(capsys, *refused, "--seed=4").splitlines()[-1]
    write_image(tmp_path / "in" / "3.png", seed=7)
    assert "3.png has changed" in refuse(capsys, *refused)
    write_image(tmp_path / "in" / "3.png", seed=3)
    tensors = predict.trained / "model.safetensors"
    original = tensors.read_bytes()
    try:
        state = load_file(tensors)
        name = next(name for name in state if name.startswith("head"))
        save_file({**state, name: state[name] + 1.0}, tensors, metadata=safe_open(tensors, "pt").metadata())
        assert "weights of the model have changed" in refuse(capsys, *refused)
    finally:
        tensors.write_bytes(original)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        *((words, 0) for words in ([], ["predict"], ["evaluate"], ["convert"])),
        *((["predict", "MODEL", "INPUT", f"--{wrong}"], 2) for wrong in ("seed=-1", "nothing")),
    ],
)
def test_help_and_wrong_options_need_no_torch(arguments, code):
    words = arguments + ["--help"] * (code == 0)
    lines = f"""
import sys
from pvl_adapter.cli import main
try: main({words})
except SystemExit as end: assert end.code == {code}
assert not {{"torch", "numpy", "transformers", "open_clip"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", lines], check=True, capture_output=True)


@pytest.mark.parametrize(
    "wrong", ["num-samples=some", "threshold=2", "abstain=0.8", "batch-size=0", "seed=-1", "slices=3", "text="]
)
def test_wrong_options_are_named_before_anything_is_read(wrong, predict):
    said = predict.refused("no-input.png", "--text", TEXT, f"--{wrong}", model="no-model")
    assert f"--{wrong.split('=')[0]}" in said.splitlines()[-1]  # after the usage, which names all


def test_models_and_devices_that_cannot_be_used_are_one_line(predict, trained, tmp_path):
    path = write_image(tmp_path / "one.png")
    unsupported = Path(shutil.copytree(trained, tmp_path / "unsupported"))
    config = unsupported / "config.json"
    config.write_text(config.read_text().replace("pvl-test-bert", "pvl-test-nothing"))
    cuda = [] if torch.cuda.is_available() else [(trained, ("--device", "cuda"))]
    for model, options in [(path, ()), (unsupported, ()), (trained, ("--device", "abacus")), *cuda]:
        said = predict.refused(path, "--text", TEXT, *options, model=model)
        assert len(said.strip().splitlines()) == 1, said
        assert (options[-1] if options else model.name) in said


def test_missing_sentences_and_inputs_and_foreign_files_are_named(predict, tmp_path):
    path, empty = write_image(tmp_path / "one.png"), tmp_path / "empty"
    assert "--text" in predict.refused(path)
    empty.mkdir()
    assert "empty" in predict.refused(empty, "--text", TEXT)
    assert "cannot be written to" in predict.refused(path, "--text", TEXT, f"--output={path}")
    (predict.out / "review.csv").write_text("my,own\n1,2\n")
    assert "--output" in predict.refused(path, "--text", TEXT, "--device=cpu")
    assert (predict.out / "review.csv").read_text() == "my,own\n1,2\n"
    (predict.out / "review.csv").unlink()
    (predict.out / "review.csv").mkdir()
    assert "review.csv" in predict.refused(path, "--text", TEXT)
