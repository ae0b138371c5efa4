"""Memory does not grow with the number of slices or of points in time; files hold what does."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fake_predictions import bright, found_in

from pvl_adapter.data.scans import InputOptions

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="the kernel does not tell what is anonymous memory")


def anonymous() -> int:
    """Bytes of memory that no file holds."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())[1])


@contextmanager
def peak() -> Iterator[list[int]]:
    """Anonymous memory at most, beyond that at the beginning."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what is free goes back, so that nothing grows into it unseen
    start, found, ended = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            found[0] = max(found[0], anonymous() - start)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("small", "axes"),
    [((64, 64, 64), ("z",)), ((64, 64, 48, 2), ("x", "y", "z"))],
    ids=["slices, two sentences, cleaned", "time, three axes"],
)
def test_memory_does_not_grow_with_the_volume(small, axes, tmp_path):
    peaks, sizes = [], []
    for shape in (small, small, (*small[:-1], 8 * small[-1])):  # the first loads libraries
        voxels = np.zeros(shape, np.float32)
        voxels[10:40, 10:40, 8:-8] = 1
        path = tmp_path / "a.nii.gz"
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
        sizes.append(voxels.nbytes)
        del voxels
        options = InputOptions(axes=axes, scratch=tmp_path)
        one = len(axes) == 1
        with peak() as found:
            seen = lambda image, _: bright(image[::4, ::4], 0)  # noqa: E731
            sentences = ("one", "two") if one else ("one",)
            how = {"largest_component": one, "fill_holes": one, "maps": not one}
            result = found_in(path, seen=seen, sentences=sentences, batch=8, options=options, **how)
            result.write(tmp_path, "found")
            result.measures(0)
        peaks.append(found[0])
    small_peak, large_peak = peaks[1:]
    print(
        f"{sizes[1] / 2**20:.1f} MiB: peak {small_peak / 2**20:.1f} MiB, "
        f"{sizes[2] / 2**20:.1f} MiB: {large_peak / 2**20:.1f} MiB"
    )
    assert large_peak < small_peak + sizes[2] / 2  # all its maps in memory would take six times that
