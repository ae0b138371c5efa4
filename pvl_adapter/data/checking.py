"""Every fault of some datasets at once, before hours are spent on them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from pvl_adapter.data.dataset import Sample, SegmentationDataset
from pvl_adapter.data.issues import DatasetIssue, one_line

NOTHING = frozenset(
    ("no", "not", "none", "nothing", "without", "absent", "absence", "free", "negative", "normal", "healthy")
)
"""A sentence with one of these words may well have an empty mask; any other is taken to state a finding."""


def check_datasets(
    datasets: Sequence[SegmentationDataset],
    *,
    progress: bool = True,
    visit: Callable[[int, int, Sample], object] | None = None,
) -> list[DatasetIssue]:
    """Read every row of every dataset once, and report everything that is wrong.

    Fatal are tables, rows, pictures and masks that are missing, cannot be read or do not fit together, and a dataset
    without rows unless it is for validation. Worth a look are an empty mask though the sentence states a finding (has
    none of the words of `NOTHING`), a picture that is in two splits, and a row that is repeated.

    Args:
        datasets: Splits of one dataset or of several.
        progress: Show a bar.
        visit: Called as `visit(dataset_index, row_index, sample)` for every sound row, in order, so that what was read
            can be kept.

    Returns:
        In the order of datasets and rows; raise them as `DatasetError(faults)` if any is fatal.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    faults: list[DatasetIssue] = []
    splits: dict[bytes, dict[str, str]] = {}  # where a picture was seen, by its content and then by split
    with tqdm(total=sum(map(len, datasets)), desc="checking data", unit="row", disable=not progress) as bar:
        for number, dataset in enumerate(datasets):
            faults += dataset.faults
            if not len(dataset) and not any(fault.fatal or dataset.split == "val" for fault in dataset.faults):
                problem = f"table has no rows: {dataset.table}"
                fix = "go on without validation, or fill it" if dataset.split == "val" else "fill it"
                faults.append(DatasetIssue(dataset.place, problem, fix, fatal=dataset.split != "val"))
            for index in range(len(dataset)):
                sample, found = dataset.read(index)
                bar.update()
                faults += found
                if sample is None:
                    continue
                faults += _doubts(dataset, index, sample, splits)
                if visit is not None:
                    visit(number, index, sample)
    return faults


def _doubts(
    dataset: SegmentationDataset, index: int, sample: Sample, splits: dict[bytes, dict[str, str]]
) -> list[DatasetIssue]:
    """What is odd about a sound sample, and no error."""
    faults = []
    place = dataset.place_of(index)
    if not sample.mask.any() and not NOTHING & set(re.findall(r"[a-z]+", sample.text.lower())):
        problem = f"mask is empty: the text states a finding, {one_line(sample.text)[:60]!r}"
        fix = "see whether the mask is right; a text that says there is none has a word like 'no' or 'without'"
        faults.append(DatasetIssue(place, problem, fix, fatal=False))
    if np.ptp(sample.image) == 0:  # slices outside of the body are all alike
        return faults
    digest = hashlib.blake2b(str(sample.image.shape).encode(), digest_size=16)
    digest.update(sample.image.data)
    seen = splits.setdefault(digest.digest(), {})
    split = dataset.split or str(dataset.table)
    if split not in seen:
        seen[split] = place
        if others := [other for other in seen if other != split]:
            problem = f"picture is in two splits: also as {seen[others[0]]}"
            faults.append(DatasetIssue(place, problem, "remove it from one, or scores will be too good", fatal=False))
    return faults
