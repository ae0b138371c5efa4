"""The published MedCLIPSeg checkpoints: what there is, and where.

Source: hub repository TahaKoleilat/MedCLIPSeg; figures from the paper (arXiv 2602.20423) and, for single checkpoints,
from a third party's evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

OFFICIAL_REPO = "TahaKoleilat/MedCLIPSeg"
DEFAULT_CHECKPOINT = "BUSI"
FRACTIONS = (10, 25, 50, 100)
PAPER_DSC = {10: 81.10, 25: 85.08, 50: 87.18, 100: 88.66}
"""The paper's Dice in %, mean over the six datasets, by percentage of the training data."""


@dataclass(frozen=True)
class Dataset:
    """What a group of checkpoints was trained on."""

    name: str  # as in the hub repository
    modality: str
    train_images: dict[int, int]  # by percentage of the data, as far as published
    test_images: int
    dsc: float | None = None  # Dice in % that a third party measured with the 100% checkpoint, if anybody did


DATASETS: tuple[Dataset, ...] = (
    Dataset("BUSI", "breast ultrasound", {10: 62, 25: 156, 50: 312}, 78, 85.00),
    Dataset("BTMRI", "brain MRI", {10: 273, 25: 684, 50: 1369}, 1005, 88.21),
    Dataset("ISIC", "skin", {10: 80, 25: 202, 50: 404}, 379, 92.12),
    Dataset("Kvasir", "endoscopy", {10: 80, 25: 200, 50: 400}, 100, 89.17),
    Dataset("Covid19", "chest X-ray (QaTa-COV19)", {10: 571, 25: 1429, 50: 2858}, 2113),
    Dataset("EUS", "endoscopic ultrasound", {10: 2631, 25: 6579, 50: 13159}, 10090),
)


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint: the dataset it was trained on, and the percentage of its training data."""

    dataset: Dataset
    fraction: int

    @property
    def file(self) -> str:
        """Path within the hub repository."""
        folder = self.dataset.name if self.fraction == 100 else f"{self.dataset.name}_{self.fraction}"
        return f"{folder}/trained_models/seed666/MedCLIPSeg_unimedclip_ViT-B-16_latest.pth"

    @property
    def provenance(self) -> dict[str, object]:
        """Where it comes from, what it was trained on, and the scores that are known."""
        known: dict[str, object] = {"file": self.file, "checkpoint": self.dataset.name, "fraction": self.fraction}
        known["training_data"] = (
            f"{self.fraction}% of the training images of {self.dataset.name} ({self.dataset.modality})."
        )
        if self.fraction == 100 and self.dataset.dsc is not None:
            known["scores"] = {
                f"DSC % on {self.dataset.name}'s test images, as a third party measured it": self.dataset.dsc
            }
        return known


CHECKPOINTS: tuple[Checkpoint, ...] = tuple(
    Checkpoint(dataset, fraction) for dataset in DATASETS for fraction in sorted(FRACTIONS, reverse=True)
)
"""All 24."""


def find_checkpoint(name: str | None = None, *, fraction: int = 100) -> Checkpoint:
    """The published checkpoint of a dataset (in any case of letters) and a percentage of its training data.

    Raises:
        ValueError: If there is none; the message names the nearest.
    """
    names = {dataset.name.lower(): dataset for dataset in DATASETS}
    dataset = names.get((DEFAULT_CHECKPOINT if name is None else name).lower())
    if dataset is None:
        near = get_close_matches(str(name).lower(), names, cutoff=0.4)
        meant = f"did you mean {' or '.join(repr(names[match].name) for match in near)}? " if near else ""
        raise ValueError(
            f"there is no checkpoint {name!r}; {meant}Published are {', '.join(known.name for known in DATASETS)}, "
            f"each with fraction {', '.join(map(str, FRACTIONS))}"
        )
    if fraction not in FRACTIONS:
        raise ValueError(f"fraction is {fraction!r}, expected the percentage of training data, one of {FRACTIONS}")
    return Checkpoint(dataset, int(fraction))  # 50.0 is good too


def list_checkpoints() -> None:
    """Print the published checkpoints, how to load one, and the published scores that are known."""
    print(f'from_pretrained("{OFFICIAL_REPO}", checkpoint=..., fraction=...)\n')
    print(f"{'checkpoint':<11}{'fraction':>8}  {'training images':>15}  {'test images':>11}  {'DSC %':>6}  images")
    for entry in CHECKPOINTS:
        known = entry.dataset
        images = known.train_images.get(entry.fraction, "")
        dsc = "" if entry.fraction < 100 or known.dsc is None else f"{known.dsc:.2f}"
        row = f"{known.name:<11}{entry.fraction:>8}  {images:>15}  {known.test_images:>11}  {dsc:>6}"
        print(f"{row}  {known.modality}")
    means = ", ".join(f"{PAPER_DSC[fraction]:.2f} with {fraction}%" for fraction in FRACTIONS)
    print(f"\nDSC of single checkpoints as a third party measured it. The paper's means over all six: {means}.")
