"""The rows that examples/train.py trains on: read once, checked, at the network's size; and their augmentation.

Shape alphabet: B batch, N rows, P pictures, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from recipe import Recipe
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.data import DatasetError, Sample, SegmentationDataset, check_datasets
from pvl_adapter.data.issues import one_of_each_kind
from pvl_adapter.images import prepare_masks


@dataclass(frozen=True)
class Rows:
    """Pictures, sentences and masks of a split, at the size the network takes.

    Attributes:
        pictures: [P, 3, H, W], uint8, in the network's channel order; one picture may serve several rows.
        picture: Of each of N rows, which.
        texts: N sentences.
        masks: [N, H, W], bool.
        names: Of each row: dataset, picture and mask.
    """

    pictures: Tensor
    picture: list[int]
    texts: list[str]
    masks: Tensor
    names: list[tuple[str, str, str]]

    def __len__(self) -> int:
        return len(self.texts)

    def digest(self) -> str:
        """Of everything in it."""
        digest = hashlib.sha256(json.dumps([self.names, self.texts]).encode())
        for tensor in (self.pictures, self.masks):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


class Normalization:
    """Between grey levels 0 to 255 and what the network takes, in the network's own way."""

    def __init__(self, model: pvl.MedCLIPSeg) -> None:
        size = model.image_size
        both = model.prepare([np.full((*size, 3), level, dtype=np.uint8) for level in (0, 255)]).float().cpu()
        self.black, white = both[:, :, :1, :1].unbind(dim=0)  # [3, 1, 1]
        self.range = white - self.black

    def levels(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], uint8."""
        return ((images.float().cpu() - self.black) / self.range * 255.0).round().to(torch.uint8)

    def images(self, levels: Tensor) -> Tensor:
        return levels / 255.0 * self.range + self.black


def read_rows(splits: Sequence[Sequence[SegmentationDataset]], model: pvl.MedCLIPSeg, *, quiet: bool) -> list[Rows]:
    """Read, check and shrink every picture and mask of some splits, each of some datasets.

    Raises:
        SystemExit: If something is wrong with them; everything that is, is named.
    """
    normalization, size = Normalization(model), model.image_size
    datasets = [dataset for split in splits for dataset in split]
    split_of = [number for number, split in enumerate(splits) for _ in split]
    places: dict[tuple[int, str], int] = {}  # of pictures among those of their split
    pictures: list[list[Tensor]] = [[] for _ in splits]
    masks: list[list[Tensor]] = [[] for _ in splits]
    rows = [Rows(torch.empty(0), [], [], torch.empty(0), []) for _ in splits]

    def visit(dataset: int, row: int, sample: Sample) -> None:
        split, names = split_of[dataset], datasets[dataset].rows[row]
        if (dataset, names.image) not in places:
            places[dataset, names.image] = len(pictures[split])
            pictures[split].append(normalization.levels(model.prepare(sample.image))[0])
        masks[split].append(prepare_masks([sample.mask], size=size)[0])
        rows[split].picture.append(places[dataset, names.image])
        rows[split].texts.append(sample.text)
        rows[split].names.append((datasets[dataset].name, names.image, names.mask))

    faults = check_datasets(datasets, progress=not quiet, visit=visit)
    if any(fault.fatal for fault in faults):
        raise SystemExit(str(DatasetError(faults)))
    if not quiet:
        for line in one_of_each_kind(faults):
            print(f"warning: {line}")
    return [
        replace(
            split,
            pictures=torch.stack(pictures[number]) if len(split) else torch.empty(0, 3, *size, dtype=torch.uint8),
            masks=torch.stack(masks[number]) if len(split) else torch.empty(0, *size, dtype=torch.bool),
        )
        for number, split in enumerate(rows)
    ]


def augment(images: Tensor, masks: Tensor, recipe: Recipe, *, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Turn and scale pictures with their masks, and change the pictures' contrast.

    Args:
        images: [B, 3, H, W], grey levels in 0 to 255, any type.
        masks: [B, H, W], bool.
        recipe: By how much.
        random: Draws the same for a row whatever rows are beside it, if it is the row's own.

    Returns:
        Pictures as float, masks as bool.
    """
    turned = random.random(len(images)) < recipe.rotate_probability
    degrees = random.uniform(-recipe.rotate_degrees, recipe.rotate_degrees, len(images))
    if recipe.rotate_whole_degrees:
        most = round(recipe.rotate_degrees)
        degrees = random.integers(-most, most, len(images), endpoint=True).astype(float)
    zoom, contrast = (1.0 + extent * random.uniform(-1, 1, len(images)) for extent in (recipe.scale, recipe.contrast))
    angle = np.radians(degrees) * turned
    height, width = images.shape[-2:]
    cosine, sine, zero = np.cos(angle) / zoom, np.sin(angle) / zoom, np.zeros(len(images))
    matrix = np.stack([cosine, -sine * height / width, zero, sine * width / height, cosine, zero])
    theta = rearrange(torch.from_numpy(matrix).float(), "(i j) b -> b i j", i=2)
    grid = F.affine_grid(theta, [len(images), 1, height, width], align_corners=False)
    both = torch.cat([images.float(), masks[:, None].float()], dim=1)  # [B, 4, H, W]
    both = F.grid_sample(both, grid, mode=recipe.interpolation, padding_mode="zeros", align_corners=False)
    factor = torch.from_numpy(contrast).float()[:, None, None, None]
    return (both[:, :3] * factor).clamp(0.0, 255.0), both[:, 3] > 0.5
