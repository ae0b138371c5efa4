"""How the benchmarks measure time and memory, and what each writes beside its figures."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")


def setting() -> dict[str, Any]:
    """Hardware, versions and commit. On another machine times differ; the ratios should hold."""
    root = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "transformers", "pvl-adapter")},
        "commit": commit.stdout.strip() or None,
    }


def side_by_side(ways: dict[str, Callable[[], Any]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each way; the ways take turns, so that other load on the machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first turn warms up and does not count
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(way: Callable[[], Any]) -> int:
    """Peak of resident memory while `way` runs, in bytes above what was resident before (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed but not returned would hide new allocations
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    way()
    return _status("VmHWM") - before


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write figures and setting to benchmarks/results/NAME.json and print them."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps({"setting": setting(), **figures}, indent=2) + "\n"
    path.write_text(text)
    print(text)
    return path


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
