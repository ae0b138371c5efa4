"""`ProbCrossAttention` against the oracle, in edge cases, in low precision, and its errors."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from support import array, arrays, gradients, normal, randomise
from torch import Tensor

import pvl_adapter as pvl

SHAPES = [(2, 3, 4, 5), (1, 1, 1, 1), (3, 7, 2, 6), (2, 1, 9, 8)]  # batch, query tokens, context tokens, width


def make(dim: int, **settings: float) -> pvl.ProbCrossAttention:
    return randomise(pvl.ProbCrossAttention(dim, **settings))


def tokens(batch: int, queries: int, keys: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return normal(batch, queries, dim, seed=1, dtype=dtype), normal(batch, keys, dim, seed=2, dtype=dtype)


def random_mask(batch: int, keys: int) -> Tensor:
    """[B, K], at least one real token in each row."""
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("num_samples", [0, 1, 3], ids=["mean", "one_draw", "three_draws"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_oracle(shape, num_samples, masked):
    batch, _, keys, dim = shape
    attention = make(dim, beta=1.7, gate_init=0.4).double()
    query, context = tokens(*shape, dtype=torch.float64)
    mask = random_mask(batch, keys) if masked else None
    noise = normal(num_samples, batch, keys, dim, seed=4, dtype=torch.float64) if num_samples else None
    draws = {"sample": bool(num_samples), "num_samples": max(num_samples, 1), "noise": noise}

    got = attention(query, context, context_mask=mask, **draws)

    expected = oracle.attention(
        array(query),
        array(context),
        arrays(attention),
        beta=1.7,
        mask=None if mask is None else mask.numpy(),
        noise=None if noise is None else array(noise),
    )
    assert got.dtype == torch.float64
    np.testing.assert_allclose(array(got), expected, atol=1e-10)
    single = attention.float()(query.float(), context.float(), context_mask=mask, **draws)
    np.testing.assert_allclose(array(single), expected, atol=2e-5)


@pytest.mark.parametrize("factor", [1.0, 1e6], ids=["usual", "scores_below_any_constant"])
def test_masked_context_has_no_influence_and_gets_no_gradient(factor):
    attention, (query, context), mask = make(4).double(), tokens(2, 3, 5, 4, torch.float64), random_mask(2, 5)
    changed = context.masked_fill(~mask[..., None], 1e4).requires_grad_()

    output = attention(factor * query, changed, context_mask=mask, sample=False)
    output.sum().backward()

    weights = arrays(attention)
    expected = oracle.attention(factor * array(query), array(context), weights, beta=2.35, mask=mask.numpy())
    np.testing.assert_allclose(array(output), expected, rtol=1e-9)
    assert torch.equal(changed.grad[~mask], torch.zeros_like(changed.grad[~mask]))


def test_a_fully_masked_row_attends_to_nothing_and_stays_finite():
    attention, (query, context) = make(4), tokens(2, 3, 5, 4)
    context.requires_grad_()
    mask = torch.tensor([[True, True, False, False, True], [False] * 5])

    output = attention(query, context, context_mask=mask, noise=normal(2, 5, 4, seed=5))
    output.sum().backward()

    expected = oracle.attention(array(query), array(context), arrays(attention), beta=2.35, mask=mask.numpy())
    np.testing.assert_allclose(array(output[1]), expected[1], atol=1e-5)
    assert torch.isfinite(context.grad).all()
    assert_finite_gradients(attention)


@pytest.mark.parametrize("factor", [0.0, 1e-20, 1e4, 1e10])
@pytest.mark.parametrize("scaled", ["query", "context", "both", "one_query_row"])
def test_gradients_are_finite_at_any_scale(scaled, factor):
    attention, (query, context) = make(6), tokens(2, 3, 5, 6)
    if scaled == "one_query_row":
        query[0, 1] *= factor
    query *= factor if scaled in ("query", "both") else 1.0
    context *= factor if scaled in ("context", "both") else 1.0
    query.requires_grad_(), context.requires_grad_()

    output = attention(query, context)
    output.mean().backward()

    assert all(values.isfinite().all() for values in (output, query.grad, context.grad))
    assert_finite_gradients(attention)


@pytest.mark.parametrize("zeroed", ["q_proj", "k_proj", "v_proj", "out_proj", "all"])
def test_gradients_are_finite_where_weights_are_zero(zeroed):
    attention, (query, context) = make(6), tokens(2, 3, 5, 6)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if zeroed == "all" or name.startswith(zeroed):
                parameter.zero_()

    attention(query, context).sum().backward()

    assert_finite_gradients(attention)


def test_several_samples_average_the_draws_and_the_variance_shrinks_with_their_number():
    attention, (query, context) = make(16), tokens(4, 6, 5, 16)
    mean = attention(query, context, sample=False)

    def mean_square(num_samples: int) -> float:
        deviations = torch.stack([attention(query, context, num_samples=num_samples) - mean for _ in range(60)])
        return float(deviations.square().mean())

    with torch.no_grad():
        one, sixteen = mean_square(1), mean_square(16)

    assert one > 0
    assert one / sixteen == pytest.approx(16.0, rel=0.4)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_generators_and_given_noise_fix_the_output_and_spare_the_global_state(num_samples):
    attention, (query, context), noise = make(4), tokens(2, 3, 5, 4), normal(2, 5, 4, seed=5)
    before = torch.random.get_rng_state()

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return attention(query, context, num_samples=num_samples, generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(attention(query, context, noise=noise), attention(query, context, noise=noise[None]))
    assert torch.equal(attention(query, context, sample=False), attention(query, context, sample=False))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(attention(query, context), attention(query, context))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_half_precision_stays_close_to_float32(way, dtype):
    """Within 3 % of the largest entry."""
    attention, (query, context), noise = make(32), tokens(2, 4, 6, 32), normal(2, 6, 32, seed=5)
    expected = attention(query, context, noise=noise).detach()
    if way == "weights":
        attention.to(dtype)
        query, context = query.to(dtype), context.to(dtype)

    with torch.autocast("cpu", dtype=dtype, enabled=way == "autocast"):
        got = attention(query, context, noise=noise)
    got.float().sum().backward()

    assert got.dtype == query.dtype
    torch.testing.assert_close(got.float(), expected, atol=0.03 * float(expected.abs().max()), rtol=0.0)
    assert_finite_gradients(attention)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 4)}, r"query.*\(3, 4\).*expected"),
        ({"query": torch.zeros(2, 3, 5)}, r"query.*\(2, 3, 5\).*expected.*4"),
        ({"context": torch.zeros(2, 5, 3)}, r"context.*\(2, 5, 3\).*expected.*4"),
        ({"context": torch.zeros(1, 5, 4)}, "batch of 2.*1"),
        ({"context_mask": torch.ones(2, 5)}, "context_mask.*float32.*bool"),
        ({"context_mask": torch.ones(2, 4, dtype=torch.bool)}, r"context_mask.*\(2, 4\).*\(2, 5\)"),
        ({"context_mask": torch.ones(5, dtype=torch.bool)}, r"context_mask.*\(5,\).*\(2, 5\)"),
        ({"num_samples": 0}, "num_samples is 0.*1 or more"),
        ({"noise": torch.zeros(2, 3, 4)}, r"noise.*\(2, 3, 4\).*\(2, 5, 4\)"),
        ({"noise": torch.zeros(3, 2, 5, 4), "num_samples": 2}, r"noise.*\(3, 2, 5, 4\).*\(2, 2, 5, 4\)"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused_with_what_was_got_and_expected(change, message):
    query, context = tokens(2, 3, 5, 4)
    arguments = {"query": query, "context": context, **change}

    with pytest.raises(ValueError, match=message):
        make(4)(**arguments)


def assert_finite_gradients(module: torch.nn.Module) -> None:
    for name, gradient in gradients(module).items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
