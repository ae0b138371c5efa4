"""PNG files of maps, masks and pictures, three times as fast as Pillow's encoder and about as small.

Pillow tries five filters on every row and searches for repetitions. Maps of 16 bits are smooth and have noise in their
low bytes: there the difference to the row above and Huffman's code alone do nearly as well (512 x 512 in 3 ms for 8 to
11, 11 to 17% larger). 8 bits are searched, but not filtered (a picture in 6 ms for 14, 3% smaller).
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image, in one go, so that a full disk is told by its own error; other modes are left to Pillow."""
    if image.mode not in ("L", "RGB", "I;16"):
        encoded = io.BytesIO()
        image.save(encoded, format="PNG", compress_level=1)
        path.write_bytes(encoded.getbuffer())
        return
    wide = image.mode == "I;16"
    rows = np.asarray(image)
    rows = (rows.astype(">u2") if wide else rows).reshape(image.height, -1).view(np.uint8)  # [h, bytes]
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2 if wide else 0  # "up", or none
    filtered[:, 1:] = rows
    if wide:
        filtered[1:, 1:] -= rows[:-1]
    strategy = zlib.Z_HUFFMAN_ONLY if wide else zlib.Z_DEFAULT_STRATEGY
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, strategy)
    header = struct.pack(
        ">IIBBBBB", image.width, image.height, 16 if wide else 8, 2 if image.mode == "RGB" else 0, 0, 0, 0
    )
    parts = ((b"IHDR", header), (b"IDAT", packer.compress(filtered.data) + packer.flush()), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
