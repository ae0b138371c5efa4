"""Synthetic subjects of one brain: warped, unevenly lit, of another contrast and with noise, their labels warped alike.

`make_brains.py --subjects N` writes them. Every subject's parameters are independent draws from the same distributions,
so subjects are exchangeable: what is promised of a new subject after calibration on others can be tested exactly. They
are no population of patients: all have one anatomy and no disease, so results say nothing of clinical worth.

A subject follows from the name of the brain and its own number, whatever the count of subjects is. Its split follows
from the number alone: of four subjects one is to train on, two to calibrate on (Val), one to test on.

The words for an absent structure are those of a random slice that has it. Those of the nearest slice, as in the other
datasets, would nearly always say "small", which tells absent structures without a look at the image.

Warps are in pixels, which are 1 mm in a human brain. Only the slices that are written are warped, not whole volumes.

Shape alphabet: H W pixels, Z slices from below, K control points along an axis.
"""

from __future__ import annotations

import zlib
from collections import Counter
from functools import cache, partial
from pathlib import Path

import numpy as np
from brain_atlases import COUNT, DATA, SIZE, Brain
from brain_rows import LEAST, MADE_BY, NEAR, Places, Row, describe, draw_overview, make_folders, save_mask, write_tables
from PIL import Image
from scipy import ndimage
from scipy.interpolate import make_interp_spline
from scipy.spatial.transform import Rotation

SEED = 0
SPLITS = ("Train", "Val", "Val", "Test")  # of the subjects 0, 1, 2, 3, then again from the start
COUNTS = {"Train": (3, 3, 1), "Val": (3, 4, 2), "Test": (3, 4, 2)}  # slices of a subject; rows of each: present, absent
PANELS = 36  # of overview.png

# Standard deviations, unless another meaning is given.
SCALE, STRETCH = (0.95, 0.04), 0.03  # mean and deviation of the size; of each axis apart
ROTATION, SHIFT = 4.0, 3.0  # degrees, pixels
WARPS = ((5, 4.0), (9, 1.5))  # control points along each axis, pixels
BIAS = (4, 0.15)  # control points along each axis, of the log of the brightness
TONES = (6, 0.35)  # parts of the tone curve, of the log of each part's slope
WHITE, NOISE = (0.75, 1.0), (0.01, 0.05)  # least and most: the brightest grey, and the noise's deviation


class Atlas:
    """A brain to draw subjects from.

    Attributes:
        places: Where its structures are.
        slices: Grey levels from 0 to 1, [Z, H, W].
        labels: One bit per structure, [Z, H, W], as structures overlap.
        near: The same, of the structures within `NEAR` slices.
        useful: The slices with enough of any structure.
    """

    def __init__(self, name: str, brain: Brain) -> None:
        self.name, self.places = name, Places(brain)
        self.slices = brain.slices.astype(np.float32) / 255.0
        self.labels = np.zeros(brain.slices.shape, dtype=np.uint64)
        for bit, structure in enumerate(self.places.enough):
            self.labels |= brain.masks[structure].astype(np.uint64) << np.uint64(bit)
        self.near = self.labels.copy()
        for offset in range(1, NEAR + 1):
            self.near[offset:] |= self.labels[:-offset]
            self.near[:-offset] |= self.labels[offset:]
        self.useful = np.unique(np.concatenate(list(self.places.enough.values())))


class Subject:
    """One synthetic subject; the parameters of all are independent and of one distribution."""

    def __init__(self, atlas: Atlas, number: int) -> None:
        self.atlas, self.number, self.split = atlas, number, SPLITS[number % len(SPLITS)]
        self.random = np.random.default_rng([SEED, zlib.crc32(atlas.name.encode()), number])
        normal = partial(self.random.normal, 0.0)
        scale = np.exp(normal(STRETCH, 3)) * self.random.normal(*SCALE)
        rotation = Rotation.from_euler("zyx", normal(ROTATION, 3), degrees=True).as_matrix()
        self._matrix, self._shift = rotation / scale, normal(SHIFT, 3)  # from the subject's pixels to the atlas's
        self._warps = [normal(deviation, (3, points, points, points)) for points, deviation in WARPS]
        self._bias = normal(BIAS[1], (1, *[BIAS[0]] * 3))
        tones = np.cumsum(np.exp(normal(TONES[1], TONES[0])))
        self._tones = np.append(0.0, tones / tones[-1] * self.random.uniform(*WHITE))
        self._noise = self.random.uniform(*NOISE)

    def view(self, number: int) -> tuple[np.ndarray, dict[str, np.ndarray], set[str]]:
        """Look at a slice.

        Returns:
            The image, uint8, [H, W]; the masks of the structures in the slice, bool, [H, W]; the structures that are
            not in the slice and not near.
        """
        atlas = self.atlas
        middle = (np.array(atlas.slices.shape) - 1) / 2
        z, y, x = (np.arange(size) - half for size, half in zip(atlas.slices.shape, middle, strict=True))
        matrix = self._matrix[:, :, None, None]
        places = (middle + self._shift)[:, None, None] + matrix[:, 0] * z[number]  # [3, 1, 1]
        places = places + matrix[:, 1] * y[:, None] + matrix[:, 2] * x  # [3, H, W]
        places += sum(smooth(control, number) for control in self._warps)
        places = places.clip(0, (2 * middle)[:, None, None])
        nearest = tuple(places.round().astype(np.intp))  # of masks; the image is interpolated at the same places
        image = ndimage.map_coordinates(atlas.slices, places, order=1)
        brain = image > 0
        image = np.interp(image * np.exp(smooth(self._bias, number)[0]), np.linspace(0, 1, TONES[0] + 1), self._tones)
        real, imaginary = self.random.normal(0.0, self._noise, (2, *image.shape))
        image = np.hypot(image + real, imaginary) * brain  # as in magnitude images
        labels, near = atlas.labels[nearest], np.bitwise_or.reduce(atlas.near[nearest], axis=None)
        bits = {structure: np.uint64(1 << bit) for bit, structure in enumerate(atlas.places.enough)}
        masks = {structure: (labels & bit) > 0 for structure, bit in bits.items()}
        found = {structure: mask for structure, mask in masks.items() if mask.any()}
        absent = {structure for structure, bit in bits.items() if not near & bit}
        return (255 * image.clip(0, 1)).round().astype(np.uint8), found, absent

    def slices(self) -> list[tuple[np.ndarray, dict[str, np.ndarray], list[Row]]]:
        """Its chosen slices, from below: the image, the masks and the rows."""
        slices, present, absent = COUNTS[self.split]
        chosen = []
        for number in map(int, self.random.permutation(self.atlas.useful)):
            image, masks, missing = self.view(number)
            enough = [structure for structure, mask in masks.items() if mask.sum() >= LEAST]
            if not enough:
                continue
            some = [str(name) for name in self.random.permutation(enough)[:present]]
            others = [str(name) for name in self.random.permutation(sorted(missing))[:absent]]
            words = {name: describe(masks[name], self.atlas.places.limits) for name in some}
            for name in others:
                words[name] = self.atlas.places.words(name, self.random.choice(self.atlas.places.enough[name]))
            chosen.append((image, masks, [Row(number, name, words[name], self.number) for name in [*some, *others]]))
            if len(chosen) == slices:
                break
        return sorted(chosen, key=lambda slice_: slice_[2][0].number)


@cache
def basis(points: int, count: int) -> np.ndarray:
    """Cubic splines through control points along an axis: their shares at each of `count` pixels, [count, K]."""
    spline = make_interp_spline(np.linspace(0, count - 1, points), np.eye(points), k=3, bc_type="natural")
    return np.asarray(spline(np.arange(count)))


def smooth(control: np.ndarray, number: int) -> np.ndarray:
    """A slice of smooth fields, [C, H, W], from their values at control points, [C, K, K, K]."""
    points = control.shape[-1]
    plane = np.einsum("k,ckyx->cyx", basis(points, COUNT)[number], control)  # [C, K, K]
    across = basis(points, SIZE)
    return np.asarray(across @ plane @ across.T)


# ---- files ----------------------------------------------------------------------------------------------------------


def write_subjects(folder: Path, name: str, brain: Brain, *, subjects: int) -> None:
    """Write a dataset of the first subjects of a brain."""
    atlas, panels = Atlas(name, brain), []
    rows: dict[str, list[Row]] = {split: [] for split in COUNTS}
    folders = {split: make_folders(folder, split) for split in COUNTS}
    empty: Counter[str] = Counter()
    for number in range(subjects):
        subject = Subject(atlas, number)
        images, labels = folders[subject.split]
        for image, masks, chosen in subject.slices():
            Image.fromarray(image).save(images / chosen[0].image)
            for row in chosen:
                save_mask(labels / row.mask, masks.get(row.structure, np.zeros_like(image)))
                empty[subject.split] += row.structure not in masks
            rows[subject.split] += chosen
            if len(panels) < PANELS:
                first = chosen[0]
                panels.append((image, masks[first.structure], f"{number:04d}, {first.number:03d}: {first.structure}"))
    for index, (split, chosen) in enumerate(rows.items()):
        write_tables(folder, split, chosen, np.random.default_rng([SEED, index]))
    (folder / "README.md").write_text(describe_subjects(name, brain, rows, empty), encoding="utf-8")
    draw_overview(folder / "overview.png", panels)


def describe_subjects(name: str, brain: Brain, rows: dict[str, list[Row]], empty: Counter[str]) -> str:
    """The text of README.md."""
    counts = {split: Counter(row.structure for row in chosen) for split, chosen in rows.items()}
    table = [
        ["", *rows],
        ["---"] * (1 + len(rows)),
        ["subjects", *(len({row.subject for row in chosen}) for chosen in rows.values())],
        ["slices", *(len({row.image for row in chosen}) for chosen in rows.values())],
        *([f"rows: {structure}", *(count[structure] for count in counts.values())] for structure in brain.masks),
        ["all rows", *map(len, rows.values())],
        ["of these with an empty mask (absent structure)", *(empty[split] for split in rows)],
    ]
    return f"""# {name}

{MADE_BY}

Synthetic subjects of one brain: smoothly warped at random, unevenly lit, of another contrast and with noise; labels are
warped alike. Subjects are independent draws from one distribution, so they are exchangeable. That lets the validity of
calibrated promises be tested. It says nothing of clinical worth: all subjects have one anatomy, and none is ill.

Splits are by subject, from its number alone: of four subjects one is to train on, two are for validation or
calibration, one is to test on. The tables' column Subject says whose a row is.

{DATA["sources"][name.removesuffix("_subjects")]}

Axial T1 slices, {SIZE} x {SIZE} pixels of {brain.grid.pixel:g} mm before the warp. The front of the head is up; the
patient's LEFT is on the image's RIGHT, as radiologists view it. Sides in names (left hippocampus) are the patient's,
places (bottom right) are the image's. The NNN of axial_NNN counts slices from below. A row is absent if its structure
is not within {NEAR} slices; its words are those of a random slice that has it.

""" + "".join(f"| {' | '.join(map(str, line))} |\n" for line in table)
