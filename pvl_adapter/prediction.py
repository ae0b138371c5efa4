"""What a model says of pictures, how sure it is, and how that is looked at, ranked and kept.

Shape alphabet: B batch, S samples, H W pixels of the network, h w pixels of a picture.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pvl_adapter.atomic import write_atomically
from pvl_adapter.monte_carlo import Statistics, binary_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT_MAPS = ("probability", "uncertainty", "aleatoric", "epistemic", "variance", "standard_error")
_MOST = {"probability": 1.0, "variance": 0.25, "standard_error": 0.5}  # of the others ln 2, the entropy of a coin
_FEW_PIXELS = 1e-3  # of an image: where hardly anything is found, a stray pixel is no disagreement


@dataclass(frozen=True)
class Prediction:
    """What a model says of B image and sentence pairs. All maps are [B, H, W].

    Attributes:
        mask: Bool, probability above the threshold.
        probability: Mean over samples of the sigmoid; with "auto" and antithetic pairs the deterministic pass counts as
            one more pair.
        uncertainty: Binary entropy of the probability in nats, at most ln 2; `aleatoric` plus `epistemic`.
        aleatoric: Mean of the samples' entropies, in nats: what even a sure model cannot tell from this picture.
        epistemic: What the samples disagree about, in nats, never negative.
        variance: Of one sample's probability; NaN where the samples are too few to tell (fewer than two, or than two
            antithetic pairs).
        standard_error: Of `probability` as an estimate of the infinite-sample mean; NaN likewise, but for "auto".
        num_samples: Int64 [B], how many samples each has had; 1 for a mean pass.
        samples: [S, B, H, W], each sample's probabilities, if asked for.
        pictures: The pictures as given, upright and in RGB, one or B; empty if prepared tensors were given.
    """

    mask: Tensor
    probability: Tensor
    uncertainty: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    variance: Tensor
    standard_error: Tensor
    num_samples: Tensor
    samples: Tensor | None = None
    pictures: tuple[Image.Image, ...] = ()

    @classmethod
    def from_statistics(
        cls,
        statistics: Sequence[Statistics],
        *,
        threshold: float,
        samples: Tensor | None = None,
        pictures: tuple[Image.Image, ...] = (),
    ) -> Prediction:
        """From what `monte_carlo` returns."""
        probability = torch.stack([one.estimate for one in statistics])  # [B, H, W]
        total = binary_entropy(probability)
        aleatoric = torch.stack([one.aleatoric for one in statistics])
        return cls(
            mask=probability > threshold,
            probability=probability,
            uncertainty=total,
            aleatoric=torch.minimum(aleatoric, total),  # rounding alone can lift it above the total
            epistemic=(total - aleatoric).clamp_min(0.0),
            variance=torch.stack([one.variance for one in statistics]),
            standard_error=torch.stack([one.standard_error for one in statistics]),
            num_samples=torch.tensor([one.count for one in statistics]),
            samples=samples,
            pictures=pictures,
        )

    def abstain(self, threshold: float) -> Tensor:
        """Pixels to leave to a human: bool [B, H, W], where the uncertainty exceeds `threshold` nats (at most ln 2)."""
        if not 0.0 <= threshold <= math.log(2.0):
            raise ValueError(f"threshold is {threshold}, expected nats between 0 and ln 2 = {math.log(2.0):.4f}")
        return self.uncertainty > threshold

    @property
    def review_score(self) -> Tensor:
        """How much a human should look at each, between 0 and 1, [B]: sort by it, highest first.

        One minus the Dice that the mask would have on average if every pixel were foreground with its probability.
        """
        few = _FEW_PIXELS * self.mask[0].numel()
        hit = (self.probability * self.mask).sum(dim=(1, 2))
        area = self.probability.sum(dim=(1, 2)) + self.mask.sum(dim=(1, 2))
        return 1.0 - (2.0 * hit + few) / (area + few)

    def at_original_size(self, index: int) -> dict[str, np.ndarray]:
        """Mask and maps of one pair in its picture's own geometry, [h, w]; without a picture, in the network's.

        Maps are resized bilinearly, the mask by nearest neighbour, as the released evaluation does.
        """
        picture = self.picture(index)
        size = tuple(self.mask.shape[-2:]) if picture is None else (picture.height, picture.width)
        maps = {name: getattr(self, name)[index].detach().float().cpu() for name in FLOAT_MAPS}
        resized = {
            name: F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
            for name, values in maps.items()
        }
        mask = F.interpolate(self.mask[index].float().cpu()[None, None], size=size, mode="nearest")[0, 0].bool()
        return {"mask": mask.numpy(), **resized}

    def picture(self, index: int) -> Image.Image | None:
        """The picture of a pair, as it was given."""
        if not self.pictures:
            return None
        return self.pictures[0 if len(self.pictures) == 1 else index]

    def to_dict(self) -> list[dict[str, Any]]:
        """A JSON-ready summary of each pair: areas, mean and largest uncertainties, review score, samples used."""
        return [self._summary(index) for index in range(len(self.mask))]

    def save(self, folder: str | os.PathLike[str], *, names: Sequence[str] | None = None) -> Path:
        """Write every pair's maps in its picture's own geometry.

        For each: `NAME.npz` with the mask and all maps as floats; `NAME_mask.png`; `NAME_probability.png` and
        `NAME_uncertainty.png` of 16 bits (65535 is 1, or ln 2 nats); `NAME_overlay.png` where there is a picture.
        Besides `predictions.json`, the summaries.

        Args:
            folder: Made if it is missing.
            names: One for each pair; None numbers them.

        Returns:
            The folder.

        Raises:
            ValueError: If there are not as many names as pairs, two are alike, or one cannot name a file.
        """
        folder = Path(folder)
        names = [f"{index:04d}" for index in range(len(self.mask))] if names is None else list(names)
        usable = all(name and Path(name).name == name for name in names)  # of no other folder
        if not usable or len(names) != len(self.mask) or len(set(names)) != len(names):
            raise ValueError(f"names are {names}, expected {len(self.mask)} different ones that can name files")
        folder.mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(names):
            maps = self.at_original_size(index)
            write_atomically(folder / f"{name}.npz", partial(_write_npz, maps=maps))
            _write_png(folder / f"{name}_mask.png", maps["mask"].astype(np.uint8) * 255)
            for of in ("probability", "uncertainty"):
                levels = np.round(np.clip(maps[of] / _MOST.get(of, math.log(2.0)), 0.0, 1.0) * 65535)
                _write_png(folder / f"{name}_{of}.png", levels.astype(np.uint16))
            if (picture := self.picture(index)) is not None:
                _write_png(folder / f"{name}_overlay.png", overlay(picture, maps))
        summaries = [{"name": name, **summary} for name, summary in zip(names, self.to_dict(), strict=True)]
        text = json.dumps(summaries, indent=2) + "\n"
        write_atomically(folder / "predictions.json", lambda path: path.write_text(text))
        return folder

    def plot(self) -> Figure:
        """A matplotlib figure: each pair's picture with the mask's outline, probability, and both uncertainties.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        columns = ("probability", "aleatoric", "epistemic")
        figure = Figure(figsize=(3.0 * (len(columns) + 1), 2.8 * len(self.mask)), layout="constrained")
        axes = figure.subplots(len(self.mask), len(columns) + 1, squeeze=False)
        for index, row in enumerate(axes):
            maps = self.at_original_size(index)
            shown = self.picture(index)
            row[0].imshow(maps["mask"] if shown is None else overlay(shown, maps), cmap="gray")
            row[0].set(title=f"mask, review score {self.review_score[index]:.2f}", xticks=[], yticks=[])
            for axis, name in zip(row[1:], columns, strict=True):
                image = axis.imshow(maps[name], vmin=0.0, vmax=_MOST.get(name, math.log(2.0)), cmap="magma")
                axis.set(title=name if name in _MOST else f"{name} (nats)", xticks=[], yticks=[])
                figure.colorbar(image, ax=axis, shrink=0.8)
        return figure

    def _summary(self, index: int) -> dict[str, Any]:
        error = self.standard_error[index]
        return {
            "foreground_fraction": self.mask[index].float().mean().item(),
            "expected_foreground_fraction": self.probability[index].mean().item(),
            "mean_uncertainty_nats": self.uncertainty[index].mean().item(),
            "largest_uncertainty_nats": self.uncertainty[index].max().item(),
            "mean_epistemic_nats": self.epistemic[index].mean().item(),
            "review_score": self.review_score[index].item(),
            "largest_standard_error": None if error.isnan().any() else error.max().item(),
            "num_samples": int(self.num_samples[index]),
        }


def overlay(picture: Image.Image, maps: dict[str, np.ndarray]) -> np.ndarray:
    """The picture with the mask tinted green and, over it, uncertainty in red: [h, w, 3], 8-bit."""
    colors: np.ndarray = np.asarray(picture.convert("RGB"), dtype=np.float32)
    tint = 0.35 * maps["mask"][..., None].astype(np.float32)
    colors = (1 - tint) * colors + tint * np.array([0.0, 255.0, 0.0], dtype=np.float32)
    doubt = 0.8 * np.clip(maps["uncertainty"][..., None] / math.log(2.0), 0.0, 1.0)
    colors = (1 - doubt) * colors + doubt * np.array([255.0, 0.0, 0.0], dtype=np.float32)
    return np.round(colors).astype(np.uint8)


def _write_npz(path: Path, maps: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # given a name, numpy would add to it
        np.savez_compressed(file, allow_pickle=False, **maps)


def _write_png(path: Path, pixels: np.ndarray) -> None:
    write_atomically(path, lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"))
