"""Examples to click on the page: from a table or a folder, or a made-up head without any file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pvl_adapter.data.inputs import find_sources
from pvl_adapter.data.tables import TABLE_SUFFIXES

_MOST = 12
_ELLIPSOIDS = (  # level; centre and radii in rows, columns and slices
    (190, (0.0, 0.0, 0.0), (0.9, 0.72, 0.95)),  # skull
    (-130, (0.0, 0.0, 0.0), (0.82, 0.64, 0.88)),  # brain
    (50, (0.05, 0.0, 0.0), (0.7, 0.52, 0.75)),
    (-90, (0.0, -0.17, 0.05), (0.28, 0.09, 0.3)),  # ventricles
    (-90, (0.0, 0.17, 0.05), (0.28, 0.09, 0.3)),
    (110, (-0.32, 0.27, 0.1), (0.22, 0.2, 0.32)),  # lesion
)


@dataclass(frozen=True)
class Example:
    """Files of one input, with sentences, one in each line."""

    files: tuple[Path, ...]
    sentences: str
    title: str


def examples_of(path: Path) -> list[Example]:
    """Those of a table of images and sentences, or of a folder: of its tables, or else its images, without sentences.

    Raises:
        ValueError: If there are none, or a table is faulty.
    """
    tables = [file for file in sorted(path.iterdir()) if file.suffix in TABLE_SUFFIXES] if path.is_dir() else [path]
    sources = find_sources(map(str, tables or [path]), output=path / "no output")[0]
    if not sources:
        raise ValueError(f"{path} holds no examples; give a folder of images, or a table with columns image and text")
    return [Example(each.files, "\n".join(each.texts[:4]), each.name) for each in sources[:_MOST] if not each.part]


def phantoms(folder: Path | None = None) -> list[Example]:
    """A made-up head with a bright lesion, as a picture and as a volume."""
    folder = Path(tempfile.mkdtemp(prefix="pvl-adapter-examples-")) if folder is None else folder
    nibabel: Any = import_module("nibabel")

    axis = np.linspace(-1.0, 1.0, 64)
    voxels = np.random.default_rng(0).normal(8.0, 3.0, (64, 64, 64))  # rows, columns, slices
    for level, centre, radii in _ELLIPSOIDS:
        parts = [((axis - at) / radius) ** 2 for at, radius in zip(centre, radii, strict=True)]
        distance = parts[0][:, None, None] + parts[1][:, None] + parts[2]
        voxels += level / (1.0 + np.exp(np.clip(12.0 * (distance - 1.0), -60.0, 60.0)))
    voxels = np.clip(voxels, 0, 255).astype(np.uint8)
    Image.fromarray(voxels[:, :, 35]).resize((256, 256), Image.Resampling.BICUBIC).save(folder / "made-up-head.png")
    turned = nibabel.Nifti1Image(voxels.transpose(1, 0, 2)[::-1, ::-1], np.diag([3.0, 3.0, 3.0, 1.0]))
    nibabel.save(turned, folder / "made-up-head.nii.gz")
    sentences = "the brain", "the bright lesion at the front\nthe ventricles"
    files = ("made-up-head.png", "made-up-head.nii.gz")
    return [Example((folder / file,), said, file) for file, said in zip(files, sentences, strict=True)]
