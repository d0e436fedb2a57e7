"""Integrity checks of pretraining and the reward model, recomputed from a run's own batches.

Each takes a Setting and says whether it found what it should, with the figures. The references
are NumPy in float64 and the definitions in the docs, not the code that is checked.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minilm.audit.setting import Setting, rows_of
from minilm.errors import UserError
from minilm.files import read_json
from minilm.stages.reward import score_texts
from minilm.text.batches import Batch
from minilm.text.tokenizer import Tokenizer

BROKEN = (ArithmeticError, LookupError, RuntimeError, TypeError, UserError, ValueError)
MOST = 0.9  # of the reference's completions end, so that their mean is that of the score


class Check(NamedTuple):
    """What one check found."""

    name: str
    passed: bool | None  # None: nothing to test it by
    said: str  # the figures, and where it failed what that means


type Checks = dict[str, Callable[[Setting], tuple[bool | None, str]]]


def run_checks(setting: Setting, checks: Checks) -> Iterator[Check]:
    for name, check in checks.items():
        try:
            passed, said = check(setting)
        except BROKEN as error:
            passed, said = False, f"could not be computed: {error!r}"
        yield Check(f"{setting.stage}: {name}", None if passed is None else bool(passed), said)


def close(found: Any, expected: Any, tolerance: float) -> tuple[bool, str]:
    """Whether two numbers or arrays agree, relative to the expected one's size (at least 1)."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    gap = np.abs(a - b).max() / max(np.abs(b).max(), 1.0) if a.size else 0.0
    shown = (
        f"{np.ravel(a)[0]:.6g} against {np.ravel(b)[0]:.6g}" if a.size == 1 else f"off by {gap:.2g}"
    )
    return bool(np.isfinite(gap) and gap <= tolerance), f"{shown} (at most {tolerance:g})"


# Language


def _log_softmax(logits: Any) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _cross_entropies(logits: Any, targets: np.ndarray) -> np.ndarray:
    return -np.take_along_axis(_log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def language_formula(setting: Setting) -> tuple[bool, str]:
    """−log p of each counted target; the loss is their sum over their number.

    Of a batch whose rows count unequally much: a mean of the rows' means would differ.
    """
    batch, term = _ragged(setting), setting.objective.terms[0]
    outputs, counted = setting.outputs(batch), np.asarray(batch.weights) > 0
    expected = _cross_entropies(outputs, np.asarray(batch.targets))[counted]
    each, of_each = close(np.asarray(term.values(outputs, batch))[counted], expected, 1e-4)
    totals, counts = setting.objective.totals(outputs, batch), setting.objective.counts(batch)
    found = totals[term.name] / jnp.maximum(counts[term.name], 1e-6)
    mean, said = close(found, expected.sum() / max(counted.sum(), 1), 1e-4)
    return each and mean, f"{said}; each target {of_each}"


def every_target_counts_once(setting: Setting) -> tuple[bool, str]:
    """Weight 1 exactly where the target is a token: not at padding, and nowhere else is it 0."""
    batch = setting.batch
    weights, targets = np.asarray(batch.weights), np.asarray(batch.targets)
    wrong = int((weights != (targets != Tokenizer.pad_id)).sum())
    counted = float(weights.sum())
    return (
        wrong == 0 and counted > 0,
        f"{counted:.0f} targets counted, {wrong} of {weights.size} wrong",
    )


def targets_are_the_next_tokens(setting: Setting) -> tuple[bool, str]:
    tokens, targets = np.asarray(setting.batch.tokens), np.asarray(setting.batch.targets)
    wrong = int((tokens[:, 1:] != targets[:, :-1]).sum())
    return wrong == 0, f"{wrong} of {tokens[:, 1:].size} are not"


def documents_do_not_see_each_other(setting: Setting) -> tuple[bool | None, str]:
    """Changing the first document of each row leaves what is said of the later ones."""
    if setting.stage == "pretrain" and not setting.ws.config.pretrain.document_attention:
        return None, "pretrain.document_attention is off"
    tokens, targets = np.array(setting.batch.tokens), np.asarray(setting.batch.targets)
    starts = np.cumsum(tokens == Tokenizer.eos_id, axis=1)
    later, first = (starts > 1) & (tokens != Tokenizer.pad_id), (starts == 1)
    first &= tokens != Tokenizer.eos_id
    if not later.any():
        return None, "no row of the first batch holds two documents"
    # Another token for each of the first document's; the segments stay what they are.
    other = np.where(first, 2 + (tokens - 1) % (setting.ws.tokenizer.vocab_size - 2), tokens)
    changed = setting.batch._replace(tokens=other.astype(np.int32))
    before, after = (
        _cross_entropies(setting.outputs(batch), targets)[later]
        for batch in (setting.batch, changed)
    )
    return close(after, before, setting.tolerance)


def company_and_padding_change_nothing(setting: Setting) -> tuple[bool, str]:
    """A row alone, and with padding after it, pays what it pays in the batch."""
    batch, width = setting.batch, setting.batch.tokens.shape[1]
    whole = _cross_entropies(setting.outputs(batch), np.asarray(batch.targets))
    alone = rows_of(batch, slice(0, 1))
    padded = Batch(
        *(
            np.pad(np.asarray(x), ((0, 0), (0, 16)), constant_values=value)
            for x, value in zip(alone, (Tokenizer.pad_id, Tokenizer.pad_id, 0, 0), strict=True)
        )
    )
    real = np.asarray(alone.weights)[0] > 0
    found = [
        _cross_entropies(setting.outputs(b), np.asarray(b.targets))[0, :width][real]
        for b in (alone, padded)
    ]
    passed, said = close(np.stack(found), np.stack([whole[0][real]] * 2), setting.tolerance)
    losses = setting.loss(alone), setting.loss(padded)
    same, of_loss = close(losses[1], losses[0], setting.tolerance)
    return passed and same, f"tokens {said}; loss {of_loss}"


def accumulation_is_the_whole_batch(setting: Setting) -> tuple[bool, str]:
    """The gradient in parts is that of the whole batch, though its rows count unequally much."""
    batch, over = _ragged(setting), setting.objective.terms[0].over
    count = len(np.asarray(over(batch)))
    weights = setting.objective.weights(0)[None]
    whole = setting.gradients(setting.model, batch, weights)
    parts = setting.gradients(setting.model, batch, weights, count)
    a, b = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(found[3])])
        for found in (whole, parts)
    )
    # Where nothing pulls, as in GRPO with equal scores, what is left is rounding.
    gap = float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-4))
    same, said = close(jnp.sum(parts[0]), jnp.sum(whole[0]), setting.tolerance)
    return same and gap <= setting.tolerance, f"gradient off by {gap:.2g} of its norm, loss {said}"


def _ragged(setting: Setting) -> Any:
    """The batch with fewer and fewer elements counted, row by row."""
    batch, field = setting.batch, "mask" if setting.stage == "rlhf" else "weights"
    kept = np.array(batch._asdict()[field])
    for row in range(len(kept)):
        real = np.flatnonzero(kept[row])
        kept[row, real[max(1, len(real) // (row % 4 + 1)) :]] = 0
    return batch._replace(**{field: kept})


def no_held_out_document_is_trained_on(setting: Setting) -> tuple[bool, str]:
    """Documents read back from the packed rows, against the held-out texts; of longer ones the
    first window, as it is packed."""
    rows, tokenizer = setting.parts.rows, setting.ws.tokenizer
    flat = np.ravel(
        np.concatenate([rows, np.full((len(rows), 1), tokenizer.pad_id, rows.dtype)], 1)
    )
    flat = flat[flat != tokenizer.pad_id]
    pieces = np.split(flat, np.flatnonzero(flat == tokenizer.eos_id))
    trained = {piece[1:].tobytes() for piece in pieces} | {row[1:].tobytes() for row in rows}
    texts = tokenizer.encode_batch(setting.parts.held_out)
    windows = [np.array(ids[: rows.shape[1] - 1], rows.dtype).tobytes() for ids in texts if ids]
    leaked = sum(window in trained for window in windows)
    return leaked == 0, f"{leaked} of {len(texts)} held-out documents are in the training rows"


# Pairs


def preference_formula(setting: Setting) -> tuple[bool, str]:
    """−y log σ(Δ) − (1 − y) log σ(−Δ), averaged over the pairs that are there."""
    batch, outputs = setting.batch, setting.outputs(setting.batch)
    gap = np.asarray(outputs.first, np.float64) - np.asarray(outputs.second, np.float64)
    label, real = np.asarray(batch.label, np.float64), np.asarray(batch.weights) > 0
    losses = label * np.logaddexp(0, -gap) + (1 - label) * np.logaddexp(0, gap)
    name = setting.objective.terms[0].name
    totals, counts = setting.objective.totals(outputs, batch), setting.objective.counts(batch)
    found = totals[name] / jnp.maximum(counts[name], 1e-6)
    passed, said = close(found, losses[real].mean(), 1e-4)
    return passed and bool(real.any()), f"{said}; {real.sum()} pairs counted"


def scores_stand_on_end_of_text(setting: Setting) -> tuple[bool, str]:
    """The score of each completion is that of its last token, which is end-of-text."""
    batch, eos = setting.batch, setting.ws.tokenizer.eos_id
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segments)
    lengths = segments.astype(bool).sum(-1)
    there = lengths > 0
    last = np.take_along_axis(tokens, np.asarray(batch.last)[..., None], -1)[..., 0]
    right = (last == eos) & (np.asarray(batch.last) == lengths - 1)
    # From the text, by the code that scores a user's texts.
    first = np.asarray(batch.first)[0, 0]
    row = tokens[0, first][: lengths[0, first]]
    text = setting.ws.tokenizer.decode(row)
    again = score_texts(setting.model, setting.ws.tokenizer, [""], [text], len(row), batch_size=1)[
        0
    ]
    passed, said = close(np.asarray(setting.outputs(batch).first)[0, 0], again, setting.tolerance)
    missing = int((~right & there).sum())
    return (
        missing == 0 and passed,
        f"{missing} of {there.sum()} read elsewhere; one scored anew: {said}",
    )


def pairs_do_not_depend_on_company_or_padding(setting: Setting) -> tuple[bool, str]:
    batch = setting.batch

    def scores(of: Any) -> np.ndarray:
        outputs = setting.outputs(of)
        return np.stack([outputs.first, outputs.second])

    room = ((0, 0), (0, 0), (0, 16))
    wider = batch._replace(tokens=np.pad(batch.tokens, room), segments=np.pad(batch.segments, room))
    other = batch._replace(  # another token under the padding
        tokens=np.where(np.asarray(batch.segments) == 0, 2, batch.tokens).astype(np.int32)
    )
    alone = rows_of(batch, slice(0, 1))
    real = np.asarray(batch.weights) > 0
    expected = scores(batch)
    found = [scores(b) for b in (wider, other)]
    passed, said = close(
        np.stack([x[:, real] for x in found]), np.stack([expected[:, real]] * 2), setting.tolerance
    )
    single = scores(alone)[:, real[:1]]
    same, of_one = close(single, expected[:, :1][:, real[:1]], setting.tolerance)
    return passed and same, f"padding: {said}; alone: {of_one}"


def a_pair_turned_round_pays_the_same(setting: Setting) -> tuple[bool, str]:
    batch = setting.batch
    turned = batch._replace(
        first=batch.second, second=batch.first, label=1 - np.asarray(batch.label)
    )
    return close(setting.loss(turned), setting.loss(batch), setting.tolerance)


def no_held_out_prompt_is_trained_on(setting: Setting) -> tuple[bool, str]:
    shared = len(setting.parts.train_prompts & setting.parts.held_out_prompts)
    return shared == 0, f"{shared} prompts are in both"


def reward_is_in_units_of_the_reference(setting: Setting) -> tuple[bool | None, str]:
    """Mean 0 on completions of the model before RLHF, where these end and so have a score."""
    found = read_json(setting.ws.stage("rlhf") / "evaluation.json")
    before, ended = found.get("reference/proxy"), found.get("reference/ended", 0.0)
    if before is None or ended < MOST:
        return None, f"nothing to compare with: {ended:.0%} of the reference's completions end"
    return abs(before) < 0.5, f"mean proxy of the reference: {before:.3f} standard deviations"


LANGUAGE_CHECKS: Checks = {
    "the loss is its formula, in float64": language_formula,
    "every target counts, padding does not": every_target_counts_once,
    "targets are the next tokens": targets_are_the_next_tokens,
    "documents do not see each other": documents_do_not_see_each_other,
    "company and padding change nothing": company_and_padding_change_nothing,
    "accumulation is the whole batch": accumulation_is_the_whole_batch,
    "no held-out document is trained on": no_held_out_document_is_trained_on,
}
REWARD_CHECKS: Checks = {
    "the loss is its formula, in float64": preference_formula,
    "scores stand on end-of-text": scores_stand_on_end_of_text,
    "company and padding change nothing": pairs_do_not_depend_on_company_or_padding,
    "a pair turned round pays the same": a_pair_turned_round_pays_the_same,
    "accumulation is the whole batch": accumulation_is_the_whole_batch,
    "no held-out prompt is trained on": no_held_out_prompt_is_trained_on,
    "the reward is in units of the reference": reward_is_in_units_of_the_reference,
}
