"""What metrics take: masks, maps and lists of numbers, of NumPy or torch; and the libraries they need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

Map = np.ndarray | Tensor
Values = Sequence[float] | np.ndarray | Tensor


def as_array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return values.double().numpy() if values.is_floating_point() else values.numpy()  # NumPy has no bfloat16
    return np.asarray(values)


def as_masks(prediction: Map, truth: Map) -> tuple[np.ndarray, np.ndarray]:
    one, other = as_array(prediction), as_array(truth)
    check_mask(one)
    check_mask(other)
    check_shapes(one, other)
    return one, other


def check_mask(mask: np.ndarray) -> None:
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(
            f"got a mask of {mask.dtype} with shape {mask.shape}, expected bool [height, width]; of grey levels take "
            "mask > 127"
        )


def check_shapes(one: np.ndarray, other: np.ndarray) -> None:
    if one.shape != other.shape:
        raise ValueError(f"got shapes {one.shape} and {other.shape}, expected the same")


def check_bins(one: np.ndarray, other: np.ndarray) -> None:
    if len(one) != len(other):
        raise ValueError(f"got {len(one)} and {len(other)} bins, expected as many")


def as_numbers(values: Any, name: str, *, most: float = math.inf) -> np.ndarray:
    """As float64; with `most`, between 0 and that."""
    numbers = as_array(values).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds NaN or infinite values, expected finite numbers")
    rounding = 1e-6 * most  # of float32
    if most < math.inf and numbers.size and (numbers.min() < -rounding or numbers.max() > most + rounding):
        raise ValueError(f"{name} is from {numbers.min():g} to {numbers.max():g}, expected 0 to {most:.4g}")
    return numbers.clip(0.0, most) if most < math.inf else numbers


def bin_of(values: np.ndarray, *, bins: int, most: float) -> np.ndarray:
    """Which bin each is in, the upper end in the last: [pixels]."""
    return np.minimum(np.floor(values.ravel() * (bins / most)), bins - 1).astype(np.int64)


@contextmanager
def of_the_extra() -> Iterator[None]:
    """Imports within say what is to be installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is not installed: pip install "pvl-adapter[metrics]"', name=error.name
        ) from error
