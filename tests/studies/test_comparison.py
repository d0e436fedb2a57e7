"""Win rates and their intervals."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from minilm.config import Config
from minilm.studies.comparison import (
    against_reference,
    arms,
    best_of_n_wins,
    between,
    frontier,
    two_way_interval,
)
from minilm.studies.curves import Curve


def test_an_interval_over_prompts_covers_the_truth_as_often_as_it_says():
    """Of 200 samples of a Bernoulli(0.7), about 95 % of intervals hold 0.7; 6 s.d. below: 0.86."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        found = two_way_interval((rng.random((1, 100)) < 0.7).astype(float), resamples=200)
        held += found.low <= 0.7 <= found.high
    assert held / 200 > 0.86


def test_seeds_that_differ_widen_the_interval():
    same = np.tile(np.linspace(0, 1, 50), (4, 1))
    differing = same + np.array([[-0.4], [-0.1], [0.1], [0.4]])
    narrow, wide = two_way_interval(same), two_way_interval(differing)
    assert narrow.mean == pytest.approx(wide.mean)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_a_policy_as_good_as_its_reference_wins_half():
    rng = np.random.default_rng(1)
    gold, reference = rng.normal(size=(3, 400)), rng.normal(size=(3, 400, 4))
    found = against_reference(gold, reference)
    assert found.low < 0.5 < found.high
    assert against_reference(gold + 9, reference).mean == 1
    assert against_reference(0 * gold, 0 * reference).mean == 0.5


def test_between_arms_every_seed_meets_every_seed():
    ours, theirs = np.array([[1.0, 1.0], [3.0, 3.0]]), np.array([[2.0, 2.0]])
    assert between(ours, theirs).mean == 0.5
    assert between(theirs, ours).mean == 0.5
    with pytest.raises(ValueError, match="2 prompts against 1"):
        between(ours, np.zeros((1, 1)))


def test_the_best_of_n_wins_as_often_as_over_all_its_subsets():
    rng = np.random.default_rng(3)
    proxy, gold = rng.normal(size=(2, 5)), rng.integers(3, size=(2, 5)).astype(float)
    theirs = rng.integers(3, size=(2, 4)).astype(float)
    for n in (1, 2, 3, 5):
        expected = []
        for p, g, r in zip(proxy, gold, theirs, strict=True):
            best = [g[max(some, key=lambda i: p[i])] for some in combinations(range(5), n)]
            expected.append(np.mean([(x > y) + 0.5 * (x == y) for x in best for y in r]))
        np.testing.assert_allclose(best_of_n_wins(proxy, gold, theirs, n), expected, rtol=1e-12)


def test_runs_that_differ_in_seeds_alone_are_one_arm():
    config = Config()
    seeded = config.model_copy(update={"rlhf": config.rlhf.model_copy(update={"seed": 3})})
    other = config.model_copy(update={"rlhf": config.rlhf.model_copy(update={"kl_coef": 0.5})})
    found = arms({Path("a"): config, Path("b"): seeded, Path("c"): other})
    assert list(found.values()) == [[Path("a"), Path("b")], [Path("c")]]
    assert list(found) == ["rloo, kl_coef 0.04", "rloo, kl_coef 0.5"]


def test_arms_of_runs_in_folders_of_the_same_name_keep_their_own():
    """`evaluate runs/a/rlhf runs/b/rlhf runs/c/rlhf` once lost all but two of them."""
    config = Config()
    paths = [Path("runs") / name / "rlhf" for name in "abc"]
    found = arms(
        {
            path: config.model_copy(
                update={"judge": config.judge.model_copy(update={"name": name})}
            )
            for path, name in zip(paths, ("length", "repetition", "none"), strict=True)
        }
    )
    assert list(found.values()) == [[path] for path in paths]
    plain = "rloo, kl_coef 0.04"
    assert list(found) == [plain, f"{plain} (rlhf)", f"{plain} (runs/c/rlhf)"]


def test_the_frontier_is_a_picture():
    curve = Curve(*(np.arange(3.0) for _ in range(4)))
    assert frontier({"ppo": [curve], "grpo": [curve, curve]}).startswith(b"\x89PNG")
