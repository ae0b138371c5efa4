"""examples/synthetic_subjects.py and make_brains.py --subjects, on a made-up brain of boxes."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from pvl_adapter.data import SegmentationDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import brain_atlases
import make_brains
import synthetic_subjects

BOXES = {"left thalamus": (40, 130), "right thalamus": (40, 60), "left insula": (90, 130), "right insula": (90, 60)}


@pytest.fixture(scope="module")
def brain() -> brain_atlases.Brain:
    """Nothing but structures, each the brighter part of its slices; the patient's left on the right."""
    z, y, x = np.ogrid[:144, :192, :192]
    places = BOXES.items()
    masks = {name: (abs(z - up) < 18) & (abs(y - 90) < 25) & (abs(x - at) < 20) for name, (up, at) in places}
    slices = np.where(np.any(list(masks.values()), axis=0), 200, 0).astype(np.uint8)
    return brain_atlases.Brain(brain_atlases.HUMAN, slices, masks)


def test_splits_are_by_subject_and_a_subject_is_the_same_however_many_there_are(
    brain: brain_atlases.Brain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(brain_atlases.LOADERS, "Colin27", lambda _: brain)
    for count in (4, 9):
        make_brains.main(make_brains.parse(["Colin27", f"--output={tmp_path / str(count)}", f"--subjects={count}"]))
    few, more = (tmp_path / count / "Colin27_subjects" for count in ("4", "9"))
    hashes = [
        {(path.parent.name, path.name, hashlib.sha256(path.read_bytes()).digest()) for path in folder.rglob("subj*")}
        for folder in (few, more)
    ]
    assert hashes[0] < hashes[1]
    for split, subjects in (("train", [0, 4, 8]), ("val", [1, 2, 5, 6]), ("test", [3, 7])):
        dataset = SegmentationDataset(more, split)
        assert list(dict.fromkeys(row.subject for row in dataset.rows)) == [f"subject_{n:04d}" for n in subjects]
        assert set(SegmentationDataset(few, split).rows) <= set(dataset.rows)
        samples = [dataset[index] for index in range(len(dataset))]
        assert all(sample["name"].startswith(f"{sample['subject']}_axial_") for sample in samples)
        sizes = np.array([sample["mask"].sum() for sample in samples])
        assert (sizes == 0).any()
        assert sizes[sizes > 0].min() >= 30
        for size, row in zip(sizes, dataset.rows, strict=True):  # the structures are at two heights
            number, part = int(row.image[-7:-4]), "thalamus" if "thalamus" in row.mask else "insula"
            assert (size > 0) == ((part == "thalamus") == (number < 65)), row


def test_labels_are_warped_with_the_image_and_sides_are_kept(brain: brain_atlases.Brain) -> None:
    atlas = synthetic_subjects.Atlas("boxes", brain)
    left = []
    for number in range(4):
        image, found, absent = synthetic_subjects.Subject(atlas, number).view(40)
        assert absent == {"left insula", "right insula"}
        both, bright = found["left thalamus"] | found["right thalamus"], image > image.max() / 3
        assert (both & bright).sum() > 0.95 * (both | bright).sum()
        assert np.argwhere(found["right thalamus"])[:, 1].max() < np.argwhere(found["left thalamus"])[:, 1].min()
        left.append(found["left thalamus"])
    assert all((left[0] & other).sum() < 0.95 * (left[0] | other).sum() for other in left[1:])
