"""Monte-Carlo inference: many stochastic passes become a probability, its error and its uncertainties.

Entropies are in nats, as in MedCLIPSeg (arXiv 2602.20423). The split of the total into aleatoric (mean of entropies)
and epistemic (what the samples disagree about) is that of Depeweg et al., 2018 (arXiv 1710.07283). Antithetic pairs, a
draw and its negative, cancel what is linear in the noise (Hammersley and Morton, 1956).

Shape alphabet: B batch, S samples, R rows of one forward (samples times images), V image tokens, L text tokens,
C adapter width, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvl_adapter.adapter import NoisePair

Draw = Callable[[Sequence[int], Sequence[int]], Tensor]
"""Gives the logits [len(samples), len(images), H, W] of some images of a batch and some samples of each."""

NoiseFn = Callable[[Sequence[int], Sequence[int]], list[NoisePair]]
"""Gives the draws of some samples (zeros for `MEAN`) of some images: per adapter [R, L, C] and [R, V, C], rows by
sample, then image."""

MEAN = -1
"""The index of the deterministic pass, in which every adapter takes its mean values, among samples."""


@dataclass(frozen=True)
class MonteCarloConfig:
    """How many samples are drawn.

    Args:
        num_samples: S; 0 is one deterministic pass with the mean values; "auto" adds pairs (or pairs of samples) until
            `percentile` percent of an image's pixels have a standard error of the probability below `tolerance`.
        antithetic: Draw in pairs whose noise is each other's negative.
        tolerance: For "auto".
        percentile: For "auto".
        max_samples: For "auto": where it gives up; of an odd number the last has no partner and is not drawn.

    Raises:
        ValueError: If a value is out of range.
    """

    num_samples: int | str = 30
    antithetic: bool = True
    tolerance: float = 0.01
    percentile: float = 99.0
    max_samples: int = 128

    def __post_init__(self) -> None:
        count = self.num_samples
        if count != "auto" and (isinstance(count, bool) or not hasattr(count, "__index__") or index(count) < 0):
            raise ValueError(f'num_samples is {count!r}, expected a number of samples, 0 for the mean pass, or "auto"')
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}, expected a positive standard error of the probability")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}, expected a percentage of pixels, above 0, at most 100")
        if self.max_samples < 2:
            raise ValueError(f"max_samples is {self.max_samples}, expected 2 or more")


class Statistics:
    """Running statistics of one image's samples, one map at a time: memory does not grow with their number.

    Means and squared deviations are Welford's. Of antithetic samples, which come one after the other, the deviations of
    pair means are kept too: samples of a pair are not independent, pairs are.

    Args:
        antithetic: The samples come in pairs.
        mean_pass: Probabilities of the deterministic pass, [H, W], if there was one. It is biased but does not scatter,
            so it is worth about as much as a pair and enters the estimate as one. And it gives a single pair an error
            bar: their average is wrong, in the mean of squares, by half their distance.
    """

    def __init__(self, *, antithetic: bool, mean_pass: Tensor | None = None) -> None:
        self.antithetic = antithetic
        self.mean_pass = mean_pass
        self.count = 0
        self.pairs = 0
        self.first_of_pair: Tensor | None = None
        self.probability: Any = 0.0
        self.squares: Any = 0.0
        self.aleatoric: Any = 0.0
        self.pair_mean: Any = 0.0
        self.pair_squares: Any = 0.0

    def add(self, sample: Tensor) -> None:
        """Take in one sample's probabilities, [H, W], float32."""
        self.count += 1
        deviation = sample - self.probability
        self.probability = self.probability + deviation / self.count
        self.squares = self.squares + deviation * (sample - self.probability)
        self.aleatoric = self.aleatoric + (binary_entropy(sample) - self.aleatoric) / self.count
        if not self.antithetic:
            return
        if self.first_of_pair is None:
            self.first_of_pair = sample
            return
        mean = (self.first_of_pair + sample) / 2
        self.first_of_pair = None
        self.pairs += 1
        deviation = mean - self.pair_mean
        self.pair_mean = self.pair_mean + deviation / self.pairs
        self.pair_squares = self.pair_squares + deviation * (mean - self.pair_mean)

    @property
    def estimate(self) -> Tensor:
        """Of the infinite-sample mean of the probability, [H, W]."""
        if self.mean_pass is None:
            return self.probability
        return (self.pairs * self.probability + self.mean_pass) / (self.pairs + 1)

    @property
    def variance(self) -> Tensor:
        """Of one sample's probability, unbiased, [H, W]; NaN where the samples are too few to tell.

        The squared deviations of S samples from their mean add up to S (variance - variance of the mean) on average.
        """
        if self.pairs == 1 or self.count < 2:
            return torch.full_like(self.probability, math.nan)
        return (self.squares + self._paired / self.count) / (self.count - self._unpaired / self.count)

    @property
    def standard_error(self) -> Tensor:
        """Root of the mean squared error of `estimate`, [H, W]; NaN where it cannot be told."""
        if self.mean_pass is not None:
            bias = (self.probability - self.mean_pass).square()  # or more: it holds the error of the samples' mean too
            scatter = self.pairs * self.pair_squares / max(self.pairs - 1, 1)
            return (scatter + bias).sqrt() / (self.pairs + 1)
        return ((self._paired + self._unpaired * self.variance) / self.count**2).sqrt()

    @property
    def _unpaired(self) -> int:
        return self.count - 2 * self.pairs

    @property
    def _paired(self) -> Any:
        """What the pairs add to the variance of the sum of all samples."""
        return 4 * self.pairs * self.pair_squares / (self.pairs - 1) if self.pairs > 1 else 0.0


def monte_carlo(
    draw: Draw, *, batch: int, sampling: MonteCarloConfig, rows: int, keep: bool = False
) -> tuple[list[Statistics], Tensor | None]:
    """Draw samples and summarise them.

    Each image of a batch gets the same samples in the same order whatever `rows` is. "auto" with antithetic pairs looks
    first at a deterministic pass and one pair, then after every pair.

    Args:
        draw: Gives the logits of some samples of some images.
        batch: B.
        sampling: How many.
        rows: How many rows (samples times images) to give to `draw` at a time; halved when memory runs out.
        keep: Return the samples too.

    Returns:
        One summary per image, and the samples' probabilities [S, B, H, W] if they are to be kept.

    Raises:
        ValueError: If samples are to be kept whose number is not known beforehand.
    """
    if keep and sampling.num_samples == "auto":
        raise ValueError('samples can only be returned of a fixed number, num_samples is "auto"')
    auto, everyone = sampling.num_samples == "auto", range(batch)
    statistics = [Statistics(antithetic=sampling.antithetic and sampling.num_samples != 0) for _ in everyone]
    kept: list[list[Tensor]] = [[] for _ in everyone]

    def take(b: int, sample: int, probability: Tensor) -> None:
        if auto and sample == MEAN:
            statistics[b].mean_pass = probability
            return
        statistics[b].add(probability)
        if keep:
            kept[b].append(probability)

    if not auto:
        samples = range(int(sampling.num_samples)) if sampling.num_samples else range(MEAN, MEAN + 1)
        _draw_all(draw, images=everyone, samples=samples, rows=rows, take=take)
        return statistics, torch.stack([torch.stack(maps) for maps in kept], dim=1) if keep else None
    going: Sequence[int] = everyone
    samples = range(MEAN if sampling.antithetic else 0, 2)
    while going and samples:
        rows = _draw_all(draw, images=going, samples=samples, rows=rows, take=take)
        going = [b for b in going if not _settled(statistics[b].standard_error, sampling)]
        samples = range(samples.stop, samples.stop + 2 if samples.stop + 2 <= sampling.max_samples else samples.stop)
    return statistics, None


def _draw_all(
    draw: Draw,
    *,
    images: Sequence[int],
    samples: range,
    rows: int,
    take: Callable[[int, int, Tensor], None],
) -> int:
    """Draw these samples of these images in chunks of `rows`; the number of rows that memory had room for."""
    tasks: list[tuple[Sequence[int], range]] = [(images, samples)]
    while tasks:
        group, ahead = tasks.pop()
        if len(group) > rows:
            tasks += [(group[rows:], ahead), (group[:rows], ahead)]
            continue
        some = ahead[: max(1, rows // len(group))]
        try:
            probabilities = draw(group, some).float().sigmoid()  # [s, b, H, W]
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not _out_of_memory(error):
                raise
            rows //= 2
            tasks.append((group, ahead))
            continue
        for sample, maps in zip(some, probabilities, strict=True):
            for b, probability in zip(group, maps, strict=True):
                take(b, sample, probability)
        if len(some) < len(ahead):
            tasks.append((group, ahead[len(some) :]))
    return rows


def _settled(standard_error: Tensor, sampling: MonteCarloConfig) -> bool:
    return bool(torch.quantile(standard_error.flatten().double(), sampling.percentile / 100) < sampling.tolerance)


def _out_of_memory(error: Exception) -> bool:
    told = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in told)


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
    """Draws that are functions of seed, image, sample, adapter and direction alone.

    So neither chunks nor batch neighbours nor the device change them (numpy's SeedSequence tells the streams apart),
    and a longer text continues the draws of a shorter one.

    Args:
        seed: 0 or more.
        images: A number for each image of the batch, see `image_number`.
        adapters: How many there are.
        text_shape: L and C.
        vision_shape: V and C.
        antithetic: Samples 2k and 2k + 1 are each other's negative.
        device: Where to; they are drawn on the CPU.
    """

    def one(image: int, unit: int, adapter: int, direction: int, shape: tuple[int, int]) -> Tensor:
        generator = np.random.default_rng([seed, image, unit, adapter, direction])
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    def source(pairs: Sequence[int], samples: Sequence[int]) -> list[NoisePair]:
        def rows(adapter: int, direction: int, shape: tuple[int, int]) -> Tensor:
            drawn = torch.zeros(len(samples), len(pairs), *shape)  # as it stays for `MEAN`
            known: dict[tuple[int, int], Tensor] = {}  # of both samples of a pair, and of one image's sentences
            for s, sample in enumerate(samples):
                if sample == MEAN:
                    continue
                unit, sign = (sample // 2, 1 - 2 * (sample % 2)) if antithetic else (sample, 1)
                for p, pair in enumerate(pairs):
                    stream = images[pair], unit
                    if stream not in known:
                        known[stream] = one(*stream, adapter, direction, shape)
                    torch.mul(known[stream], sign, out=drawn[s, p])
            return drawn.flatten(0, 1).to(device)

        return [(rows(k, 0, text_shape), rows(k, 1, vision_shape)) for k in range(adapters)]

    return source


def given_noise(
    noise: Sequence[NoisePair],
    *,
    num_samples: int | str,
    batch: int,
    adapters: int,
    text_shape: tuple[int, int],
    vision_shape: tuple[int, int],
) -> NoiseFn:
    """Draws as the user gives them: for each adapter [S, B, L, C] and [S, B, V, C].

    Raises:
        ValueError: If there are not as many, or they have other shapes.
    """
    expected = tuple((num_samples, batch, *shape) for shape in (text_shape, vision_shape))
    if len(noise) != adapters:
        raise ValueError(f"noise holds {len(noise)} pairs, expected one for each of {adapters} adapters")
    for k, pair in enumerate(noise):
        shapes = tuple(tuple(drawn.shape) for drawn in pair)
        if shapes != expected:
            raise ValueError(f"noise for adapter {k} has the shapes {shapes}, expected {expected}")

    def source(pairs: Sequence[int], samples: Sequence[int]) -> list[NoisePair]:
        return [
            (text[list(samples)][:, list(pairs)].flatten(0, 1), vision[list(samples)][:, list(pairs)].flatten(0, 1))
            for text, vision in noise
        ]

    return source


def image_number(image: Tensor) -> int:
    """A number that stands for the content of a prepared image, [3, H, W]; the same in float32 and bfloat16."""
    content = image.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy of a Bernoulli variable in nats, 0 at 0 and 1."""
    return torch.special.entr(probability) + torch.special.entr(1.0 - probability)
