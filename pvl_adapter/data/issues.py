"""What is wrong with a dataset: one issue, many of them as an error, and a line for each kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SHOWN = 3  # issues of one kind in an error message


@dataclass(frozen=True)
class DatasetIssue:
    """One thing that is wrong.

    Attributes:
        location: Where, as "BUSI/train line 12 (case_07.png)".
        kind: In a few words that issues of one kind share, as "image is missing".
        detail: What was got, what was expected, and how to fix it.
        fatal: Whether training or testing would fail or be wrong; otherwise it is a warning.
    """

    location: str
    kind: str
    detail: str
    fatal: bool = True

    def __str__(self) -> str:
        return " ".join(f"{self.location}: {self.kind}: {self.detail}".split())


class DatasetError(ValueError):
    """A dataset that cannot be used.

    Attributes:
        issues: All that were found; the message lists the fatal ones, three of each kind.
    """

    def __init__(self, issues: Iterable[DatasetIssue] | str) -> None:  # a message comes from a DataLoader's worker
        self.issues = [] if isinstance(issues, str) else list(issues)
        super().__init__(issues if isinstance(issues, str) else _message([each for each in self.issues if each.fatal]))


def one_of_each_kind(issues: Iterable[DatasetIssue]) -> list[str]:
    """A line for each kind of issue: the first, and how many more there are."""
    return [
        f"{first}" + (f" (and {len(others)} more of this kind)" if others else "")
        for first, *others in _kinds(issues).values()
    ]


def listed(values: Sequence[object], *, most: int = 8) -> str:
    """The first few of some values, for a message."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + more


def _kinds(issues: Iterable[DatasetIssue]) -> dict[str, list[DatasetIssue]]:
    kinds: dict[str, list[DatasetIssue]] = {}
    for issue in issues:
        kinds.setdefault(issue.kind, []).append(issue)
    return kinds


def _message(issues: Sequence[DatasetIssue]) -> str:
    lines = [f"{len(issues)} issue{'' if len(issues) == 1 else 's'} to fix first"]
    for alike in _kinds(issues).values():
        lines += [f"  {issue}" for issue in alike[:_SHOWN]]
        lines += [f"  ... and {len(alike) - _SHOWN} more of this kind"] * (len(alike) > _SHOWN)
    return "\n".join(lines)
