"""Guarantees without assumptions: valid in simulation, as an oracle counts them, and as MAPIE has them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control.methods import find_best_predict_param, get_r_hat_plus

from pvl_adapter.trust.conformal import Ranks, controlled_level, fewest_subjects, shift_p_value, subject_means
from pvl_adapter.trust.conformal import tested_level as level_by_test  # pytest would take it for a test

CASES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=20)
"""Scores, with ties, and whose they are."""
ALPHAS = st.integers(1, 19).map(lambda count: Fraction(count, 20))


def draw(random: np.random.Generator, subjects: int, *, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores [M] of exchangeable subjects of 1 to 6 cases, alike within a subject, and their subjects [M]."""
    count = random.integers(1, 7, subjects)
    whose = np.repeat(np.arange(subjects), count)
    level = random.normal(size=subjects) - 0.5 * count  # those of many cases have low scores, and no more votes
    return level[whose] + spread * random.normal(size=len(whose)), whose


def split(scores: np.ndarray, whose: np.ndarray, random: np.random.Generator) -> tuple[Ranks, float]:
    """All but the last subject calibrate; a random case of the last one is next."""
    known = whose < whose[-1]
    return Ranks.of(scores[known], whose[known]), random.choice(scores[~known])


def assert_at_most(values: list[float] | np.ndarray, limit: float) -> None:
    """In the mean, within three standard errors."""
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert np.mean(values) <= limit + 3.0 * error, (np.mean(values), limit, error)


def assert_at_least(values: list[float] | np.ndarray, limit: float) -> None:
    assert_at_most(-np.asarray(values, dtype=float), -limit)


# ---- validity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.05, 1.0], ids=["cases alike", "cases vary"])
def test_p_values_and_quantiles_are_valid_for_a_case_of_the_next_subject(spread):
    random = np.random.default_rng(0)
    p_values, beyond, pooled = [], {0.1: [], 0.2: []}, []
    for _ in range(3000):
        scores, whose = draw(random, 25, spread=spread)
        ranks, following = split(scores, whose, random)
        p_values.append(float(ranks.p_value(np.array([following]))[0]))
        for alpha, outside in beyond.items():
            outside.append(following > ranks.quantile(alpha))
        alone = Ranks.of(ranks.scores, np.arange(len(ranks.scores)))
        pooled.append(float(alone.p_value(np.array([following]))[0]))

    p_values = np.array(p_values)
    for alpha in (0.05, 0.1, 0.2, 0.5):
        assert_at_most(p_values <= alpha, alpha)
        assert_at_least(p_values <= alpha, alpha - 2.0 / 25)  # and not empty
    for alpha, outside in beyond.items():
        assert_at_most(outside, alpha)
    assert np.mean(np.array(pooled) <= 0.2) > 0.24  # cases that count as if each were a subject promise too much


def losses_of_subjects(random: np.random.Generator, subjects: int, *, bumps: bool) -> tuple[np.ndarray, np.ndarray]:
    """Losses of cases at 80 levels, [M, L], from 0 up to 1 on the whole, and whose they are."""
    scores, whose = draw(random, subjects)
    levels = np.linspace(-4.0, 8.0, 80)
    losses = np.clip(levels - scores[:, None], 0.0, 1.0)
    if bumps:  # here and there a level loses much more than the next
        losses = np.maximum(losses, (random.random(losses.shape) < 0.02) * random.random(losses.shape))
    losses[:, 0] = 0.0
    return losses, whose


@pytest.mark.parametrize("bumps", [False, True], ids=["rising", "not monotone"])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_controlled_loss_of_the_next_case_is_at_most_alpha(alpha, bumps):
    random, found = np.random.default_rng(1), []
    for _ in range(1000):
        losses, whose = losses_of_subjects(random, 41, bumps=bumps)
        known = whose < 40
        level = controlled_level(subject_means(losses[known], whose[known]), alpha)
        found.append(random.choice(losses[~known])[level])

    assert_at_most(found, alpha)
    if not bumps:
        assert_at_least(found, alpha - 3.0 / 41)


def test_a_tested_level_keeps_its_limit_with_the_confidence():
    random, broken, risks = np.random.default_rng(2), [], np.array([0.05, 0.1, 0.201, 0.15, 0.5])  # falls in between
    for _ in range(600):
        level = level_by_test((random.random((60, 5)) < risks).astype(float), 0.2, start=1, confidence=0.8)
        broken.append(level > 1)

    assert_at_most(broken, 0.2)
    assert np.mean(broken) > 0.0  # the test is not of an empty promise


# ---- against others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.03, 0.1, 0.25])
def test_the_controlled_level_is_that_of_mapie(alpha):
    random, levels = np.random.default_rng(3), np.arange(50)
    for subjects in (12, 40, 41):
        losses = np.sort(random.random((subjects, 50)) ** random.integers(1, 9), axis=1)
        losses[:, 0] = 0.0
        _, bound = get_r_hat_plus(losses, levels, method="crc", bound=None, delta=None, sigma_init=None)
        expected = int(find_best_predict_param(levels, bound, np.array([alpha]))[0])
        got = controlled_level(losses, alpha)
        assert got == expected or (got == -1 and bound[0] > alpha)  # MAPIE has no word for "none"


def shares_where(cases: list[tuple[int, int]], counts) -> Fraction:
    """Subjects, of each the share of its cases whose score counts."""
    total = Fraction(0)
    for subject in {whose for _, whose in cases}:
        scores = [score for score, whose in cases if whose == subject]
        total += Fraction(sum(map(counts, scores)), len(scores))
    return total


@settings(deadline=None, max_examples=150, derandomize=True)
@given(CASES, st.integers(-1, 7), ALPHAS)
def test_ranks_are_those_that_an_oracle_counts(cases, score, alpha):
    subjects = len({whose for _, whose in cases})
    ranks = Ranks.of(np.array([score for score, _ in cases]), [f"s{whose}" for _, whose in cases])

    expected = (shares_where(cases, lambda other: other >= score) + 1) / (subjects + 1)
    assert ranks.p_value(np.array([score]))[0] == pytest.approx(float(expected), abs=1e-12)
    enough = [at for at, _ in cases if shares_where(cases, lambda other: other <= at) >= (1 - alpha) * (subjects + 1)]  # noqa: B023
    quantile = ranks.quantile(float(alpha))
    assert quantile == min(enough, default=math.inf)
    assert (score > quantile) == (expected <= alpha)  # both say the same


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=12), ALPHAS)
def test_the_controlled_level_is_that_of_an_oracle(losses, alpha):
    expected = -1
    for level in range(6):
        largest = [max(row[: level + 1]) for row in losses]
        if (Fraction(sum(largest), 4) + 1) / (len(losses) + 1) > alpha:
            break
        expected = level
    assert controlled_level(np.array(losses) / 4.0, float(alpha)) == expected


@settings(deadline=None, max_examples=50, derandomize=True)
@given(CASES, st.randoms(use_true_random=False))
def test_neither_order_nor_names_matter(cases, random):
    names = dict(zip(range(5), random.sample("abcde", 5), strict=True))
    mixed = random.sample(cases, len(cases))
    one, other = (
        Ranks.of(np.array([score for score, _ in some]), [rename(whose) for _, whose in some])
        for some, rename in ((cases, str), (mixed, names.__getitem__))
    )
    at = np.arange(-1, 8)
    np.testing.assert_allclose(one.p_value(at), other.p_value(at), rtol=1e-12)
    assert one.quantile(0.25) == other.quantile(0.25)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["0.01", "0.025", "0.05", "0.1", "0.15", "0.2", "0.3", "0.5", "0.9"])
def test_so_many_subjects_are_just_enough(alpha):
    enough = next(count for count in range(1000) if Fraction(1, count + 1) <= Fraction(alpha))

    assert fewest_subjects(float(alpha)) == enough
    assert controlled_level(np.zeros((enough, 5)), float(alpha)) == 4
    assert Ranks.of(np.arange(enough), np.arange(enough)).quantile(float(alpha)) == enough - 1
    if enough:
        assert controlled_level(np.zeros((enough - 1, 5)), float(alpha)) == -1
        assert Ranks.of(np.arange(enough - 1), np.arange(enough - 1)).quantile(float(alpha)) == math.inf


def test_losses_of_nothing_or_all():
    assert controlled_level(np.ones((50, 7)), 0.1) == -1
    assert controlled_level(np.zeros((50, 7)), 0.1) == 6
    assert level_by_test(np.ones((50, 7)), 0.1, start=0, confidence=0.9) == -1
    assert level_by_test(np.zeros((50, 7)), 0.1, start=2, confidence=0.9) == 6
    assert level_by_test(np.zeros((3, 7)), 0.1, start=0, confidence=0.9) == -1  # three say little


def test_a_test_ends_at_the_first_level_that_fails_and_begins_where_it_is_told():
    losses = np.zeros((80, 9))
    losses[:, 4] = 1.0
    assert level_by_test(losses, 0.1, start=0, confidence=0.9) == 3
    assert level_by_test(losses, 0.1, start=4, confidence=0.9) == -1
    assert level_by_test(losses, 0.1, start=8, confidence=0.9) == 8


def test_one_case_of_each_subject_is_split_conformal():
    random = np.random.default_rng(4)
    scores = random.normal(size=39)
    ranks = Ranks.of(scores, [f"s{index}" for index in range(39)])

    at = random.normal(size=20)
    np.testing.assert_allclose(ranks.p_value(at), [((scores >= one).sum() + 1) / 40 for one in at])
    assert ranks.quantile(0.1) == np.sort(scores)[36 - 1]  # the 36th of 39, as (1 - 0.1) * 40
    np.testing.assert_array_equal(subject_means(scores, np.arange(39)), scores)


def test_ties_count_against_the_next_case():
    ranks = Ranks.of(np.full(9, 2.0), np.arange(9))
    np.testing.assert_allclose(ranks.p_value(np.array([1.0, 2.0, 3.0])), [1.0, 1.0, 0.1])
    assert ranks.quantile(0.1) == 2.0


def test_subjects_count_once_however_many_cases_they_have():
    values = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 3.0]])
    np.testing.assert_allclose(subject_means(values, ["b", "b", "a", "b"]), [[0.0, 0.0], [1 / 3, 5 / 3]])
    assert Ranks.of(np.arange(4.0), ["b", "b", "a", "b"]).subjects == pytest.approx(2.0)
    assert Ranks.of(np.array([]), []).p_value(np.array([0.0]))[0] == 1.0  # nothing is known


def test_a_dataset_of_unlike_images_is_told():
    random = np.random.default_rng(0)
    usual = [shift_p_value(random.uniform(size=200), np.repeat(np.arange(50), 4)) for _ in range(300)]
    assert np.mean(np.array(usual) <= 0.05) <= 0.05
    assert shift_p_value(random.uniform(size=200) ** 3, np.repeat(np.arange(50), 4)) < 1e-6
    assert shift_p_value(np.zeros(4), ["a", "a", "b", "b"]) == pytest.approx(0.05**2)
