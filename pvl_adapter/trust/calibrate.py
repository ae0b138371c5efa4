"""Calibrates a model on held-out subjects: some teach scores, on the others is counted what may be promised.

Shape alphabet: M cases, n subjects, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pvl_adapter.config import is_int, require
from pvl_adapter.distilled_head import weights_hash, weights_stamp
from pvl_adapter.images import prepare_masks
from pvl_adapter.trust.calibration import Calibration, sampling_arguments
from pvl_adapter.trust.cases import Cases, compare
from pvl_adapter.trust.conformal import Ranks, controlled_level, fewest_subjects, subject_means, tested_level
from pvl_adapter.trust.learning import Labelled, learn
from pvl_adapter.trust.scorer import THRESHOLDS, Scorer

if TYPE_CHECKING:
    from pvl_adapter.segmentation import MedCLIPSeg


def calibrate(
    model: MedCLIPSeg,
    dataset: Any,
    *,
    alpha: float = 0.1,
    by: str | Sequence[str] = "subject",
    learn_share: float = 0.3,
    loss_limit: float = 0.25,
    pixel_limit: float = 0.05,
    confidence: float = 0.9,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
    **sampling: Any,
) -> Calibration:
    """Find what a model may promise; the result becomes `model.calibration`, and is saved and loaded with the model.

    Args:
        model: Trained; its weights are left as they are.
        dataset: A `SegmentationDataset` of subjects that the model was not trained on, or anything that gives such
            samples. Promises hold for subjects like these, asked in sentences like these.
        alpha: What may be missed, wrong or outside, on average over subjects.
        by: What is independent of another: "subject" for the table's column, "image", or one name for each row.
        learn_share: Share of the subjects that scores are learned on; the others calibrate.
        loss_limit: Mean loss (one minus the Dice) that the pairs without abstention shall have at most.
        pixel_limit: Share of wrong pixels that those without abstention shall have at most.
        confidence: Chance with which these two limits hold.
        batch_size: Pairs that are predicted at a time.
        seed: Of the split; noise is seeded as in `predict`.
        progress: Show a progress bar.
        sampling: Arguments of `model.predict`: num_samples, antithetic, threshold. Promises hold for these alone.

    Raises:
        ValueError: If an argument is out of range; if there are too few subjects for alpha, or no row has anything to
            find; if it is not known whose the rows are; or if the network's output holds NaN.
        ModuleNotFoundError: If the extra `trust` is not installed.
    """
    for name, value in {"alpha": alpha, "loss_limit": loss_limit, "pixel_limit": pixel_limit}.items():
        require(0.0 < value < 1.0, name, value, "a share between 0 and 1")
    require(0.0 < confidence < 1.0, "confidence", confidence, "a chance between 0 and 1")
    require(0.0 < learn_share < 1.0, "learn_share", learn_share, "a share of the subjects between 0 and 1")
    require(is_int(batch_size) and batch_size > 0, "batch_size", batch_size, "1 or more")
    if unknown := sorted(sampling.keys() - {"num_samples", "antithetic", "threshold", "memory_budget"}):
        raise ValueError(f"got {unknown}, expected num_samples, antithetic, threshold or memory_budget of predict")
    if find_spec("mapie") is None:
        raise ModuleNotFoundError('mapie not installed: pip install "pvl-adapter[trust]"')
    subjects = _subjects(dataset, by)
    names = np.random.default_rng(seed).permutation(sorted(set(subjects)))
    few = round(learn_share * len(names))
    least = fewest_subjects(alpha)
    if len(names) - few < least or few < 3:
        raise ValueError(
            f"got {len(names)} subjects, of which {few} to learn from, expected at least 3 of those and {least} more "
            f"for alpha={alpha}; add subjects, or take a larger alpha"
        )
    learned, choosing = names[: few - few // 3], names[few - few // 3 : few]
    parts = [np.flatnonzero(np.isin(subjects, part)) for part in (learned, choosing, names[few:])]

    distilled = sampling.get("num_samples") == "distilled"

    from tqdm import tqdm

    with tqdm(total=len(subjects), unit="row", desc="calibrating", disable=not progress) as bar:

        def labelled(rows: np.ndarray) -> Labelled:
            samples = [dataset[int(row)] for row in rows]
            prediction = model.predict(
                [each["image"] for each in samples], [each["text"] for each in samples], **sampling
            )
            truth = prepare_masks([each["mask"] for each in samples], size=model.image_size)
            bar.update(len(rows))
            return prediction, truth, [subjects[row] for row in rows], [each["text"] for each in samples]

        first, second = ([labelled(rows) for rows in _batches(part, batch_size)] for part in parts[:2])
        if not all(any(truth.any() for _, truth, *_ in part) for part in (first, second)):
            raise ValueError(
                f"the masks of all {len(parts[0]) + len(parts[1])} rows to learn from are empty, expected some with "
                "something to find"
            )
        scorer = learn(first, second, alpha=alpha, loss_limit=loss_limit, pixel_limit=pixel_limit)
        del first, second
        cases = Cases.join([compare(scorer, *labelled(rows)) for rows in _batches(parts[2], batch_size)])
    texts = [row.text for row in getattr(dataset, "rows", [])] or [dataset[k]["text"] for k in range(len(subjects))]
    tokens = [model.tokenize(texts[first : first + 256]) for first in range(0, len(texts), 256)]
    ids = [each if isinstance(each, torch.Tensor) else each["input_ids"] for each in tokens]
    calibration = from_cases(
        scorer,
        cases,
        alpha=alpha,
        loss_limit=loss_limit,
        pixel_limit=pixel_limit,
        confidence=confidence,
        weights=weights_hash(model, distilled=distilled),
        sampling=sampling_arguments(**sampling),
        facts={"dataset": str(getattr(dataset, "location", type(dataset).__name__)), "learned_on": few},
        tokens=frozenset(int(token) for each in ids for token in torch.unique(each)),
    )
    calibration.stamp = weights_stamp(model, distilled=distilled)
    model.calibration = calibration
    return calibration


def from_cases(
    scorer: Scorer,
    cases: Cases,
    *,
    alpha: float,
    loss_limit: float,
    pixel_limit: float,
    confidence: float,
    weights: str = "",
    sampling: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    tokens: frozenset[int] = frozenset(),
) -> Calibration:
    """What may be promised after these cases; arguments as `Calibration` has them.

    Raises:
        ValueError: If there is nothing to find in any case, or too few subjects have something.
    """
    found, absent = cases[cases.present], cases[~cases.present]
    count, least = len(set(found.subjects)), fewest_subjects(alpha)
    if count < least:
        raise ValueError(
            f"got {count} subjects with anything to find, expected at least {least} for alpha={alpha}; add subjects, "
            "or take a larger alpha"
        )
    outer = controlled_level(subject_means(found.missed, found.subjects), alpha)
    inner = controlled_level(subject_means(cases.wrong[:, ::-1], cases.subjects), alpha)
    loss, pixel = (
        tested_level(subject_means(losses, cases.subjects), limit, start=start, confidence=confidence)
        for losses, limit, start in (
            (cases.pair_losses(loss_limit), loss_limit, scorer.loss_start),
            (cases.pixel_losses(pixel_limit), pixel_limit, scorer.pixel_start),
        )
    )
    rising, falling = THRESHOLDS.tolist(), THRESHOLDS.flip(0).tolist()
    true, expected, error = cases.area.T
    return Calibration(
        alpha=alpha,
        confidence=confidence,
        weights=weights,
        sampling=sampling or {},
        facts={
            **(facts or {}),
            "subjects": len(set(cases.subjects)),
            "cases": len(cases),
            "present": len(found),
            "mean_dice_loss": float(found.loss.mean()),
            "outer_area_over_truth": float(found.outer_area[:, outer].sum() / found.area[:, 0].sum()),
            "inner_share_of_truth": float(found.found[:, ::-1][:, inner].mean()) if inner >= 0 else 0.0,
            "kept": float((cases.risk < rising[loss]).mean()) if loss >= 0 else 0.0,
        },
        scorer=scorer,
        outer_threshold=rising[outer] if outer >= 0 else None,
        inner_threshold=falling[inner] if inner >= 0 else None,
        absent=_ranks(absent.presence, absent.subjects, least),
        present=_ranks(-found.presence, found.subjects, least),
        area_factor=_finite(Ranks.of(np.abs(true - expected) / error, cases.subjects).quantile(alpha)),
        volume_factor=_volume_factor(cases, alpha),
        loss_limit=loss_limit,
        loss_threshold=rising[loss] if loss >= 0 else None,
        pixel_limit=pixel_limit,
        pixel_threshold=(1.0 - falling[pixel]) * float(np.log(2.0)) if pixel >= 0 else None,
        familiar=Ranks.of(cases.distance, cases.subjects),
        tokens=tokens,
    )


def _volume_factor(cases: Cases, alpha: float) -> float | None:
    """Of sums over the slices of one subject and sentence; None without such."""
    volumes, index, count = np.unique(
        np.stack([cases.subjects, cases.texts]), axis=1, return_inverse=True, return_counts=True
    )
    sums = np.zeros((len(count), 3))
    np.add.at(sums, index.ravel(), cases.area)
    several = count > 1
    if not several.any():
        return None
    off = np.abs(sums[:, 0] - sums[:, 1]) / sums[:, 2]
    return _finite(Ranks.of(off[several], volumes[0][several]).quantile(alpha))


def _ranks(scores: np.ndarray, subjects: np.ndarray, least: int) -> Ranks | None:
    return Ranks.of(scores, subjects) if len(set(subjects)) >= least else None


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


def _batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _subjects(dataset: Any, by: str | Sequence[str]) -> list[str]:
    """Whose each row is."""
    if not isinstance(by, str):
        require(len(by) == len(dataset), "number of names in by", len(by), f"one for each of {len(dataset)} rows")
        return [str(name) for name in by]
    require(by in ("subject", "image"), "by", by, '"subject", "image", or one name for each row')
    if (rows := getattr(dataset, "rows", None)) is not None:
        subjects = [getattr(row, by) for row in rows]
    else:
        samples = (dataset[index] for index in range(len(dataset)))
        subjects = [sample.get("subject" if by == "subject" else "name", "") for sample in samples]
    if not all(subjects):
        raise ValueError(
            f"whose {subjects.count('')} of {len(subjects)} rows are is not known: the table has no column Subject; "
            'add one, or say by="image" if every image is of another subject, or give by=[one name for each row]'
        )
    return subjects
