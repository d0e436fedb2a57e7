"""Each verdict on RLHF, on curves drawn by hand; names as minilm and as TRL log them."""

import numpy as np
import pytest

from minilm.diagnose import diagnose, rl

N = 40
RISE = np.linspace(0.0, 1.2, N)


def run(**curves) -> list[dict]:
    """A healthy run, some of its curves replaced; None leaves one out."""
    rng = np.random.default_rng(0)
    own = {
        "objective/scores": RISE + rng.normal(0, 0.05, N),
        "objective/kl": np.linspace(0.0, 1.5, N),
        "policy/entropy_avg": np.linspace(1.6, 1.5, N),
        "completions/mean_length": 20 + rng.normal(0, 0.5, N),
        "reward_std": np.full(N, 1.0),
        "frac_reward_zero_std": np.zeros(N),
        **{name.replace("__", "/"): values for name, values in curves.items()},
    }
    gold = own.pop("gold", np.linspace(0.0, 1.0, 6))
    parses = own.pop("parse_share", None)
    rows = [
        {"step": k + 1, **{name: float(v[k]) for name, v in own.items() if v is not None}}
        for k in range(N)
    ]
    for n in range(6):
        extra = {"gold": gold, "parse_share": parses}
        found = {name: float(v[n]) for name, v in extra.items() if v is not None}
        rows.append({"step": 8 * n, "proxy": 0.0, **found})
    return rows


def first(rows):
    return diagnose(rows)[0]


def test_a_rising_proxy_with_gold_behind_it_is_healthy():
    assert first(run()).name == "improving"
    flat = np.minimum(np.linspace(0.0, 3.0, N), 1.0)
    assert first(run(objective__scores=flat)).name == "converged"


def test_trls_names_do_as_well():
    rows = [
        {"step": r["step"], "reward": r["objective/scores"], "kl": r["objective/kl"],
         "reward_std": 1.0}
        for r in run() if "objective/kl" in r
    ]  # fmt: skip
    assert first(rows).name == "improving"


@pytest.mark.parametrize("known", [True, False])
def test_groups_that_all_score_the_same(known):
    share = {"frac_reward_zero_std": np.ones(N) if known else None}
    rows = run(**share, reward_std=np.zeros(N), objective__scores=np.full(N, -3.0))
    assert [v.name for v in diagnose(rows)] == ["zero_reward_variance"]


def test_a_policy_that_has_converged_to_one_answer_began_with_variance():
    share = np.r_[np.zeros(25), np.ones(15)]
    assert "zero_reward_variance" not in [v.name for v in diagnose(run(frac_reward_zero_std=share))]


def test_a_critic_whose_error_is_beyond_the_rewards_own_spread():
    found = first(run(loss__value=np.linspace(0.5, 4.0, N)))
    assert found.name == "value_function_failure"
    assert {e.figure: e.value for e in found.evidence}["over half the reward's variance"] > 3
    # A critic that knows the prompt's mean is left with half the variance.
    assert first(run(loss__value=np.linspace(0.8, 0.5, N))).name == "improving"


def test_a_policy_that_says_one_thing_only():
    found = first(run(policy__entropy_avg=np.linspace(1.6, 0.05, N)))
    assert found.name == "entropy_collapse"
    assert found.evidence[-1].value < 0.3


def test_longer_and_longer_completions_that_no_judge_likes_better():
    longer = {"completions__mean_length": np.linspace(20, 50, N)}
    assert first(run(**longer, gold=np.linspace(0.3, 0.2, 6))).name == "length_gaming"
    assert first(run(**longer, gold=None)).name == "length_gaming"
    # The judge agrees: longer is better.
    assert first(run(**longer)).name == "improving"


def test_gold_falls_while_the_proxy_rises():
    found = first(run(gold=[0.0, 0.3, 0.5, 0.2, -0.2, -0.4]))
    assert found.name == "reward_hacking"
    assert (found.evidence[0].value, found.evidence[0].step) == (0.5, 16)
    assert "--rlhf.steps 16" in found.command
    # Gold falls, but so does the proxy: that is not hacking.
    fall = run(gold=[0.0, 0.3, 0.5, 0.2, -0.2, -0.4], objective__scores=-RISE)
    assert "reward_hacking" not in [v.name for v in diagnose(fall)]


def test_where_no_gold_is_logged_the_parse_share_tells():
    found = first(run(gold=None, parse_share=[0.9, 0.9, 0.8, 0.6, 0.3, 0.1]))
    assert found.name == "reward_hacking"
    assert first(run(gold=None, parse_share=[0.9, 0.85, 0.9, 0.88, 0.86, 0.87])).name == "improving"


def test_kl_beyond_what_the_reward_needs():
    """The exponential tilt of a Gaussian needs Δ²/2 nats for Δ standard deviations."""
    found = first(run(objective__kl=np.linspace(0, 20, N)))
    assert found.name == "kl_blow_up"
    need = {e.figure: e.value for e in found.evidence}["KL that this reward needs"]
    assert need == pytest.approx(0.5 * 1.15**2, rel=0.25)
    # Five standard deviations cost twelve nats at best.
    far = run(objective__kl=np.linspace(0, 20, N), objective__scores=np.linspace(0, 5, N))
    assert first(far).name == "improving"


def test_a_proxy_that_does_not_rise():
    still = np.random.default_rng(3).normal(0, 0.1, N)
    assert first(run(objective__scores=still)).name == "plateau"


def test_a_reward_that_is_not_a_number():
    scores = RISE.copy()
    scores[7] = np.nan
    assert first(run(objective__scores=scores)).name == "nonfinite"


def test_every_explanation_names_a_verdict():
    assert set(rl.EXPLAINED_BY) <= set(rl.RULES)
    assert set().union(*rl.EXPLAINED_BY.values()) <= {*rl.RULES, "*"}
