"""The counter-based generator: pinned integers, the statistics of standard normal draws, and what a draw depends on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pvl_adapter.noise import (
    FEW_PAIRS,
    GOLDEN,
    MEAN,
    PAIRS,
    NoiseFn,
    image_keys,
    mix_,
    normal,
    seeded_noise,
    stream_keys,
)

UNSIGNED = 2**64


def draws(seed: int, *, images: Tensor | None = None, adapters=2, vision=5, text=4, width=6) -> NoiseFn:
    images = torch.tensor([11, 12]) if images is None else images
    return seeded_noise(
        seed=seed,
        images=images,
        adapters=adapters,
        vision_shape=(vision, width),
        text_shape=(text, width),
        draws=PAIRS,
    )


def test_integers_are_those_of_splitmix64():
    """The first five outputs for the seed 1234567, as in the reference implementation's published test."""
    outputs = mix_(1234567 + torch.arange(1, 6) * GOLDEN)

    assert [int(value) % UNSIGNED for value in outputs] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_keys_are_pinned():
    """A change here changes every seeded prediction: say so in the changelog."""
    image = torch.arange(24.0).view(2, 3, 2, 2) / 8

    assert image_keys(image).tolist() == [6045290829633223718, 6823578100975345630]
    assert stream_keys(7, image_keys(image), [0, 5]).tolist() == [
        [4146094760757671658, 408560230060831846],
        [6764463239356360536, -4825780760384905667],
    ]
    assert torch.equal(image_keys(image.bfloat16()), image_keys(image))


def test_draws_are_equal_to_rounding_however_near_zero_their_radius():
    """Log(1 - x) for tiny x is where float32 could differ from device to device."""
    counters = (torch.arange(2_000_000) * GOLDEN).view(-1, 125)
    bits = mix_(counters + 3)
    uniform = ((bits >> 40).bitwise_and_(2**24 - 1).float() + 0.5).double() / 2**24
    angle = bits.bitwise_and_(2**24 - 1).double() * (2 * math.pi / 2**24)
    radius = (-2 * uniform.log()).sqrt()

    got = normal(torch.tensor([3]), counters)[0]

    expected = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    torch.testing.assert_close(got.double(), expected, atol=4e-6, rtol=0.0)


@pytest.mark.slow  # a few seconds: run it when noise.py changes
def test_ten_million_draws_are_standard_normal_and_independent():
    count = 10_240_000
    values = normal(torch.tensor([3]), (torch.arange(count // 2) * GOLDEN).view(-1, 128)).flatten().double()
    error = 1 / math.sqrt(count)

    assert abs(values.mean()) < 4 * error
    assert abs(values.var() - 1) < 4 * math.sqrt(2) * error
    assert abs((values**3).mean()) < 4 * math.sqrt(15) * error
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96) * error
    ordered = values.sort().values
    distribution = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert (distribution - steps).abs().max() < 1.63 * error  # Kolmogorov and Smirnov, 1%
    for lag in (1, 2, 3, 64, 128, 256, 4096, count // 2):
        both = values[lag:] * values[:-lag]
        assert abs(both.mean()) < 4.5 / math.sqrt(len(both))
        assert abs(both.square().mean() - 1) < 4.5 * math.sqrt(8 / len(both))


def test_draws_are_not_correlated_across_any_index():
    """Seeds, images, pairs, adapters, directions, tokens and channels: each compared with its neighbour."""
    size = {"vision": 32, "text": 32, "width": 64, "adapters": 4}
    values = torch.stack([gathered(draws(seed, **size), samples=range(0, 16, 2)) for seed in range(4)])
    # [seeds, pairs, images, adapters, directions, tokens, channels]

    assert values.shape == (4, 8, 2, 4, 2, 32, 64)
    for dim in range(values.ndim):
        first, second = values.narrow(dim, 0, values.shape[dim] - 1), values.narrow(dim, 1, values.shape[dim] - 1)
        for one, other in ((first, second), (first.square() - 1, second.square() - 1)):
            both = one * other
            assert abs(both.mean()) < 4.5 * both.std() / math.sqrt(both.numel())


def gathered(noise_fn, *, samples: range) -> Tensor:
    """[samples, images, adapters, directions, tokens, channels]."""
    rows = [torch.stack([one.image, one.text], dim=1) for one in noise_fn([0, 1], samples)]
    return torch.stack(rows, dim=1).unflatten(0, (len(samples), 2))


def test_a_draw_depends_on_its_own_indices_alone():
    everything = draws(5)([0, 1], range(6))

    for k, one in enumerate(everything):
        assert one.image.shape == (12, 5, 6)
        assert one.text.shape == (12, 4, 6)
        assert torch.equal(draws(5)([1], [3])[k].image[0], one.image[7])
        assert torch.equal(draws(5, vision=7, text=9)([0, 1], range(6))[k].text[:, :4], one.text)
        assert torch.equal(draws(5, images=torch.tensor([12]))([0, 1, 2], [2])[k].text[2], one.text[5])
        assert torch.equal(one.image[2:4], -one.image[:2])
    assert all(not values.any() for one in draws(5)([0, 1], [MEAN]) for values in one)
    assert torch.equal(draws(5)([0], [MEAN, 0])[1].text[1], everything[1].text[0])
    assert not torch.equal(draws(5 + 2**62)([0], [0])[0].text, draws(5)([0], [0])[0].text)
    odd = draws(5, width=5)([0], [0])[0]
    assert odd.image.shape == (1, 5, 5)
    assert draws(5, adapters=0)([0], [0]) == []


def test_a_draw_is_made_from_its_own_counters():
    """A change here changes every seeded prediction: say so in the changelog."""
    keys = stream_keys(5, torch.tensor([11, 12]), [1])[0]  # of the second pair

    for k, pair in enumerate(draws(5)([0, 1], [2])):
        for direction, values in enumerate(pair):
            elements = torch.arange(1, values.shape[1] * 3 + 1).view(-1, 3)
            assert torch.equal(values, normal(keys, (2**32 * (2 * k + direction) + elements) * GOLDEN))


def test_few_samples_are_pairs_and_every_unit_is_used():
    drawn = [FEW_PAIRS.of(sample) for sample in range(48)]

    assert drawn[:6] == [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1), (3, 1)]
    assert [FEW_PAIRS.is_paired(sample) for sample in (3, 4, 23, 24, 27, 28)] == [True, False, False, True, True, False]
    assert sorted({unit for unit, _ in drawn}) == list(range(44))
