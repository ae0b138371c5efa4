"""What is wrong with a dataset, in words that name the place and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

_SHOWN = 3  # faults of one kind, in an error message


@dataclass(frozen=True)
class DatasetIssue:
    """One thing that is wrong.

    Attributes:
        place: Where, as "BUSI/train line 12 (case_07.png)".
        problem: What, its kind before the first colon: "image is missing: img/case_07.png".
        fix: What to do.
        fatal: Whether training or testing would fail or be wrong; otherwise it is worth a look.
    """

    place: str
    problem: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        return one_line(f"{self.place}: {self.problem}; {self.fix}")


class DatasetError(ValueError):
    """A dataset that cannot be used; the message lists its fatal faults, those of one kind together.

    Attributes:
        faults: All that were found.
    """

    def __init__(self, faults: Iterable[DatasetIssue]) -> None:
        if isinstance(cast(object, faults), str):  # PyTorch tries that with errors of its loaders' workers
            raise TypeError("got a message, expected faults")
        self.faults = list(faults)
        super().__init__(_summary([fault for fault in self.faults if fault.fatal]))

    def __reduce__(self) -> tuple[Callable[..., DatasetError], tuple[list[DatasetIssue]]]:
        return type(self), (self.faults,)


class ReadError(ValueError):
    """A file that cannot be read, or does not hold what it should.

    Attributes:
        problem: What is wrong, as in a `DatasetIssue`.
        fix: What to do.
    """

    def __init__(self, problem: str, fix: str, *, file: object = None) -> None:
        self.problem, self.fix, self.file = one_line(problem), one_line(fix), file
        super().__init__(f"{'' if file is None else f'{file}: '}{self.problem}; {self.fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _read_error, (self.problem, self.fix, self.file)


def reason(error: BaseException, *, most: int = 300) -> str:
    """What an exception of another library says, in one line."""
    text = one_line(str(error))
    return (text[:most] + "..." if len(text) > most else text) or type(error).__name__


def one_line(text: str) -> str:
    return " ".join(text.split())


def listed(values: Sequence[object], *, most: int = 8) -> str:
    """The first few of some values, for a message."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + more


def _read_error(problem: str, fix: str, file: object) -> ReadError:
    return ReadError(problem, fix, file=file)


def one_of_each_kind(faults: Iterable[DatasetIssue]) -> list[str]:
    """A line for each kind of fault: the first, and how many there are."""
    return [
        f"{first}" + (f" (and {len(others)} more of this kind)" if others else "")
        for first, *others in _kinds(faults).values()
    ]


def _kinds(faults: Iterable[DatasetIssue]) -> dict[str, list[DatasetIssue]]:
    kinds: dict[str, list[DatasetIssue]] = {}
    for fault in faults:
        kinds.setdefault(fault.problem.partition(":")[0], []).append(fault)
    return kinds


def _summary(faults: Sequence[DatasetIssue]) -> str:
    kinds = _kinds(faults)
    lines = [f"{len(faults)} fault{'' if len(faults) == 1 else 's'} must be mended first"]
    for alike in kinds.values():
        lines += [f"  {fault}" for fault in alike[:_SHOWN]]
        if len(alike) > _SHOWN:
            lines.append(f"  ... and {len(alike) - _SHOWN} more of this kind")
    return "\n".join(lines)
