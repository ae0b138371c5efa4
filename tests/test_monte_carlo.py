"""The Monte-Carlo engine: the same samples whatever the chunks and neighbours, right statistics, Auto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hosts import BY_NAME
from support import FEW_HOSTS, HOST, MAPS, assert_same_bits, assert_same_maps, images, maps, predict, segmenter
from tiny_models import PAD
from torch import Tensor

import pvl_adapter as pvl
from pvl_adapter.error_bars import LogitMoments, fit_logits, normal_maps
from pvl_adapter.monte_carlo import MonteCarlo, MonteCarloConfig

IMAGES = images()
PLENTY = 2**40
BUDGETS = (1, 200_000, 600_000, PLENTY)  # bytes: one row at a time, two or three, some samples of a batch, everything


@pytest.fixture(scope="module")
def model() -> pvl.MedCLIPSeg:
    return segmenter()


@contextmanager
def watched_rows(model: pvl.MedCLIPSeg) -> Iterator[list[int]]:
    """How many rows each forward has had."""
    seen: list[int] = []
    handle = model.head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    yield seen
    handle.remove()


# --- what decides a sample -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
def test_memory_decides_how_much_is_computed_at_once_and_nothing_else(model, antithetic):
    expected = predict(model, 4, antithetic=antithetic, memory_budget=PLENTY, return_samples=True)
    largest = []
    # Kernels of other sizes round logits otherwise: by 16 ulp of the largest, of which the sigmoid leaves a quarter.
    rounding = 16 * torch.finfo().eps * expected.samples.logit().abs().max().item() / 4

    for budget in BUDGETS:
        with watched_rows(model) as rows:
            got = predict(model, 4, antithetic=antithetic, memory_budget=budget, return_samples=True)
        assert_same_maps(maps(got), maps(expected))
        torch.testing.assert_close(got.samples, expected.samples, atol=rounding, rtol=0.0)
        assert sum(rows) == 12
        largest.append(max(rows))
    assert largest[0] == 1 < largest[1] <= 3 < largest[2] < 12 == largest[3]


def planned(*, images: int, samples: int, rows: int) -> MonteCarlo:
    config = MonteCarloConfig(samples)
    return MonteCarlo(shape=(images, 2, 2), device=torch.device("cpu"), config=config, rows=rows)


@pytest.mark.parametrize("rows", range(1, 17))
def test_every_sample_of_every_image_is_in_one_chunk_of_at_most_so_many_rows(rows):
    monte_carlo, plan = planned(images=3, samples=5, rows=rows), []

    while (chunk := monte_carlo.next_chunk()) is not None:
        assert 1 <= len(chunk.images) * len(chunk.samples) <= rows
        plan += [(image, sample) for image in chunk.images for sample in chunk.samples]

    assert sorted(plan) == [(image, sample) for image in range(3) for sample in range(5)]
    for image in range(3):  # in their order
        assert [sample for of, sample in plan if of == image] == list(range(5))


def test_where_memory_runs_out_half_as_many_rows_are_taken_until_one_is_too_much():
    monte_carlo, error = planned(images=2, samples=2, rows=4), MemoryError()

    for rows in (4, 2, 1):
        chunk = monte_carlo.next_chunk()
        assert len(chunk.images) * len(chunk.samples) == rows
        with pytest.raises(KeyError):
            monte_carlo.shrink(chunk, KeyError())
        if rows > 1:
            monte_carlo.shrink(chunk, error)
    with pytest.raises(MemoryError):
        monte_carlo.shrink(chunk, error)


@pytest.mark.parametrize("host", FEW_HOSTS, ids=str)
def test_several_sentences_on_one_image_are_as_many_predictions(host):
    model, ids = segmenter(host), torch.cat([host.ids, host.ids[:2].flip(0)])
    ids[3:, 1] += 1  # five different sentences

    for budget in (1, 200_000, PLENTY):
        together = model.predict(IMAGES[0], host.text_of(ids), num_samples=4, memory_budget=budget)
        assert together.mask.shape == (5, *host.image_size)
        for index in range(5):
            alone = model.predict(IMAGES[0], host.text_of(ids[index : index + 1]), num_samples=4)
            assert_same_maps(maps(together, index), maps(alone, 0), atol=1e-5)


@pytest.mark.parametrize("name", ["open_clip-bert", "transformers-clip", "transformers-dual-clip-bert"])
def test_padding_for_a_longer_neighbour_changes_nothing(name):
    host = BY_NAME[name]
    model, short = segmenter(host), host.ids[1:2, :4]
    padded = torch.cat([short, torch.full((1, host.text_length - 4), PAD)], dim=1)

    alone = model.predict(IMAGES[0], host.text_of(short), num_samples=4)
    beside = model.predict(IMAGES[:2], host.text_of(torch.cat([padded, host.ids[:1]])), num_samples=4)

    assert_same_maps(maps(beside, 0), maps(alone, 0), atol=1e-5)


def test_the_seed_decides_the_samples_and_nothing_else_does(model):
    first = predict(model, seed=0)
    torch.manual_seed(123)
    np.random.seed(123)
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()

    assert_same_bits(maps(predict(model)), maps(first))
    seeds = [predict(model, seed=seed).probability for seed in (0, 1, 2, 2**40)]
    assert len({tuple(probability.flatten()[:8].tolist()) for probability in seeds}) == 4
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert all(np.array_equal(one, other) for one, other in zip(np.random.get_state(), numpy_state, strict=True))


def noise_of(model: pvl.MedCLIPSeg, number: int, **settings: object) -> list[Tensor]:
    """The noise each adapter is given for the image and for the text values, each [S, 3, tokens, C]."""
    found: list[Tensor] = []
    handles = [
        adapter.register_forward_pre_hook(
            lambda _, __, given: found.extend(values.unflatten(0, (number, 3)) for values in given["noise"]),
            with_kwargs=True,
        )
        for adapter in model.clip.pvl_adapters
    ]
    predict(model, number, memory_budget=PLENTY, **settings)
    for handle in handles:
        handle.remove()
    return found


def test_noise_is_standard_normal_and_differs_wherever_it_may(model):
    """Between images, samples, adapters, directions and seeds; of a pair one is the other's negative."""
    paired, other_seed = noise_of(model, 20), noise_of(model, 20, seed=1)
    independent = noise_of(model, 10, seed=2, antithetic=False)

    for values in paired:  # of every 24 samples two pairs, and 20 without a partner
        assert torch.equal(values[1:4:2], -values[:4:2])
    different = [torch.cat([values[:4:2], values[4:]]) for values in (*paired, *other_seed)] + independent
    values = torch.cat([each[:, :, : HOST.image_tokens].flatten(2).flatten(0, 1) for each in different])  # [N, 7 * C]
    correlation = torch.corrcoef(values) - torch.eye(len(values))
    assert len(values) == 4 * 3 * (2 * 18 + 10)
    assert correlation.abs().max() < 0.75  # of 56 values each: independent ones stay below
    everything = torch.cat([each.flatten() for each in different]).double()
    assert abs(everything.mean()) < 0.02
    assert everything.var() == pytest.approx(1.0, abs=0.03)
    assert (everything**4).mean() == pytest.approx(3.0, abs=0.2)


def test_noise_continues_for_longer_sentences_and_larger_numbers_and_knows_images_by_content(model):
    def samples(number: int, pixels: list[object]) -> Tensor:
        ids = HOST.ids[:1].expand(3, -1)
        settings = {"num_samples": number, "antithetic": False, "return_samples": True}
        return model.predict(pixels, ids, **settings).samples

    changed = np.array(IMAGES[0])
    changed[10:13, 15:18] += 40
    few, many = (samples(number, [IMAGES[0], IMAGES[0], changed]) for number in (3, 8))
    deviations = (many.logit() - many.logit().mean(dim=0)).flatten(2)

    torch.testing.assert_close(many[:3], few, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(many[:, 0], many[:, 1])
    assert torch.corrcoef(torch.stack([deviations[:, 0].flatten(), deviations[:, 2].flatten()]))[0, 1] < 0.7


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 8, 9])
def test_statistics_of_independent_samples_are_those_of_the_stacked_samples(model, number):
    prediction = predict(model, number, antithetic=False, threshold=0.4, return_samples=True)
    samples = prediction.samples.double().numpy()  # [S, B, H, W]

    def entropy(p: np.ndarray) -> np.ndarray:
        return -p * np.log(p) - (1 - p) * np.log1p(-p)

    mean, aleatoric = samples.mean(axis=0), entropy(samples).mean(axis=0)
    variance = samples.var(axis=0, ddof=1) if number > 1 else np.full_like(mean, np.nan)
    expected = dict(zip(MAPS, (mean, entropy(mean), aleatoric, entropy(mean) - aleatoric, variance), strict=False))

    for name, value in expected.items():
        np.testing.assert_allclose(getattr(prediction, name).numpy(), value, atol=2e-6)
    assert prediction.num_samples.tolist() == [number] * 3
    sure = np.abs(mean - 0.4) > 1e-5
    assert np.array_equal(prediction.mask.numpy()[sure], (mean > 0.4)[sure])


@pytest.mark.parametrize("number", [1, 2, 3, 8, 9, 30])
def test_statistics_of_pairs_and_single_samples_are_those_of_the_stacked_logits(model, number):
    prediction = predict(model, number, return_samples=True)
    logits = prediction.samples.double().logit()  # [S, B, H, W]
    firsts = [s for s in range(number - 1) if s % 24 in (0, 2)]
    partners = {s + 1 for s in firsts}
    alone = logits[[s for s in range(number) if s not in firsts and s not in partners]]
    first, second = (logits[[s + step for s in firsts]] for step in range(2))

    def moments(values: Tensor) -> LogitMoments:
        mean = values.mean(dim=0) if len(values) else torch.zeros_like(logits[0])
        return LogitMoments(torch.full((3,), len(values)), mean, (values - mean).square().sum(dim=0))

    fit = fit_logits(moments(alone), moments((first + second) / 2), ((first - second) / 2).square().sum(dim=0))

    torch.testing.assert_close(prediction.logits.mean, fit.mean.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prediction.logits.variance, fit.variance.float(), atol=1e-4, rtol=1e-3, equal_nan=True)
    for name, value in normal_maps(fit).items():
        torch.testing.assert_close(getattr(prediction, name), value.float(), atol=1e-4, rtol=1e-3, equal_nan=True)


def test_the_mean_pass_is_one_deterministic_sample(model):
    prediction = predict(model, 0, return_samples=True)

    torch.testing.assert_close(prediction.samples, prediction.probability[None])
    assert prediction.standard_error.isnan().all()
    assert prediction.variance.isnan().all()
    assert prediction.epistemic.max() < 1e-6
    assert prediction.num_samples.tolist() == [1, 1, 1]


def test_without_adapters_a_prediction_is_that_of_the_bare_towers(model):
    with pvl.disable_adapters(model.clip):
        expected = model(model.prepare(IMAGES), HOST.ids).logits.sigmoid()
        for number in (0, 2):
            torch.testing.assert_close(predict(model, number).probability, expected, atol=1e-6, rtol=0.0)
    assert (predict(model, 0).probability - expected).abs().max() > 1e-3


def many_seeds(model: pvl.MedCLIPSeg, *, antithetic: bool) -> dict[str, Tensor]:
    """Predictions of one image from 6 samples each, [100, H, W]."""
    found = [
        model.predict(IMAGES[0], HOST.ids[:1], num_samples=6, antithetic=antithetic, seed=seed) for seed in range(100)
    ]
    return {name: torch.stack([getattr(one, name)[0] for one in found]).double() for name in MAPS}


@pytest.fixture(scope="module")
def by_seed(model) -> dict[bool, dict[str, Tensor]]:
    return {antithetic: many_seeds(model, antithetic=antithetic) for antithetic in (True, False)}


@pytest.fixture(scope="module")
@torch.no_grad()
def reference(model) -> Tensor:
    """Many samples of plain calls on one image, [600, H, W]: predict has no part in them."""
    image, generator = model.prepare(IMAGES[0]).expand(100, -1, -1, -1), torch.Generator().manual_seed(0)
    text = HOST.ids[:1].expand(100, -1)
    return torch.cat([model(image, text, sample=True, generator=generator).logits.sigmoid() for _ in range(6)]).double()


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
def test_samples_have_mean_and_variance_of_plain_calls(by_seed, reference, antithetic):
    """Differences of means per pixel in units of their own standard deviation; variances on average."""
    means, variances = by_seed[antithetic]["probability"], by_seed[antithetic]["variance"].mean(dim=(1, 2))

    deviation = (means.var(dim=0) / 100 + reference.var(dim=0) / 600).sqrt()
    expected = reference.var(dim=0).mean()

    assert ((means.mean(dim=0) - reference.mean(dim=0)) / deviation).abs().max() < 5.0
    assert expected > 1e-4  # the adapters matter
    assert abs(variances.mean() - expected) < 4 * variances.std() / 10 + 0.05 * expected


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
def test_the_standard_error_is_what_predictions_scatter_by(by_seed, antithetic):
    told, scatter = by_seed[antithetic]["standard_error"].square().mean(), by_seed[antithetic]["probability"].var(dim=0)

    assert told / scatter.mean() == pytest.approx(1.0, abs=0.35)


def test_antithetic_samples_are_nearer_to_the_truth_and_more_samples_nearer_still(model, by_seed, reference):
    truth = reference.mean(dim=0)
    antithetic, independent = ((by_seed[kind]["probability"] - truth).square().mean() for kind in (True, False))
    few, many = (predict(model, n, antithetic=False).standard_error.mean() for n in (4, 64))

    assert antithetic < 0.7 * independent
    assert few / many == pytest.approx(4.0, rel=0.5)


# --- as many as it takes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("antithetic", "percentile"), [(True, 60.0), (False, 99.0)], ids=["antithetic", "independent"])
def test_auto_gives_each_image_as_many_samples_as_it_needs(model, antithetic, percentile):
    def auto(tolerance: float, max_samples: int = 128, **settings: object) -> pvl.Prediction:
        limits = pvl.Auto(tolerance=tolerance, percentile=percentile, max_samples=max_samples)
        return predict(model, limits, antithetic=antithetic, **settings)

    tolerance = 0.02 if antithetic else 0.05
    prediction = auto(tolerance)
    counts = prediction.num_samples.tolist()

    assert all(4 <= count <= 128 and count % 2 == 0 for count in counts)
    assert max(counts) > 4
    for index, count in enumerate(counts):
        assert count == 128 or np.percentile(prediction.standard_error[index], percentile) < tolerance
        if count > 4:
            sooner = auto(tolerance, count - 2)
            assert np.percentile(sooner.standard_error[index], percentile) >= tolerance
    assert_same_maps(maps(auto(tolerance, memory_budget=1)), maps(prediction))
    assert auto(1e-9, 5).num_samples.tolist() == [4, 4, 4]  # an odd last one would have no partner
    assert auto(1.0).num_samples.tolist() == [4, 4, 4]


def test_independent_samples_of_auto_are_those_of_a_fixed_number(model):
    auto = predict(model, pvl.Auto(tolerance=1e-9, max_samples=6), antithetic=False)

    assert_same_maps(maps(auto), maps(predict(model, 6, antithetic=False)))


def test_auto_tells_the_size_of_its_error_for_two_pairs(model, reference):
    """In the mean of squares over seeds and pixels."""
    limits = pvl.Auto(tolerance=1e-9, max_samples=4)
    found = [model.predict(IMAGES[0], HOST.ids[:1], num_samples=limits, seed=seed) for seed in range(60)]

    error = torch.stack([one.probability[0] for one in found]) - reference.mean(dim=0)
    told = torch.stack([one.standard_error[0] for one in found])

    assert told.square().mean() / error.square().mean() == pytest.approx(1.0, abs=0.5)


def test_samples_of_unknown_number_are_not_kept(model):
    with pytest.raises(ValueError, match="Auto"):
        predict(model, pvl.Auto(), return_samples=True)
