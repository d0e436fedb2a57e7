"""The objective card: what each term is, what share of loss and gradient it has, who bears it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minilm.audit.setting import Setting
from minilm.losses import LOSSES
from minilm.losses.docstrings import explain
from minilm.objective import Objective, Term
from minilm.terms import LOSS_OF, OVER, plain

CONFLICT = -0.1  # cosine below which two terms pull against each other
RARE = 0.01  # share of the gradient below which a group is hardly heard


class TermCard(NamedTuple):
    """One trained term, on one batch."""

    name: str
    weight: float
    loss: float  # unweighted
    loss_share: float  # of Σ |weight · loss|
    gradient_norm: float  # of weight · loss
    gradient_share: float  # of Σ of the norms
    pays_for: str  # from the loss's docstring, as are the next two
    rewards: str
    ignores: str


class GroupCard(NamedTuple):
    """One group of the batch's elements."""

    name: str
    elements: float  # shares of the batch
    loss: float
    gradient: float  # of Σ over elements of the norm of d loss / d outputs


class Card(NamedTuple):
    stage: str
    terms: list[TermCard]
    cosines: dict[str, float]  # "a | b" -> cosine of their gradients
    groups: list[GroupCard]
    heaviest: dict[str, float]  # kinds of example -> share of the loss
    flags: list[str]


def card_of(setting: Setting, groups: dict[str, np.ndarray] | None = None) -> Card:
    """The card of an objective on one batch.

    Args:
      setting: a stage's (`minilm.audit.setting`), or any model, objective, forward and batch.
      groups: masks over the batch's elements by name; None for those of the stage.
    """
    aim, stage = setting.objective, setting.stage
    names = list(aim.trained)
    losses, _, _, gradients = setting.gradients(setting.model, setting.batch, jnp.eye(len(names)))
    weights = np.asarray(aim.weights(0), np.float64)
    flat = np.stack([_flat(g) for g in gradients]) * weights[:, None]
    norms, weighed = np.linalg.norm(flat, axis=1), weights * np.asarray(losses, np.float64)
    unit = flat / np.maximum(norms, 1e-30)[:, None]
    cosine = unit @ unit.T
    terms = [
        TermCard._make((name, *map(float, figures), *described(plain(name))))
        for name, *figures in zip(
            names, weights, losses, _share(np.abs(weighed)), norms, _share(norms), strict=True
        )
    ]
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    cosines = {f"{names[j]} | {names[i]}": float(cosine[i, j]) for i, j in pairs}
    known = GROUPS[stage](setting) if groups is None else groups
    cards, loss = _groups(setting, known)
    heaviest = HEAVIEST[stage](setting, loss) if groups is None else {g.name: g.loss for g in cards}
    flags = [
        f"conflict: {pair} pull against each other (cosine {value:.2f})"
        for pair, value in cosines.items()
        if value < CONFLICT
    ]
    flags += [
        f"rare: {g.name} ({g.elements:.1%} of the elements) has {g.gradient:.2%} of the gradient"
        for g in cards
        if g.elements and g.gradient < RARE and any(other.gradient for other in cards)
    ]
    flags += [f"idle: {t.name} has no gradient" for t in terms if t.gradient_norm == 0]
    return Card(stage, terms, cosines, cards, heaviest, flags)


def described(term: str) -> tuple[str, str, str]:
    """What a term's loss pays for, rewards and ignores, from its docstring."""
    said = explain(LOSSES[LOSS_OF.get(term, term)])
    return said.pays, said.rewards, said.ignores


def element_gradients(aim: Objective, outputs: Any, batch: Any) -> np.ndarray:
    """‖d loss / d outputs‖ of each element, of the shape of the elements' weights.

    Terms of other elements, such as whole lists, and outputs of other shapes have no part in it.
    """
    aim = Objective(_of_elements(aim))
    if not aim.trained:
        return np.zeros(aim.terms[0].over(batch).shape)

    def loss(outputs):
        return aim.loss(aim.totals(outputs, batch), aim.counts(batch))

    shape = aim.terms[0].over(batch).shape
    total = np.zeros(shape)
    for leaf in jax.tree.leaves(jax.grad(loss, allow_int=True)(outputs)):
        if leaf.shape[: len(shape)] != shape:
            continue
        squares = np.square(np.asarray(leaf, np.float64))
        total += squares.sum(axis=tuple(range(len(shape), squares.ndim)))
    return np.sqrt(total)


def element_losses(aim: Objective, outputs: Any, batch: Any) -> np.ndarray:
    """|Σ weight · loss| of each element over the trained terms, elements' weights included."""
    own = Objective(_of_elements(aim))
    total = np.zeros(own.terms[0].over(batch).shape)
    for term, weight in zip(own.terms, _all_weights(own), strict=True):
        if weight:
            over = np.asarray(term.over(batch), np.float64)
            values = np.where(over > 0, np.asarray(term.values(outputs, batch), np.float64), 0.0)
            total = total + weight * over * values / max(over.sum(), 1e-9)
    return np.abs(total)


def _of_elements(aim: Objective) -> tuple[Term, ...]:
    """The terms that are paid for the stage's own elements."""
    return tuple(term for term in aim.terms if term.over not in OVER.values())


def _all_weights(aim: Objective) -> list[float]:
    return [float(t.weight(0)) if callable(t.weight) else float(t.weight) for t in aim.terms]


def _groups(setting: Setting, masks: dict[str, np.ndarray]) -> tuple[list[GroupCard], np.ndarray]:
    """A card a group, and each element's loss."""
    aim, batch, outputs = setting.objective, setting.batch, setting.outputs(setting.batch)
    counted = np.asarray(aim.terms[0].over(batch)) > 0
    loss, gradient = element_losses(aim, outputs, batch), element_gradients(aim, outputs, batch)
    loss, gradient = (np.where(counted, x, 0.0) for x in (loss, gradient))
    cards = [
        GroupCard(name, *(_part(x, inside) for x in (counted.astype(float), loss, gradient)))
        for name, inside in masks.items()
    ]
    return cards, loss


def _token_groups(setting: Setting) -> dict[str, np.ndarray]:
    """By what is predicted: the end, and bands of how common a token is in the training text."""
    targets, tokenizer = np.asarray(setting.batch.targets), setting.ws.tokenizer
    counts = np.bincount(np.ravel(setting.parts.rows), minlength=tokenizer.vocab_size)
    counts[[tokenizer.pad_id, tokenizer.eos_id]] = 0
    rank = np.argsort(np.argsort(-counts))[targets]
    end = targets == tokenizer.eos_id
    return {
        "end-of-text": end,
        "the 20 commonest tokens": ~end & (rank < 20),
        "the next 180": ~end & (rank >= 20) & (rank < 200),
        "rarer ones": ~end & (rank >= 200),
    }


def _vote_groups(setting: Setting) -> dict[str, np.ndarray]:
    label = np.asarray(setting.batch.label)
    certain = np.maximum(label, 1 - label)
    return {
        "unanimous votes": certain == 1,
        "clear majorities": (certain < 1) & (certain >= 0.75),
        "narrow ones": certain < 0.75,
    }


def _advantage_groups(setting: Setting) -> dict[str, np.ndarray]:
    advantages = np.asarray(setting.batch.advantages)
    return {
        "tokens of better completions": advantages > 0,
        "tokens of worse ones": advantages < 0,
        "tokens without an advantage": advantages == 0,
    }


def _heavy_tokens(setting: Setting, loss: np.ndarray) -> dict[str, float]:
    targets = np.asarray(setting.batch.targets)
    total = np.bincount(
        np.ravel(targets), np.ravel(loss), minlength=setting.ws.tokenizer.vocab_size
    )
    heavy = np.argsort(-total)[:8]
    names = [
        "⟨end⟩" if i == setting.ws.tokenizer.eos_id else repr(n) for i, n in _named(setting, heavy)
    ]
    return dict(zip(names, _share(total)[heavy].tolist(), strict=True))


def _named(setting: Setting, ids: np.ndarray) -> list[tuple[int, str]]:
    return list(zip(ids.tolist(), setting.ws.tokenizer.tokens(ids), strict=True))


def _heavy_pairs(setting: Setting, loss: np.ndarray) -> dict[str, float]:
    """By how the model orders a pair."""
    first, second = (np.asarray(x) for x in setting.outputs(setting.batch)[:2])
    label = np.asarray(setting.batch.label)
    right, gap = (first > second) == (label > 0.5), np.abs(first - second)
    bands = {"narrowly": gap < 1, "clearly": (gap >= 1) & (gap < 3), "by far": gap >= 3}
    found = {}
    for word, agrees in (("right", right), ("wrong", ~right)):
        found |= {f"{word}, {name}": _part(loss, agrees & band) for name, band in bands.items()}
    return found


def _heavy_completions(setting: Setting, loss: np.ndarray) -> dict[str, float]:
    """By where in the completion a token stands."""
    mask = np.asarray(setting.batch.mask)
    place = (np.cumsum(mask, axis=1) - 1) / np.maximum(mask.sum(1, keepdims=True), 1)
    thirds = (("its beginning", 0, 1 / 3), ("its middle", 1 / 3, 2 / 3), ("its end", 2 / 3, 1))
    return {name: _part(loss, (place >= low) & (place < high)) for name, low, high in thirds}


GROUPS: dict[str, Callable[[Setting], dict[str, np.ndarray]]] = {
    "pretrain": _token_groups,
    "reward": _vote_groups,
    "rlhf": _advantage_groups,
}
HEAVIEST: dict[str, Callable[[Setting, np.ndarray], dict[str, float]]] = {
    "pretrain": _heavy_tokens,
    "reward": _heavy_pairs,
    "rlhf": _heavy_completions,
}


def _flat(tree: Any) -> np.ndarray:
    leaves = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def _share(values: np.ndarray) -> np.ndarray:
    return values / max(float(np.sum(values)), 1e-30)


def _part(values: np.ndarray, inside: np.ndarray) -> float:
    return float(values[inside].sum() / max(float(values.sum()), 1e-30))
