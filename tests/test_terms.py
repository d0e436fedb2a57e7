"""Terms that the config adds: their weights over the steps, and what is refused."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from minilm.algorithms import PolicyBatch
from minilm.config import Config, TermConfig
from minilm.configfile import load
from minilm.errors import UserError
from minilm.objective import Objective
from minilm.rollout import Outputs
from minilm.stages.pretrain import LANGUAGE
from minilm.stages.reward import PREFERENCE, Scores
from minilm.terms import PENALTIES, TERMS, check_grades, configured, scheduled
from minilm.text.batches import Batch


def objective(**rows) -> Objective:
    config = Config(objective={name: TermConfig(**row) for name, row in rows.items()})
    return configured(LANGUAGE, "pretrain", config, steps=100)


def test_without_config_a_stage_has_its_own_terms():
    assert objective() == LANGUAGE


def test_a_term_is_added_beside_the_stages_own():
    found = objective(z_loss={"weight": 0.1})
    assert found.trained == {"cross_entropy": 1.0, "z_loss": 0.1}


def test_a_stages_own_term_is_weighed_otherwise():
    assert objective(cross_entropy={"weight": 0.5}).trained == {"cross_entropy": 0.5}
    watched = objective(mean_token_accuracy={"weight": 0.0}, l2={"weight": 1e-3})
    assert watched.trained == {"cross_entropy": 1.0, "l2": 1e-3}


def test_a_term_of_another_stage_is_left_to_it():
    assert objective(centering={"weight": 0.1}) == LANGUAGE
    config = Config(objective={"l2": TermConfig(weight=1.0, stages=("reward",))})
    assert configured(LANGUAGE, "pretrain", config, 9) == LANGUAGE
    assert configured(PREFERENCE, "reward", config, 9).trained["l2"] == 1.0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"z_los": {"weight": 1.0, "stages": ("pretrain",)}}, "did you mean 'z_loss'"),
        ({"z_loss": {"weight": 1.0, "options": {"base": 2}}}, "has no option 'base'"),
        ({"cross_entropy": {"weight": 1.0, "options": {"a": 1}}}, "takes no options"),
        ({"mean_token_accuracy": {"weight": 1.0}}, "nothing can be learnt from it"),
        ({"cross_entropy": {"weight": 0.0}}, "nothing would be learnt"),
        ({"l2": {"weight": 1.0, "schedule": "linear", "begin": 100}}, "beyond begin"),
    ],
)
def test_mistakes_are_explained(rows, said):
    with pytest.raises(UserError, match=said):
        objective(**rows)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"schedule": "constant"}, [2, 2, 2, 2]),
        ({"schedule": "linear"}, [2, 1.5, 1, 0]),
        ({"schedule": "linear", "final_weight": 4.0, "begin": 50}, [2, 2, 2, 4]),
        ({"schedule": "cosine"}, [2, 1 + math.sqrt(0.5), 1, 0]),
        ({"schedule": "step", "begin": 50, "final_weight": 0.5}, [2, 2, 0.5, 0.5]),
        ({"schedule": "linear", "end": 50}, [2, 1, 0, 0]),
    ],
)
def test_schedules_by_hand(row, expected):
    weight = scheduled(TermConfig(weight=2.0, **row), 100, "objective.x")
    found = [weight(step) if callable(weight) else weight for step in (0, 25, 50, 100)]
    np.testing.assert_allclose(np.array(found, np.float32), expected, atol=1e-6)


def test_a_file_and_an_option_name_a_term(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[objective.z_loss]\nweight = 0.1\n")
    found = load(path, ["--objective.repetition.weight", "0.2", "--objective.z-loss.weight", "1"])
    assert found.objective == {
        "z_loss": TermConfig(weight=1.0), "repetition": TermConfig(weight=0.2),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"did you mean objective.NAME.weight\?"):
        load(path, ["--objective.z_loss.wieght", "1"])
    with pytest.raises(UserError, match="a number"):
        load(path, ["--objective.z_loss.weight", "much"])


def test_every_language_term_has_one_value_a_position():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 7, (2, 2, 5)), jnp.int32)
    batch = Batch(*tokens, jnp.ones((2, 5)), jnp.ones((2, 5), jnp.int32))
    for values in TERMS["pretrain"].values():
        found = values(logits, batch)
        assert found.shape == (2, 5)
        assert np.isfinite(found).all()


def test_smoothing_added_to_cross_entropy_is_label_smoothing():
    """(1 − ε) CE(y) + ε CE(uniform), Szegedy et al. (2016), section 7."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 3, 6)).astype(np.float32)
    targets = jnp.array([[1, 4, 2]])
    segments = jnp.ones((1, 3), jnp.int32)
    batch = Batch(segments, targets, jnp.ones((1, 3)), segments)
    aim = objective(cross_entropy={"weight": 0.9}, smoothing={"weight": 0.1})
    found = float(aim.loss(aim.totals(jnp.asarray(logits), batch), aim.counts(batch)))
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    soft = np.full((1, 3, 6), 0.1 / 6)
    np.put_along_axis(soft, np.asarray(targets)[..., None], 0.9 + 0.1 / 6, -1)
    assert found == pytest.approx(-(soft * logprobs).sum(-1).mean(), rel=1e-5)


def test_penalties_are_of_the_parameters_alone():
    tree = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[1.0]])}
    assert float(PENALTIES["l1"](tree)) == pytest.approx(8.0)
    assert float(PENALTIES["l2"](tree)) == pytest.approx(26.0, rel=1e-6)


class Votes(NamedTuple):
    label: jnp.ndarray


def test_terms_of_pairs_by_hand():
    """Softplus of minus the difference, where the label says 1; of both, weighed, elsewhere."""
    pair = jnp.array([2.0, 0.5]), jnp.array([1.0, 0.0])
    scores = Scores(*pair, jnp.stack(pair, 1), jnp.zeros((2, 2, 1, 3)))
    batch = Votes(jnp.array([1.0, 0.75]))
    rows = TERMS["reward"]
    first, second = np.logaddexp(0, -1.0), np.logaddexp(0, 1.0)
    smoothed = rows["bradley_terry_smoothed"](scores, batch, smoothing=0.2)
    assert float(smoothed[0]) == pytest.approx(0.9 * first + 0.1 * second, rel=1e-6)
    margin = rows["bradley_terry_margin"](scores, batch, margin=1.0)
    assert float(margin[0]) == pytest.approx(np.log(2))  # the difference is the margin
    assert float(margin[1]) == pytest.approx(np.log(2))  # half of it is asked by a 3 to 1 vote
    plain = rows["bradley_terry_margin"](scores, batch, margin=0.0)
    np.testing.assert_allclose(plain, rows["bradley_terry_smoothed"](scores, batch, smoothing=0.0))


def test_terms_of_rlhf_are_zero_on_padding():
    """Dr. GRPO averages over every slot: there padding had entropy and KL too."""
    mask = jnp.array([[True, True, False]])
    batch = PolicyBatch(
        jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.int32), mask,
        *(jnp.full((1, 3), x) for x in (-1.0, -3.0, 1.0)), None, None, jnp.ones(1),
    )  # fmt: skip
    outputs = Outputs(jnp.full((1, 3), -1.0), jnp.full((1, 3), 2.0), None)
    for values in TERMS["rlhf"].values():
        found = values(outputs, batch)
        assert (found[0, :2] > 0).all()
        assert found[0, 2] == 0


@pytest.mark.parametrize(
    ("options", "ratings", "said"),
    [
        ({"low": 5, "high": 1}, [], "high must be a number above low"),
        ({"low": 1}, [], "high must be a number above low"),
        ({"high": "5"}, [], "high must be a number above low"),
        ({}, [0.5, 3.0], "1 of 2 ratings are not from low to high"),
        ({"low": 1, "high": 5}, [0.0, 1.0, 5.0], "1 of 3 ratings are not from low to high"),
    ],
)
def test_what_grades_would_clip_is_refused(options, ratings, said):
    row = {"weight": 1.0, "options": options}
    config = Config.model_validate({"objective": {"ordinal": row}})
    with pytest.raises(UserError, match=said) as refused:
        check_grades(config, ratings)
    assert refused.value.where == "objective.ordinal.options"
    check_grades(Config(), ratings)  # nobody reads them
    elsewhere = {"objective": {"ordinal": row | {"stages": ("rlhf",)}}}
    check_grades(Config.model_validate(elsewhere), ratings)


def test_ratings_up_to_both_ends_are_graded():
    row = {"weight": 1.0, "options": {"low": 1, "high": 5}}
    check_grades(Config.model_validate({"objective": {"ordinal": row}}), [1.0, 3.5, 5.0])
