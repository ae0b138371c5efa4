"""What `predict` makes of images before it knows the sentences.

Shape alphabet: B batch, H W pixels.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from pvl_adapter.distilled_head import weights_stamp
from pvl_adapter.images import appearance
from pvl_adapter.joint import Prefixes
from pvl_adapter.noise import image_keys

if TYPE_CHECKING:
    from pvl_adapter.segmentation import MedCLIPSeg


@dataclass(eq=False)
class ImagePart:
    """Images that several sentences are asked about, one after the other; made by `MedCLIPSeg.image_part`.

    The first call of `predict` that needs them adds what the image tower computes before the first adapter.

    Attributes:
        pixels: As the network takes them, [B, 3, H, W].
        images: As given, upright and in RGB; empty if they were prepared already.
        prefixes: Of the image tower.
    """

    pixels: Tensor
    images: tuple[Image.Image, ...] = ()
    prefixes: Prefixes = field(default_factory=dict, repr=False)

    def bind(self, model: MedCLIPSeg) -> ImagePart:
        """Note which model and weights it belongs to; returns itself."""
        self._model, self._stamp = weakref.ref(model), weights_stamp(model)
        return self

    def check(self, model: MedCLIPSeg) -> None:
        """Raise ValueError if another model made it, or other weights did."""
        if self._model() is not model or self._stamp != weights_stamp(model):
            raise ValueError(
                "the image part was made by another model, or by other weights, in another type or on another device; "
                "make it again by model.image_part(image)"
            )

    def rows(self, index: list[int]) -> ImagePart:
        """Some of its images, without what was computed of all together; itself if there is one for all sentences."""
        return self if len(self.pixels) == 1 else ImagePart(self.pixels[index])

    @cached_property
    def appearance(self) -> Tensor:
        """See `pvl_adapter.images.appearance`, [B, 18]."""
        return appearance(self.pixels)

    @cached_property
    def keys(self) -> Tensor:
        """What the noise of each image depends on, [B]; see `pvl_adapter.noise.image_keys`."""
        return image_keys(self.pixels)
