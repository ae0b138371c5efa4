"""Every issue of some datasets at once, before hours are spent on them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from pvl_adapter.data.dataset import SegmentationDataset
from pvl_adapter.data.issues import DatasetError, DatasetIssue

NOTHING = {"no", "not", "none", "nothing", "without", "absent", "absence", "free", "negative", "normal", "healthy"}
"""A sentence with one of these words may well have an empty mask; any other is taken to state a finding."""


def check_datasets(datasets: Sequence[SegmentationDataset], *, progress: bool = True) -> list[DatasetIssue]:
    """Read every row of every dataset once, and list everything that is wrong; a bar shows the progress.

    Fatal are images and masks that are missing, cannot be read or differ in size. Warnings are those of the tables, an
    empty mask though the sentence states a finding (has none of the words of `NOTHING`), and an image that is in two
    splits. A table that is missing or faulty is an error before: the dataset cannot be made.

    Returns:
        In the order of datasets and rows; raise `DatasetError(issues)` if any is fatal.
    """
    from tqdm import tqdm

    issues: list[DatasetIssue] = []
    seen: dict[bytes, dict[str, str]] = {}  # where an image was seen, by its content and then by split
    with tqdm(total=sum(map(len, datasets)), desc="checking data", unit="row", disable=not progress) as bar:
        for dataset in datasets:
            issues += dataset.issues
            for index in range(len(dataset)):
                try:
                    issues += _warnings(dataset, index, seen)
                except DatasetError as error:
                    issues += error.issues
                bar.update()
    return issues


def _warnings(dataset: SegmentationDataset, index: int, seen: dict[bytes, dict[str, str]]) -> list[DatasetIssue]:
    issues, sample, location = [], dataset.read(index), dataset.locate(index)
    image, text = np.asarray(sample["image"]), sample["text"]
    if not np.any(sample["mask"]) and not NOTHING & set(re.findall(r"[a-z]+", text.lower())):
        detail = f"the text states a finding, {text[:60]!r}; correct one of them (a text with no, without, ... fits)"
        issues.append(DatasetIssue(location, "mask is empty", detail, fatal=False))
    if np.ptp(image) == 0:  # slices outside of the body are all alike
        return issues
    digest = hashlib.blake2b(str(image.shape).encode() + image.tobytes(), digest_size=16).digest()
    split, places = dataset.split or str(dataset.table), seen.setdefault(digest, {})
    if places and split not in places:
        detail = f"also as {next(iter(places.values()))}; remove it from one, or scores will be too good"
        issues.append(DatasetIssue(location, "image is in two splits", detail, fatal=False))
    places.setdefault(split, location)
    return issues
