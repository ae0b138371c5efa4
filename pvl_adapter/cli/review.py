"""review.csv of `pvl-adapter predict`: what was found in each input, and what need not be predicted again."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import time
from pathlib import Path
from typing import Any

from pvl_adapter.atomic import write_atomically
from pvl_adapter.data.results import MEASURES

COLUMNS = ["input", "sentence", *MEASURES, "files", "seconds", "note", "error", "name", "settings"]
REWRITE_SECONDS = 2.0  # at most so much of a killed run is done again, with inputs that take less


class Review:
    """A line for each input and sentence, the most doubtful first, failures at the end; goes on with an earlier one."""

    def __init__(self, folder: Path) -> None:
        self.path, self.written = folder / "review.csv", -math.inf
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.unlisted: list[str] = []  # files of rows that were added since the last writing
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                lines = csv.DictReader(file)
                if lines.fieldnames != COLUMNS:
                    raise ValueError(f"{self.path} was not written by this script; choose another --output")
                self.rows = {(row["input"], row["sentence"]): row for row in lines}
        self.named = {row["name"].lower(): key for key, row in self.rows.items()}

    def new_row(self, location: str, sentence: str, *, name: str, settings: str) -> dict[str, Any]:
        """A line to be filled, with the file name that it had before, or `name`, with a hash if that is taken."""
        key = location, sentence
        if key in self.rows:
            name = self.rows[key]["name"]
        elif self.named.get(name.lower(), key) != key:
            name = f"{name}-{digest(key)[:8]}"
        self.named[name.lower()] = key
        row = {"input": location, "sentence": sentence, "name": name, "settings": settings}
        return dict.fromkeys(COLUMNS, "") | row

    def is_done(self, row: dict[str, Any]) -> bool:
        before = self.rows.get((row["input"], row["sentence"]))
        if before is None or before["error"] or before["settings"] != row["settings"]:
            return False
        return all((self.path.parent / name).is_file() for name in before["files"].split("; "))

    def add(self, row: dict[str, Any]) -> None:
        """Take in a filled line instead of an earlier one, whose files are removed unless the new one has them too."""
        key = row["input"], row["sentence"]
        if key in self.rows and not row["error"]:
            for name in set(self.rows[key]["files"].split("; ")) - set(row["files"].split("; ")):
                if name.startswith(row["name"]) and ".." not in Path(name).parts:  # a table can be edited
                    (self.path.parent / name).unlink(missing_ok=True)
        self.rows[key] = row
        self.unlisted += row["files"].split("; ") if row["files"] else []
        if time.monotonic() - self.written > REWRITE_SECONDS:
            self.write()

    def write(self) -> None:
        ranked = sorted(self.rows.values(), key=lambda row: (bool(row["error"]), -float(row["review_score"] or 0.0)))
        text = io.StringIO()
        lines = csv.DictWriter(text, COLUMNS)
        lines.writeheader()
        lines.writerows(ranked)
        try:
            write_atomically(self.path, lambda temporary: temporary.write_text(text.getvalue(), "utf-8", newline=""))
        except OSError as error:
            files = f"; it does not list these finished files: {', '.join(self.unlisted)}" if self.unlisted else ""
            raise OSError(f"{self.path} cannot be written ({error.strerror or error}){files}") from error
        self.written, self.unlisted = time.monotonic(), []


def digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]
