"""What a model says of images, how sure it is, and how that is looked at, ranked and kept.

Shape alphabet: B batch, S samples, H W pixels of the network, h w pixels of an image as it was given.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pvl_adapter.atomic import write_atomically
from pvl_adapter.error_bars import NormalLogits, interval
from pvl_adapter.promises import Promises
from pvl_adapter.sample_statistics import Moments, Statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pvl_adapter.label_map import LabelMap
    from pvl_adapter.trust.calibration import Calibration

FLOAT_MAPS = ("probability", "uncertainty", "aleatoric", "epistemic", "variance", "standard_error")
_MOST = {"probability": 1.0, "variance": 0.25, "standard_error": 0.5}  # of the others ln 2, the entropy of a coin
_SMOOTHING = 1e-3  # of an image's pixels, so that tiny masks do not dominate


@dataclass(frozen=True)
class Prediction(Promises):
    """What a model says of B image and sentence pairs. All maps are [B, H, W].

    Attributes:
        mask: Bool, probability above the threshold.
        probability: Mean over samples of the sigmoid; of normal logits, unless samples were independent.
        uncertainty: Binary entropy of the probability in nats, at most ln 2; `aleatoric` plus `epistemic`.
        aleatoric: Mean of the samples' entropies, in nats: what even a sure model cannot tell from this image.
        epistemic: What the samples disagree about, in nats: their mutual information with the outcome, never negative.
        variance: Of one sample's probability; NaN of a single sample.
        standard_error: Of `probability` as an estimate of the infinite-sample mean; NaN of a single sample or pair. It
            is itself estimated from few samples: for an interval use `interval`, not 1.96 standard errors.
        num_samples: Int64 [B], how many samples each has had; 1 for a mean pass.
        logits: What the samples tell of each pixel's logit.
        area_deviation: Between samples, of a sample's mean probability, [B]; 0 of a single one.
        likeness: `JointFeatures.likeness`, averaged over samples, [B, 3].
        summary: `JointFeatures.summary`, likewise, [B, 2 D].
        samples: [S, B, H, W], each sample's probabilities, if asked for.
        appearance: Of the prepared images, see `pvl_adapter.images.appearance`, [B, 18].
        images: The images as given, upright and in RGB, one or B; empty if prepared tensors were given.
        texts: The sentences, B of them; empty if token ids were given.
        threshold: Probability above which a pixel belongs to the mask.
        calibration: What promises rest on; None if there are none.
        no_promise: Why there are none.
        unseen: Which sentences hold words that the calibration's have not, bool [B].
    """

    mask: Tensor
    probability: Tensor
    uncertainty: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    variance: Tensor
    standard_error: Tensor
    num_samples: Tensor
    logits: NormalLogits
    area_deviation: Tensor
    likeness: Tensor
    summary: Tensor
    samples: Tensor | None = None
    appearance: Tensor | None = None
    images: tuple[Image.Image, ...] = ()
    texts: tuple[str, ...] = ()
    threshold: float = 0.5
    calibration: Calibration | None = None
    no_promise: str = "the model is not calibrated; see pvl_adapter.trust.calibrate(model, held_out_dataset)"
    unseen: Tensor | None = None

    @classmethod
    def from_statistics(
        cls,
        statistics: Statistics,
        *,
        threshold: float,
        samples: Tensor | None = None,
    ) -> Prediction:
        """From what `MonteCarlo` gathers of each pair.

        Raises:
            ValueError: If the probability holds NaN.
        """
        count = torch.tensor(statistics.count, device=statistics.areas.mean.device)
        fit = statistics.fit()
        maps = statistics.maps(fit)
        refuse_nan(maps["probability"])
        return cls(
            mask=maps["probability"] > threshold,
            **maps,  # type: ignore[arg-type]
            num_samples=count.cpu(),
            logits=fit,
            area_deviation=(statistics.areas.squares / count).sqrt(),
            likeness=cast(Moments, statistics.features).mean[:, :3],
            summary=cast(Moments, statistics.features).mean[:, 3:],
            samples=samples,
            threshold=threshold,
        )

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of the infinite-sample probability, each [B, H, W]; NaN where it cannot be told.

        Not symmetric: near 0 and 1 few samples often find too little spread. It covers the sampling alone, not whether
        the model is right.

        Raises:
            ValueError: If `level` is not between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level is {level}, expected a share of cases between 0 and 1, as 0.95")
        return interval(self.logits, level, probability=self.probability)

    def abstain(self, threshold: float | None = None) -> Tensor | None:
        """Pixels to leave to a human: bool [B, H, W], where the uncertainty exceeds `threshold` nats (at most ln 2).

        None takes the calibration's: of the pixels that are left, at most `calibration.pixel_limit` are wrong.
        """
        if threshold is None:
            return self._promise("abstained_pixels")
        if not 0.0 <= threshold <= math.log(2.0):
            raise ValueError(f"threshold is {threshold}, expected nats between 0 and ln 2 = {math.log(2.0):.4f}")
        return self.uncertainty > threshold

    @property
    def review_score(self) -> Tensor:
        """How much a human should look at each, between 0 and 1, [B]: one minus `expected_dice`; sort by it, highest
        first."""
        return 1.0 - self.expected_dice

    @property
    def expected_dice(self) -> Tensor:
        """The Dice that the mask has on average if every pixel is foreground with its probability, [B].

        The Soft Dice Confidence of Borges, Pacheco and Silva (arXiv 2402.10665), smoothed.
        """
        few = _SMOOTHING * self.mask[0].numel()
        hit = (self.probability * self.mask).sum(dim=(1, 2))
        area = self.probability.sum(dim=(1, 2)) + self.mask.sum(dim=(1, 2))
        return (2.0 * hit + few) / (area + few)

    def empty_absent(self) -> Prediction:
        """The same with an empty mask wherever `presence` says "absent"; promises are those of this one alone."""
        if (presence := self.presence) is None:
            return self
        absent = torch.tensor([verdict == "absent" for verdict in presence.verdict], device=self.mask.device)
        why = "masks were emptied since; ask the prediction that empty_absent() was called on"
        return replace(self, mask=self.mask & ~absent[:, None, None], calibration=None, no_promise=why)

    def label_map(self, *, threshold: float | None = None, names: Sequence[str] | None = None) -> LabelMap:
        """One label for every pixel of one image that several sentences were asked of; see `pvl_adapter.label_map`.

        The order of the sentences does not matter.

        Args:
            threshold: Probability above which a pixel is in a single mask; None takes the masks as they are.
            names: Of the labels, one for each sentence; None means the sentences.

        Raises:
            ValueError: If there are several images, or names are missing or not distinct.
        """
        from pvl_adapter.label_map import LabelMap

        return LabelMap.from_prediction(self, threshold=threshold, names=names)

    def at_original_size(self, index: int, *, names: Sequence[str] = ("mask", *FLOAT_MAPS)) -> dict[str, np.ndarray]:
        """Mask and maps of one pair in its image's own geometry, [h, w]; without an image, in the network's.

        Maps are resized bilinearly, the mask by nearest neighbour, as the released evaluation does.

        Args:
            index: Of the pair.
            names: Which of them, also "outer_mask" or "inner_mask" of a calibrated model: each of a large image takes 4
                bytes a pixel.

        Raises:
            ValueError: If one is promised by a calibrated model alone, and this one is not.
        """
        image = self.image(index)
        size = tuple(self.mask.shape[-2:]) if image is None else (image.height, image.width)
        resized = {}
        for name in names:
            if (maps := getattr(self, name)) is None:
                raise ValueError(f"there is no {name}: {self.no_promise}")
            values = maps[index].detach().float().cpu()[None, None]  # [1, 1, H, W]
            if name.endswith("mask"):
                resized[name] = F.interpolate(values, size=size, mode="nearest")[0, 0].bool().numpy()
            else:
                resized[name] = F.interpolate(values, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
        return resized

    def image(self, index: int) -> Image.Image | None:
        """The image of a pair, as it was given."""
        if not self.images:
            return None
        return self.images[0 if len(self.images) == 1 else index]

    def to_dict(self) -> list[dict[str, Any]]:
        """A JSON-ready summary of each pair: areas, mean and largest uncertainties, review score, samples used."""
        return [self._summary(index) for index in range(len(self.mask))]

    def save(self, folder: str | os.PathLike[str], *, names: Sequence[str] | None = None) -> Path:
        """Write every pair's maps.

        For each, in the image's own geometry: `NAME_mask.png`; `NAME_probability.png` and `NAME_uncertainty.png` of 16
        bits (65535 is 1, or ln 2 nats); `NAME_overlay.png` where there is an image. `NAME.npz` holds the mask and all
        maps as floats at the network's size, [H, W]: `at_original_size` makes the others from them. Besides,
        `predictions.json` holds the summaries.

        Args:
            folder: Made if it is missing.
            names: One for each pair; None numbers them.

        Returns:
            The folder.

        Raises:
            ValueError: If there are not as many names as pairs, two are alike, or one cannot name a file; or if
                probability or uncertainty hold NaN.
        """
        folder = Path(folder)
        names = [f"{index:04d}" for index in range(len(self.mask))] if names is None else list(names)
        usable = all(name and Path(name).name == name for name in names)  # of no other folder
        if not usable or len(names) != len(self.mask) or len(set(names)) != len(names):
            raise ValueError(f"names are {names}, expected {len(self.mask)} different ones that can name files")
        for of in ("probability", "uncertainty"):
            if not getattr(self, of).isfinite().all():
                raise ValueError(f"the {of} holds NaN or infinite values, expected finite numbers; nothing was written")
        folder.mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(names):
            maps = {of: getattr(self, of)[index].detach().cpu().numpy() for of in ("mask", *FLOAT_MAPS)}
            write_atomically(folder / f"{name}.npz", partial(_write_npz, maps=maps))
            for of in ("mask", "probability", "uncertainty"):  # one after the other: a large image is large
                _write_png(folder / f"{name}_{of}.png", _levels(self.at_original_size(index, names=[of])[of], of))
            if (image := self.image(index)) is not None:
                maps = self.at_original_size(index, names=["mask", "uncertainty"])
                _write_png(folder / f"{name}_overlay.png", overlay(image, maps))
        summaries = [{"name": name, **summary} for name, summary in zip(names, self.to_dict(), strict=True)]
        text = json.dumps(summaries, indent=2, allow_nan=False) + "\n"
        write_atomically(folder / "predictions.json", lambda path: path.write_text(text))
        return folder

    def plot(self) -> Figure:
        """A matplotlib figure: each pair's image with the mask over it, probability, and both uncertainties.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib, which is not installed: pip install matplotlib") from error

        columns = ("probability", "aleatoric", "epistemic")
        figure = Figure(figsize=(3.0 * (len(columns) + 1), 2.8 * len(self.mask)), layout="constrained")
        axes = figure.subplots(len(self.mask), len(columns) + 1, squeeze=False)
        for index, row in enumerate(axes):
            maps = self.at_original_size(index, names=["mask", "uncertainty", *columns])
            shown = self.image(index)
            row[0].imshow(maps["mask"] if shown is None else overlay(shown, maps), cmap="gray")
            row[0].set(title=f"mask, review score {self.review_score[index]:.2f}", xticks=[], yticks=[])
            for axis, name in zip(row[1:], columns, strict=True):
                drawn = axis.imshow(maps[name], vmin=0.0, vmax=_MOST.get(name, math.log(2.0)), cmap="magma")
                axis.set(title=name if name in _MOST else f"{name} (nats)", xticks=[], yticks=[])
                figure.colorbar(drawn, ax=axis, shrink=0.8)
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


def refuse_nan(probability: Tensor) -> None:
    """Raise ValueError if a probability holds NaN, which would look like nothing found."""
    if (missing := probability.isnan()).any():
        raise ValueError(
            f"the network's output holds NaN in {int(missing.sum())} of {missing.numel()} pixels, expected finite "
            "logits: its weights hold NaN, or overflow in this type; load them again, or use float32"
        )


def overlay(image: Image.Image, maps: dict[str, np.ndarray]) -> Image.Image:
    """The image with the mask tinted green and, over it, uncertainty in red."""
    image = image.convert("RGB")
    tint = Image.fromarray(np.where(maps["mask"], np.uint8(round(0.35 * 255)), np.uint8(0)))
    tinted = Image.composite(Image.new("RGB", image.size, (0, 255, 0)), image, tint)
    doubt = np.clip(maps["uncertainty"] * np.float32(0.8 * 255 / math.log(2.0)), 0, 255).round().astype(np.uint8)
    return Image.composite(Image.new("RGB", image.size, (255, 0, 0)), tinted, Image.fromarray(doubt))


def _levels(values: np.ndarray, name: str) -> Image.Image:
    """A map as grey levels: of 8 bits for the mask, else of 16."""
    if name == "mask":
        return Image.fromarray(values.astype(np.uint8) * 255)
    scale = np.float32(65535 / _MOST.get(name, math.log(2.0)))
    return Image.fromarray(np.clip(values * scale, 0, 65535).round().astype(np.uint16))


def _write_npz(path: Path, maps: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # given a name, numpy would add to it
        np.savez_compressed(file, allow_pickle=False, **maps)


def _write_png(path: Path, image: Image.Image) -> None:
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", compress_level=1))
