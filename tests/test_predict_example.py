"""examples/predict.py on images: maps in their own geometry, failures reported, finished work kept."""

from __future__ import annotations

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
from example_model import (
    EXAMPLES,
    OTHER,
    SAMPLES,
    TEXT,
    Predict,
    assert_masks,
    expected,
    noise,
    pixels,
    predict_into,
    refuse,
    review_of,
    script,
    small_segmenter,
    write_image,
)
from PIL import Image
from support import full_disk

import pvl_adapter as pvl
from pvl_adapter.data import read_image

for needed in ("highdicom", "nibabel", "pydicom"):  # of pvl-adapter[examples]
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def model(open_clip_models) -> pvl.MedCLIPSeg:
    return small_segmenter(open_clip_models["bert"])


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture
def predict(trained, tmp_path) -> Predict:
    return predict_into(tmp_path / "out", trained)


@pytest.fixture
def refused(trained, tmp_path, capsys) -> Any:
    def run(*arguments: object, model: object = trained) -> str:
        return refuse("predict", capsys, model, f"--output={tmp_path / 'out'}", *arguments)

    return run


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grey.png", "colour.png", "deep.png", "grey.bmp", "colour.tif", "grey.gif"])
def test_an_image_gets_maps_in_its_own_geometry(kind, predict, model, tmp_path):
    path, deep, shape = tmp_path / kind, "deep" in kind, (40, 56, 3) if "colour" in kind else (40, 56)
    Image.fromarray(noise(*shape, most=4000 if deep else 256, dtype=np.uint16 if deep else np.uint8)).save(path)

    (row,) = predict(path, "--abstain=0.5")
    maps, out, name = expected(model, read_image(path)), tmp_path / "out", path.stem
    np.testing.assert_array_equal(pixels(out / f"{name}_mask.png"), maps["mask"] * np.uint8(255))
    np.testing.assert_array_equal(pixels(out / f"{name}_abstain.png") > 0, maps["uncertainty"] > 0.5)
    for of, most in (("probability", 1.0), ("uncertainty", np.log(2.0))):
        np.testing.assert_allclose(pixels(out / f"{name}_{of}.png") / 65535 * most, maps[of], atol=1e-5)
    assert pixels(out / f"{name}_overlay.png").shape == (40, 56, 3)

    small = model.predict(read_image(path), TEXT, num_samples=SAMPLES)
    with np.load(out / f"{name}.npz") as saved:  # floats at the network's size, unless --maps asks for more
        np.testing.assert_allclose(saved["probability"], small.probability[0], atol=1e-6)
    assert (row["sentence"], row["input"], row["num_samples"]) == (TEXT, str(path), str(SAMPLES))
    assert int(row["found_pixels"]) == maps["mask"].sum()
    assert row["found_mm2"] == row["found_ml"] == row["error"] == ""
    for column, value in {
        "max_probability": small.probability.max(),
        "mean_uncertainty": small.uncertainty.mean(),
        "abstained_fraction": (small.uncertainty > 0.5).float().mean(),
        "review_score": small.review_score[0],
    }.items():
        assert float(row[column]) == pytest.approx(value.item(), abs=1e-5), column
    assert set(row["files"].split("; ")) == {file.name for file in out.iterdir()} - {"review.csv"}


def test_float_maps_at_the_images_size_are_for_those_who_ask(predict, model, tmp_path):
    predict(write_image(tmp_path / "one.png"), "--maps")
    maps = expected(model, tmp_path / "one.png")
    with np.load(tmp_path / "out" / "one.npz") as saved:
        for name, values in maps.items():
            np.testing.assert_allclose(saved[name], values, atol=1e-5, err_msg=name)


def test_a_folder_is_read_and_what_is_no_input_is_named(predict, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("0.png", "1.png", "2.gif", "3.webp"):
        write_image(folder / name, seed=int(name[0]))
    broken = folder / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    Image.new("L", (8, 8)).save(folder / "4.gif", save_all=True, append_images=[Image.new("L", (8, 8), 255)])
    (folder / "notes.txt").write_text("not an input")
    (folder / ".hidden.png").write_text("not an input either")

    rows, said = predict(folder, code=1), capsys.readouterr().err
    assert {Path(row["input"]).name for row in rows[:3]} == {"0.png", "2.gif", "3.webp"}
    errors = {Path(row["input"]).name: row["error"] for row in rows if row["error"]}
    assert set(errors) == {"1.png", "4.gif"}
    assert "#frame=" in errors["4.gif"]  # not its first frame in silence
    assert all(name in said for name in ("notes.txt", "1.png"))
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == 3
    write_image(broken)  # what has failed is tried again
    rows = predict(folder, f"{folder / '4.gif'}#frame=1", code=1)
    assert [row["input"] for row in rows if row["error"]] == [str(folder / "4.gif")]


def test_nan_in_the_network_is_a_failure_not_an_empty_mask(predict, open_clip_models, tmp_path):
    broken = small_segmenter(open_clip_models["bert"])
    with torch.no_grad():
        next(broken.head.parameters())[0] = float("nan")
    paths = [write_image(tmp_path / f"{seed}.png", seed=seed) for seed in range(2)]
    rows = predict(*paths, code=1, model=broken.save_pretrained(tmp_path / "broken"))
    assert ["NaN" in row["error"] for row in rows] == [True, True]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["review.csv"]


def test_the_review_is_sorted_and_does_not_depend_on_the_order(predict, model, tmp_path):
    paths = [write_image(tmp_path / "in" / f"{seed}.png", seed=seed) for seed in range(4)]
    rows = predict(tmp_path / "in", texts=(TEXT, OTHER))
    scores = [float(row["review_score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert len(rows) == 8
    again = predict(*reversed(paths), "--overwrite", texts=(OTHER, TEXT))
    measured = ("input", "sentence", "review_score", "found_pixels", "standard_error")
    assert [[row[name] for name in measured] for row in again] == [[row[name] for name in measured] for row in rows]


def test_inputs_of_one_name_do_not_overwrite_each_other(predict, model, tmp_path):
    paths = [write_image(tmp_path / each / "same.png", seed=seed) for seed, each in enumerate(("a", "b"))]
    paths.append(write_image(tmp_path / "a" / "same.bmp", seed=9))
    nested = write_image(tmp_path / "a" / "deeper" / "same.png", seed=10)
    predict(paths[0])
    rows = predict(*paths[1:], tmp_path / "a")  # two calls, one folder
    assert {row["input"] for row in rows} == {str(path) for path in (*paths, nested)}
    assert_masks(rows, tmp_path / "out", model)
    assert (tmp_path / "out" / "deeper" / "same_mask.png").is_file()


def test_two_sentences_do_not_overwrite_each_other(predict, model, tmp_path):
    path, long = write_image(tmp_path / "one.png"), "a tumor " * 30
    rows = predict(path, texts=(TEXT, long + "left", long + "right", "Ümlaut: a/b?"))
    assert len({row["name"].lower() for row in rows}) == 4
    assert max(len(row["name"]) for row in rows) < 80
    assert_masks(rows, tmp_path / "out", model)


def test_a_table_asks_each_image_its_own_sentence(predict, model, tmp_path):
    for seed, name in enumerate(("a.png", "sub/b.png")):
        write_image(tmp_path / name, seed=seed)
    asked = {("a.png", TEXT), ("sub/b.png", OTHER), ("a.png", OTHER), ("missing.png", TEXT)}
    (tmp_path / "questions.csv").write_text("image,text\n" + "".join(f"{image},{text}\n" for image, text in asked))
    rows = predict(tmp_path / "questions.csv", texts=(), code=1)
    assert {(Path(row["input"]).relative_to(tmp_path).as_posix(), row["sentence"]) for row in rows} == asked
    assert "missing.png" in rows[-1]["error"]
    assert_masks(rows[:-1], tmp_path / "out", model)


# --- going on --------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != "review.csv"
    }


def test_finished_work_is_kept_and_only_changed_inputs_are_predicted(predict, tmp_path):
    """The output folder lies within the input folder, and is no input."""
    for seed in range(3):
        write_image(tmp_path / f"{seed}.png", seed=seed)
    first = predict(tmp_path)
    before = contents(tmp_path / "out")
    assert predict(tmp_path) == first
    assert contents(tmp_path / "out") == before

    (tmp_path / "out" / "0_mask.png").unlink()
    write_image(tmp_path / "1.png", seed=7)
    predict(tmp_path)
    after = contents(tmp_path / "out")
    assert {name[0] for name in before if after[name][0] != before[name][0]} == {"0", "1"}
    assert {name[0] for name in before if after[name][1] != before[name][1]} == {"1"}


@pytest.mark.parametrize("change", ["--threshold=0.6", "--seed=1", "--abstain=0.3", "--maps", "--overwrite"])
def test_other_settings_are_predicted_again(change, predict, tmp_path):
    write_image(tmp_path / "one.png")
    predict(tmp_path / "one.png")
    before = contents(tmp_path / "out")
    predict(tmp_path / "one.png", change)
    after = contents(tmp_path / "out")
    assert all(after[name][0] != before[name][0] for name in before)
    predict(tmp_path / "one.png")
    assert set(contents(tmp_path / "out")) == set(before)  # maps that are no longer asked for do not stay


def test_a_killed_run_keeps_what_is_done(predict, trained, tmp_path):
    for seed in range(200):
        write_image(tmp_path / "in" / f"{seed:03d}.png", seed=seed, size=(200, 200))
    out = tmp_path / "out"
    command = [sys.executable, EXAMPLES / "predict.py", trained, tmp_path / "in", "--text", TEXT, "--device=cpu"]
    command += [f"--output={out}", f"--num-samples={SAMPLES}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120.0
    while not (out / "review.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done, before = review_of(out), contents(out)
    assert 0 < len(done) < 200

    for path in sorted((tmp_path / "in").iterdir())[20:]:
        path.unlink()
    rows, after = predict(tmp_path / "in"), contents(out)
    assert {row["input"] for row in rows} >= {str(path) for path in (tmp_path / "in").iterdir()}
    for row in done:
        if Path(row["input"]).exists():
            assert all(after[name] == before[name] for name in row["files"].split("; "))


def test_a_full_disk_leaves_no_half_result(predict, tmp_path):
    write_image(tmp_path / "large.png", size=(300, 400))
    with full_disk(20_000):
        (row,) = predict(tmp_path / "large.png", code=1)
    assert row["error"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["review.csv"]
    assert not predict(tmp_path / "large.png")[0]["error"]


def test_results_that_the_review_cannot_list_are_named(refused, tmp_path, monkeypatch):
    """The disk is full when review.csv is written: a folder that takes its place stands for that."""
    path = write_image(tmp_path / "one.png")
    review = script("review")

    def no_room(self: Any) -> None:
        (tmp_path / "out" / "review.csv").mkdir(exist_ok=True)
        write(self)

    write = review.Review.write
    monkeypatch.setattr(review.Review, "write", no_room)
    said = refused(path, "--text", TEXT, "--device=cpu", "--num-samples=0")
    assert "review.csv" in said
    assert "one_mask.png" in said
    assert (tmp_path / "out" / "one_mask.png").is_file()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_help_and_wrong_options_need_no_torch(name):
    code = f"""
import sys
import {name} as script
for argv, code in ((["--help"], 0), (["MODEL", "INPUT", "--seed", "-1"], 2)):
    try:
        script.main(argv)
    except SystemExit as ended:
        assert ended.code == code, ended.code
assert not {{"torch", "numpy", "pvl_adapter"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=EXAMPLES)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--num-samples=some"], "--num-samples is some"),
        (["--threshold=2"], "--threshold is 2.0"),
        (["--abstain=0.8"], "--abstain is 0.8"),
        (["--batch-size=0"], "--batch-size is 0"),
        (["--seed=-1"], "--seed is -1"),
        (["--slices=3"], "'3'"),
        (["--text", " "], "empty sentence"),
    ],
)
def test_wrong_options_are_named_before_anything_is_read(arguments, named, refused):
    assert named in refused("no-input.png", "--text", TEXT, *arguments, model="no-model")


def test_models_and_devices_that_cannot_be_used_are_one_line(refused, trained, tmp_path):
    path = write_image(tmp_path / "one.png")
    damaged, unsupported = (Path(shutil.copytree(trained, tmp_path / name)) for name in ("damaged", "unsupported"))
    (weights,) = damaged.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    config = unsupported / "config.json"
    config.write_text(config.read_text().replace("pvl-test-bert", "pvl-test-nothing"))
    cases = [(damaged, ()), (tmp_path / "one.png", ()), (unsupported, ()), (trained, ("--device", "abacus"))]
    cases += [] if torch.cuda.is_available() else [(trained, ("--device", "cuda"))]
    for model, options in cases:
        said = refused(path, "--text", TEXT, *options, model=model)
        assert len(said.strip().splitlines()) == 1, said
        assert (options[-1] if options else model.name) in said


def test_missing_sentences_and_inputs_and_foreign_files_are_named(refused, tmp_path):
    path, empty, out = write_image(tmp_path / "one.png"), tmp_path / "empty", tmp_path / "out"
    assert "--text" in refused(path)
    empty.mkdir()
    assert "empty" in refused(empty, "--text", TEXT)
    assert "cannot be written to" in refused(path, "--text", TEXT, f"--output={path}")
    (out / "review.csv").write_text("my,own\n1,2\n")
    assert "--output" in refused(path, "--text", TEXT, "--device=cpu")
    assert (out / "review.csv").read_text() == "my,own\n1,2\n"
