"""Slices of synthetic subjects with sentences about what they show, and no masks: what a CLIP learns from.

`make_brains.py --captions N` writes them, of other subjects than `--subjects` does. captions.jsonl has a line for each
slice: its image, its subject, the structures in it, and the sentences that are true of it. Of each structure there are
all wordings of `brains.toml`, so a sentence that is not listed for a slice is not true of it, or about the whole slice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from brain_atlases import DATA, Brain
from brain_rows import LEAST, MADE_BY, Words, describe, write_sentence
from PIL import Image
from synthetic_subjects import SEED, Atlas, Subject

FIRST = 100_000  # number of the first subject; those of --subjects are counted from 0
SLICES = 8  # of a subject
WHOLE = 3  # sentences about a slice as a whole
PHRASINGS = [  # of a structure in a slice; the last one says only which it is
    *DATA["sentences"]["train"],
    *(text for name, text in DATA["sentences"]["test"].items() if name in ("missing_location", "underdescriptive")),
    "the {name}",
]


def write_captions(folder: Path, name: str, brain: Brain, *, subjects: int) -> None:
    """Write images and sentences of so many subjects of a brain."""
    atlas, count = Atlas(name, brain), 0
    (folder / "img").mkdir(parents=True)
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as file:
        for number in range(FIRST, FIRST + subjects):
            subject = Subject(atlas, number)
            random = np.random.default_rng([SEED, number])
            for z in sorted(map(int, random.permutation(atlas.useful)[:SLICES])):
                image, masks, _ = subject.view(z)
                words = {
                    structure: describe(mask, atlas.places.limits)
                    for structure, mask in masks.items()
                    if mask.sum() >= LEAST
                }
                if not words:
                    continue
                path = f"img/subject_{number}_axial_{z:03d}.png"
                Image.fromarray(image).save(folder / path)
                texts = [
                    write_sentence(phrasing, structure, said)
                    for structure, said in words.items()
                    for phrasing in PHRASINGS
                ]
                texts = list(dict.fromkeys(texts))  # "Thalamus visible." is said of both sides
                whole = [describe_slice(words, random) for _ in range(WHOLE)]
                line = {"image": path, "subject": number, "present": list(words), "whole": whole, "texts": texts}
                file.write(json.dumps(line) + "\n")
                count += 1
    text = f"# {name}\n\n{MADE_BY}\n\n{count} slices of {subjects} synthetic subjects, with sentences and no masks.\n"
    (folder / "README.md").write_text(f"{text}\n{DATA['sources'][name.removesuffix('_captions')]}\n", encoding="utf-8")


def describe_slice(said: Mapping[str, Words], random: np.random.Generator) -> str:
    """A sentence about two or three structures of a slice, in any order."""
    some = [str(name) for name in random.permutation(list(said))[: int(random.integers(2, 4))]]
    start = "axial T1 slice with {}", "brain MRI with {}", "{} in the axial slice"
    parts = [write_sentence("{size} {shape} {name} in the {place}", name, said[name]) for name in some]
    return str(random.choice(start)).format(", ".join(parts))
