"""What is wrong with a dataset: one issue, many of them as an error, and a line for each kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
        fatal = [issue for issue in self.issues if issue.fatal]
        lines = [f"{len(fatal)} issue{'s' * (len(fatal) > 1)} to fix first", *one_of_each_kind(fatal, most=3)]
        super().__init__(issues if isinstance(issues, str) else "\n  ".join(lines))


def one_of_each_kind(issues: Iterable[DatasetIssue], *, most: int = 1) -> list[str]:
    """The first `most` issues of each kind, a line each; the last line of a kind says how many more there are."""
    kinds: dict[str, list[DatasetIssue]] = {}
    for issue in issues:
        kinds.setdefault(issue.kind, []).append(issue)
    lines: list[str] = []
    for alike in kinds.values():
        lines += map(str, alike[:most])
        if len(alike) > most:
            lines[-1] += f" (and {len(alike) - most} more of this kind)"
    return lines


def listed(values: Sequence[object], *, most: int = 8) -> str:
    """The first few of some values, for a message."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + more
