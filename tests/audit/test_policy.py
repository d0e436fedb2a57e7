"""Checks of RLHF by themselves: each finds its fault in an otherwise sound rollout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm.audit import policy
from minilm.audit.setting import of_rlhf
from minilm.files import write_jsonl
from minilm.objective import Objective
from minilm.stages.workspace import open_run


@pytest.fixture(scope="module")
def setting(tiny_run):
    return of_rlhf(open_run(tiny_run))


def with_batch(setting, **changes):
    return setting._replace(batch=setting.batch._replace(**changes))


def test_a_mask_that_forgets_the_last_token_is_found(setting):
    assert policy.the_mask_covers_the_completion(setting)[0]
    mask = np.array(setting.batch.mask)
    last = mask.sum(1) - 1
    mask[np.arange(len(mask)), last] = False
    assert not policy.the_mask_covers_the_completion(with_batch(setting, mask=mask))[0]


def test_an_empty_mask_covers_nothing(setting):
    mask = jnp.zeros_like(setting.batch.mask)
    assert not policy.the_mask_covers_the_completion(with_batch(setting, mask=mask))[0]


def test_a_loss_over_sequences_is_not_one_over_tokens(setting):
    """Advantages of our own, since a tiny policy's are all 0."""
    mask = np.array(setting.batch.mask)
    mask[::2, 3:] = False  # rows of different lengths, else both are the same
    advantages = jnp.asarray(np.random.default_rng(0).normal(size=mask.shape), jnp.float32)
    sound = with_batch(setting, mask=jnp.asarray(mask), advantages=advantages)
    assert policy.the_loss_is_its_formula(sound)[0]
    term = sound.objective.terms[0]

    def over(batch):
        mask = batch.mask.astype(jnp.float32)
        return mask / jnp.sum(mask, axis=1, keepdims=True)

    aim = Objective((term._replace(over=over), *sound.objective.terms[1:]))
    assert not policy.the_loss_is_its_formula(sound._replace(objective=aim))[0]


def test_a_ratio_to_itself_is_found(setting):
    """torchforge#571: log-probabilities compared with their own detached copy never move."""
    assert policy.the_ratio_moves(setting)[0]
    stuck = [
        t._replace(values=lambda o, b: jnp.zeros_like(o.logprobs))
        if t.name == "val/ratio_deviation"
        else t
        for t in setting.objective.terms
    ]
    assert not policy.the_ratio_moves(setting._replace(objective=Objective(tuple(stuck))))[0]


def test_a_logged_kl_of_another_sign_is_found(setting):
    assert policy.the_logged_kl_is_the_kl_in_the_loss(setting)[0]
    moved = setting.parts.moved
    logprobs = moved.rollout.ref_logprobs - 0.1  # a KL of −0.1 a token
    logged = jax.tree.map(lambda x: -x, moved.metrics["objective/kl"].total)
    metrics = moved.metrics | {
        "objective/kl": moved.metrics["objective/kl"]._replace(total=logged + 1.0)
    }
    wrong = moved._replace(rollout=moved.rollout._replace(logprobs=logprobs), metrics=metrics)
    parts = setting.parts._replace(moved=wrong)
    assert not policy.the_logged_kl_is_the_kl_in_the_loss(setting._replace(parts=parts))[0]


def test_a_price_that_has_moved_is_told_from_the_one_configured(setting):
    """`rlhf.kl_target` moves the price of a nat: the formula follows what the batch says of it."""
    parts, config = setting.parts, setting.ws.config.rlhf
    policy_moved = jax.tree.map(lambda x: 1.05 * x, parts.last)
    moved = parts.collect(config)(policy_moved, 1, 40.0)
    found = setting._replace(parts=parts._replace(moved=moved))
    assert policy.the_logged_kl_is_the_kl_in_the_loss(found)[0]
    batch = moved.batch._replace(kl_scale=jnp.ones_like(moved.batch.kl_scale))
    wrong = setting._replace(parts=parts._replace(moved=moved._replace(batch=batch)))
    assert not policy.the_logged_kl_is_the_kl_in_the_loss(wrong)[0]


def test_one_completion_for_every_prompt_is_found(setting, tiny_copy):
    ws = open_run(tiny_copy)
    write_jsonl(ws.stage("rlhf") / "samples.jsonl", [{"after": "the same"}] * 16)
    assert not policy.completions_differ(setting._replace(ws=ws))[0]


def test_an_evaluation_prompt_that_was_trained_on_is_found(setting, tiny_copy):
    assert policy.evaluation_prompts_are_not_trained_on(setting)[0]
    ws = open_run(tiny_copy)
    row = np.asarray(setting.batch.tokens)[0, : -setting.batch.mask.shape[1]]
    write_jsonl(
        ws.stage("rlhf") / "samples.jsonl", [{"prompt": ws.tokenizer.decode(row), "after": ""}]
    )
    passed, said = policy.evaluation_prompts_are_not_trained_on(setting._replace(ws=ws))
    assert not passed
    assert said.startswith("1 of 1")
