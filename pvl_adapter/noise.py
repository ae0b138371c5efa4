"""Seeded noise for Monte-Carlo samples: a function of seed, image, sample, adapter, direction and element alone.

So neither chunks nor batch neighbours nor the device change a sample. A counter gives 64 bits by the finaliser of
SplitMix64 (Steele, Lea and Flood, 2014), in int64 arithmetic that wraps alike on every device; 24 bits give the radius
and 24 the angle of two normals (Box and Muller, 1958). A longer text continues the noise of a shorter one.

Shape alphabet: B batch, U streams, R rows of one forward (samples times images), K adapters, V image tokens, L text
tokens, T all of them, C adapter width, E half of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pvl_adapter.adapter import NoisePair
from pvl_adapter.fused import CounterNoise, is_available

NoiseFn = Callable[[Sequence[int], Sequence[int]], list[NoisePair]]
"""Gives the noise of some images of a batch and some samples of each (zeros for `MEAN`): for each adapter [R, V, C] and
[R, L, C], rows by sample, then image; counters of them where a fused kernel makes the noise."""


class Draws(NamedTuple):
    """Which samples take which noise.

    Attributes:
        block: Of every so many samples ...
        paired: ... the first so many are antithetic pairs: each is followed by the one of the negative noise.
    """

    block: int
    paired: int

    def of(self, sample: int) -> tuple[int, int]:
        """A sample's unit, which numbers what shares its noise, and its sign, 1 or -1."""
        block, place = divmod(sample, self.block)
        first = block * (self.block - self.paired // 2)
        if place < self.paired:
            return first + place // 2, 1 - 2 * (place % 2)
        return first + place - self.paired // 2, 1

    def is_paired(self, sample: int) -> bool:
        """Whether a sample belongs to a pair."""
        return sample % self.block < self.paired


INDEPENDENT, PAIRS, FEW_PAIRS = Draws(1, 0), Draws(2, 2), Draws(24, 4)

MEAN = -1
"""Among samples, the index of the deterministic pass, in which every adapter takes its mean values."""

GOLDEN = -7046029254386353131  # 2^64 divided by the golden ratio, as a signed number
_FACTORS = ((30, -4658895280553007687), (27, -7723592293110705685))  # of SplitMix64's finaliser
_CPU_BLOCK = 2**17  # elements whose temporary tensors fit the caches


def seeded_noise(
    *,
    seed: int,
    images: Tensor,
    adapters: int,
    vision_shape: tuple[int, int],
    text_shape: tuple[int, int],
    draws: Draws,
) -> NoiseFn:
    """Build the noise function of a batch; it works on the device of `images`.

    Args:
        seed: 0 or more.
        images: Int64 [B], a number for each image of the batch, see `image_keys`; [1] if all share one image.
        adapters: K.
        vision_shape: V and C.
        text_shape: L and C.
        draws: Which samples take which noise.
    """
    (vision, width), text, half = vision_shape, text_shape[0], -(-text_shape[1] // 2)
    device = images.device
    # 2^32 elements for each direction of each adapter.
    directions = torch.arange(2 * adapters, device=device).view(-1, 2, 1, 1) * 2**32 * GOLDEN  # [K, 2, 1, 1]
    of_image, of_text = (element_counters(tokens, half, device=device) for tokens in (vision, text))  # [V or L, E]
    counters = torch.cat([directions[:, 0] + of_image, directions[:, 1] + of_text], dim=1).flatten(0, 1)  # [K T, E]

    def noise_fn(pairs: Sequence[int], samples: Sequence[int]) -> list[NoisePair]:
        drawn = [(0, 0) if sample == MEAN else draws.of(sample) for sample in samples]  # unit and sign
        units = sorted({unit for unit, _ in drawn})
        chosen = [0] if len(images) == 1 else list(pairs)
        of_chosen = images[on_device(chosen, device)]
        streams = stream_keys(seed, of_chosen, units).flatten()  # [U], by unit, then image
        rows, signs = [], []
        for unit, sign in drawn:
            first = len(chosen) * units.index(unit)
            rows += [first + (p if len(chosen) > 1 else 0) for p in range(len(pairs))]
            signs += [sign] * len(pairs)
        of_row, factor = on_device(rows, device), on_device(signs, device)  # 2 x [R]
        if is_available(device):
            firsts = (streams[of_row] + directions[..., 0]).unbind()  # K of [2, R]
            return [
                NoisePair(
                    CounterNoise(first[0], factor, of_image, width), CounterNoise(first[1], factor, of_text, width)
                )
                for first in firsts
            ]
        noise = normal(streams, counters).view(len(streams), adapters, vision + text, 2 * half)[..., :width]
        noise = noise.index_select(0, of_row).mul_(factor[:, None, None, None])  # [R, K, T, C]
        return [NoisePair(image=one[:, :vision], text=one[:, vision:]) for one in noise.unbind(dim=1)]

    return noise_fn


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Int64, copied without waiting for what a GPU still computes, which `device=` or indexing by a list would do."""
    return torch.tensor(list(numbers), dtype=torch.long).to(device, non_blocking=True)


def image_keys(images: Tensor) -> Tensor:
    """A number that stands for the content of each prepared image [B, 3, H, W]: int64 [B], computed on its device.

    The same in float32 and bfloat16.
    """
    content = images.detach().to(torch.bfloat16).contiguous().view(torch.int16).long().flatten(1)  # [B, 3 H W]
    index = torch.arange(1, content.shape[1] + 1, device=images.device)
    return mix_(content + index * GOLDEN).sum(dim=1)


def stream_keys(seed: int, images: Tensor, units: Sequence[int]) -> Tensor:
    """The first counter of each unit (a sample, or a pair) of each image: int64 [units, B]."""
    state = torch.zeros_like(images)
    while True:  # a seed of any size
        state = mix_(state + GOLDEN + (seed & (2**62 - 1)))
        seed >>= 62
        if not seed:
            break
    state = mix_(state + GOLDEN + images)  # [B]
    return mix_(state + GOLDEN + on_device(units, images.device)[:, None])


def element_counters(tokens: int, half: int, *, device: torch.device | None = None) -> Tensor:
    """Of the elements of one direction of one adapter: int64 [tokens, E]."""
    return (torch.arange(1, tokens * half + 1, device=device) * GOLDEN).view(tokens, half)


def normal(streams: Tensor, counters: Tensor) -> Tensor:
    """Standard normal float32 [U, T, 2 E], from the first counters of streams [U] and counters [T, E], both int64."""
    if counters.device.type != "cpu" or torch.compiler.is_compiling():
        radius, angle = _polar(streams[:, None, None] + counters)  # 2 x [U, T, E]
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)
    noise = torch.empty(len(streams), len(counters), 2, counters.shape[1])
    step = max(1, _CPU_BLOCK // counters.shape[1])
    for stream, rows in zip(streams, noise, strict=True):
        for first in range(0, len(counters), step):
            radius, angle = _polar(counters[first : first + step] + stream)
            torch.mul(radius, angle.cos(), out=rows[first : first + step, 0])
            torch.mul(radius, angle.sin_(), out=rows[first : first + step, 1])
    return noise.flatten(2)


def mix_(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64, in place; int64 of any shape."""
    for bits, factor in _FACTORS:
        z.bitwise_xor_(_shift(z, bits)).mul_(factor)
    return z.bitwise_xor_(_shift(z, 31))


def _shift(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _polar(z: Tensor) -> tuple[Tensor, Tensor]:
    """Radius and angle of two normals for each counter; counters are overwritten."""
    mix_(z)
    radius = _shift(z, 40).float().add_(0.5).mul_(2**-24).log_().mul_(-2).sqrt_()
    return radius, z.bitwise_and_(2**24 - 1).float().mul_(2 * math.pi / 2**24)
