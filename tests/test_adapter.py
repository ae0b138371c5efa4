"""`PVLAdapter` against the oracle, its types and its errors."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from support import array, arrays, normal, randomise
from torch import Tensor

import pvl_adapter as pvl

SHAPES = [(2, 5, 4, 7, 6, 3), (1, 1, 1, 2, 3, 1), (3, 2, 6, 4, 4, 5)]  # batch, image and text tokens, widths, C
VISION_DIM, TEXT_DIM, DIM = 7, 6, 4


def make(**settings: float) -> pvl.PVLAdapter:
    return randomise(pvl.PVLAdapter(VISION_DIM, TEXT_DIM, DIM, **settings))


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """[2, 5, vision width] and [2, 3, text width]."""
    return normal(2, 5, VISION_DIM, seed=1, dtype=dtype), normal(2, 3, TEXT_DIM, seed=2, dtype=dtype)


def noise() -> pvl.NoisePair:
    return pvl.NoisePair(image=normal(2, 5, DIM, seed=4), text=normal(2, 3, DIM, seed=3))


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("num_samples", [0, 1, 2], ids=["mean", "one_draw", "two_draws"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_oracle(shape, num_samples, masked):
    batch, patches, words, vision_dim, text_dim, dim = shape
    adapter = randomise(pvl.PVLAdapter(vision_dim, text_dim, dim, beta=0.8, gate_init=-0.3)).double()
    vision = normal(batch, patches, vision_dim, seed=1, dtype=torch.float64)
    text = normal(batch, words, text_dim, seed=2, dtype=torch.float64)
    masks = {"text_mask": None, "vision_mask": None}
    if masked:
        masks["text_mask"] = torch.arange(words) < torch.arange(1, batch + 1)[:, None]
        masks["vision_mask"] = torch.arange(patches) >= torch.arange(batch)[:, None]  # none at all in one case
    pair = None
    if num_samples:
        pair = pvl.NoisePair(
            image=normal(num_samples, batch, patches, dim, seed=4, dtype=torch.float64),
            text=normal(num_samples, batch, words, dim, seed=3, dtype=torch.float64),
        )

    got = adapter(vision, text, **masks, sample=bool(num_samples), num_samples=max(num_samples, 1), noise=pair)

    expected = oracle.adapter(
        array(vision),
        array(text),
        arrays(adapter),
        beta=0.8,
        **{name: None if mask is None else mask.numpy() for name, mask in masks.items()},
        image_noise=None if pair is None else array(pair.image),
        text_noise=None if pair is None else array(pair.text),
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(array(one), other, atol=1e-10)


def test_updates_have_the_types_of_the_streams_they_are_added_to():
    adapter, (vision, text) = make(), tokens()

    vision_update, text_update = adapter(vision.bfloat16(), text.double())

    assert vision_update.dtype == torch.bfloat16
    assert text_update.dtype == torch.float64


def test_defaults_are_those_of_the_configuration():
    config, adapter = pvl.PVLConfig(), pvl.PVLAdapter(VISION_DIM, TEXT_DIM)

    assert adapter.vision_down.out_features == config.dim
    for attention in (adapter.two_way.image_to_text, adapter.two_way.text_to_image, pvl.ProbCrossAttention(DIM)):
        assert (attention.gate.item(), attention.beta, attention.log_beta) == (config.gate_init, config.beta, None)


def test_a_call_samples_once_unless_told_otherwise():
    adapter, streams = make(), tokens()

    for got, expected in zip(
        adapter(*streams, noise=noise()), adapter(*streams, noise=noise(), sample=True), strict=True
    ):
        assert torch.equal(got, expected)
    for got, mean in zip(adapter(*streams, noise=noise()), adapter(*streams, sample=False), strict=True):
        assert not torch.equal(got, mean)


def test_it_runs_without_memory_on_the_meta_device():
    adapter = make().to("meta")

    updates = adapter(torch.zeros(2, 5, VISION_DIM, device="meta"), torch.zeros(2, 3, TEXT_DIM, device="meta"))

    assert [tuple(update.shape) for update in updates] == [(2, 5, VISION_DIM), (2, 3, TEXT_DIM)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_tokens": torch.zeros(2, 5, 8)}, r"vision.*\(2, 5, 8\).*expected.*7"),
        ({"vision_tokens": torch.zeros(5, 7)}, r"(vision|query).*\(5, .\).*expected"),
        ({"text_tokens": torch.zeros(2, 3, 7)}, r"text.*\(2, 3, 7\).*expected.*6"),
        ({"text_tokens": torch.zeros(1, 3, 6)}, "batch of 2.*1"),
        ({"text_mask": torch.ones(2, 3)}, "mask.*float32.*bool"),
        ({"text_mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask.*\(2, 5\).*\(2, 3\)"),
        ({"vision_mask": torch.ones(2, 5)}, "mask.*float32.*bool"),
        ({"vision_mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask.*\(2, 3\).*\(2, 5\)"),
        ({"num_samples": 0}, "num_samples is 0.*1 or more"),
        ({"noise": pvl.NoisePair(*reversed(noise()))}, r"noise.*\(2, 5, 4\).*\(2, 3, 4\)"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused_with_what_was_got_and_expected(change, message):
    vision, text = tokens()

    with pytest.raises(ValueError, match=message):
        make()(**{"vision_tokens": vision, "text_tokens": text, **change})
