"""One label for every pixel, from the masks of several sentences.

Each of K sentences says with a probability p_k whether a pixel is what it describes, without knowing of the others.
Labels exclude each other: at most one of these independent opinions is right. Given that, the probability of label k is
proportional to p_k times all other 1 - p_j, and that of background to all 1 - p_j. Divided by the latter:

    P(k) = o_k / (o_0 + sum of o_j),  o_k = p_k / (1 - p_k),  o_0 = t / (1 - t) of the background

A threshold t of 0.5 makes background count once, as above; another is its price. Odds rise with the probability, so
the likeliest label is that of the highest probability where it is above t, else background: what is in a single mask
is never background. A calibrated probability is one rising function of the probability for all sentences. It chooses
among labels alike, but may be on the other side of t. So labels come from the probability itself, as single masks do,
and the calibrated one tells how likely each is, for the entropy.

Shape alphabet: K labels, H W pixels of the network, h w pixels of an image as it was given.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from pvl_adapter.data.presets import Label
    from pvl_adapter.prediction import Prediction


class Combined(NamedTuple):
    """What `combine` makes of single probabilities.

    Attributes:
        labels: Int32 [...], k + 1 of row k, 0 of background.
        entropy: Of the probabilities of labels and background, in nats, from 0 to ln(K + 1), float32 [...].
        shared: How many pixels are in both masks of two rows, int64 [K, K]; those of parts may be added up.
    """

    labels: Tensor
    entropy: Tensor
    shared: Tensor


class Overlap(NamedTuple):
    """Two labels whose single masks share pixels."""

    first: str
    second: str
    pixels: int


def combine(
    probability: Tensor | np.ndarray,
    *,
    threshold: float = 0.5,
    masks: Tensor | np.ndarray | None = None,
    calibrated: Tensor | np.ndarray | None = None,
    names: Sequence[str] = (),
) -> Combined:
    """One label for every pixel, see the module; of a volume, part by part, so that memory does not grow with it.

    Args:
        probability: Of each label by itself, [K, ...].
        threshold: Probability above which a pixel is in a single mask.
        masks: The single masks, bool [K, ...], where they are not just that, as after a clean-up.
        calibrated: The calibrated probability, [K, ...], for the entropy.
        names: Of the rows; of equal probabilities the first name wins. Without names it is the first row.

    Raises:
        ValueError: If a probability is NaN, below 0 or above 1.
    """
    order = torch.tensor(sorted(range(len(probability)), key=list(names or range(len(probability))).__getitem__))
    probability = torch.as_tensor(probability)
    low, high = probability.aminmax()
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"got numbers from {low:g} to {high:g}, expected probabilities from 0 to 1, and no NaN")
    inside = probability > threshold if masks is None else torch.as_tensor(masks).bool()  # [K, ...]
    best = torch.where(inside, probability, -1.0)[order].max(dim=0)  # the first of equals
    labels = torch.where(inside.any(dim=0), order.to(best.indices)[best.indices] + 1, 0).int()  # [...]

    belief = (probability if calibrated is None else torch.as_tensor(calibrated))[order].float()
    belief = torch.cat([torch.full_like(belief[:1], threshold), belief])  # [K + 1, ...]
    log_odds = belief.clamp_(torch.finfo(torch.float32).tiny, 1.0 - 2.0**-24).logit_()  # finite
    entropy = torch.special.entr(log_odds.softmax(dim=0)).sum(dim=0)

    several = inside[:, inside.sum(dim=0) > 1].double()  # [K, pixels of several]; exact up to 2 ** 53
    return Combined(labels, entropy, (several @ several.T).long())


def overlaps(shared: Tensor, names: Sequence[str]) -> tuple[Overlap, ...]:
    """Pairs of labels that share pixels, those that share most first, from `Combined.shared`."""
    pairs = combinations(sorted(range(len(names)), key=names.__getitem__), 2)
    found = [Overlap(names[one], names[other], int(shared[one, other])) for one, other in pairs]
    return tuple(sorted((each for each in found if each.pixels), key=lambda each: -each.pixels))


@dataclass(frozen=True)
class LabelMap:
    """What several sentences say of one image, as one label for every pixel.

    Attributes:
        labels: Int32 [H, W]: k + 1 is `names[k]`, 0 background.
        entropy: Doubt between labels and background, in nats, from 0 to ln(K + 1), [H, W].
        names: Of the labels, in alphabetical order.
        overlaps: Pairs of labels whose single masks share pixels (of the network), with their number.
        calibrated: Whether the entropy is of calibrated probabilities.
        image: As it was given; None if prepared tensors were.
    """

    labels: Tensor
    entropy: Tensor
    names: tuple[str, ...]
    overlaps: tuple[Overlap, ...]
    calibrated: bool
    image: Image.Image | None = None

    @classmethod
    def from_prediction(
        cls, prediction: Prediction, *, threshold: float | None = None, names: Sequence[str] | None = None
    ) -> LabelMap:
        """See `Prediction.label_map`."""
        names, looks = tuple(prediction.texts if names is None else names), prediction.appearance
        if len(prediction.images) > 1 or not (looks is None or (looks == looks[0]).all()):
            raise ValueError("got a prediction of several images, expected one; predict each with all sentences")
        if len(set(names)) != len(names) or len(names) != len(prediction.mask):
            got = f"got {len(set(names))} different names of {len(prediction.mask)} labels"
            raise ValueError(f"{got}, expected as many; say each sentence once, or give names=[...]")
        order = sorted(range(len(names)), key=names.__getitem__)
        calibrated = None if prediction.calibration is None else prediction.calibrated_probability
        labels, entropy, shared = combine(
            prediction.probability[order],
            threshold=prediction.threshold if threshold is None else threshold,
            masks=prediction.mask[order] if threshold is None else None,
            calibrated=None if calibrated is None else calibrated[order],
        )
        names = tuple(sorted(names))
        return cls(labels, entropy, names, overlaps(shared, names), calibrated is not None, prediction.image(0))

    def at_original_size(self) -> dict[str, np.ndarray]:
        """At the image's size, [h, w]: `labels` by nearest neighbour, as single masks, `entropy` bilinearly."""
        size = tuple(self.labels.shape) if self.image is None else (self.image.height, self.image.width)
        labels = F.interpolate(self.labels.cpu().float()[None, None], size=size)[0, 0].int()
        entropy = F.interpolate(self.entropy.cpu()[None, None], size=size, mode="bilinear")[0, 0]
        return {"labels": labels.numpy(), "entropy": entropy.numpy()}

    def save(self, path: str | os.PathLike[str], *, labels: Sequence[Label] | None = None) -> Path:
        """Write a PNG of label values, coloured by its palette, at the image's size, and a JSON legend beside it.

        Args:
            path: Of the PNG.
            labels: Values and colours, as `pvl_adapter.data.presets.read_preset` reads them (also from a legend), with
                each name as name or sentence. None counts from 1. Values above 255 make a colourless PNG of 16 bits.

        Raises:
            ValueError: If a name has no label, or the path does not end in .png.
        """
        from pvl_adapter.data.label_files import write_label_image

        numbers, pairs = self.at_original_size()["labels"], [pair._asdict() for pair in self.overlaps]
        facts = {"overlaps": pairs, "entropy_is_calibrated": self.calibrated}
        return write_label_image(Path(path), numbers, self.names, labels=labels, facts=facts)
