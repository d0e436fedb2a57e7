"""Falls, early stopping, Gao's fits and best-of-n, against closed forms and enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.studies.curves import (
    Curve,
    best_budget,
    best_of_doublings,
    best_of_n,
    best_of_n_kl,
    falls,
    fit_seeds,
    gao_fit,
    gao_value,
    most_n,
    regrets,
    rises,
    stopped_at,
    stops,
    student_interval,
)

KL = np.array([0.0, 1.0, 2.0, 4.0, 8.0])


def curve(gold, kl=KL, proxy=None) -> Curve:
    proxy = np.arange(len(kl), dtype=float) if proxy is None else np.array(proxy)
    return Curve(np.arange(len(kl)), np.array(kl, float), proxy, np.array(gold, float))


def test_students_interval_is_the_tables():
    """t(0.975, 3) = 3.1824; the values have standard deviation 1.2910."""
    found = student_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.1824463 * 1.2909944 / 2
    assert found == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)


def test_an_interval_of_one_seed_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        student_interval([1.0])


def test_a_budget_stops_before_it_is_first_exceeded():
    path = curve(np.zeros(5), kl=np.array([0.0, 1.0, 3.0, 2.0, 5.0]))
    assert [stopped_at(path, b) for b in (0.5, 1.0, 2.5, 4.0, 9.0)] == [0, 1, 1, 3, 4]


def test_the_fall_is_measured_from_where_the_others_would_stop():
    """Both are best at KL 2, the one by 3 above its end, the other by 1."""
    seeds = [curve([0, 1, 4, 2, 1]), curve([0, 0, 2, 1, 1])]
    assert best_budget(seeds) == 2.0
    assert falls(seeds) == [3.0, 1.0]
    assert rises(seeds) == [2.0, 2.0]


def test_a_seed_stops_where_the_others_were_best():
    seeds = [curve([0, 5, 0, 0, 0]), curve([0, 0, 3, 0, 0])]
    assert stops(seeds) == [2, 1]
    assert stops([seeds[0]] * 2) == [1, 1]  # the same run twice is still two
    with pytest.raises(ValueError, match="at least 2 seeds"):
        stops(seeds[:1])


def test_noise_alone_is_no_fall():
    """A seed's own maximum would lie 1.5 above its last value; the others' budget does not."""
    rng = np.random.default_rng(0)
    means = []
    for _ in range(200):
        seeds = [curve(rng.normal(size=5)) for _ in range(4)]
        means.append(np.mean(falls(seeds)))
    assert abs(np.mean(means)) < 4 * np.std(means) / np.sqrt(200)


def test_regret_of_noise_is_none():
    """Of a budget chosen on the seeds it is judged by, it would be 0.6 above any other's."""
    rng, means = np.random.default_rng(0), []
    for _ in range(200):
        seeds = [curve(rng.normal(size=5)) for _ in range(4)]
        means.append(np.mean(regrets(seeds, 2.0)))
    assert abs(np.mean(means)) < 4 * np.std(means) / np.sqrt(200)


@given(st.floats(-2, 3), st.floats(-1, 2), st.sampled_from(["rl", "best_of_n"]))
def test_a_fit_finds_the_coefficients_that_made_the_curve(alpha, beta, shape):
    d = np.sqrt(np.linspace(0, 20, 30))
    bend = np.log(np.maximum(d, 1e-9)) if shape == "rl" else d
    reward = 0.25 + d * (alpha - beta * bend)
    fit = gao_fit(d**2, reward, 0.25, shape)
    assert (fit.alpha, fit.beta) == pytest.approx((alpha, beta), abs=1e-6)
    np.testing.assert_allclose(gao_value(fit, d[1:] ** 2), reward[1:], atol=1e-6)


def test_a_policy_that_never_left_has_no_curve():
    fit = gao_fit(np.zeros(3), np.ones(3), 1.0, "rl")
    assert (fit.alpha, fit.beta, fit.start) == (0, 0, 1)


def test_the_interval_over_seeds_holds_the_fit_and_is_empty_for_equal_seeds():
    gold = 1.0 * np.sqrt(KL) * (2 - np.log(np.sqrt(np.maximum(KL, 1e-9))))
    found = fit_seeds([curve(gold)] * 3, "gold", resamples=20)
    assert found["alpha"] == pytest.approx((2, 2, 2))
    spread = fit_seeds([curve(gold), curve(0.5 * gold), curve(1.5 * gold)], "gold")
    middle, low, high = spread["alpha"]
    assert low < middle < high


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    proxy, gold = rng.normal(size=(2, 3, 5))
    expected = [
        np.mean([g[max(c, key=p.__getitem__)] for c in itertools.combinations(range(5), n)])
        for p, g in zip(proxy, gold, strict=True)
    ]
    np.testing.assert_allclose(best_of_n(proxy, gold, n), expected)


def test_best_of_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="between 1 and the 5"):
        best_of_n(np.zeros((2, 5)), np.zeros((2, 5)), 6)


def test_the_interval_of_best_of_n_is_that_of_a_mean_over_prompts():
    """At n = 1 that of the prompts' own means, ± 1.96 s.d. / √P; of 1,000 resamples to 5 %."""
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(200, 4)), rng.normal(size=(200, 4)) + rng.normal(size=(200, 1))
    found = best_of_doublings(proxy, gold)
    half = 1.96 * gold.mean(axis=1).std() / np.sqrt(200)
    assert found["gold_low"][0] == pytest.approx(gold.mean() - half, abs=0.15 * half)
    assert found["gold_high"][0] == pytest.approx(gold.mean() + half, abs=0.15 * half)
    assert len(found["gold_low"]) == len(found["gold_high"]) == len(found["n"]) == 3


def test_the_most_n_of_a_budget_spends_no_more_than_it():
    for kl in (0.0, 0.2, 1.0, 2.5):
        n = most_n(kl, 1000)
        assert best_of_n_kl(n) <= kl < best_of_n_kl(n + 1)
    assert most_n(20.0, 64) == 64


def test_best_of_n_kl_is_that_of_the_maximum_of_uniforms():
    """The density of the best of n is n u^(n−1) on [0, 1]."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 8):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-4)
