"""What an audit looks at: a stage of a finished run as its own code sets it up."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minilm import backend
from minilm.algorithms import algorithm_of, objective
from minilm.config import RLHFConfig
from minilm.model import Transformer
from minilm.objective import Objective
from minilm.rewards import RewardModel
from minilm.stages import pretrain, reward, rlhf
from minilm.stages.policy import PolicyEvaluator
from minilm.stages.preferences import load_pairs
from minilm.stages.workspace import Workspace
from minilm.step import make_gradients
from minilm.terms import configured
from minilm.text.corpora import split

TRAINED = ("pretrain", "reward", "rlhf")
# Of losses in nats and of relative gradients: what rounding may change between two ways to compute
# the same. bfloat16 has 8 bits.
TOLERANCES = {"float32": 1e-3, "bfloat16": 4e-2}


class Setting(NamedTuple):
    """A stage: the model that it ended with, its objective, and a batch of its own."""

    stage: str
    ws: Any  # the Workspace; None outside a run
    model: Any
    objective: Objective
    forward: Callable[[Transformer, Any], Any]
    batch: Any
    parts: Any  # what only this stage has

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.ws.compute_dtype]

    def gradients(self, model: Any, batch: Any, directions, accumulation: int = 1):
        """Losses, totals, counts and a gradient a direction: see `minilm.step.make_gradients`."""
        found = make_gradients(self.forward, self.objective, accumulation)
        return backend.keep(jax.jit(found))(model, batch, directions)

    def loss(self, batch: Any) -> float:
        """What training would log for a batch."""
        batch, outputs = jax.tree.map(jnp.asarray, batch), self.outputs(batch)
        totals, counts = self.objective.totals(outputs, batch), self.objective.counts(batch)
        totals |= self.objective.penalty_totals(self.model)
        return float(self.objective.loss(totals, counts))

    def outputs(self, batch: Any) -> Any:
        return _outputs(self.forward, self.model, jax.tree.map(jnp.asarray, batch))


@functools.partial(jax.jit, static_argnums=0)
def _outputs(forward, model, batch):
    return forward(model, batch)


class Language(NamedTuple):
    rows: np.ndarray  # all that was trained on
    held_out: list[str]


def of_pretraining(ws: Workspace) -> Setting:
    documents = split(ws.config.corpus, ws.config.seed)
    batches = pretrain.training_batches(ws, documents.train)
    aim = configured(pretrain.LANGUAGE, "pretrain", ws.config, ws.config.pretrain.steps)
    held_out = [d.text for d in ws.held_out()]
    model = ws.load("pretrain", scalar_head=False)
    parts = Language(batches.rows, held_out)
    batch = jax.tree.map(jnp.asarray, batches[0])
    return Setting("pretrain", ws, model, aim, pretrain.forward, batch, parts)


class Preference(NamedTuple):
    train_prompts: set[str]
    held_out_prompts: set[str]


def of_reward(ws: Workspace) -> Setting:
    pairs = reward.training_pairs(ws)
    batches = reward.Pairs(ws, pairs)
    aim = configured(reward.PREFERENCE, "reward", ws.config, batches.steps)
    parts = Preference({p.prompt for p in pairs}, {p.prompt for p in load_pairs(ws, "held_out")})
    batch = jax.tree.map(jnp.asarray, batches[0])
    return Setting("reward", ws, ws.load("reward"), aim, reward.forward, batch, parts)


class Policy(NamedTuple):
    reference: Transformer
    reward_model: RewardModel
    collect: Callable[[RLHFConfig], Callable[[Transformer, int], rlhf.Collected]]
    start: Transformer  # the policy before RLHF, and
    collected: rlhf.Collected  # its first rollout
    last: Transformer  # the policy after RLHF, and
    moved: rlhf.Collected  # a rollout of it


def of_rlhf(ws: Workspace) -> Setting:
    """The first rollout, sampled anew from the policy that RLHF began with, and paid as it was."""
    config, sizes = ws.config.rlhf, ws.config.prompts
    algorithm, evaluator = algorithm_of(config), PolicyEvaluator(ws)
    reference, reward_model = evaluator.reference, evaluator.reward_model
    start = ws.load(ws.base, scalar_head=algorithm.critic)
    collect = rlhf.collector(ws, reference, reward_model, evaluator.judge_paid)
    aim = configured(objective(algorithm, config), "rlhf", ws.config, rlhf.updates(config))
    collected = collect(config)(start, 0)
    forward = rlhf.make_forward(config, sizes.max_new_tokens)
    last = ws.load("rlhf")
    moved = collect(config)(last, 1, rlhf.last_kl_scale(ws))
    parts = Policy(reference, reward_model, collect, start, collected, last, moved)
    ptx = rlhf.pretraining_rows(ws, len(collected.batch.mask))  # as many, to be cut alike
    batch = collected.batch._replace(ptx=ptx and jax.tree.map(jnp.asarray, ptx(0)))
    return Setting("rlhf", ws, start, aim, forward, batch, parts)


SETTINGS: dict[str, Callable[[Workspace], Setting]] = {
    "pretrain": of_pretraining,
    "reward": of_reward,
    "rlhf": of_rlhf,
}


def rows_of(batch: Any, rows: slice) -> Any:
    """Some rows of a batch."""
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)
