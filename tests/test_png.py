"""PNG files of ours are what Pillow reads back, and what it would not take is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pvl_adapter.png import write_png


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (40, 57), (300, 400)])
@pytest.mark.parametrize(("mode", "dtype", "channels"), [("L", "u1", ()), ("RGB", "u1", (3,)), ("I;16", "u2", ())])
def test_an_image_is_read_back_as_it_was(size, mode, dtype, channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2 ** (8 * int(dtype[1])), (*size, *channels), dtype=dtype)
    write_png(tmp_path / "image.png", Image.fromarray(pixels))
    with Image.open(tmp_path / "image.png") as opened:
        opened.verify()
    with Image.open(tmp_path / "image.png") as opened:
        assert opened.mode == mode
        np.testing.assert_array_equal(np.asarray(opened), pixels)


def test_a_palette_is_kept(tmp_path):
    labels = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).convert("P")
    labels.putpalette(range(36))
    write_png(tmp_path / "image.png", labels)
    with Image.open(tmp_path / "image.png") as opened:
        assert opened.getpalette()[:36] == list(range(36))
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(labels))
