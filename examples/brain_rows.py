"""Rows of a dataset of brains: a slice, a structure and a sentence about it; and the tables and pictures of them.

Shape alphabet: H W pixels, Z slices from below.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from brain_atlases import DATA, SIDES, SIZE, Brain
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image
from scipy.spatial import ConvexHull

MADE_BY = "Made by examples/make_brains.py of pvl-adapter."
LEAST = 30  # pixels of a structure
NEAR = 3  # slices
FRACTIONS = (10, 25, 50)  # % of the training and the validation rows

# ---- sentences ------------------------------------------------------------------------------------------------------

SIZES = ("small", "medium", "large")
CELLS = [(row, column) for row in range(3) for column in range(3)]


@dataclass(frozen=True)
class Words:
    """What a sentence says of a mask: one of `SIZES`, a shape, and the row and column of a grid of 3 x 3."""

    size: str
    shape: str
    cell: tuple[int, int]


def describe(mask: np.ndarray, limits: Sequence[float]) -> Words:
    """Args: mask: Bool, [H, W]. limits: Up to which number of pixels a structure is small, and medium."""
    row, column = (3 * np.argwhere(mask).mean(axis=0) / mask.shape).astype(int).clip(0, 2)
    return Words(SIZES[int(np.searchsorted(limits, mask.sum()))], shape_of(mask), (int(row), int(column)))


def shape_of(mask: np.ndarray) -> str:
    points = np.argwhere(mask)
    corners = rearrange(points[:, None] + [[0, 0], [0, 1], [1, 0], [1, 1]], "n corner yx -> (n corner) yx")
    solidity = len(points) / ConvexHull(corners).volume  # in two dimensions the "volume" is the area
    shorter, longer = np.sqrt(np.linalg.eigvalsh(np.cov(points.T) + np.eye(2) / 12))
    if solidity < 0.7:
        return "irregular"
    return "round" if shorter > 0.75 * longer else "oval" if shorter > 0.45 * longer else "elongated"


def write_sentence(phrasing: str, structure: str, words: Words) -> str:
    vertical, horizontal = ("top", "", "bottom")[words.cell[0]], ("left", "", "right")[words.cell[1]]
    place = f"{vertical} {horizontal}".strip() or "center"
    part = structure.removeprefix("left ").removeprefix("right ").capitalize()
    return phrasing.format(size=words.size, shape=words.shape, name=structure, part=part, place=place)


def contradict(structure: str, words: Words, random: np.random.Generator) -> tuple[str, Words]:
    """The other side, another size, and the cell across the image; from the center, any other."""
    first, _, rest = structure.partition(" ")
    if first in SIDES:
        structure = f"{SIDES[1 - SIDES.index(first)]} {rest}"
    size = str(random.choice([size for size in SIZES if size != words.size]))
    others = [cell for cell in CELLS if cell != (1, 1)]
    drawn = others[random.integers(len(others))]
    row, column = words.cell
    return structure, Words(size, words.shape, drawn if words.cell == (1, 1) else (2 - row, 2 - column))


# ---- rows and tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One slice, one structure; the structure may be absent."""

    number: int
    structure: str
    words: Words
    subject: int | None = None

    @property
    def name(self) -> str:
        """Of the subject; empty if there is but one."""
        return "" if self.subject is None else f"subject_{self.subject:04d}"

    @property
    def image(self) -> str:
        return f"{self.name}{'_' * bool(self.name)}axial_{self.number:03d}.png"

    @property
    def mask(self) -> str:
        return f"{self.image.removesuffix('.png')}_{self.structure.replace(' ', '_')}.png"

    @property
    def group(self) -> int:
        """What no fraction of a table divides: the subject, or of a single one the slice."""
        return self.number if self.subject is None else self.subject


class Places:
    """In which slices of a brain its structures are, and the words for them.

    Attributes:
        areas: Pixels of each structure in each slice, [Z].
        enough: The slices with `LEAST` or more of them, in order; structures without such a slice are left out.
        limits: Up to how many pixels a structure is small, and medium.
    """

    def __init__(self, brain: Brain) -> None:
        self.areas = {structure: mask.sum(axis=(1, 2)) for structure, mask in brain.masks.items()}
        slices = {structure: np.flatnonzero(area >= LEAST) for structure, area in self.areas.items()}
        self.enough = {structure: numbers for structure, numbers in slices.items() if len(numbers)}
        areas = [self.areas[structure][numbers] for structure, numbers in self.enough.items()]
        self.limits = np.quantile(np.concatenate(areas), [1 / 3, 2 / 3])
        self._describe = cache(lambda structure, number: describe(brain.masks[structure][number], self.limits))

    def words(self, structure: str, number: int) -> Words:
        """Words for a structure in a slice, or in the nearest one with enough of it."""
        words: Words = self._describe(structure, int(min(self.enough[structure], key=lambda z: abs(int(z) - number))))
        return words


def make_tables(split: str, rows: Sequence[Row], random: np.random.Generator) -> dict[str, list[tuple[Row, str]]]:
    """Rows with their sentences, by the names of a split's tables."""
    if split == "Test":
        tables: dict[str, list[tuple[Row, str]]] = {}
        for design, phrasing in DATA["sentences"]["test"].items():
            said = [(row.structure, row.words) for row in rows]
            if design == "contradictory":
                said = [contradict(structure, words, random) for structure, words in said]
            sentences = [write_sentence(phrasing, structure, words) for structure, words in said]
            tables[f"Test_text_{design}"] = list(zip(rows, sentences, strict=True))
        return tables
    phrasings = DATA["sentences"]["train"]
    drawn = random.integers(len(phrasings), size=len(rows))
    whole = [
        (row, write_sentence(phrasings[number], row.structure, row.words))
        for row, number in zip(rows, drawn, strict=True)
    ]
    groups = order_groups(rows, random)
    return {f"{split}_text": whole, **{f"{split}_text_{part}": take(whole, groups, part) for part in FRACTIONS}}


def order_groups(rows: Sequence[Row], random: np.random.Generator) -> list[int]:
    """Slices or subjects, each next one that with most of what the ones before it have least of."""
    structures: dict[int, list[str]] = {group: [] for group in sorted({row.group for row in rows})}
    left = [int(group) for group in random.permutation(list(structures))]
    for row in rows:
        structures[row.group].append(row.structure)
    covered: Counter[str] = Counter()
    ordered = []
    while left:
        best = max(left, key=lambda group: sum(1.0 / (1 + covered[name]) ** 2 for name in structures[group]))
        left.remove(best)
        ordered.append(best)
        covered.update(structures[best])
    return ordered


def take(table: Sequence[tuple[Row, str]], groups: Sequence[int], fraction: int) -> list[tuple[Row, str]]:
    """The rows of the first groups, as many as come nearest to a fraction in %, but at least one group's."""
    if not groups:
        return []
    count = Counter(row.group for row, _ in table)
    sizes = np.cumsum([count[group] for group in groups])
    taken = set(groups[: int(np.abs(sizes - len(table) * fraction / 100).argmin()) + 1])
    return [(row, sentence) for row, sentence in table if row.group in taken]


# ---- files ----------------------------------------------------------------------------------------------------------


def make_folders(folder: Path, split: str) -> tuple[Path, Path]:
    """The new folders of a split's images and masks; that of the tables is made too."""
    (folder / "Prompts_Folder").mkdir(parents=True, exist_ok=True)
    images, labels = (folder / f"{split}_Folder" / part for part in ("img", "label"))
    images.mkdir(parents=True)
    labels.mkdir()
    return images, labels


def save_mask(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def write_tables(folder: Path, split: str, rows: Sequence[Row], random: np.random.Generator) -> None:
    """Write a split's tables, with a column Subject if rows have subjects."""
    header = ("Image", "Description", "Ground Truth", "Subject")[: 3 + any(row.name for row in rows)]
    for stem, table in make_tables(split, rows, random).items():
        with (folder / "Prompts_Folder" / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
            lines = [(row.image, sentence, row.mask, row.name)[: len(header)] for row, sentence in table]
            csv.writer(file).writerows([header, *lines])


def draw_overview(path: Path, panels: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> None:
    """Draw images with the outline of a mask in each, and a title above it.

    Args:
        path: Of the PNG.
        panels: Image, [H, W] in uint8; mask, [H, W]; title.
    """
    across, title, down = 6, 20, -(-len(panels) // 6)  # panels in a row, pixels above each, rows of panels
    sheet = np.zeros((down * (SIZE + title), across * SIZE), dtype=np.uint8)  # one panel for all: axes are slow
    outlined = np.zeros(sheet.shape, dtype=bool)
    figure = Figure(figsize=(sheet.shape[1] / 100, sheet.shape[0] / 100))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    for index, (image, mask, text) in enumerate(panels):
        top, left = index // across * (SIZE + title) + title, index % across * SIZE
        panel = slice(top, top + SIZE), slice(left, left + SIZE)
        sheet[panel], outlined[panel] = image, mask
        axes.text(left + 4, top - 5, text, color="white", fontsize=7)
        for side, column in (("R", 4), ("L", SIZE - 10)):
            axes.text(left + column, top + SIZE / 2, side, color="yellow", fontsize=7)
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=255)
    axes.contour(outlined, levels=[0.5], colors="red", linewidths=0.7)
    axes.axis("off")
    figure.savefig(path, dpi=130, metadata={"Software": None})
