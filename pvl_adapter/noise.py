"""Seeded noise for Monte-Carlo samples: a function of seed, image, sample, adapter and direction alone.

So neither chunks nor batch neighbours nor the device change a sample (numpy's SeedSequence tells the streams apart). A
longer text continues the noise of a shorter one.

Shape alphabet: B batch, R rows of one forward (samples times images), V image tokens, L text tokens, C adapter width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from pvl_adapter.adapter import NoisePair

NoiseFn = Callable[[Sequence[int], Sequence[int]], list[NoisePair]]
"""Gives the noise of some images of a batch and some samples of each (zeros for `MEAN`): for each adapter [R, V, C] and
[R, L, C], rows by sample, then image."""

MEAN = -1
"""Among samples, the index of the deterministic pass, in which every adapter takes its mean values."""


def seeded_noise(
    *,
    seed: int,
    images: Sequence[int],
    adapters: int,
    text_shape: tuple[int, int],
    vision_shape: tuple[int, int],
    antithetic: bool,
    device: torch.device | str = "cpu",
) -> NoiseFn:
    """Build the noise function of a batch.

    Args:
        seed: 0 or more.
        images: A number for each image of the batch, see `image_key`.
        adapters: How many there are.
        text_shape: L and C.
        vision_shape: V and C.
        antithetic: Samples 2k and 2k + 1 are each other's negative.
        device: Where to; the noise is made on the CPU.
    """

    def one(image: int, unit: int, adapter: int, direction: int, shape: tuple[int, int]) -> Tensor:
        generator = np.random.default_rng([seed, image, unit, adapter, direction])
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    def noise_fn(pairs: Sequence[int], samples: Sequence[int]) -> list[NoisePair]:
        def rows(adapter: int, direction: int, shape: tuple[int, int]) -> Tensor:
            noise = torch.zeros(len(samples), len(pairs), *shape)  # as it stays for `MEAN`
            known: dict[tuple[int, int], Tensor] = {}  # of both samples of a pair, and of one image's sentences
            for s, sample in enumerate(samples):
                if sample == MEAN:
                    continue
                unit, sign = (sample // 2, 1 - 2 * (sample % 2)) if antithetic else (sample, 1)
                for p, pair in enumerate(pairs):
                    stream = images[pair], unit
                    if stream not in known:
                        known[stream] = one(*stream, adapter, direction, shape)
                    torch.mul(known[stream], sign, out=noise[s, p])
            return noise.flatten(0, 1).to(device)

        return [NoisePair(text=rows(k, 0, text_shape), image=rows(k, 1, vision_shape)) for k in range(adapters)]

    return noise_fn


def image_key(image: Tensor) -> int:
    """A number that stands for the content of a prepared image, [3, H, W]; the same in float32 and bfloat16."""
    content = image.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
