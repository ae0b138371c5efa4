"""What examples/make_brains.py asks about a brain: which structure of which slice, and in which words.

Shape alphabet: H W pixels, Z slices from below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from brain_sources import COUNT, SIDES, Brain
from einops import rearrange
from scipy import ndimage
from scipy.spatial import ConvexHull

FRACTIONS = (10, 25, 50)  # % of the training and the validation rows

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
LEAST = 30  # pixels of a structure
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
        present = [(number, structure) for number, structure in pairs if areas[structure][number] >= LEAST]
        seen = {number for number, _ in present}
        absent = [(number, structure) for number, structure in pairs if number in seen and not near[structure][number]]
        count = min(len(absent), round(len(present) * share / (1.0 - share)))
        chosen = {*present, *(absent[index] for index in random.permutation(len(absent))[:count])}
        rows[split] = [make(*pair) for pair in pairs if pair in chosen]
    return rows


def make_tables(split: str, rows: Sequence[Row], random: np.random.Generator) -> dict[str, list[tuple[Row, str]]]:
    """Rows with their sentences, by the names of a split's workbooks."""
    if split == "Test":
        return {
            f"Test_text_{design}": [
                (row, write_sentence(phrasing, *contradict(row.structure, row.words, random)))
                if design == "contradictory"
                else (row, write_sentence(phrasing, row.structure, row.words))
                for row in rows
            ]
            for design, phrasing in TEST_PHRASINGS.items()
        }
    drawn = random.integers(len(PHRASINGS), size=len(rows))
    whole = [
        (row, write_sentence(PHRASINGS[number], row.structure, row.words))
        for row, number in zip(rows, drawn, strict=True)
    ]
    slices = order_slices(rows, random)
    parts = {f"{split}_text_{fraction}": take(whole, slices, fraction) for fraction in FRACTIONS}
    return {f"{split}_text": whole, **parts}


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


def take(table: Sequence[tuple[Row, str]], slices: Sequence[int], fraction: int) -> list[tuple[Row, str]]:
    """The rows of the first slices, as many as come nearest to a fraction in %, but at least one slice's."""
    if not slices:
        return []
    sizes = np.cumsum([sum(row.number == number for row, _ in table) for number in slices])
    taken = set(slices[: int(np.abs(sizes - len(table) * fraction / 100).argmin()) + 1])
    return [(row, sentence) for row, sentence in table if row.number in taken]
