"""How far a mean may be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pvl_adapter.metrics.inputs import Values, as_numbers, of_the_extra


def bootstrap_interval(
    values: Values, *, groups: Sequence[object] | None = None, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: One number for each case.
        groups: Which cases belong together, as the sentences about one picture do: they are drawn together. None
            takes each for itself.
        level: Of the interval.
        seed: Of the drawing.

    Returns:
        Lower and upper end; of a single case or group, its mean twice.

    Raises:
        ValueError: If there are no values, some are not finite, or there are not as many groups.
    """
    with of_the_extra():
        from scipy.stats import bootstrap  # type: ignore[import-untyped]

    numbers = as_numbers(values, "values").ravel()
    if not len(numbers) or (groups is not None and len(groups) != len(numbers)):
        raise ValueError(
            f"got {len(numbers)} values and {'no' if groups is None else len(groups)} groups, expected one or more "
            "values, and a group for each or none"
        )
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}, expected a number between 0 and 1")
    numbering: dict[object, int] = {}
    members = range(len(numbers)) if groups is None else groups
    index = np.array([numbering.setdefault(member, len(numbering)) for member in members])
    total, count = np.bincount(index, weights=numbers), np.bincount(index)
    if len(count) == 1:
        return float(numbers.mean()), float(numbers.mean())
    drawn = bootstrap(
        (total, count),
        lambda total, count, axis: total.sum(axis=axis) / count.sum(axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=level,
        method="percentile",
        batch=max(1, 2_000_000 // len(count)),  # draws at a time
        rng=np.random.default_rng(seed),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)
