"""What a run would otherwise find out only after its pretraining."""

from pathlib import Path

from minilm.algorithms import algorithm_of, objective
from minilm.choices import choose
from minilm.config import Config
from minilm.errors import UserError
from minilm.judges import configured
from minilm.stages.preferences import users_pairs
from minilm.stages.pretrain import LANGUAGE
from minilm.stages.reward import PREFERENCE
from minilm.stages.sft import examples_of
from minilm.terms import configured as configured_objective
from minilm.terms import known_names


def check(config: Config, todo: list[str]) -> None:
    """Checks names and counts that the stages `todo` will need.

    Raises:
      UserError: names the key.
    """
    aims = {"pretrain": LANGUAGE, "sft": LANGUAGE, "reward": PREFERENCE}
    if "rlhf" in todo:
        algorithm = algorithm_of(config.rlhf)
        if config.rlhf.group_size < 2 and not algorithm.critic:
            problem = f"{config.rlhf.algorithm} compares a completion with others of its prompt"
            raise UserError(problem, where="rlhf.group_size", value=1, allowed="at least 2")
        if config.rlhf.value_warmup_steps and not algorithm.critic:
            problem, where = f"{config.rlhf.algorithm} has no critic", "rlhf.value_warmup_steps"
            raise UserError(problem, where=where, value=config.rlhf.value_warmup_steps, allowed="0")
        if config.rlhf.judge_weight and config.judge.name == "none":
            problem, where = "there is no judge to pay by", "rlhf.judge_weight"
            raise UserError(problem, where=where, value=config.rlhf.judge_weight)
        aims["rlhf"] = objective(algorithm, config.rlhf)
    for name in config.objective:
        choose(dict.fromkeys(known_names(aims)), name, f"objective.{name}")
    for stage in aims.keys() & set(todo):
        configured_objective(aims[stage], stage, config, 10**6)
    if "sft" in todo:
        examples_of(config)
    if "preferences" in todo and config.preferences.file:
        users_pairs(Path(config.preferences.file))
    elif "preferences" in todo and config.judge.name == "none":
        hint = "name a judge, or give your own pairs: --preferences.file FILE.jsonl"
        raise UserError("there is no judge to label pairs", where="judge.name", hint=hint)
    if not {"preferences", "rlhf"} & set(todo):
        return
    corpus, sizes = config.corpus, config.prompts
    wanted = sizes.preferences + sizes.rlhf + sizes.development + sizes.evaluation
    if corpus.kind == "fables" and wanted > round(corpus.held_out * corpus.documents):
        raise UserError(
            "more prompts than held-out stories",
            where="prompts.preferences + rlhf + development + evaluation",
            value=wanted,
            allowed=f"at most {round(corpus.held_out * corpus.documents)}",
            hint="lower the counts, or raise corpus.held_out or corpus.documents",
        )
    if gold := configured(config):
        if config.judge.name == "fables" and corpus.kind != "fables":
            hint = 'name "length", your "module:function" or "none", or stop at --until pretrain'
            raise UserError("knows fables alone", where="judge.name", value="fables", hint=hint)
        gold(["Once upon a time"], [" a fox slept."])
