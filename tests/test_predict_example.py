"""examples/predict.py: maps in the input's own geometry for every format, failures reported, finished work kept."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from example_model import small_segmenter
from PIL import Image
from support import full_disk

import pvl_adapter as pvl
from pvl_adapter.data import read_image

highdicom, nib, pydicom = map(pytest.importorskip, ("highdicom", "nibabel", "pydicom"))  # of pvl-adapter[examples]

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "predict.py"
TEXT, OTHER = "a tumor at the left", "one polyp"
SAMPLES = 2
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.1, 0.15) @ np.diag([0.9, 1.1, 2.0]), [-10.0, 20.0, 5.0]
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module("predict")


@pytest.fixture(scope="module")
def model(open_clip_models) -> pvl.MedCLIPSeg:
    return small_segmenter(open_clip_models["bert"])


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture
def predict(example, trained, tmp_path) -> Callable[..., list[dict[str, str]]]:
    """Runs the script, checks its exit code, and returns the lines of review.csv."""

    def run(*arguments: object, code: int = 0, texts: tuple[str, ...] = (TEXT,), model: Path = trained) -> list:
        command = [str(model), *map(str, arguments), "--device=cpu", f"--num-samples={SAMPLES}"]
        command += [f"--output={tmp_path / 'out'}", *(("--text", *texts) if texts else ())]
        assert example.main(command) == code
        return lines(tmp_path / "out")

    return run


@pytest.fixture
def refused(example, trained, tmp_path, capsys) -> Callable[..., str]:
    """Runs the script, checks that it ends with exit code 2, and returns what it says."""

    def run(*arguments: object, model: object = trained) -> str:
        with pytest.raises(SystemExit) as ended:
            example.main([str(model), f"--output={tmp_path / 'out'}", *map(str, arguments)])
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


def lines(output: Path) -> list[dict[str, str]]:
    with (output / "review.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected(model: pvl.MedCLIPSeg, image: Any, *, text: str = TEXT) -> dict[str, np.ndarray]:
    """Maps of an image by itself."""
    return model.predict(image, text, num_samples=SAMPLES).at_original_size(0)


def noise(*shape: int, seed: int = 0, most: int = 256, dtype: Any = np.uint8) -> np.ndarray:
    """Smooth enough to have regions."""
    coarse = np.random.default_rng(seed).integers(0, most, [-(-size // 4) for size in shape])
    for axis, size in enumerate(shape):
        coarse = coarse.repeat(4, axis=axis).take(range(size), axis=axis)
    return coarse.astype(dtype)


def write_image(path: Path, *, seed: int = 0, size: tuple[int, ...] = (40, 56)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*size, seed=seed)).save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.array(opened)


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
    (row,) = predict(f"{folder / '4.gif'}#frame=1")[:1]
    assert not row["error"]


def test_nan_in_the_network_is_a_failure_not_an_empty_mask(predict, open_clip_models, tmp_path):
    broken = small_segmenter(open_clip_models["bert"])
    with torch.no_grad():
        next(broken.head.parameters())[0] = float("nan")
    rows = predict(
        write_image(tmp_path / "one.png"),
        write_image(tmp_path / "two.png", seed=1),
        code=1,
        model=broken.save_pretrained(tmp_path / "broken"),
    )
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
    for row in rows:
        mask = pixels(tmp_path / "out" / f"{row['name']}_mask.png") > 0
        np.testing.assert_array_equal(mask, expected(model, row["input"])["mask"])
    assert (tmp_path / "out" / "deeper" / "same_mask.png").is_file()


def test_two_sentences_do_not_overwrite_each_other(predict, model, tmp_path):
    path, long = write_image(tmp_path / "one.png"), "a tumor " * 30
    rows = predict(path, texts=(TEXT, long + "left", long + "right", "Ümlaut: a/b?"))
    assert len({row["name"].lower() for row in rows}) == 4
    assert max(len(row["name"]) for row in rows) < 80
    for row in rows:
        mask = pixels(tmp_path / "out" / f"{row['name']}_mask.png") > 0
        np.testing.assert_array_equal(mask, expected(model, path, text=row["sentence"])["mask"])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_asks_each_image_its_own_sentence(kind, predict, model, tmp_path):
    for seed, name in enumerate(("a.png", "sub/b.png")):
        write_image(tmp_path / name, seed=seed)
    asked = [("a.png", TEXT), ("sub/b.png", OTHER), ("a.png", OTHER), ("missing.png", TEXT)]
    table = tmp_path / f"questions.{kind}"
    if kind == "csv":
        table.write_text("image,text\n" + "".join(f"{image},{text}\n" for image, text in asked))
    else:
        table.write_text("".join(json.dumps({"image": image, "text": text}) + "\n" for image, text in asked))

    rows = predict(table, texts=(), code=1)
    assert {(Path(row["input"]).relative_to(tmp_path).as_posix(), row["sentence"]) for row in rows} == set(asked)
    assert "missing.png" in rows[-1]["error"]
    for row in rows[:-1]:
        mask = pixels(tmp_path / "out" / f"{row['name']}_mask.png") > 0
        np.testing.assert_array_equal(mask, expected(model, row["input"], text=row["sentence"])["mask"])


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


def test_a_failed_input_is_tried_again(predict, tmp_path):
    (tmp_path / "one.png").write_bytes(b"")
    assert predict(tmp_path / "one.png", code=1)[0]["error"]
    assert predict(write_image(tmp_path / "one.png"))[0]["error"] == ""


def test_a_killed_run_keeps_what_is_done(predict, trained, tmp_path):
    for seed in range(200):
        write_image(tmp_path / "in" / f"{seed:03d}.png", seed=seed, size=(200, 200))
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, trained, tmp_path / "in", "--text", TEXT, "--device=cpu", f"--output={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, f"--num-samples={SAMPLES}"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120.0
    while not (out / "review.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done, before = lines(out), contents(out)
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
    review = importlib.import_module("review")

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


@pytest.mark.parametrize("script", ["predict", "evaluate"])
def test_help_and_wrong_options_need_no_torch(script):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "examples")!r})
import {script} as script
for argv in (["--help"], ["MODEL", "INPUT", "--seed", "-1"]):
    try:
        script.main(argv)
    except SystemExit as ended:
        assert ended.code == (0 if argv == ["--help"] else 2), ended.code
assert not {{"torch", "numpy", "pvl_adapter"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


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
    damaged, unsupported = tmp_path / "damaged", tmp_path / "unsupported"
    for folder in (damaged, unsupported):
        shutil.copytree(trained, folder)
    (weights,) = damaged.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    config = json.loads((unsupported / "config.json").read_text().replace("pvl-test-bert", "pvl-test-nothing"))
    (unsupported / "config.json").write_text(json.dumps(config))
    cases = [(damaged, ()), (tmp_path / "one.png", ()), (unsupported, ()), (trained, ("--device", "abacus"))]
    cases += [] if torch.cuda.is_available() else [(trained, ("--device", "cuda"))]
    for model, options in cases:
        said = refused(path, "--text", TEXT, *options, model=model)
        assert len(said.strip().splitlines()) == 1, said
        assert (options[-1] if options else model.name) in said


def test_what_is_missing_is_named(refused, tmp_path):
    assert "--text" in refused(write_image(tmp_path / "one.png"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty", "--text", TEXT)
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(tmp_path / "one.png", "--text", TEXT, f"--output={tmp_path / 'file'}")


def test_another_review_is_not_overwritten(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "review.csv").write_text("my,own\n1,2\n")
    assert "--output" in refused(write_image(tmp_path / "one.png"), "--text", TEXT, "--device=cpu")
    assert (tmp_path / "out" / "review.csv").read_text() == "my,own\n1,2\n"


# --- NIfTI -----------------------------------------------------------------------------------------------------------


def write_scan(path: Path, *, axes: str = "RAS", shape: tuple[int, ...] = (24, 28, 6), seed: int = 0) -> Path:
    """A scan whose voxels are the same anatomy whatever the order of its axes."""
    image = nib.Nifti1Image(noise(*shape, seed=seed, most=900, dtype=np.int16), OBLIQUE)
    turn = nib.orientations.ornt_transform(nib.io_orientation(OBLIQUE), nib.orientations.axcodes2ornt(axes))
    image = image.as_reoriented(turn)
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=2)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


@pytest.mark.parametrize("axis", "xyz")
@pytest.mark.parametrize("axes", ["RAS", "SRP", "AIL"])
def test_maps_of_a_scan_lie_on_its_voxels(axes, axis, predict, model, tmp_path):
    path = write_scan(tmp_path / "scan.nii.gz", axes=axes)
    (row,) = predict(path, f"--axis={axis}", "--slices=1:3", "--abstain=0.5", "--batch-size=3")
    scan = nib.load(path)
    out = {name: nib.load(tmp_path / "out" / f"scan_{name}.nii.gz") for name in ("mask", "probability", "uncertainty")}
    for name, written in out.items():
        assert written.shape == scan.shape
        np.testing.assert_array_equal(written.affine, scan.affine)
        assert written.header["qform_code"] == 1
        assert written.header["sform_code"] == 2
        np.testing.assert_allclose(written.header.get_zooms(), scan.header.get_zooms())
        assert written.get_data_dtype() == (np.uint8 if name == "mask" else np.float32)

    canonical = {name: np.asarray(nib.as_closest_canonical(image).dataobj) for name, image in out.items()}
    assert {name: maps.shape for name, maps in canonical.items()} == dict.fromkeys(canonical, (24, 28, 6))
    found = 0
    for number in range(canonical["mask"].shape["xyz".index(axis)]):
        here = {name: maps.take(number, axis="xyz".index(axis)) for name, maps in canonical.items()}
        if number not in (1, 2):
            assert not here["mask"].any()
            assert not here["probability"].any()
            assert np.isnan(here["uncertainty"]).all()
            continue
        maps = expected(model, read_image(f"{path}#{axis}={number}"))
        # As a radiologist sees it: the first row is the most superior or anterior, the first column right or anterior.
        assert np.abs(here["probability"] - maps["probability"][::-1, ::-1].T).max() < 1e-5
        np.testing.assert_array_equal(here["mask"], maps["mask"][::-1, ::-1].T)
        found += maps["mask"].sum()
    assert int(row["found_pixels"]) == found
    voxel_ml = abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    assert float(row["found_ml"]) == pytest.approx(found * voxel_ml, abs=1e-4)
    assert pixels(tmp_path / "out" / "scan_overlay.png").ndim == 3
    assert (tmp_path / "out" / "scan_abstain.nii.gz").is_file()


def test_one_slice_of_a_scan_has_an_area(predict, tmp_path):
    path = write_scan(tmp_path / "scan.nii.gz", axes="LAS")
    (row,) = predict(f"{path}#z=2")
    mask = np.asarray(nib.load(tmp_path / "out" / "scan_z2_mask.nii.gz").dataobj)
    assert mask[..., 2].any()
    assert not mask[..., [0, 1, 3, 4, 5]].any()
    assert float(row["found_mm2"]) == pytest.approx(mask.sum() * 0.9 * 1.1, abs=1e-2)
    assert row["found_ml"] == ""


def series_in_time(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 3, 2), np.uint8), np.eye(4)), path)


def with_nan(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.full((8, 8, 3), np.nan, np.float32), np.eye(4)), path)


def cut_short(path: Path) -> None:
    write_scan(path)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("write", "part", "options", "named"),
    [
        (series_in_time, "", [], "3-D"),
        (with_nan, "", [], "NaN"),
        (cut_short, "", [], "damaged"),
        (write_scan, "#z=6", [], "z=6"),
        (write_scan, "#frame=1", [], "frame"),
        (write_scan, "", ["--slices=10:"], "--slices"),
    ],
)
def test_scans_that_cannot_be_predicted_are_reported(write, part, options, named, predict, tmp_path):
    write(tmp_path / "scan.nii.gz")
    (row,) = predict(f"{tmp_path / 'scan.nii.gz'}{part}", *options, code=1)
    assert named in row["error"]


@pytest.mark.parametrize("shape", [(24, 28), (24, 28, 1), (24, 28, 6, 1)])
def test_maps_have_the_shape_of_the_scan(shape, predict, tmp_path):
    nib.save(nib.Nifti2Image(noise(*shape, dtype=np.float32), OBLIQUE), tmp_path / "scan.nii")
    predict(tmp_path / "scan.nii")
    written = nib.load(tmp_path / "out" / "scan_uncertainty.nii.gz")
    assert isinstance(written, nib.Nifti2Image)
    assert written.shape == shape
    assert np.isfinite(written.get_fdata()).all()


@pytest.mark.parametrize("kind", ["nifti", "dicom", "deep"])
def test_a_window_says_what_is_black_and_white(kind, predict, model, tmp_path):
    if kind == "nifti":
        path = f"{write_scan(tmp_path / 'one.nii')}#z=3"
    elif kind == "dicom":
        path = save(dicom(stored(30, 44)), tmp_path / "one.dcm")
    else:
        path = tmp_path / "one.png"
        Image.fromarray(stored(30, 44)).save(path)
    (row,) = predict(path, "--window", "300", "500")
    wanted = model.predict(read_image(path, window=(300.0, 500.0)), TEXT, num_samples=SAMPLES)
    assert float(row["review_score"]) == pytest.approx(wanted.review_score.item(), abs=1e-5)
    other = model.predict(read_image(path), TEXT, num_samples=SAMPLES)
    assert abs(other.review_score - wanted.review_score) > 1e-4


# --- DICOM -----------------------------------------------------------------------------------------------------------

STUDY, SERIES, FRAME_OF_REFERENCE = (f"1.2.826.0.1.3680043.8.498.{number}" for number in (1, 2, 3))
CT, ENHANCED_CT, ULTRASOUND, RADIOGRAPH = (f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "2.1", "3.1", "1"))
TILTED = [1.0, 0.0, 0.0, 0.0, 0.8, 0.6]  # rows and columns of a coronal-oblique plane, growing to left and back


def dicom(stored: np.ndarray, *, storage: str = CT, **attributes: Any) -> pydicom.Dataset:
    """A file as a scanner writes it; an attribute that is None is left out."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = storage
    header.file_meta.MediaStorageSOPInstanceUID = uid = pydicom.uid.generate_uid()
    usual = {
        "SOPClassUID": storage,
        "SOPInstanceUID": uid,
        "StudyInstanceUID": STUDY,
        "SeriesInstanceUID": SERIES,
        "FrameOfReferenceUID": FRAME_OF_REFERENCE,
        "PatientName": "Müller^Ärzte",
        "SpecificCharacterSet": "ISO_IR 100",
        "SeriesNumber": 3,
        "InstanceNumber": 1,
        "Modality": "CT",
        "ImageOrientationPatient": TILTED,
        "PixelSpacing": [0.8, 0.5],
        "SliceThickness": 2.0,
        "Rows": stored.shape[-2],
        "Columns": stored.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "WindowCenter": 40,
        "WindowWidth": 1800,
    }
    empty = ("PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime")
    for name, value in {**dict.fromkeys((*empty, "ReferringPhysicianName"), ""), **usual, **attributes}.items():
        if value is not None:
            setattr(header, name, value)
    header.PixelData = stored.astype(np.uint16).tobytes()
    return header


def stored(*shape: int, seed: int = 0) -> np.ndarray:
    return noise(*shape, seed=seed, most=2000, dtype=np.uint16)


def save(header: pydicom.Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path, *, count: int = 5, change: Callable[[int], dict[str, Any]] = lambda number: {}
) -> list[Path]:
    """Files in the order of their places, whose names and instance numbers are in another order."""
    normal = np.cross(TILTED[:3], TILTED[3:])
    paths = []
    for number in range(count):
        position = {"ImagePositionPatient": list(np.round(2.5 * number * normal + [3.0, 1.0, -7.0], 6))}
        header = dicom(stored(30, 44, seed=number), InstanceNumber=7 * number % 5 + 1, **(position | change(number)))
        paths.append(save(header, folder / f"{(2 * number + 1) % count}.dcm"))
    return paths


def test_a_dicom_file_gets_a_seg_that_refers_to_it(predict, model, tmp_path):
    path = save(dicom(stored(30, 44), ImagePositionPatient=[0.0, 0.0, 0.0]), tmp_path / "ct.dcm")
    sentence = "Ménière: " + "a tumor at the left " * 5
    (row,) = predict(path, "--abstain=0.4", texts=(sentence,))
    maps = expected(model, read_image(path), text=sentence)
    seg = highdicom.seg.segread(tmp_path / "out" / "ct.seg.dcm")
    source = pydicom.dcmread(path)

    planes = seg.get_pixels_by_source_instance([source.SOPInstanceUID], ignore_spatial_locations=True)
    np.testing.assert_array_equal(planes[0, :, :, 0] > 0, maps["mask"])
    np.testing.assert_array_equal(planes[0, :, :, 1] > 0, maps["uncertainty"] > 0.4)
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == (STUDY, FRAME_OF_REFERENCE)
    assert seg.SeriesInstanceUID != SERIES
    assert str(seg.PatientName) == "Müller^Ärzte"
    first = seg.SegmentSequence[0]
    assert first.SegmentLabel == sentence[:64].strip()
    assert first.SegmentDescription == sentence.strip()
    assert first.SegmentAlgorithmType == "AUTOMATIC"
    assert seg.SegmentationType == "BINARY"
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "ct_mask.png") > 0, maps["mask"])
    assert float(row["found_mm2"]) == pytest.approx(maps["mask"].sum() * 0.4, abs=1e-2)
    assert row["note"] == ""


def test_a_radiograph_gets_a_seg(predict, model, tmp_path):
    """It has a spacing of pixels, but neither a place in space nor a thickness."""
    lacking = dict.fromkeys(("FrameOfReferenceUID", "ImageOrientationPatient", "SliceThickness"))
    header = dicom(stored(30, 44), storage=RADIOGRAPH, Modality="CR", **lacking)
    path = save(header, tmp_path / "chest.dcm")
    (row,) = predict(path)
    seg = highdicom.seg.segread(tmp_path / "out" / "chest.seg.dcm")
    planes = seg.get_pixels_by_source_instance([header.SOPInstanceUID], ignore_spatial_locations=True)
    np.testing.assert_array_equal(planes[0, :, :, 0] > 0, expected(model, read_image(path))["mask"])
    assert float(row["found_mm2"]) == pytest.approx(int(row["found_pixels"]) * 0.4, abs=1e-2)


def test_a_series_is_put_in_order(predict, model, tmp_path):
    paths = write_series(tmp_path / "in" / "series")
    write_image(tmp_path / "in" / "series" / "beside.png")
    rows = {row["name"]: row for row in predict(tmp_path / "in", "--slices=1:4", "--batch-size=2")}
    assert set(rows) == {"series", "series/beside"}
    out = tmp_path / "out"
    seg = highdicom.seg.segread(out / "series.seg.dcm")
    instances = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    with np.load(out / "series.npz") as saved:
        maps = dict(saved)
    assert maps["instances"].tolist() == instances[1:4]
    assert maps["slices"].tolist() == [1, 2, 3]
    planes = seg.get_pixels_by_source_instance(instances[1:4], ignore_spatial_locations=True)
    found = 0
    for index, path in enumerate(paths[1:4]):
        wanted = expected(model, read_image(path))
        np.testing.assert_array_equal(planes[index, :, :, 0] > 0, wanted["mask"])
        np.testing.assert_array_equal(maps["mask"][index] > 0, wanted["mask"])
        np.testing.assert_allclose(maps["probability"][index], wanted["probability"], atol=1e-5)
        np.testing.assert_allclose(maps["uncertainty"][index], wanted["uncertainty"], atol=1e-5)
        found += wanted["mask"].sum()
    row = rows["series"]
    assert float(row["found_ml"]) == pytest.approx(found * 0.4 * 2.5 / 1000, abs=1e-3)
    assert row["found_mm2"] == row["note"] == ""
    assert row["input"].startswith(str(tmp_path / "in" / "series"))


def test_series_are_not_mixed(predict, tmp_path):
    for number, uid in enumerate((pydicom.uid.generate_uid(), pydicom.uid.generate_uid())):
        change = {"SeriesInstanceUID": uid, "SeriesNumber": number + 4}
        paths = write_series(tmp_path / "in", count=3, change=lambda _, change=change: change)
        for path in paths:
            path.rename(path.with_name(f"{number}-{path.stem}"))  # without an ending
    write_series(tmp_path / "in" / "alone", count=1)
    rows = predict(tmp_path / "in")
    assert {row["name"] for row in rows} == {"in/series4", "in/series5", "alone/0"}
    for name in ("in/series4", "in/series5"):
        assert highdicom.seg.segread(tmp_path / "out" / f"{name}.seg.dcm").SeriesNumber == 1000 + int(name[-1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda number: {"ImagePositionPatient": [0.0, 0.0, number // 2]}, "the same position"),
        (lambda number: {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]} if number == 2 else {}, "ImageOrientation"),
        (lambda number: {"PixelSpacing": [0.8, 0.6]} if number == 2 else {}, "PixelSpacing"),
    ],
)
def test_slices_that_are_no_stack_are_reported(change, named, predict, tmp_path):
    write_series(tmp_path / "in", change=change)
    (row,) = predict(tmp_path / "in", code=1)
    assert named in row["error"]


def test_uneven_gaps_are_noted_and_a_tilted_gantry_does_no_harm(predict, tmp_path):
    normal = np.cross(TILTED[:3], TILTED[3:])
    lies = {
        "tilted": lambda number: {
            "ImagePositionPatient": list(np.round(normal * number + [0.0, 0.3 * number, 0.0], 6))
        },
        "uneven": lambda number: {"ImagePositionPatient": list(np.round(normal * number**2, 6))},
    }
    for name, change in lies.items():
        write_series(tmp_path / "in" / name, change=change)
    tilted, uneven = sorted(predict(tmp_path / "in"), key=lambda row: row["name"])
    assert (float(tilted["found_ml"]) > 0, tilted["note"]) == (True, "")
    assert uneven["found_ml"] == ""
    assert "1 to 7 mm apart" in uneven["note"]
    for name in lies:
        highdicom.seg.segread(tmp_path / "out" / f"{name}.seg.dcm")


def multi_frame(count: int = 4) -> pydicom.Dataset:
    """An enhanced CT: what it says of single frames is in sequences."""

    def item(**values: Any) -> pydicom.Dataset:
        made = pydicom.Dataset()
        for name, value in values.items():
            setattr(made, name, value)
        return made

    header = dicom(
        stored(count, 30, 44),
        storage=ENHANCED_CT,
        NumberOfFrames=count,
        PixelSpacing=None,
        ImageOrientationPatient=None,
        SliceThickness=None,
    )
    header.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=[0.8, 0.5], SliceThickness=2.0)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        )
    ]
    header.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[0.0, 0.0, 3.0 * frame])]) for frame in range(count)
    ]
    return header


def test_frames_are_slices(predict, model, tmp_path):
    path = save(multi_frame(), tmp_path / "enhanced.dcm")
    (row,) = predict(path, "--slices=1:")
    seg = highdicom.seg.segread(tmp_path / "out" / "enhanced.seg.dcm")
    instance = pydicom.dcmread(path).SOPInstanceUID
    frames = [2, 3, 4]  # counted from 1
    planes = seg.get_pixels_by_source_frame(
        instance, frames, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    found = 0
    for index, frame in enumerate(frames):
        wanted = expected(model, read_image(f"{path}#frame={frame - 1}"))["mask"]
        np.testing.assert_array_equal(planes[index, :, :, 0] > 0, wanted)
        found += wanted.sum()
    assert float(row["found_ml"]) == pytest.approx(found * 0.4 * 3 / 1000, abs=1e-3)


def test_what_an_input_lacks_for_a_seg_is_noted(predict, model, tmp_path):
    lacking = dict.fromkeys(("FrameOfReferenceUID", "ImageOrientationPatient"))
    cine = dicom(stored(3, 30, 44), storage=ULTRASOUND, NumberOfFrames=3, Modality="US", **lacking)
    bare = dicom(stored(3, 30, 44), NumberOfFrames=3, SOPInstanceUID=None, SOPClassUID=None, StudyInstanceUID=None)
    odd = dicom(stored(2, 30, 44), NumberOfFrames=2, FrameOfReferenceUID=None)
    torn = dicom(stored(30, 44), StudyInstanceUID=None)
    paths = {name: tmp_path / f"{name}.dcm" for name in ("cine", "bare", "odd", "torn")}
    for path, header in zip(paths.values(), (cine, bare, odd, torn), strict=True):
        save(header, path)
    rows = {row["name"]: row for row in predict(*paths.values())}
    for row in rows.values():
        assert "no DICOM SEG" in row["note"]
        assert "attribute" not in row["note"]  # not what Python says
        assert ".seg.dcm" not in row["files"]
    assert "StudyInstanceUID" in rows["torn"]["note"]
    for name in ("cine", "bare"):
        with np.load(tmp_path / "out" / f"{name}.npz") as saved:
            for frame in range(3):
                wanted = expected(model, read_image(f"{paths[name]}#frame={frame}"))
                np.testing.assert_array_equal(saved["mask"][frame] > 0, wanted["mask"])
                np.testing.assert_allclose(saved["uncertainty"][frame], wanted["uncertainty"], atol=1e-5)
    assert (tmp_path / "out" / "torn_mask.png").is_file()


def report() -> pydicom.Dataset:
    made = dicom(stored(2, 2), Modality="SR", Rows=None, Columns=None)
    del made.PixelData
    return made


def test_what_lies_beside_a_series_is_left_out_and_named(predict, tmp_path, capsys):
    """Reports, and the segmentation of an earlier call."""
    write_series(tmp_path / "in")
    predict(tmp_path / "in")
    (tmp_path / "out" / "in.seg.dcm").rename(tmp_path / "in" / "found.dcm")
    save(report(), tmp_path / "in" / "report.dcm")
    (row,), said = predict(tmp_path / "in"), capsys.readouterr().err
    assert "#series=" in row["input"]
    assert all(name in said for name in ("found.dcm", "report.dcm"))


@pytest.mark.filterwarnings("ignore:Invalid value for VR IS")
def test_dicom_that_cannot_be_predicted_is_reported(predict, tmp_path):
    damaged = save(dicom(stored(30, 44), NumberOfFrames=3), tmp_path / "damaged.dcm")
    content = damaged.read_bytes()
    place = content.index(b"IS", content.index(b"\x28\x00\x08\x00")) + 4
    damaged.write_bytes(content[:place] + b"x " + content[place + 2 :])
    enhanced = save(multi_frame(), tmp_path / "enhanced.dcm")
    rows = predict(damaged, enhanced, save(report(), tmp_path / "report.dcm"), "--axis=x", code=1)
    errors = {Path(row["input"]).name: row["error"] for row in rows}
    for name, named in {"damaged.dcm": "damaged.dcm", "enhanced.dcm": "--axis", "report.dcm": "SR"}.items():
        assert named in errors[name]
