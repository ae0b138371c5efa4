"""What is done in an output folder, and who does what: one log for each process, in OUTPUT/.runs.

N.jsonl gets a line of JSON for each batch that is begun and for each input that is finished or has failed. No line is
ever changed, so a kill costs the last one at most. A process holds the lock N.lock as long as it lives: what a killed
one has begun is free again. So any number of processes, on all machines that share the folder, divide the work that is
left, and none waits for another.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pvl_adapter.data.results import slug

if TYPE_CHECKING:
    from pvl_adapter.data.inputs import Source
    from pvl_adapter.data.presets import Label


@dataclass(frozen=True)
class Work:
    """What is asked of one input.

    Attributes:
        source: The input.
        labels: What is to be found.
        name: Of the files that are written.
        settings: Changes with everything that changes what is written.
    """

    source: Source
    labels: tuple[Label, ...]
    name: str
    settings: str

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What review.csv has lines for: input and sentence."""
        return [(self.source.location, label.sentence) for label in self.labels]

    @property
    def stems(self) -> list[str]:
        """What names of its files begin with."""
        several = [f"{self.name}_{slug(label.name)}" for label in self.labels] if len(self.labels) > 1 else []
        return [self.name, *several]

    @property
    def id(self) -> str:
        return digest((self.source.location, self.settings))


class RunLog:
    """All logs of an output folder, and this process's own.

    Attributes:
        entries: The last line about each input and sentence.
        staging: Folder for unfinished files, which is emptied when its process has ended.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output / ".runs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries: dict[tuple[str, str], dict[str, Any]] = {}
        self.created: dict[str, str] = {}  # when each run was first begun
        self._begun: dict[str, int] = {}  # by whom
        self._news: set[str] = set()  # finished since this process started
        self._turn = 0
        self._offsets: dict[Path, int] = {}
        self._writing = threading.Lock()
        self._mutex = FileLock(self.folder / "lock")
        with self._mutex:
            self._refresh()
            self._news.clear()
            self.number = next(number for number in itertools.count() if self._take(number))
            for staging in self.folder.glob("*.part"):
                if not self._is_alive(int(staging.stem)) or staging.stem == str(self.number):
                    shutil.rmtree(staging, ignore_errors=True)
            self.staging = self.folder / f"{self.number}.part"
            self._file = (self.folder / f"{self.number}.jsonl").open("ab", buffering=0)
            self._file.write(b"\n")  # whatever a killed process has left of its last line ends here
            self._append({"started": self.number})

    def begun(self, run: str, created: str | None = None) -> str:
        """When a run was begun for the first time; `created` of one that is repeated."""
        with self._mutex:
            self._refresh()
            if run not in self.created or created:
                now = datetime.now().astimezone().isoformat(timespec="seconds")
                self._append({"run": run, "created": created or now})
                self._refresh()
        return self.created[run]

    def is_done(self, work: Work) -> bool:
        found = [self.entries.get(row) for row in work.rows]
        if any(entry is None or entry.get("error") or entry["settings"] != work.settings for entry in found):
            return False
        for name, (size, _) in found[0]["files"].items():  # type: ignore[index]
            try:
                if (self.output / name).stat().st_size != size:
                    return False
            except OSError:
                return False
        return True

    def files_before(self, work: Work) -> set[str]:
        """Files of earlier results of the same rows, but for what other rows of them need."""
        before = {id(entry): entry for row in work.rows if (entry := self.entries.get(row))}.values()
        files = {name for entry in before for name in entry["files"] if name.startswith(entry["name"])}
        others = [
            row.get("files", "").split("; ")
            for entry in before
            for row in entry["rows"]
            if (entry["input"], row["sentence"]) not in work.rows
        ]
        return {name for name in files if ".." not in Path(name).parts}.difference(*others)

    def claim(self, works: Sequence[Work]) -> list[Work]:
        """Those that nobody has finished since this process started, and nobody alive has begun: now they are ours."""
        with self._mutex:
            self._refresh()
            free = [
                work for work in works if work.id not in self._news and not self._is_alive(self._begun.get(work.id))
            ]
            if free:
                self._turn += 1
                self._append({"begin": [work.id for work in free], "turn": self._turn})
        return free

    def add(self, work: Work, entry: dict[str, Any]) -> None:
        """A finished or failed input."""
        self._append({"id": work.id, "turn": self._turn, "input": work.source.location, **entry})

    @contextmanager
    def ending(self, works: Sequence[Work]) -> Iterator[int]:
        """The end of this process, in which it alone may write what is made of all logs.

        Yields how many of `works` others are still at; the last process to end has read that all others have done.
        """
        with self._mutex:
            try:
                self._refresh()
                others = {number for number in self._begun.values() if number != self.number and self._is_alive(number)}
                yield sum(work.id not in self._news and self._begun.get(work.id) in others for work in works)
            finally:
                shutil.rmtree(self.staging, ignore_errors=True)
                self._file.close()
                self._own.release()

    def _take(self, number: int) -> bool:
        self._own = FileLock(self.folder / f"{number}.lock")
        try:
            self._own.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def _is_alive(self, number: int | None) -> bool:
        if number is None:
            return False
        lock = FileLock(self.folder / f"{number}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with self._writing:
            while text:
                text = text[self._file.write(text) :]

    def _refresh(self) -> None:
        """Read what was added to the logs."""
        for path in self.folder.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                added = file.read()
            whole = added[: added.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            for text in whole.splitlines():
                try:
                    line = json.loads(text)
                except ValueError:  # cut off by a kill, or empty
                    continue
                self._read(line, int(path.stem))

    def _read(self, line: dict[str, Any], number: int) -> None:
        self._turn = max(self._turn, line.get("turn", 0))
        if "started" in line:
            self._begun = {work: by for work, by in self._begun.items() if by != number}
        elif "begin" in line:
            self._begun.update(dict.fromkeys(line["begin"], number))
        elif "run" in line:
            self.created[line["run"]] = line["created"]
        else:
            self._news.add(line["id"])
            for row in line["rows"]:
                key = line["input"], row["sentence"]
                if self.entries.get(key, line)["turn"] <= line["turn"]:
                    self.entries[key] = line


def digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]
