"""What a prediction promises where its model was calibrated: the part of `Prediction` that rests on its calibration.

Without one, every promise is None, with a warning that says why. See docs/trust.md.

Shape alphabet: B batch, H W pixels.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    from pvl_adapter.trust.calibration import Calibration, Presence


class Promises:
    """Promises of a `Prediction`, which has the attributes below."""

    mask: Tensor
    calibration: Calibration | None
    no_promise: str
    unseen: Tensor | None

    def image(self, index: int) -> Image.Image | None:
        raise NotImplementedError

    @property
    def outer_mask(self) -> Tensor | None:
        """Bool [B, H, W]: on average over subjects it misses at most `calibration.alpha` of what is to be found."""
        return self._promise("outer_mask")

    @property
    def inner_mask(self) -> Tensor | None:
        """Bool [B, H, W]: on average over subjects at most `calibration.alpha` of it is something else."""
        return self._promise("inner_mask")

    @property
    def presence(self) -> Presence | None:
        """Whether there is something to find; masks stay as they are, see `empty_absent`."""
        return self._promise("presence")

    @property
    def area_interval(self) -> Tensor | None:
        """Lower and upper bound of the true area in pixels of the images as given, else of the network, [B, 2].

        Times the area of a pixel it is in mm2. It holds for a share of 1 - alpha of the pairs.
        """
        if (shares := self._promise("area_interval")) is None:
            return None
        images = [self.image(index) for index in range(len(shares))]
        pixels = [self.mask[0].numel() if image is None else image.height * image.width for image in images]
        return shares * torch.tensor(pixels, device=shares.device)[:, None]

    def volume_interval(self, slice_volume: float) -> Tensor | None:
        """Lower and upper bound of the true volume, if all pairs are the slices of one subject and one sentence, [2].

        Args:
            slice_volume: Of a whole image times the distance of slices; in ml if that is.
        """
        interval = self._promise("volume_interval")
        return None if interval is None else interval * slice_volume

    @property
    def abstained(self) -> Tensor | None:
        """Pairs to leave to a human, bool [B]: the others have a mean loss (one minus the Dice) of at most
        `calibration.loss_limit`, with `calibration.confidence`."""
        return self._promise("abstained")

    @property
    def calibrated_probability(self) -> Tensor | None:
        """As often right as it says on average over the calibration's pixels, [B, H, W]."""
        return self._promise("calibrated_probability")

    @property
    def familiarity(self) -> Tensor | None:
        """[B]; were an image like the calibration's, so small a number would come up with at most its probability."""
        return self._promise("familiarity")

    @property
    def flagged(self) -> Tensor | None:
        """Pairs unlike the calibration's, by image or by words, bool [B]: promises may not hold for them."""
        return self._promise("flagged")

    def _promise(self, name: str) -> Any:
        if self.calibration is None:
            warnings.warn(f"no {name} is promised: {self.no_promise}", stacklevel=3)
            return None
        promise = getattr(self.calibration, name)(self)
        if promise is None:
            warnings.warn(f"no {name} is promised: the calibration's subjects do not allow it", stacklevel=3)
        return promise.to(self.mask.device) if isinstance(promise, Tensor) else promise
