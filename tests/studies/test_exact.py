"""Every estimator against what it estimates, computed by listing all completions.

Expectations are sums over the whole language, so there is no Monte-Carlo error to allow for: an
unbiased estimator agrees to rounding, and a bias that the literature knows shows as one.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm.advantages import generalized_advantages, group_z_score, leave_one_out
from minilm.generate import generate
from minilm.losses.policy import clipped_surrogate, kl_estimate
from minilm.studies import exact


@pytest.fixture(scope="module")
def case():
    """The language, a policy, its reference, and a reward for every completion."""
    world = exact.world(3, 3)
    policy, reference = exact.model_of(world, 1), exact.model_of(world, 2)
    reward = np.random.default_rng(0).normal(size=len(world.tokens))
    return world, policy, reference, reward


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def cosine(a, b) -> float:
    a, b = flat(a), flat(b)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def apart(a, b) -> float:
    """Distance, as a share of the second's length; rounding alone is 1e-4."""
    a, b = flat(a), flat(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def close(a, b) -> None:
    a, b = flat(a), flat(b)
    np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


def test_the_list_is_every_completion_once():
    """Ended after 0 … R − 1 tokens, or cut off: 1 + 3 + 9 + 27 and 81 of four tokens."""
    world = exact.world(4, 4)
    assert len(world.tokens) == 121
    assert len({tuple(row) for row in world.tokens}) == 121
    assert (~world.finished).sum() == 81
    assert world.mask.sum(1).tolist().count(1) == 1
    found = exact.place(jnp.asarray(world.tokens), 4)
    assert len(set(np.asarray(found).tolist())) == 121


def test_the_probabilities_of_all_completions_sum_to_one(case):
    world, policy, _, _ = case
    logs = np.asarray(exact.token_logprobs(policy, world), np.float64).sum(1)
    assert np.exp(logs).sum() == pytest.approx(1, abs=1e-5)


def test_samples_come_as_often_as_the_list_says(case):
    """4,096 draws; the squared distance, χ², of 13 cells exceeds 40 once in 10,000."""
    world, policy, _, _ = case
    prompts = jnp.full((4096, 1), exact.PROMPT, jnp.int32)
    options = {"max_new_tokens": world.width, "eos_id": exact.EOS, "pad_id": exact.EOS}
    samples = generate(policy, prompts, jax.random.key(0), **options)
    places = np.asarray(exact.place(samples.tokens, world.vocab))
    order = np.asarray(exact.place(jnp.asarray(world.tokens), world.vocab))
    seen = np.array([(places == o).sum() for o in order])
    wanted = 4096 * np.exp(exact.logprobs(policy, world))
    assert seen.sum() == 4096
    big = wanted > 5
    assert ((seen - wanted) ** 2 / wanted)[big].sum() < 40
    assert seen[~big].sum() < 5 * np.sqrt(wanted[~big].sum() + 1) + wanted[~big].sum()


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k3", True), ("k2", False)])
def test_kl_estimators_on_average(case, estimator, unbiased):
    """Schulman (2020): k1 and k3 are unbiased, k2 is not."""
    world, policy, reference, _ = case
    ours, theirs = (exact.token_logprobs(m, world) for m in (policy, reference))
    each = kl_estimate(ours, theirs, estimator=estimator)
    p, q = exact.logprobs(policy, world), exact.logprobs(reference, world)
    found = exact.expected(p, np.asarray(jnp.where(world.mask, each, 0.0), np.float64).sum(1))
    truth = exact.kl(p, q)
    assert truth > 0.1
    if unbiased:
        assert found == pytest.approx(truth, rel=1e-4)
    else:
        assert abs(found - truth) > 0.05 * truth


def test_k3_varies_less_than_k1_near_the_reference(case):
    world, policy, _, _ = case
    near = jax.tree.map(lambda x: x * 1.02, policy)
    ours, theirs = (exact.token_logprobs(m, world) for m in (policy, near))
    p = exact.logprobs(policy, world)

    def variance(estimator):
        each = jnp.where(world.mask, kl_estimate(ours, theirs, estimator=estimator), 0.0)
        values = np.asarray(each, np.float64).sum(1)
        return exact.expected(p, values**2) - exact.expected(p, values) ** 2

    assert variance("k3") < 0.05 * variance("k1")


def gradient_as_loss(case, estimator, *, old=None):
    """∇ E[Σ_t k(t)] as RLHF takes it: the tokens are the current policy's, and constants.

    With `old` they are another policy's, and weighed by the ratio of the two.
    """
    world, policy, reference, _ = case
    theirs = exact.token_logprobs(reference, world)
    sampler = policy if old is None else old
    p = jnp.asarray(np.exp(exact.logprobs(sampler, world)), jnp.float32)
    before = exact.token_logprobs(sampler, world)

    def loss(m):
        ours = exact.token_logprobs(m, world)
        each = kl_estimate(ours, theirs, estimator=estimator)
        ratio = 1.0 if old is None else jnp.exp(jnp.cumsum(ours - before, axis=1))
        return jnp.sum(p[:, None] * jnp.where(world.mask, ratio * each, 0.0))

    return jax.grad(loss)(policy)


def next_token_gradients(case):
    """∇ of Σ over prefixes, as often as the policy writes them, of KL between next tokens.

    Both ways round, (policy ‖ reference) and (reference ‖ policy), by listing prefixes and tokens;
    how often a prefix comes is a constant.
    """
    world, policy, reference, _ = case
    p, theirs = np.exp(exact.logprobs(policy, world)), exact.token_logprobs(reference, world)
    weights = np.zeros(world.tokens.shape)  # of a prefix, at one completion for each next token
    for t in range(world.width):
        _, prefix = np.unique(world.tokens[:, :t], axis=0, return_inverse=True)
        _, first = np.unique(world.tokens[:, : t + 1], axis=0, return_index=True)
        mass = np.bincount(prefix.reshape(-1), p)[prefix.reshape(-1)]
        weights[first, t] = np.where(world.mask[first, t], mass[first], 0.0)
    constant = jnp.asarray(weights, jnp.float32)

    def reverse(m):
        ours = exact.token_logprobs(m, world)
        return jnp.sum(constant * jnp.exp(ours) * (ours - theirs))

    def forward(m):
        return jnp.sum(constant * jnp.exp(theirs) * (theirs - exact.token_logprobs(m, world)))

    return jax.grad(reverse)(policy), jax.grad(forward)(policy)


def whole_kl_gradient(case):
    """∇ KL(policy ‖ reference) of whole completions."""
    world, policy, reference, _ = case
    zero, q = np.zeros(len(world.tokens)), exact.logprobs(reference, world)
    found = exact.objective_gradient(policy, world, zero, reference=q, beta=1.0)
    return jax.tree.map(lambda x: -x, found)


def test_the_gradient_of_k1_as_a_loss_is_zero(case):
    scale = np.abs(flat(whole_kl_gradient(case))).max()
    assert np.abs(flat(gradient_as_loss(case, "k1"))).max() < 1e-3 * scale


def test_k2s_gradient_is_that_of_the_kl_of_each_next_token_and_k3s_of_it_the_other_way_round(case):
    """Neither is the other's: swapped, k2 and k3 would fail both."""
    reverse, forward = next_token_gradients(case)
    close(gradient_as_loss(case, "k2"), reverse)
    close(gradient_as_loss(case, "k3"), forward)
    assert apart(reverse, forward) > 0.05


def test_what_k2_leaves_out_is_what_a_token_does_to_the_kl_of_later_ones(case):
    """So even k2's is not the gradient of the KL of whole completions, but near it."""
    found, whole = gradient_as_loss(case, "k2"), whole_kl_gradient(case)
    assert cosine(found, whole) > 0.7
    assert apart(found, whole) > 0.1


@pytest.mark.parametrize(("estimator", "right"), [("k1", True), ("k3", True), ("k2", False)])
def test_weighed_by_the_ratio_every_unbiased_estimator_has_the_kls_gradient(case, estimator, right):
    """The ratio of whole prefixes brings back how often they come: then k1 and k3, not k2."""
    old = exact.model_of(case[0], 3)
    found, whole = gradient_as_loss(case, estimator, old=old), whole_kl_gradient(case)
    if right:
        close(found, whole)
    else:
        assert apart(found, whole) > 0.01


def expected_advantages(p, reward, estimator, group=2) -> np.ndarray:
    """E[advantage | completion] over all groups that it can be in, by listing them."""
    count, weights = len(reward), np.exp(p)
    groups = np.array(list(itertools.product(range(count), repeat=group)))
    scores = jnp.asarray(reward[groups].ravel(), jnp.float32)
    found = np.asarray(estimator(scores, group=group), np.float64).reshape(groups.shape)
    mass = weights[groups].prod(axis=1)
    return np.bincount(groups[:, 0], mass * found[:, 0], count)  # times π(completion)


def test_rloo_is_unbiased(case):
    """The leave-one-out baseline is independent of the completion: Kool et al. (2019)."""
    world, policy, _, reward = case
    p = exact.logprobs(policy, world)
    weights = expected_advantages(p, reward, leave_one_out)
    found = exact.weighted_gradient(policy, world, weights[:, None] * world.mask)
    close(found, exact.objective_gradient(policy, world, reward))


def test_grpos_division_by_the_standard_deviation_is_a_bias(case):
    """It weighs groups of little spread up: Liu et al. (2025), arXiv:2503.20783, section 3.1.

    In pairs it knows only which is better, so a reward that is a tenth gives the same gradient.
    """
    world, policy, _, reward = case
    p, truth = exact.logprobs(policy, world), exact.objective_gradient(policy, world, reward)

    def gradient(scores):
        weights = expected_advantages(p, scores, group_z_score)
        return exact.weighted_gradient(policy, world, weights[:, None] * world.mask)

    found = gradient(reward)
    assert 0.5 < cosine(found, truth) < 0.995
    np.testing.assert_allclose(flat(gradient(0.1 * reward)), flat(found), atol=2e-2)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_the_true_values_is_unbiased_whatever_lambda(case, lam):
    world, policy, _, reward = case
    p = exact.logprobs(policy, world)
    found = gae_gradient(world, policy, p, reward, exact.prefix_values(p, world, reward), lam)
    close(found, exact.objective_gradient(policy, world, reward))


def test_gae_with_wrong_values_is_biased_unless_lambda_is_one(case):
    """At λ = 1 the values are a baseline alone: Schulman et al. (2016), section 3."""
    world, policy, _, reward = case
    p, truth = exact.logprobs(policy, world), exact.objective_gradient(policy, world, reward)
    # A function of the prefix, as a critic's prediction is; but a wrong one.
    prefixes = exact.prefix_values(p, world, np.arange(len(reward)) % 3 - 1.0)
    close(gae_gradient(world, policy, p, reward, prefixes, 1.0), truth)
    assert cosine(gae_gradient(world, policy, p, reward, prefixes, 0.0), truth) < 0.95


def gae_gradient(world, policy, p, reward, values, lam):
    last = world.mask.sum(1) - 1
    rewards = np.where(np.arange(world.width) == last[:, None], reward[:, None], 0.0)
    arrays = (jnp.asarray(x, jnp.float32) for x in (rewards, values))
    advantages, _ = generalized_advantages(*arrays, jnp.asarray(world.mask), gamma=1.0, lam=lam)
    return exact.weighted_gradient(
        policy, world, np.exp(p)[:, None] * np.asarray(advantages, np.float64)
    )


def test_the_clipped_surrogate_begins_with_the_policy_gradient(case):
    world, policy, _, reward = case
    p = exact.logprobs(policy, world)
    old = exact.token_logprobs(policy, world)
    gain = jnp.broadcast_to(jnp.asarray(reward, jnp.float32)[:, None], old.shape)
    weights = jnp.asarray(np.exp(p)[:, None] * world.mask, jnp.float32)

    def loss(m):
        return jnp.sum(weights * clipped_surrogate(exact.token_logprobs(m, world), old, gain))

    found = jax.tree.map(lambda x: -x, jax.grad(loss)(policy))
    close(found, exact.objective_gradient(policy, world, reward))


def test_the_optimum_is_where_no_distribution_has_more(case):
    """E[r] − β KL of π* is β log Σ π_ref exp(r/β), and no other distribution reaches it."""
    world, policy, reference, reward = case
    q, beta = exact.logprobs(reference, world), 0.5
    best = exact.optimal(q, reward, beta)

    def value(p):
        return exact.expected(p, reward) - beta * exact.kl(p, q)

    assert value(best) == pytest.approx(beta * np.log(np.exp(q + reward / beta).sum()))
    others = [exact.logprobs(policy, world), q, exact.best_of_n(q, reward, 4)]
    others += [exact.optimal(q, reward, b) for b in (0.3, 0.8)]
    assert all(value(p) < value(best) for p in others)


def test_best_of_n_is_the_distribution_of_the_best(case):
    """By listing all pairs of draws; and a reward with ties keeps the reference among them."""
    world, _, reference, reward = case
    q = exact.logprobs(reference, world)
    found = np.zeros(len(q))
    for i, j in itertools.product(range(len(q)), repeat=2):
        found[i if reward[i] >= reward[j] else j] += np.exp(q[i] + q[j])
    np.testing.assert_allclose(np.exp(exact.best_of_n(q, reward, 2)), found, rtol=1e-9)
    tied = exact.best_of_n(q, np.zeros(len(q)), 5)
    np.testing.assert_allclose(tied, q)
    p = exact.best_of_n(q, reward, 8)
    assert exact.kl(p, q) <= np.log(8) - 7 / 8 + 1e-9
