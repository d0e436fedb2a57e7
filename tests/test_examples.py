"""The studies under examples/ are tests of their claims: tiny ones, and whole with -m slow."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = ("electricity", "fraud", "houses", "loans", "sentiment")


@pytest.fixture
def module(monkeypatch) -> Callable[[str], ModuleType]:
    """A file of the folder, imported as `python examples/NAME.py` sees its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def quick(module) -> Callable[[str], Any]:
    """The figures of a study at its tiny sizes."""
    return lambda name: module(name).figures(module(name).QUICK)


@pytest.fixture
def run(module, tmp_path, capsys) -> Callable[..., Any]:
    """Runs a whole study, and looks at what every one of them shows: card, table and picture."""

    def study(name: str, quick: bool = False) -> Any:
        found = module(name).study(tmp_path, quick)
        printed = capsys.readouterr().out
        assert "rewards" in printed and "of the gradient" in printed
        assert f"{name}" in printed
        svg = (tmp_path / f"{name}.svg").read_bytes()
        assert svg.startswith(b"<?xml") and len(svg) < 60_000
        if not quick:
            module(name).drawing(found, tmp_path / "again" / f"{name}.svg")
            assert svg == (tmp_path / "again" / f"{name}.svg").read_bytes()
        return SimpleNamespace(figures=found, printed=printed)

    return study


# Electricity


def test_the_loss_with_the_utilitys_prices_costs_it_less(quick):
    arms = quick("electricity").arms
    squared, matched = arms["squared"], arms["asymmetric absolute, k = 9"]
    assert (squared.cost > 1.2 * matched.cost).all()  # on every seed
    assert (squared.shortfall_rate > 0.3).all() and (matched.shortfall_rate < 0.2).all()


@pytest.mark.slow
def test_the_matched_loss_wins_over_every_other_and_squared_error_at_its_own_game(run):
    found = run("electricity").figures
    matched = "asymmetric absolute, k = 9"
    others = [name for name in found.arms if name != matched]
    assert len(others) == 3
    assert all(found.dearer(name).low > 0 for name in others)
    assert found.arms[matched].cost.mean() < 1.05 * found.least_cost
    assert abs(found.arms[matched].shortfall_rate.mean() - 0.1) < 0.01  # 1 / (k + 1)
    assert min(found.arms, key=lambda name: found.arms[name].rmse.mean()) == "squared"


def test_the_known_quantile_is_that_of_the_process(module):
    electricity = module("electricity")
    hours, best = electricity.draw(3, 100_000)
    assert abs((hours.target > best).mean() - 0.1) < 0.004  # four standard errors


def test_no_constant_shift_of_the_known_quantile_is_cheaper(module):
    electricity = module("electricity")
    hours, best = electricity.draw(3, 100_000)
    demand = np.asarray(hours.target, np.float64)
    costs = [electricity.cost(best + shift, demand) for shift in (-0.1, 0.0, 0.1)]
    assert min(costs) == costs[1]


# Fraud


def test_plain_cross_entropy_lets_the_fraud_pass_that_the_matched_loss_stops(quick):
    arms = quick("fraud").arms
    plain, matched = arms["plain cross-entropy"], arms["cost-matched, k = 1000"]
    assert (plain.recall < 0.1).all() and (matched.recall > 0.6).all()
    assert (plain.cost > 2 * matched.cost).all()


@pytest.mark.slow
def test_matched_costs_least_and_calibration_is_another_matter(run):
    shown = run("fraud")
    found = shown.figures
    assert "! rare: fraud" in shown.printed  # under 1 % of the first gradient
    cost = {name: arm.cost.mean() for name, arm in found.arms.items()}
    says = {name: arm.says.mean() for name, arm in found.arms.items()}
    matched, moved = "cost-matched, k = 1000", "plain, threshold 1 / 1001"
    assert cost[matched] < 1.1 * found.least_cost
    assert cost["plain cross-entropy"] > 3 * cost[matched] < cost["focal, γ = 2"]
    assert cost["class-weighted"] > 1.05 * cost[matched]
    # What the threshold did, training need not do: the same cost, from calibrated probabilities.
    assert abs(cost[moved] / cost[matched] - 1) < 0.1
    assert 0.8 < says["plain cross-entropy"] < 1.25
    assert min(says["focal, γ = 2"], says["class-weighted"], says[matched]) > 10


def test_one_payment_in_five_hundred_is_fraud(module):
    payments, truth = module("fraud").draw(5, 400_000)
    assert 0.0018 < truth.mean() < 0.0022
    assert abs(payments.target.mean() - truth.mean()) < 4 * (truth.mean() / 400_000) ** 0.5


def test_costs_count_misses_and_false_alarms(module):
    """Forty payments, half of them frauds for certain: first no alarm, then one at each."""
    judged, truth = module("fraud").judged, np.repeat([1.0, 0.0], 20)
    nothing, everything = judged(np.array([[-1.0] * 40, [1.0] * 40]), truth).cost
    assert (nothing, everything) == (1000 * 1000 / 2, 1000 / 2)


# Houses


def test_wrong_outliers_pull_the_mean_and_right_ones_are_lost_to_the_median(quick):
    found = quick("houses")
    assert found.bias("squared", "mistyped").mean > 0.2
    assert abs(found.bias("absolute", "mistyped").mean) < 0.06
    assert found.bias("absolute", "by the lake").mean < -0.05


@pytest.mark.slow
def test_each_loss_is_right_about_the_outliers_that_it_was_made_for(run):
    found = run("houses").figures
    robust = ("absolute", "Huber, δ = 30,000 €")
    assert found.bias("squared", "mistyped").low > 0.3
    assert found.bias("squared", "by the lake").low > -0.03
    for name in robust:
        assert abs(found.bias(name, "mistyped").mean) < 0.02
        assert found.bias(name, "by the lake").high < -0.05
    miss = {name: arm.miss.mean(0) for name, arm in found.arms.items()}
    assert all((miss["squared"] > miss[name]).all() for name in robust)
    assert all(miss["squared"][1] > 4 * miss[name][1] for name in robust)


def test_the_clerk_spoils_one_district_only(module):
    draw = module("houses").draw
    recorded, true = draw(1, 5000, clerk=True), draw(1, 5000, clerk=False)
    ratio = np.asarray(recorded.examples.target, np.float64) / true.examples.target
    assert set(np.round(ratio, 3)) == {1.0, 10.0}
    assert set(recorded.district[ratio > 5]) == {1}


# Loans


def test_a_heavier_gap_term_narrows_the_gap_and_costs_accuracy(run):
    shown = run("loans", quick=True)
    points = shown.figures.frontier
    gaps, accuracies = ([getattr(p, f).mean() for p in points] for f in ("gap", "accuracy"))
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.2
    assert accuracies == sorted(accuracies, reverse=True)
    assert "! conflict" in shown.printed


@pytest.mark.slow
def test_the_frontier_falls_and_a_balance_picks_a_point_without_asking(run):
    found = run("loans").figures
    gaps, accuracies = (
        np.array([getattr(p, f).mean() for p in found.frontier]) for f in ("gap", "accuracy")
    )
    # From weight 1 on, what is left of the gap is within the noise of the seeds.
    assert (np.diff(gaps[:5]) < 0).all() and (np.diff(accuracies[:5]) < 0).all()
    assert accuracies[0] > found.best_accuracy - 0.005
    assert gaps[0] > 0.25 and (abs(gaps[5:]) < 0.03).all()
    # 1 / (2 gap) grows without bound as the gap closes: everybody gets the same answer.
    uncertainty, gradnorm = found.balanced.values()
    assert (uncertainty.weight > 10).all() and uncertainty.accuracy.mean() < accuracies[-1] - 0.05
    assert 0.1 < gradnorm.weight.mean() < 2


# Sentiment


def test_a_text_classifier_overfits_and_is_stopped(quick):
    _overfits(quick("sentiment"))


@pytest.mark.slow
def test_text_classifiers_overfit_on_both_sources_and_are_stopped(run):
    shown = run("sentiment")
    assert shown.figures.keys() == {"reviews", "manual"}
    assert shown.printed.count("│ overfitting ") == 2  # a verdict each, beside the live ones
    _overfits(shown.figures)


def _overfits(found: dict[str, Any]) -> None:
    for run in found.values():
        last = max(run.validation)
        assert run.validation[last] > 1.2 * run.validation[run.best]
        assert run.training[last] < run.training[run.best]
        assert run.at_last["binary_cross_entropy"] > 1.2 * run.at_best["binary_cross_entropy"]
        after = {step: loss for step, loss in run.validation.items() if step}  # step 0 is not kept
        assert run.best == min(after, key=after.__getitem__)
        assert run.best < run.stopped < last
        assert "overfitting" in [verdict.name for verdict in run.verdicts]


def test_a_reviews_label_is_what_its_words_say(module):
    """Read here with the words alone: the last one of a clause, turned round by "nobody"."""
    sentiment = module("sentiment")
    random = np.random.default_rng(7)
    for _ in range(300):
        text, label = sentiment.write_review(random)
        votes = 0
        for sentence in re.findall(r"[^.!]+[.!]", text)[1:]:
            words = [w for w in re.findall(r"\w+", sentence) if w in sentiment.GOOD + sentiment.BAD]
            good = words[-1] in sentiment.GOOD
            votes += good != sentence.strip().startswith("Nobody")
        assert label == (votes >= 2)


@pytest.mark.slow  # two seconds to import `datasets`
def test_no_text_of_the_manual_is_both_trained_on_and_held_out(module):
    sentiment = module("sentiment")
    source = sentiment.manual(sentiment.Sizes(), 0)
    train, validation, test = ({r.text for r in part} for part in source[:3])
    assert not train & (validation | test)
    labels = [r.label for part in source[:3] for r in part]
    assert 0.3 < np.mean(labels) < 0.7 and len(source.validation) > 100


# What they share


def test_an_interval_is_students(module):
    """Of 1, 2, 3: s = 1, and Student's 97.5 % point with two degrees of freedom is 4.303."""
    found = module("common").interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and abs(found.half - 4.303 / 3**0.5) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_a_study_is_documented_beside_its_picture(name: str):
    page = (FOLDER.parent / "docs/studies.md").read_text(encoding="utf-8")
    assert f"uv run python examples/{name}.py" in page
    assert f"](../examples/pictures/{name}.svg)" in page


def test_every_study_is_tested():
    found = {path.stem for path in FOLDER.glob("*.py")} - {"common"}
    assert found == set(NAMES)
    assert "common" not in sys.stdlib_module_names
