"""Maps and error bars from normal logits, against integrals, loops and scipy written here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import entr
from torch import Tensor

from pvl_adapter.error_bars import (
    PRIOR,
    LogitMoments,
    NormalLogits,
    _student_t,
    fit_logits,
    interval,
    normal_maps,
    standard_error,
)

SCHEMES = {"4 in pairs": (2, 0), "8 in pairs": (4, 0), "30 in pairs": (15, 0), "8": (2, 4), "24": (2, 20)}
SCHEMES |= {"30": (4, 22), "4 independent": (0, 4), "8 independent": (0, 8), "30 independent": (0, 30)}


def moments(logits: Tensor) -> LogitMoments:
    """Of samples [S, B, H, W]."""
    mean = logits.mean(dim=0) if len(logits) else torch.zeros(logits.shape[1:])
    return LogitMoments(torch.full(mean.shape[:1], len(logits)), mean, (logits - mean).square().sum(dim=0))


def fit_of(first: Tensor, second: Tensor, singles: Tensor) -> NormalLogits:
    """Of pairs [K, B, H, W] twice and samples [U, B, H, W]."""
    halves = ((first - second) / 2).square().sum(dim=0)
    return fit_logits(moments(singles), moments((first + second) / 2), halves)


def known(mean: object, variance: object, *, mean_variance: object = 0.0, degrees: float = 7.0) -> NormalLogits:
    """A fit with these values, as one row of one image."""
    mean, variance = (torch.as_tensor(each, dtype=torch.float32) for each in (mean, variance))
    mean, variance, uncertain = torch.broadcast_tensors(mean, variance, torch.as_tensor(mean_variance).float())
    told = torch.full((1,), degrees)
    return NormalLogits(mean[None, None], variance[None, None], uncertain[None, None], told, told)


# --- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [0.0, 0.3, 1.0, 3.0])
def test_maps_are_integrals_over_a_normal_logit(deviation):
    mean = np.array([-15.0, -5.0, -1.0, 0.0, 0.4, 2.0, 6.0, 12.0])
    x = np.linspace(-9, 9, 20001)
    weight = np.exp(-(x**2) / 2)
    weight /= weight.sum()
    p = 1 / (1 + np.exp(-(mean[:, None] + deviation * x)))
    q = 1 / (1 + np.exp(mean[:, None] + deviation * x))
    probability, aleatoric = p @ weight, (entr(p) + entr(q)) @ weight
    total = entr(probability) + entr(q @ weight)
    expected = {
        "probability": probability,
        "aleatoric": aleatoric,
        "uncertainty": total,
        "epistemic": total - aleatoric,
    }
    expected["variance"] = (p - probability[:, None]) ** 2 @ weight

    maps = normal_maps(known(mean, deviation**2))

    for name, values in expected.items():
        np.testing.assert_allclose(maps[name][0, 0], values, rtol=5e-4, atol=2e-6, err_msg=name)


def test_epistemic_is_never_negative_and_both_terms_add_up():
    mean, deviation = torch.meshgrid(torch.linspace(-60, 60, 241), torch.logspace(-8, 1, 91), indexing="ij")
    maps = normal_maps(NormalLogits(*(each[None] for each in (mean, deviation.square(), mean * 0)), *torch.ones(2, 1)))

    assert all(values.isfinite().all() for values in maps.values())
    assert maps["epistemic"].min() >= 0
    assert torch.equal(maps["uncertainty"], maps["aleatoric"] + maps["epistemic"])
    p = maps["probability"].double()
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    assert (maps["uncertainty"] - entropy).abs().max() < 2e-6
    assert maps["uncertainty"].max() <= math.log(2) + 1e-6


def test_samples_that_agree_have_no_epistemic_uncertainty_and_no_error():
    logits = torch.linspace(-8, 8, 12).view(1, 1, 3, 4)
    fit = fit_of(*(logits.expand(2, 1, 3, 4),) * 2, logits.expand(3, 1, 3, 4))
    maps = normal_maps(fit)

    torch.testing.assert_close(maps["probability"], logits[0].sigmoid())
    assert max(maps[name].max() for name in ("epistemic", "variance", "standard_error")) < 1e-5
    for bound in interval(fit, 0.95):
        torch.testing.assert_close(bound, logits[0].sigmoid(), rtol=0, atol=1e-5)


# --- mean and variance of the logits ---------------------------------------------------------------------------------


def typical(values: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Written pixel by pixel: averages at logits of -12, 0 and 12, and a straight line between them."""
    anchors = [-12.0, 0.0, 12.0]
    shares = np.array([[np.interp(z, anchors, np.eye(3)[a]) for a in range(3)] for z in logits.flat])
    means = [np.average(values.flat, weights=share) if share.sum() else 0.0 for share in shares.T]
    return np.array([np.interp(z, anchors, means) for z in logits.flat]).reshape(values.shape)


@pytest.mark.parametrize(("pairs", "others"), [(2, 0), (3, 5), (1, 2), (0, 2), (0, 7)])
def test_the_fit_is_what_a_loop_finds(pairs, others):
    generator = torch.Generator().manual_seed(pairs + 10 * others)
    centre = 20 * torch.rand(1, 2, 3, 5, generator=generator) - 10
    drawn = centre + torch.randn(2 * pairs + others, 2, 3, 5, generator=generator)
    first, second, singles = drawn[:pairs], drawn[pairs : 2 * pairs], drawn[2 * pairs :]

    fit = fit_of(first, second, singles)

    for b in range(2):
        a, z, u = (each[:, b].double().numpy() for each in (first, second, singles))
        mean = ((a + z) / 2).mean(axis=0) if pairs else u.mean(axis=0)
        degrees = pairs + others if pairs else others - 1
        squares = sum(((one - mean) ** 2 + (other - mean) ** 2) / 2 for one, other in zip(a, z, strict=True))
        squares = squares + sum((one - mean) ** 2 for one in u)
        variance = (PRIOR * np.exp(typical(np.log(squares / degrees), mean)) + squares) / (PRIOR + degrees)
        np.testing.assert_allclose(fit.mean[b], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(fit.variance[b], variance, rtol=1e-4)
        assert fit.variance_degrees[b] == PRIOR + degrees
        if pairs == 1:
            assert fit.mean_variance[b].isnan().all()
        elif pairs:
            of_pairs = ((a + z) / 2).var(axis=0, ddof=1)
            prior = variance * typical(of_pairs, mean) / typical(variance, mean)
            expected = (PRIOR * prior + (pairs - 1) * of_pairs) / (PRIOR + pairs - 1) / pairs
            np.testing.assert_allclose(fit.mean_variance[b], expected, rtol=1e-4)
            assert fit.mean_degrees[b] == PRIOR + pairs - 1
        else:
            np.testing.assert_allclose(fit.mean_variance[b], variance / others, rtol=1e-4)
            assert fit.mean_degrees[b] == PRIOR + degrees


def test_an_image_is_fitted_alone_and_the_typical_variance_fades():
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(1, 2, 6, 6, generator=generator) + 0.5
    none = torch.zeros(0, 2, 6, 6)
    errors = []
    for number in (8, 800):
        drawn = spread * torch.randn(number, 2, 6, 6, generator=generator)
        fit, alone = fit_of(none, none, drawn), fit_of(none[:, :1], none[:, :1], drawn[:, :1])
        torch.testing.assert_close(fit.variance[:1], alone.variance)
        errors.append((fit.variance / drawn.var(dim=0) - 1).abs().max())
    assert errors[0] > 0.1
    assert errors[1] < 0.02


def test_a_single_sample_is_taken_as_it_is_and_a_single_pair_has_no_error():
    logits = torch.linspace(-3, 3, 6).view(1, 1, 2, 3)
    one = fit_of(logits[:0], logits[:0], logits)
    pair = fit_of(logits - 1, logits + 1, logits[:0])

    torch.testing.assert_close(normal_maps(one)["probability"], logits[0].sigmoid())
    assert normal_maps(one)["epistemic"].max() < 1e-12
    for unknown in (normal_maps(one)["variance"], standard_error(one), *interval(one, 0.9)):
        assert unknown.isnan().all()
    torch.testing.assert_close(pair.variance, torch.ones(1, 2, 3))
    assert normal_maps(pair)["variance"].min() > 0
    assert standard_error(pair).isnan().all()


# --- error bars ------------------------------------------------------------------------------------------------------


def drawn(pairs: int, others: int, *, seed: int) -> tuple[NormalLogits, dict[str, Tensor], Tensor | None]:
    """Fit, true maps, and plain mean of independent samples, of logits whose true law is known.

    As in the trained network: variances differ between pixels, pair means vary by 1.5% of one sample's variance, and
    an image's pixels share few sources of noise (the mean of their squared correlations is 1 / 6).
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 40, 50)
    mean = 24 * torch.rand(shape, generator=generator) - 12
    deviation = (0.4 * torch.randn(shape, generator=generator)).exp()
    shares = torch.nn.functional.normalize(torch.randn(2, 6, 40, 50, generator=generator), dim=1)
    even = 0.015**0.5

    def one(number: int) -> tuple[Tensor, Tensor]:
        sources = torch.randn(2, number, 2, 6, generator=generator)
        odd, rest = deviation * torch.einsum("pnbr, brhw -> pnbhw", sources, shares)
        return odd, mean + even * rest

    (odd, rest), (single, of_single) = one(pairs), one(others)
    fit = fit_of(rest + odd, rest - odd, single + of_single)
    truth = normal_maps(fit._replace(mean=mean, variance=deviation.square() * (1 + even**2)))
    return fit, truth, None if pairs else (single + of_single).sigmoid().mean(dim=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_interval_holds_as_often_as_it_says(scheme):
    held: list[Tensor] = []
    squares = torch.zeros(2)
    for seed in range(20):
        fit, maps, plain = drawn(*SCHEMES[scheme], seed=seed)
        truth = maps["probability"]
        (low, high), told = interval(fit, 0.95, probability=plain), standard_error(fit)
        place = torch.bucketize(truth, torch.tensor([0.01, 0.2, 0.8, 0.99]))
        inside = ((low <= truth) & (truth <= high)).float()
        held.append(torch.stack([inside[(place == part) & (told > 1e-6)].mean() for part in range(5)]))
        error = (normal_maps(fit)["probability"] if plain is None else plain) - truth
        squares += torch.stack([told.square().mean(), error.square().mean()])

    share = torch.stack(held).mean(dim=0)  # of pixels by their probability
    assert share.mean() == pytest.approx(0.95, abs=0.025)
    assert share.min() > 0.9
    assert (squares[0] / squares[1]).sqrt() == pytest.approx(1.0, abs=0.2)


def test_few_pairs_serve_the_epistemic_map_better_than_pairs_and_the_probability_better_than_none():
    error = {}
    for scheme in ((2, 20), (12, 0), (0, 24)):
        fit, truth, _ = drawn(*scheme, seed=7)
        maps = normal_maps(fit)
        error[scheme] = {name: (maps[name] - truth[name]).square().mean() for name in ("probability", "epistemic")}

    assert error[2, 20]["epistemic"] < 0.7 * error[12, 0]["epistemic"]
    assert error[2, 20]["probability"] < 0.5 * error[0, 24]["probability"]


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("degrees", [4, 7, 30])
def test_intervals_are_students_of_the_mean_and_chi_square_of_the_variance(degrees, level):
    mean = torch.tensor([-6.0, -1.0, 0.5, 5.0])
    sure_of_variance = known(mean, 1e-10, mean_variance=0.04, degrees=degrees)
    sure_of_mean = known(mean, 2.0, degrees=degrees)

    reach = 0.2 * stats.t.ppf((1 + level) / 2, degrees)
    for bound, sign in zip(interval(sure_of_variance, level), (-1, 1), strict=True):
        torch.testing.assert_close(bound[0, 0], (mean + sign * reach).sigmoid(), rtol=5e-3, atol=1e-6)
    quantiles = stats.chi2.ppf([(1 + level) / 2, (1 - level) / 2], degrees)
    ends = [normal_maps(known(mean, 2.0 * degrees / at))["probability"][0, 0] for at in quantiles]
    for bound, expected in zip(
        interval(sure_of_mean, level), (torch.minimum(*ends), torch.maximum(*ends)), strict=True
    ):
        torch.testing.assert_close(bound[0, 0], expected, rtol=1e-3, atol=1e-6)


def test_students_quantile_has_all_terms_of_its_series():
    """Where the first one that is left out is below 1e-11, and those that are not are above."""
    got = _student_t(0.5, torch.tensor([100.0], dtype=torch.float64))

    assert got.item() == pytest.approx(stats.t.ppf(0.75, 100), rel=0, abs=1e-11)


def test_an_interval_lies_about_the_probability_it_is_given():
    fit = known([-6.0, 0.0, 6.0], 1.0, mean_variance=0.05)
    plain = torch.tensor([[[0.01, 0.4, 1.0]]])
    low, high = interval(fit, 0.9, probability=plain)

    assert (low <= plain).all()
    assert (plain <= high + 1e-6).all()
    shift = (plain.logit() - normal_maps(fit)["probability"].logit())[..., :2]  # the third is infinite
    for bound, own in zip((low, high), interval(fit, 0.9), strict=True):
        torch.testing.assert_close(bound[..., :2].logit(), own[..., :2].logit() + shift, rtol=1e-3, atol=1e-3)
