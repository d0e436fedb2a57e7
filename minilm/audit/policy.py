"""Integrity checks of RLHF: its first rollout is drawn anew and read by independent formulas."""

import jax
import jax.numpy as jnp
import numpy as np

from minilm import backend
from minilm.algorithms import ALGORITHMS, algorithm_of
from minilm.audit.checks import Checks, accumulation_is_the_whole_batch, close
from minilm.audit.setting import Setting
from minilm.config import OptimizerConfig
from minilm.files import read_jsonl
from minilm.optim import make_optimizer
from minilm.rollout import Outputs
from minilm.stages.policy import proxy_scores
from minilm.stages.rlhf import make_forward, make_step, start_state
from minilm.text.prompts import prompt_sets

PROBE = 0.6  # a temperature at which a forgotten division can't hide
FEW = 0.2  # of the completions are different: fewer, and the policy says one thing to all prompts


def _outputs(setting: Setting, model, batch) -> Outputs:
    return backend.keep(jax.jit(setting.forward))(model, batch)


def the_loss_is_its_formula(setting: Setting) -> tuple[bool, str]:
    """−r A, or −min(r A, clip(r) A), over tokens or sequences; read off a moved policy."""
    config, batch = setting.ws.config.rlhf, setting.batch
    outputs = _outputs(setting, setting.parts.last, batch)
    mask = np.asarray(batch.mask)
    log_ratio, advantages = (
        np.asarray(x, np.float64) for x in (outputs.logprobs - batch.old_logprobs, batch.advantages)
    )
    ratio, row = np.exp(np.minimum(log_ratio, 20.0)), ALGORITHMS[config.algorithm]
    plain = -ratio * advantages

    def surrogate(high: float):
        return np.maximum(plain, -np.clip(ratio, 1 - config.clip, 1 + high) * advantages)

    losses = {
        "policy_gradient": plain,
        "clipped_surrogate": surrogate(config.clip),
        "clip_higher": surrogate(config.clip_high),
        "imitation": -np.asarray(outputs.logprobs, np.float64) * advantages,
    }
    chosen = mask & (advantages != 0)
    weights = {
        "token": mask / mask.sum(),
        "sequence": mask / mask.sum(1, keepdims=True) / len(mask),
        "slot": mask / mask.size,
        "chosen": chosen / max(chosen.sum(), 1),
    }
    name = next(iter(row.terms))
    term = f"loss/{name}"
    expected = (losses[name] * weights[row.over]).sum()
    totals, counts = setting.objective.totals(outputs, batch), setting.objective.counts(batch)
    return close(totals[term] / counts[term], expected, 1e-4)


def the_mask_covers_the_completion(setting: Setting) -> tuple[bool, str]:
    """From after the prompt to end-of-text, that included; nothing after it."""
    tokenizer, mask = setting.ws.tokenizer, np.asarray(setting.batch.mask)
    tokens = np.asarray(setting.batch.tokens)[:, -mask.shape[1] :]
    ended = np.cumsum(tokens == tokenizer.eos_id, axis=1) - (tokens == tokenizer.eos_id) > 0
    wrong = int((mask != ~ended).sum())
    return wrong == 0 and bool(mask.any()), f"{mask.sum()} tokens counted, {wrong} wrongly"


def the_score_stands_on_end_of_text(setting: Setting) -> tuple[bool | None, str]:
    """The rollout's scores are those of its texts, each scored at its own end-of-text."""
    ws, collected = setting.ws, setting.parts.collected
    rlhf = ws.config.rlhf
    if rlhf.judge_weight or rlhf.learned_weight != 1 or rlhf.reward_clip or rlhf.length_penalty:
        return True, "no formula is kept here for a sum of rewards, clipped or priced by length"
    width = collected.samples.tokens.shape[1]
    rows, samples = np.asarray(collected.rollout.tokens)[:, :-width], collected.samples
    samples = jax.tree.map(np.asarray, samples)
    # One by one, from the text itself: padding, order and company differ from the rollout's.
    from minilm.stages.reward import score_texts

    prompts = [ws.tokenizer.decode(row) for row in rows]
    texts = [ws.tokenizer.decode(t[m]) for t, m in zip(samples.tokens, samples.mask, strict=True)]
    longest = rows.shape[1] + width + 1
    payer, told = setting.parts.reward_model, (ws.tokenizer, prompts, texts, longest)
    raw = [np.asarray(score_texts(m, *told), np.float64) for m in payer.members]
    units = np.stack([(x - s.mean) / s.std for x, s in zip(raw, payer.scales, strict=True)])
    low = {"mean": 0.0, "penalized": ws.config.rlhf.ensemble_penalty}
    paid = units.min(0)
    if payer.combine in low:
        paid = units.mean(0) - low[payer.combine] * units.std(0)
    expected = np.where(samples.finished, paid, ws.config.rlhf.missing_eos_score)
    # A text that another tokenisation gives back is another sequence: leave those out.
    same = [
        ws.tokenizer.encode(text) == t[m & (t != ws.tokenizer.eos_id)].tolist()
        for text, t, m in zip(texts, samples.tokens, samples.mask, strict=True)
    ]
    keep = np.array(same)
    found = np.asarray(collected.scores)[keep]
    passed, said = close(found, expected[keep], 4 * setting.tolerance)
    missing, pad = ws.config.rlhf.missing_eos_score, ws.tokenizer.pad_id
    again = proxy_scores(setting.parts.reward_model, rows, samples, missing, pad, 16)
    even, of_batch = close(again, collected.scores, 4 * setting.tolerance)
    told = f"{keep.sum()} texts scored anew: {said}; other batch size: {of_batch}"
    # Without a text that comes back as it was, nothing shows where the score stands.
    return (None if even and not keep.any() else passed and even), told


def the_first_ratio_is_one(setting: Setting) -> tuple[bool, str]:
    """trl#4159: log-probabilities of sampling and of the update, at a temperature that tells."""
    worst = []
    for temperature in {setting.ws.config.rlhf.temperature, PROBE}:
        config = setting.ws.config.rlhf.model_copy(update={"temperature": temperature})
        batch = setting.parts.collect(config)(setting.parts.start, 0).batch
        width = batch.mask.shape[1]
        outputs = backend.keep(jax.jit(make_forward(config, width)))(setting.parts.start, batch)
        mask = np.asarray(batch.mask)
        worst.append(np.abs(np.exp(np.asarray(outputs.logprobs - batch.old_logprobs)) - 1)[mask])
    mean = max(float(x.mean()) for x in worst)
    return mean <= setting.tolerance, f"mean |ratio − 1| {mean:.2g} (at most {setting.tolerance:g})"


def the_ratio_moves(setting: Setting) -> tuple[bool, str]:
    """torchforge#571: of a policy that differs it is not 1, as the objective's own terms see it."""
    # Trained ones may hardly have moved: where no completion ends, all score the same.
    moved = jax.tree.map(lambda x: 1.05 * x, setting.parts.last)
    outputs = _outputs(setting, moved, setting.batch)
    totals = setting.objective.totals(outputs, setting.batch)
    counts = setting.objective.counts(setting.batch)
    gap = float(totals["val/ratio_deviation"] / counts["val/ratio_deviation"])
    mask = np.asarray(setting.batch.mask)
    own = np.abs(np.exp(np.asarray(outputs.logprobs - setting.batch.old_logprobs)) - 1)[mask].mean()
    passed, said = close(gap, own, 1e-3)
    return passed and bool(
        own > setting.tolerance / 10
    ), f"mean |ratio − 1| of a policy with parameters 5 % larger: {said}"


def the_reference_is_frozen(setting: Setting) -> tuple[bool, str]:
    """A step changes the policy and nothing else: not the reference, not the reward model."""
    config, parts = setting.ws.config.rlhf, setting.parts
    frozen = (parts.reference, parts.reward_model)
    before = [[np.array(x) for x in jax.tree.leaves(m)] for m in frozen]
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, schedule="constant"), 1)
    width = setting.batch.mask.shape[1]
    ptx = setting.batch.ptx
    rows = None if ptx is None else lambda n: ptx
    step = make_step(config, setting.objective, optimizer, lambda *_: parts.collected, width, rows)
    start = [np.array(x) for x in jax.tree.leaves(parts.start)]
    state, _ = step(start_state(parts.start, optimizer), 0)
    moved = any(
        (np.asarray(x) != y).any() for x, y in zip(jax.tree.leaves(state.model), start, strict=True)
    )
    changed = sum(
        bool((np.asarray(x) != y).any())
        for model, old in zip(frozen, before, strict=True)
        for x, y in zip(jax.tree.leaves(model), old, strict=True)
    )
    # What a policy that has moved is compared with is the pretrained model still.
    rollout, reference = parts.moved.batch, setting.ws.load(setting.ws.base, scalar_head=False)
    own, mask = _outputs(setting, reference, rollout).logprobs, np.asarray(rollout.mask)
    same, said = close(
        np.asarray(own)[mask], np.asarray(rollout.ref_logprobs)[mask], setting.tolerance
    )
    text = "policy moved" if moved else "policy did not move"
    text += f", {changed} frozen arrays changed; reference {said}"
    return moved and changed == 0 and same, text


def the_logged_kl_is_the_kl_in_the_loss(setting: Setting) -> tuple[bool, str]:
    """trl#1161: Σ log π/π_ref of the record; what is taken from the reward, or added to the loss.

    On a policy that has moved: at the start every estimator is 0.
    """
    config, collected = setting.ws.config.rlhf, setting.parts.moved
    rollout, batch = collected.rollout, collected.batch
    mask = np.asarray(rollout.mask)
    gap = np.where(mask, np.asarray(rollout.logprobs - rollout.ref_logprobs, np.float64), 0.0)
    logged = collected.metrics["objective/kl"]
    passed, said = close(float(logged.value), gap.sum(1).mean(), 1e-3)
    names = [t.name for t in setting.objective.terms]
    kl = algorithm_of(config).kl
    if "loss/kl" in names and kl:
        term = setting.objective.terms[names.index("loss/kl")]
        outputs = Outputs(rollout.logprobs, jnp.zeros_like(rollout.logprobs), rollout.values)
        found = np.asarray(term.values(outputs, batch), np.float64)[mask]
        own = (gap**2 / 2 if kl.estimator == "k2" else np.expm1(-gap) + gap)[mask]
        scale = np.broadcast_to(np.asarray(batch.kl_scale)[:, None], mask.shape)[mask]
        same, of_loss = close(found, scale * own, 1e-3)
    elif config.algorithm == "rloo" and kl == ("reward", "k1"):  # the advantages tell
        paid = config.kl_coef * np.asarray(batch.kl_scale, np.float64)
        total = np.asarray(collected.scores, np.float64) - paid * gap.sum(1)
        group = total.reshape(-1, config.group_size)
        others = (group.sum(1, keepdims=True) - group) / (config.group_size - 1)
        expected = np.where(mask, (group - others).reshape(-1, 1), 0.0)
        same, of_loss = close(batch.advantages, expected, 1e-3)
    else:
        same, of_loss = True, "no formula kept here for its place in the advantages"
    return passed and same, f"logged {said}; in training {of_loss}"


def completions_differ(setting: Setting) -> tuple[bool, str]:
    """trl#204: reward up, one completion for every prompt. And groups that all score the same."""
    path = setting.ws.stage("rlhf") / "samples.jsonl"
    if not path.exists():
        return True, "the last policy has not been sampled"
    texts = [row["after"] for row in read_jsonl(path)]
    distinct = len(set(texts)) / len(texts)
    return distinct > FEW, f"{distinct:.0%} of {len(texts)} completions of the last policy differ"


def evaluation_prompts_are_not_trained_on(setting: Setting) -> tuple[bool, str]:
    sets = prompt_sets(setting.ws.config, setting.ws.tokenizer, setting.ws.held_out())
    tokens, width = np.asarray(setting.batch.tokens), setting.batch.mask.shape[1]
    trained = {setting.ws.tokenizer.decode(row[:-width]) for row in tokens}
    path = setting.ws.stage("rlhf") / "samples.jsonl"
    asked = {row["prompt"] for row in read_jsonl(path)} if path.exists() else set(sets.evaluation)
    shared = len(asked & ({*sets.rlhf, *sets.preferences} | trained))
    return shared == 0, f"{shared} of {len(asked)} evaluation prompts are trained on"


RLHF_CHECKS: Checks = {
    "the loss is its formula, in float64": the_loss_is_its_formula,
    "the mask covers the completion": the_mask_covers_the_completion,
    "the score stands on end-of-text": the_score_stands_on_end_of_text,
    "the first ratio is 1, at any temperature": the_first_ratio_is_one,
    "the ratio moves": the_ratio_moves,
    "the reference is frozen": the_reference_is_frozen,
    "the logged KL is the KL in the loss": the_logged_kl_is_the_kl_in_the_loss,
    "accumulation is the whole batch": accumulation_is_the_whole_batch,
    "completions differ": completions_differ,
    "evaluation prompts are not trained on": evaluation_prompts_are_not_trained_on,
}
