"""review.csv of `pvl-adapter predict`, and the few lines that it ends with."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pvl_adapter.atomic import write_atomically
from pvl_adapter.cli.run_log import Work
from pvl_adapter.data.results import MEASURES

COLUMNS = ["input", "sentence", *MEASURES, "files", "seconds", "note", "error", "name", "settings"]
_MOST = 6  # rows of the summary

Entries = Mapping[tuple[str, str], Mapping[str, Any]]


def check_review(folder: Path) -> None:
    """Raises ValueError if review.csv is not ours or cannot be one."""
    path = folder / "review.csv"
    if path.exists():
        first = path.open(newline="", encoding="utf-8").readline() if path.is_file() else ""
        if not first.startswith("input,sentence,review_score,"):
            raise ValueError(f"{path} was not written by pvl-adapter; choose another --output")


def ranked(entries: Entries) -> list[dict[str, Any]]:
    """A row for each input and sentence, the most doubtful first, failures at the end."""
    rows = []
    for (location, sentence), entry in entries.items():
        row = next(row for row in entry["rows"] if row["sentence"] == sentence)
        rows.append({"input": location, **{name: entry.get(name, "") for name in COLUMNS[-5:]}, **row})
    rows.sort(key=lambda row: (row["input"], row["sentence"]))  # whoever has written it first
    return sorted(rows, key=lambda row: (bool(row["error"]), -float(row.get("review_score") or 0.0)))


def write_review(folder: Path, entries: Entries) -> None:
    text = io.StringIO()
    lines = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore")
    lines.writeheader()
    lines.writerows(ranked(entries))
    content = text.getvalue()
    write_atomically(folder / "review.csv", lambda path: path.write_text(content, "utf-8", newline=""))


def summary(entries: Entries, works: Sequence[Work], *, done_before: int, output: Path) -> str:
    """The most doubtful rows of these works as a small table, and how many inputs went how; at most 10 lines."""
    keys = [key for work in works for key in work.rows]
    rows = ranked({key: entries[key] for key in keys if key in entries})
    table = [("input", "sentence", "found", "doubt")]
    for row in rows[:_MOST]:
        doubt = "failed" if row["error"] else f"{float(row['review_score']):.2f}"
        table.append(
            (_short(entries[row["input"], row["sentence"]]["name"]), _short(row["sentence"]), found(row), doubt)
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table
    ]
    if len(rows) > _MOST:
        lines.append(f"... and {len(rows) - _MOST} less doubtful")
    states = Counter(
        "failed" if entries[work.rows[0]]["error"] else "done" for work in works if work.rows[0] in entries
    )
    counts = {
        "predicted": states["done"] - done_before,
        "done before": done_before,
        "failed": states["failed"],
        "left": len(works) - states.total(),
    }
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "predicted")
    return "\n".join([*lines, f"{said}; see {output / 'review.csv'}"])


def found(row: Mapping[str, Any]) -> str:
    """What was found, in ml or mm2 if they are known, with its interval if it is promised."""
    if row["error"]:
        return ""
    name = next((name for name in ("ml", "mm2") if row.get(f"found_{name}")), "pixels")
    low, high = row.get(f"least_{name}"), row.get(f"most_{name}")
    interval = f" ({_number(low)} to {_number(high)})" if low and high else ""
    return f"{_number(row[f'found_{name}'])} {name}{interval}"


def _number(text: str) -> str:
    return f"{value:,.0f}" if (value := float(text)) >= 100.0 else f"{value:.3g}"


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
