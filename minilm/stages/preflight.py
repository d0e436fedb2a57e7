"""What a run would otherwise find out only after its pretraining."""

from pathlib import Path

from minilm.algorithms import Algorithm, algorithm_of, objective
from minilm.choices import choose
from minilm.config import Config
from minilm.errors import UserError
from minilm.judges import configured, rater_judge
from minilm.stages.preferences import users_pairs
from minilm.stages.pretrain import LANGUAGE
from minilm.stages.reward import PREFERENCE
from minilm.stages.sft import examples_of
from minilm.terms import check_grades, known_names
from minilm.terms import configured as configured_objective


def check(config: Config, todo: list[str]) -> None:
    """Checks names and counts that the stages `todo` will need.

    Raises:
      UserError: names the key.
    """
    aims = {"pretrain": LANGUAGE, "sft": LANGUAGE, "reward": PREFERENCE}
    if "rlhf" in todo:
        aims["rlhf"] = objective(_checked_algorithm(config), config.rlhf)
    for name in config.objective:
        choose(dict.fromkeys(known_names(aims)), name, f"objective.{name}")
    for stage in aims.keys() & set(todo):
        configured_objective(aims[stage], stage, config, 10**6)
    if "sft" in todo:
        examples_of(config)
    ratings = [0.0, 1.0] if "preferences" in todo else []  # shares of simulated votes
    if "preferences" in todo and config.preferences.file:
        pairs = users_pairs(Path(config.preferences.file))
        both = (x for p in pairs for x in (p.rating_chosen, p.rating_rejected))
        ratings = [x for x in both if x is not None]
    elif "preferences" in todo and config.judge.name == "none":
        hint = "name a judge, or give your own pairs: --preferences.file FILE.jsonl"
        raise UserError("there is no judge to label pairs", where="judge.name", hint=hint)
    if "reward" in todo:
        check_grades(config, ratings)
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
        names = {"judge.name": config.judge.name}
        names |= {"preferences.rater_judge": config.preferences.rater_judge}
        for where, name in names.items():
            if name == "fables" and corpus.kind != "fables":
                hint = 'name "length" or your "module:function", or stop at --until pretrain'
                raise UserError("knows fables alone", where=where, value=name, hint=hint)
        gold(["Once upon a time"], [" a fox slept."])
    simulated = "preferences" in todo and not config.preferences.file
    if simulated and (raters := rater_judge(config)):
        raters(["Once upon a time"], [" a fox slept."])


def _checked_algorithm(config: Config) -> Algorithm:
    """The algorithm, whose row and dials go together."""
    algorithm = algorithm_of(config.rlhf)
    if config.rlhf.group_size < 2 and algorithm.baseline == "group":
        problem = f"{config.rlhf.algorithm} compares a completion with others of its prompt"
        raise UserError(problem, where="rlhf.group_size", value=1, allowed="at least 2")
    if config.rlhf.value_warmup_steps and not algorithm.critic:
        problem, where = f"{config.rlhf.algorithm} has no critic", "rlhf.value_warmup_steps"
        raise UserError(problem, where=where, value=config.rlhf.value_warmup_steps, allowed="0")
    size = config.rlhf.prompts_per_step * config.rlhf.group_size
    if size < 2 and algorithm.baseline == "batch":
        problem = f"{config.rlhf.algorithm} compares a completion with others of its step"
        raise UserError(problem, where="rlhf.prompts_per_step", value=1, allowed="at least 2")
    if config.rlhf.whiten_rewards and algorithm.baseline in ("group", "batch"):
        problem = f"{config.rlhf.algorithm} reads a completion's reward as a whole"
        allowed = "false; tokens' rewards are whitened for ppo and reinforce++"
        raise UserError(problem, where="rlhf.whiten_rewards", value=True, allowed=allowed)
    if config.rlhf.kl_target is not None and algorithm.kl is None:
        problem = f"{config.rlhf.algorithm} has no price of KL that could be adapted"
        hint = "leave it out, or give rlhf.kl_in too"
        raise UserError(problem, where="rlhf.kl_target", value=config.rlhf.kl_target, hint=hint)
    if config.rlhf.judge_weight and config.judge.name == "none":
        problem, where = "there is no judge to pay by", "rlhf.judge_weight"
        raise UserError(problem, where=where, value=config.rlhf.judge_weight)
    return algorithm
