"""The Monte-Carlo engine: the same draws whatever the chunks, the neighbours and the memory, and when it stops."""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hosts import BY_NAME, PAD, Host
from support import CONFIG, assert_same_bits, blocks, gradients, injected, normal
from test_segmentation import HOST, SENTENCES, mixed_modes, segmenter, word_tokenizer
from torch import Tensor, nn

import pvl_adapter as pvl
from pvl_adapter.monte_carlo import MEAN, Draw, MonteCarloConfig, Statistics, image_number, monte_carlo, seeded_noise

MAPS = ("probability", "uncertainty", "aleatoric", "epistemic", "variance", "standard_error")
PLENTY = 2**40
BUDGETS = (1, 90_000, 400_000, PLENTY)  # bytes: one row at a time, two or three, some samples of a batch, everything
BERT = BY_NAME["open_clip-bert"]
FEW_HOSTS = [BY_NAME[name] for name in ("open_clip-inlined_text", "open_clip-timm-bert", "transformers-clip")]


def assert_same_prediction(got: pvl.Prediction, expected: pvl.Prediction) -> None:
    for name in MAPS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-6, rtol=0.0, equal_nan=True)
    assert torch.equal(got.num_samples, expected.num_samples)


def row(prediction: pvl.Prediction, index: int) -> dict[str, Tensor]:
    return {name: getattr(prediction, name)[index] for name in MAPS}


def assert_same_maps(got: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 1e-6) -> None:
    for name in MAPS:
        torch.testing.assert_close(got[name], expected[name], atol=atol, rtol=0.0, equal_nan=True)


def take(text: Tensor | dict[str, Tensor], rows: slice | list[int]) -> Tensor | dict[str, Tensor]:
    """Some of the sentences."""
    return {name: ids[rows] for name, ids in text.items()} if isinstance(text, dict) else text[rows]


def draws(model: pvl.MedCLIPSeg, host: Host, samples: int) -> list[tuple[Tensor, Tensor]]:
    """For each adapter the text values' [S, B, L, C] and the image values' [S, B, V, C]."""
    tokens = model.tokenize(host.text)
    length = (tokens["input_ids"] if isinstance(tokens, dict) else tokens).shape[1]
    shapes = [(samples, 3, length, CONFIG.dim), (samples, 3, host.image_tokens, CONFIG.dim)]
    return [tuple(normal(*shape, seed=2 * k + j) for j, shape in enumerate(shapes)) for k in range(len(CONFIG.layers))]


@contextmanager
def watched_rows(model: pvl.MedCLIPSeg) -> Iterator[list[int]]:
    """How many rows each forward has had."""
    seen: list[int] = []
    handle = model.head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    yield seen
    handle.remove()


# --- samples ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_samples_are_those_of_plain_calls_with_the_same_noise(host):
    model = segmenter(host)
    noise = draws(model, host, 4)
    expected = torch.stack(
        [
            model(host.image, host.text, noise=[(text[s], vision[s]) for text, vision in noise]).logits.sigmoid()
            for s in range(4)
        ]
    )

    for budget in BUDGETS:
        prediction = model.predict(
            host.image, host.text, num_samples=4, noise=noise, return_samples=True, memory_budget=budget
        )
        torch.testing.assert_close(prediction.samples, expected, atol=1e-5, rtol=0.0)
        torch.testing.assert_close(prediction.probability, expected.mean(dim=0), atol=1e-5, rtol=0.0)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_memory_decides_how_much_is_computed_at_once():
    model = segmenter()

    def rows_with(budget: int) -> list[int]:
        with watched_rows(model) as rows:
            model.predict(HOST.image, HOST.text, num_samples=4, memory_budget=budget)
        return rows

    got = [rows_with(budget) for budget in BUDGETS]

    assert [sum(rows) for rows in got] == [12] * 4
    assert got[0] == [1] * 12
    assert 1 < max(got[1]) <= 3 < max(got[2]) < 12
    assert got[3] == [12]


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
def test_memory_does_not_change_a_prediction(antithetic):
    model = segmenter()

    def predict(budget: int) -> pvl.Prediction:
        return model.predict(HOST.image, HOST.text, num_samples=5, antithetic=antithetic, memory_budget=budget)

    expected = predict(PLENTY)
    for budget in (*BUDGETS, None, 0):
        assert_same_prediction(predict(budget), expected)


def test_neighbours_in_the_batch_do_not_change_a_prediction(host):
    model = segmenter(host)
    order = [2, 0, 1]

    together = model.predict(host.image, host.text, num_samples=4)
    shuffled = model.predict(host.image[order], take(host.text, order), num_samples=4)

    for place, index in enumerate(order):
        one = slice(index, index + 1)
        alone = model.predict(host.image[one], take(host.text, one), num_samples=4)
        assert_same_maps(row(together, index), row(alone, 0), atol=1e-5)
        assert_same_maps(row(together, index), row(shuffled, place), atol=1e-5)


@pytest.mark.parametrize("host", FEW_HOSTS, ids=str)
def test_several_sentences_on_one_image_are_as_many_predictions(host):
    model, ids = segmenter(host), torch.cat([host.ids, host.ids[:2].flip(0)])
    ids[3:, 1] += 1  # five different sentences
    text = host.text_of(ids)

    for budget in (1, 90_000, PLENTY):
        together = model.predict(host.image[:1], text, num_samples=4, memory_budget=budget)

        assert together.mask.shape == (5, *host.image_size)
        for index in range(5):
            alone = model.predict(host.image[:1], take(text, slice(index, index + 1)), num_samples=4)
            assert_same_maps(row(together, index), row(alone, 0), atol=1e-5)


def test_one_sentence_on_one_image_among_several_sentences_stands_for_itself():
    model = segmenter()
    repeated = model.predict(HOST.image[:1].expand(3, -1, -1, -1), HOST.text, num_samples=4)

    assert_same_prediction(model.predict(HOST.image[:1], HOST.text, num_samples=4), repeated)


@pytest.mark.parametrize("name", ["open_clip-bert", "transformers-clip", "transformers-dual-clip-bert"])
def test_padding_for_a_longer_neighbour_changes_nothing(name):
    host = BY_NAME[name]
    model, short = segmenter(host), host.ids[1:2, :4]
    padded = torch.cat([short, torch.full((1, host.text_length - 4), PAD)], dim=1)

    alone = model.predict(host.image[:1], host.text_of(short), num_samples=4)
    beside = model.predict(host.image[:2], host.text_of(torch.cat([padded, host.ids[:1]])), num_samples=4)

    assert_same_maps(row(beside, 0), row(alone, 0), atol=1e-5)


def test_padding_by_a_tokenizer_changes_nothing():
    clip = pvl.inject_adapters(BERT.build(), CONFIG)
    model = pvl.MedCLIPSeg(clip, tokenizer=word_tokenizer()).eval()

    together = model.predict(BERT.image, SENTENCES, num_samples=4)

    for index, sentence in enumerate(SENTENCES):
        alone = model.predict(BERT.image[index : index + 1], sentence, num_samples=4)
        assert_same_maps(row(together, index), row(alone, 0), atol=1e-5)


def test_the_seed_decides_the_draws_and_nothing_else_does():
    model = segmenter()

    def predict(**settings: object) -> pvl.Prediction:
        return model.predict(HOST.image, HOST.text, num_samples=4, **settings)

    first = predict()
    torch.manual_seed(123)
    np.random.seed(123)
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()

    assert_same_bits([getattr(predict(seed=0), name) for name in MAPS], [getattr(first, name) for name in MAPS])
    assert not torch.equal(predict(seed=1).probability, first.probability)
    assert not torch.equal(predict(seed=2**40).probability, first.probability)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert all(np.array_equal(one, other) for one, other in zip(np.random.get_state(), numpy_state, strict=True))


def test_a_fixed_number_of_samples_begins_with_those_of_a_smaller_one():
    model = segmenter()

    few, many = (model.predict(HOST.image, HOST.text, num_samples=n, return_samples=True).samples for n in (3, 7))

    torch.testing.assert_close(many[:3], few, atol=1e-6, rtol=0.0)


# --- draws -----------------------------------------------------------------------------------------------------------


def source(*, seed: int = 0, length: int = 5, antithetic: bool = True, images: Sequence[int] = (11, 12, 13)) -> object:
    return seeded_noise(
        seed=seed, images=images, adapters=2, text_shape=(length, 8), vision_shape=(7, 8), antithetic=antithetic
    )


def test_draws_have_a_row_for_each_sample_of_each_image_sample_first():
    of = source()
    together = of([0, 2], [1, 4, 5])

    assert [tuple(tuple(values.shape) for values in pair) for pair in together] == [((6, 5, 8), (6, 7, 8))] * 2
    for place, (sample, image) in enumerate([(s, i) for s in (1, 4, 5) for i in (0, 2)]):
        for many, one in zip(together, of([image], [sample]), strict=True):
            assert torch.equal(many[0][place], one[0][0])
            assert torch.equal(many[1][place], one[1][0])


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
def test_draws_differ_between_images_samples_adapters_directions_and_seeds(antithetic):
    of = source(length=7, antithetic=antithetic)
    step = 2 if antithetic else 1  # the samples of a pair belong together
    pairs = of([0, 1, 2], range(0, 4 * step, step)) + source(seed=1, length=7, antithetic=antithetic)([0], [0])
    vectors = torch.cat([values.flatten(1) for pair in pairs for values in pair])

    correlation = torch.corrcoef(vectors) - torch.eye(len(vectors))

    assert len(vectors) == 2 * 2 * 12 + 2 * 2
    assert correlation.abs().max() < 0.7  # of 56 values each: independent ones stay below


def test_antithetic_samples_are_each_others_negative_also_in_separate_chunks():
    of = source()
    whole = of([0, 1], range(4))
    chunks = [of([0, 1], samples) for samples in ([0], [1, 2], [3])]

    for k, pair in enumerate(whole):
        for direction, values in enumerate(pair):
            samples = values.unflatten(0, (4, 2))
            assert torch.equal(samples[1], -samples[0])
            assert torch.equal(samples[3], -samples[2])
            assert not torch.equal(samples[2].abs(), samples[0].abs())
            assert torch.equal(torch.cat([chunk[k][direction] for chunk in chunks]), values)


def test_independent_samples_are_no_negatives():
    (text, _), *_ = source(antithetic=False)([0], [0, 1])

    assert not torch.equal(text[1].abs(), text[0].abs())


def test_the_mean_pass_draws_zeros_and_shifts_nothing():
    of = source()

    for with_mean, without in zip(of([0, 1], [MEAN, 0, 1]), of([0, 1], [0, 1]), strict=True):
        for values, expected in zip(with_mean, without, strict=True):
            assert not values[:2].any()
            assert torch.equal(values[2:], expected)


def test_a_longer_sentence_continues_the_draws_of_a_shorter_one():
    (short, vision), *_ = source(length=3)([0], [0])
    (long, same), *_ = source(length=9)([0], [0])

    assert torch.equal(long[:, :3], short)
    assert torch.equal(same, vision)


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
def test_draws_are_standard_normal(antithetic):
    values = torch.cat([v.flatten() for p in source(antithetic=antithetic)([0, 1, 2], range(100)) for v in p]).double()

    assert abs(values.mean()) < 0.02
    assert values.var() == pytest.approx(1.0, abs=0.03)
    assert (values**4).mean() == pytest.approx(3.0, abs=0.2)
    assert (values.abs() > 1.96).double().mean() == pytest.approx(0.05, abs=0.005)


def test_an_image_is_known_by_its_content():
    image = HOST.image[0]
    other = image.clone()
    other[0, 0, 0] += 0.1  # more than bfloat16 rounds away

    assert image_number(image) == image_number(image.clone())
    assert image_number(image) == image_number(HOST.image.flip(0)[2])
    assert image_number(image) == image_number(image.double()) == image_number(image.bfloat16())
    assert len({image_number(image), image_number(other), image_number(image.flip(-1)), image_number(-image)}) == 4


# --- the mean pass ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_samples_are_the_mean_pass(host):
    model = segmenter(host)
    prediction = model.predict(host.image, host.text, num_samples=0, return_samples=True)
    expected = model(host.image, host.text).logits.sigmoid()

    torch.testing.assert_close(prediction.probability, expected, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(prediction.samples, expected[None], atol=1e-6, rtol=0.0)
    assert prediction.standard_error.isnan().all()
    assert prediction.variance.isnan().all()
    assert prediction.epistemic.max() < 1e-6
    assert prediction.num_samples.tolist() == [1, 1, 1]


def test_without_adapters_a_prediction_is_that_of_the_bare_towers():
    model = segmenter()

    with pvl.disable_adapters(model.clip):
        expected = model(HOST.image, HOST.text).logits.sigmoid()
        for settings in ({"num_samples": 0}, {"num_samples": 2}):
            prediction = model.predict(HOST.image, HOST.text, **settings)
            torch.testing.assert_close(prediction.probability, expected, atol=1e-6, rtol=0.0)
    assert not torch.equal(model.predict(HOST.image, HOST.text, num_samples=0).probability, expected)


# --- statistics over many seeds --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> pvl.MedCLIPSeg:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return segmenter()


@pytest.fixture(scope="module")
def reference(model) -> Tensor:
    """Many independent samples of one image, [500, H, W]."""
    samples = model.predict(
        HOST.image[:1], HOST.text[:1], num_samples=500, antithetic=False, seed=10_000, return_samples=True
    ).samples
    assert samples.std(dim=0).mean() > 0.02  # the adapters matter
    return samples[:, 0]


def many_seeds(model: pvl.MedCLIPSeg, *, antithetic: bool, num_samples: int, seeds: int) -> dict[str, Tensor]:
    predictions = [
        model.predict(HOST.image[:1], HOST.text[:1], num_samples=num_samples, antithetic=antithetic, seed=seed)
        for seed in range(seeds)
    ]
    return {name: torch.stack([getattr(one, name)[0] for one in predictions]).double() for name in MAPS}


@pytest.fixture(scope="module")
def antithetic_seeds(model) -> dict[str, Tensor]:
    return many_seeds(model, antithetic=True, num_samples=6, seeds=100)


@pytest.fixture(scope="module")
def independent_seeds(model) -> dict[str, Tensor]:
    return many_seeds(model, antithetic=False, num_samples=6, seeds=100)


def test_antithetic_and_independent_samples_have_one_mean(antithetic_seeds, independent_seeds, reference):
    """Differences per pixel, in units of their own standard deviation."""

    def moments(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.mean(dim=0), values.var(dim=0) / len(values)

    means = [moments(maps["probability"]) for maps in (antithetic_seeds, independent_seeds)]
    means.append(moments(reference.double()))

    for (one, variance), (other, other_variance) in [means[:2], means[1:], means[::2]]:
        assert ((one - other) / (variance + other_variance).sqrt()).abs().max() < 5.0


def test_antithetic_samples_are_nearer_to_the_truth(antithetic_seeds, independent_seeds, reference):
    truth = reference.double().mean(dim=0)

    antithetic, independent = (
        (maps["probability"] - truth).square().mean() for maps in (antithetic_seeds, independent_seeds)
    )

    assert antithetic < 0.7 * independent


@pytest.mark.parametrize("seeds", ["antithetic_seeds", "independent_seeds"])
def test_the_variance_is_that_of_one_sample_on_average(seeds, reference, request):
    per_seed = request.getfixturevalue(seeds)["variance"].mean(dim=(1, 2))  # [seeds]
    expected = reference.double().var(dim=0).mean()

    error = per_seed.std() / len(per_seed) ** 0.5
    assert error < 0.1 * expected
    assert abs(per_seed.mean() - expected) < 4 * error + 0.03 * expected


@pytest.mark.parametrize("seeds", ["antithetic_seeds", "independent_seeds"])
def test_the_standard_error_is_what_predictions_scatter_by(seeds, request):
    maps = request.getfixturevalue(seeds)

    told, scatter = maps["standard_error"].square().mean(), maps["probability"].var(dim=0).mean()

    assert told / scatter == pytest.approx(1.0, abs=0.35)


# --- as many as it takes ---------------------------------------------------------------------------------------------


def drawing(
    spreads: Sequence[float],
    *,
    log: list[tuple[list[int], list[int]]] | None = None,
    antithetic: bool = True,
    room: int | None = None,
    error: Exception | None = None,
) -> Draw:
    """Logits with a spread for each image, curved so that pairs do not cancel; beyond `room` rows memory is short."""

    def logits(image: int, sample: int) -> Tensor:
        if sample == MEAN:
            return normal(4, 6, seed=image)
        unit, sign = (sample // 2, -1 if sample % 2 else 1) if antithetic else (sample, 1)
        noise = sign * spreads[image] * normal(4, 6, seed=1000 * (image + 1) + unit)
        return normal(4, 6, seed=image) + noise + 0.3 * noise**2

    def draw(images: Sequence[int], samples: Sequence[int]) -> Tensor:
        if log is not None:
            log.append((list(images), list(samples)))
        if room is not None and len(images) * len(samples) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.") if error is None else error
        return torch.stack([torch.stack([logits(image, sample) for image in images]) for sample in samples])

    return draw


def assert_same_statistics(got: Statistics, expected: Statistics) -> None:
    assert got.count == expected.count
    for name in ("probability", "aleatoric", "variance", "standard_error"):
        one, other = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
@pytest.mark.parametrize("percentile", [50.0, 99.0, 100.0])
def test_each_image_gets_as_many_samples_as_it_needs(antithetic, percentile):
    spreads, tolerance = (0.01, 0.4, 1.0), 0.02
    draw = drawing(spreads, antithetic=antithetic)
    sampling = MonteCarloConfig(
        "auto", antithetic=antithetic, tolerance=tolerance, percentile=percentile, max_samples=1000
    )

    statistics, kept = monte_carlo(draw, batch=3, sampling=sampling, rows=100)

    assert kept is None
    counts = [one.count for one in statistics]
    assert counts[0] == 2
    assert counts[0] <= counts[1] < counts[2] < 1000
    for image, one in enumerate(statistics):
        error = np.percentile(one.standard_error.numpy(), percentile)
        assert error < tolerance
        fixed, _ = monte_carlo(draw, batch=3, sampling=MonteCarloConfig(one.count, antithetic=antithetic), rows=100)
        torch.testing.assert_close(fixed[image].probability, one.probability)
        if not antithetic:
            assert_same_statistics(one, fixed[image])
        if one.count > 2:
            shorter = dataclasses.replace(sampling, max_samples=one.count - 2)
            sooner, _ = monte_carlo(draw, batch=3, sampling=shorter, rows=100)
            assert np.percentile(sooner[image].standard_error.numpy(), percentile) >= tolerance


@pytest.mark.parametrize("antithetic", [True, False], ids=["antithetic", "independent"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_memory_does_not_decide_how_many_samples_are_needed(antithetic, rows):
    draw = drawing((0.01, 0.4, 1.0), antithetic=antithetic)
    sampling = MonteCarloConfig("auto", antithetic=antithetic, tolerance=0.03)

    expected, _ = monte_carlo(draw, batch=3, sampling=sampling, rows=1000)
    got, _ = monte_carlo(draw, batch=3, sampling=sampling, rows=rows)

    for one, other in zip(got, expected, strict=True):
        assert_same_statistics(one, other)


@pytest.mark.parametrize("max_samples", [2, 3, 8, 11])
def test_a_hopeless_image_stops_at_the_limit(max_samples):
    log: list[tuple[list[int], list[int]]] = []
    sampling = MonteCarloConfig("auto", tolerance=1e-9, max_samples=max_samples)

    statistics, _ = monte_carlo(drawing((1.0,), log=log), batch=1, sampling=sampling, rows=100)

    drawn = max_samples - max_samples % 2  # an odd last one would have no partner
    assert statistics[0].count == drawn
    assert [sample for _, samples in log for sample in samples] == [MEAN, *range(drawn)]


def test_the_first_look_takes_the_mean_pass_and_one_pair():
    log: list[tuple[list[int], list[int]]] = []

    statistics, _ = monte_carlo(drawing((0.01, 1.0), log=log), batch=2, sampling=MonteCarloConfig("auto"), rows=100)

    assert log[0] == ([0, 1], [MEAN, 0, 1])
    assert log[1] == ([1], [2, 3])  # the easy one is done
    mean, pair = normal(4, 6, seed=0).sigmoid(), statistics[0].probability
    torch.testing.assert_close(statistics[0].estimate, (pair + mean) / 2)
    torch.testing.assert_close(statistics[0].standard_error, (pair - mean).abs() / 2)


@pytest.mark.parametrize("pairs", [1, 3])
def test_auto_tells_the_size_of_its_error(pairs):
    """In the mean of squares over many images; with more pairs it tells a little too much."""
    images = 60
    draw = drawing((0.7,) * images)
    truth, _ = monte_carlo(draw, batch=images, sampling=MonteCarloConfig(200), rows=1000)

    sampling = MonteCarloConfig("auto", tolerance=1e-9, max_samples=2 * pairs)
    statistics, _ = monte_carlo(draw, batch=images, sampling=sampling, rows=1000)

    error = torch.stack([one.estimate - exact.estimate for one, exact in zip(statistics, truth, strict=True)])
    told = torch.stack([one.standard_error for one in statistics])
    assert told.square().mean() / error.square().mean() == pytest.approx(1.0, abs=0.2 if pairs == 1 else 0.4)


def test_independent_samples_need_no_mean_pass():
    log: list[tuple[list[int], list[int]]] = []
    draw = drawing((0.01,), log=log, antithetic=False)

    monte_carlo(draw, batch=1, sampling=MonteCarloConfig("auto", antithetic=False), rows=100)

    assert log == [([0], [0, 1])]


def test_a_model_can_be_asked_for_as_many_samples_as_it_takes():
    model = segmenter()

    def predict(**settings: object) -> pvl.Prediction:
        return model.predict(HOST.image, HOST.text, **{"num_samples": "auto", "tolerance": 0.02, **settings})

    prediction = predict()
    counts = prediction.num_samples.tolist()

    assert all(2 <= count <= 128 and count % 2 == 0 for count in counts)
    assert max(counts) > 2
    for index, count in enumerate(counts):
        assert count == 128 or np.percentile(prediction.standard_error[index], 99) < 0.02
        fixed = model.predict(HOST.image, HOST.text, num_samples=count).probability[index]
        mean_pass = model.predict(HOST.image, HOST.text, num_samples=0).probability[index]  # counts as one more pair
        expected = (count / 2 * fixed + mean_pass) / (count / 2 + 1)
        torch.testing.assert_close(prediction.probability[index], expected, atol=1e-6, rtol=0.0)
    assert_same_prediction(predict(memory_budget=1), prediction)
    assert predict(tolerance=1e-9, max_samples=4).num_samples.tolist() == [4, 4, 4]
    assert predict(tolerance=1.0).num_samples.tolist() == [2, 2, 2]


def test_samples_of_unknown_number_are_not_kept():
    with pytest.raises(ValueError, match="only be returned of a fixed number"):
        segmenter().predict(HOST.image, HOST.text, num_samples="auto", return_samples=True)


# --- out of memory ---------------------------------------------------------------------------------------------------

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError("Unable to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("room", [1, 2, 4, 7])
@pytest.mark.parametrize("number", [5, "auto"])
def test_where_memory_is_short_less_is_computed_at_once(error, room, number):
    spreads, log = (0.3, 0.5, 1.0), []
    sampling = MonteCarloConfig(number, tolerance=0.05, max_samples=20)

    expected, kept = monte_carlo(drawing(spreads), batch=3, sampling=sampling, rows=16, keep=number == 5)
    draw = drawing(spreads, room=room, error=error, log=log)
    got, kept_too = monte_carlo(draw, batch=3, sampling=sampling, rows=16, keep=number == 5)

    for one, other in zip(got, expected, strict=True):
        assert_same_statistics(one, other)
    if number == 5:
        torch.testing.assert_close(kept_too, kept)
    failures = [place for place, (images, samples) in enumerate(log) if len(images) * len(samples) > room]
    assert 0 < len(failures) <= 4
    assert failures == list(range(len(failures)))  # what has been learnt is not forgotten


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_where_there_is_no_room_for_one_row_the_error_is_told(error):
    log: list[tuple[list[int], list[int]]] = []

    with pytest.raises(type(error), match=r"alloc|memory"):
        monte_carlo(drawing((1.0, 1.0), room=0, error=error, log=log), batch=2, sampling=MonteCarloConfig(4), rows=8)

    assert log[-1] == ([0], [0])


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_told_at_once(error):
    log: list[tuple[list[int], list[int]]] = []

    with pytest.raises(type(error), match=str(error).strip("'")):
        monte_carlo(drawing((1.0,), room=0, error=error, log=log), batch=1, sampling=MonteCarloConfig(4), rows=8)

    assert len(log) == 1


@pytest.mark.parametrize("room", [2, 0], ids=["some", "none"])
def test_a_model_short_of_memory_still_predicts_or_is_left_as_it_was(room):
    model = segmenter()
    expected = model.predict(HOST.image, HOST.text, num_samples=4)
    logits = model(HOST.image, HOST.text).logits
    modes = mixed_modes(model)

    def allocate(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        if len(args[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.head.register_forward_pre_hook(allocate, with_kwargs=True)
    if room:
        assert_same_prediction(model.predict(HOST.image, HOST.text, num_samples=4), expected)
    else:
        with pytest.raises(torch.OutOfMemoryError):
            model.predict(HOST.image, HOST.text, num_samples=4)
    handle.remove()

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert_same_bits(model.eval()(HOST.image, HOST.text).logits, logits)
    assert_same_prediction(model.predict(HOST.image, HOST.text, num_samples=4), expected)


# --- what is computed once -------------------------------------------------------------------------------------------


def late(host: Host = HOST, layers: tuple[int, ...] = (2,)) -> pvl.MedCLIPSeg:
    """With blocks before the first adapter."""
    return pvl.MedCLIPSeg(injected(host, config=pvl.PVLConfig(layers=layers, dim=8))).eval()


@contextmanager
def watched_blocks(
    model: pvl.MedCLIPSeg, monkeypatch: pytest.MonkeyPatch, seen: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """See what each block computes, underneath the adapters' machinery."""
    names = {id(block): name for name, block in blocks(model.clip).items()}
    with monkeypatch.context() as patch:
        for kind in {type(block) for block in blocks(model.clip).values()}:

            def forward(self: nn.Module, *args: object, native: Callable = kind.forward, **kwargs: object) -> object:
                output = native(self, *args, **kwargs)
                seen(names[id(self)], output[0] if isinstance(output, tuple) else output)
                return output

            patch.setattr(kind, "forward", forward)
        yield


@pytest.mark.parametrize("host", FEW_HOSTS, ids=str)
@pytest.mark.parametrize("budget", [1, PLENTY], ids=["chunks", "at_once"])
def test_what_comes_before_the_first_adapter_is_computed_once(host, budget, monkeypatch):
    model, rows, calls = late(host), Counter(), Counter()

    def seen(name: str, output: Tensor) -> None:
        rows[name] += len(output)
        calls[name] += 1

    with watched_blocks(model, monkeypatch, seen):
        model.predict(host.image[:1], take(host.text, slice(0, 1)), num_samples=6, memory_budget=budget)

    assert set(rows) == set(blocks(model.clip))  # no block is left out
    assert set(rows.values()) == {1, 6}
    assert sum(count == 1 for count in rows.values()) >= 2 + 2
    if budget == 1:
        assert calls == rows


def test_one_image_with_several_sentences_is_computed_once_before_the_first_adapter(monkeypatch):
    model, rows = late(), Counter()

    with watched_blocks(model, monkeypatch, lambda name, output: rows.update({name: len(output)})):
        model.predict(HOST.image[:1], HOST.text, num_samples=2)

    assert {name: count for name, count in rows.items() if count < 6} == {
        "visual.transformer.resblocks.0": 1,
        "visual.transformer.resblocks.1": 1,
        "visual.transformer.resblocks.2": 1,
        "transformer.resblocks.0": 3,
        "transformer.resblocks.1": 3,
    }


@pytest.mark.parametrize("name", ["open_clip-inlined_text", "transformers-clip"])
@pytest.mark.parametrize("layers", [(0, 2), (2,)], ids=["early", "late"])
@torch.no_grad()
def test_a_hook_on_a_block_sees_what_that_block_computes(name, layers):
    host = BY_NAME[name]
    model = late(host, layers)
    hooked = blocks(model.clip)
    seen: dict[str, Tensor] = {}

    def first(output: object) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    handles = [
        block.register_forward_hook(lambda _, args, output, name=name: seen.update({name: first(output).clone()}))
        for name, block in hooked.items()
    ]
    expected_logits = model(host.image, host.text).logits
    expected, seen = seen, {}  # the hooks fill the new one from here on
    prediction = model.predict(host.image, host.text, num_samples=0)
    for handle in handles:
        handle.remove()

    torch.testing.assert_close(prediction.probability, expected_logits.sigmoid(), atol=1e-6, rtol=0.0)
    assert set(seen) == set(expected) == set(hooked)
    for block in hooked:
        torch.testing.assert_close(seen[block], expected[block], atol=1e-5, rtol=1e-5)
    assert len({tuple(output.flatten()[:4].tolist()) for output in seen.values()}) == len(hooked)


@torch.no_grad()
def test_a_hook_before_a_block_sees_what_that_block_is_given():
    model, seen = late(), []
    block = model.clip.visual.transformer.resblocks[1]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))

    model(HOST.image, HOST.text)
    model.predict(HOST.image, HOST.text, num_samples=0)
    handle.remove()

    torch.testing.assert_close(seen[-1], seen[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["open_clip-bert", "open_clip-inlined_text"])
def test_a_forward_that_another_library_put_on_a_block_is_used(name):
    """Accelerate moves weights in and out so."""
    host, calls = BY_NAME[name], Counter()
    clip = host.build()
    for block_name, block in blocks(clip).items():

        def forward(*args: object, block: nn.Module = block, of: str = block_name, **kwargs: object) -> object:
            calls[of] += 1
            return type(block).forward(block, *args, **kwargs)

        block.forward = forward
    model = pvl.MedCLIPSeg(pvl.inject_adapters(clip, CONFIG)).eval()
    calls.clear()

    model.predict(host.image, host.text, num_samples=2)

    assert set(calls) == set(blocks(clip))


def test_block_outputs_are_not_kept_alive(monkeypatch):
    model, outputs, most = late(), [], [0]

    def seen(name: str, output: Tensor) -> None:
        outputs.append(weakref.ref(output))
        most[0] = max(most[0], sum(one() is not None for one in outputs))

    with watched_blocks(model, monkeypatch, seen):
        model.predict(HOST.image, HOST.text, num_samples=4, memory_budget=1)

    assert len(outputs) > 30
    assert most[0] <= 5  # of each tower the shared one, the last and the one being made


# --- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"tolerance": 0.0}, "tolerance is 0.0, expected a positive"),
        ({"tolerance": -1.0}, "tolerance is -1.0, expected a positive"),
        ({"tolerance": math.nan}, "tolerance is nan, expected a positive"),
        ({"percentile": 0.0}, "percentile is 0.0, expected a percentage"),
        ({"percentile": 101.0}, "percentile is 101.0, expected a percentage"),
        ({"percentile": math.nan}, "percentile is nan, expected a percentage"),
        ({"max_samples": 1}, "max_samples is 1, expected 2 or more"),
        ({"image": HOST.image[:2]}, "2 images and 3 sentences"),
        ({"text": HOST.ids[:1]}, "3 images and 1 sentences"),
        ({"text": HOST.ids[:0]}, "3 images and 0 sentences|expected"),
        ({"num_samples": "many"}, "num_samples is 'many', expected a number"),
        ({"num_samples": True}, "num_samples is True, expected a number"),
        ({"num_samples": 2.5}, r"num_samples is 2\.5, expected a number"),
        ({"num_samples": None}, "num_samples is None, expected a number"),
        ({"num_samples": -1}, "num_samples is -1, expected a number"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        segmenter().predict(**{"image": HOST.image, "text": HOST.text, "num_samples": 2, **arguments})


@pytest.mark.parametrize("number", [0, 3, "auto"])
def test_noise_for_another_number_of_samples_is_refused(number):
    model = segmenter()

    with pytest.raises(ValueError, match="noise for adapter 0 has the shapes"):
        model.predict(HOST.image, HOST.text, num_samples=number, noise=draws(model, HOST, 4))


def test_noise_of_another_shape_is_refused():
    model = segmenter()
    noise = draws(model, HOST, 2)
    (text, vision), other = noise

    for wrong, message in [
        (noise[:1], "noise holds 1 pairs, expected one for each of 2 adapters"),
        ([other, (vision, text)], "noise for adapter 1 has the shapes"),
        ([(text[:, :2], vision[:, :2]), other], "noise for adapter 0 has the shapes"),
        ([other, (text[..., :-1], vision)], "noise for adapter 1 has the shapes"),
        ([other, (text, vision[:, :, 1:])], "noise for adapter 1 has the shapes"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.predict(HOST.image, HOST.text, num_samples=2, noise=wrong)


# --- types and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", FEW_HOSTS, ids=str)
def test_half_precision_gives_nearly_the_same_maps_in_float32(host):
    model, image = segmenter(host), host.image.bfloat16()

    half = copy.deepcopy(model).bfloat16().predict(image, host.text, num_samples=6)
    full = model.predict(image.float(), host.text, num_samples=6)

    for name in MAPS:
        assert getattr(half, name).dtype == torch.float32
        assert getattr(half, name).isfinite().all()
    assert (half.probability - full.probability).square().mean().sqrt() < 0.05


def test_a_generator_gives_its_next_number_as_seed():
    model = segmenter()
    source = torch.Generator().manual_seed(5)

    first, second = (model.predict(HOST.image, HOST.text, num_samples=2, generator=source) for _ in range(2))
    again = model.predict(HOST.image, HOST.text, num_samples=2, generator=torch.Generator().manual_seed(5))

    assert torch.equal(first.probability, again.probability)
    assert not torch.equal(first.probability, second.probability)


def test_predicting_builds_no_graph_and_training_goes_on():
    model = segmenter().train()
    expected = copy.deepcopy(model)

    prediction = model.predict(HOST.image, HOST.text, num_samples=2, return_samples=True)

    assert not any(getattr(prediction, name).requires_grad for name in (*MAPS, "samples"))
    assert torch.is_grad_enabled()
    assert all(gradient is None for gradient in gradients(model).values())
    for one in (model, expected):
        torch.manual_seed(3)
        one(HOST.image, HOST.text).logits.square().mean().backward()
    for name, gradient in gradients(expected).items():
        got = gradients(model)[name]
        assert (got is None) == (gradient is None), name
        assert gradient is None or torch.equal(got, gradient), name
