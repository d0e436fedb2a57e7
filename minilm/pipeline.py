"""The stages of a run: what each needs, what it is made from, what runs it. Imports no JAX."""

from typing import NamedTuple

from minilm.config import Config


class Stage(NamedTuple):
    """A row of the pipeline.

    Attributes:
      needs: stages whose results it reads.
      sections: of the config; with the needs' hashes and the files read they make its hash.
      run: "module:function", taking a Workspace and returning the stage's summary.
    """

    name: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    run: str


STAGES = (
    Stage(
        "pretrain",
        (),
        ("seed", "corpus", "tokenizer", "model", "backend", "pretrain", "objective", "balance"),
        "minilm.stages.pretrain:pretrain",
    ),
    Stage(
        "sft",
        ("pretrain",),
        ("seed", "backend", "sft", "objective", "balance"),
        "minilm.stages.sft:sft",
    ),
    Stage(
        "preferences",
        ("pretrain",),
        ("seed", "backend", "prompts", "judge", "preferences"),
        "minilm.stages.preferences:preferences",
    ),
    Stage(
        "reward",
        ("pretrain", "preferences"),
        ("seed", "backend", "reward", "objective", "balance"),
        "minilm.stages.reward:reward",
    ),
    Stage(
        "rlhf",
        ("pretrain", "reward"),
        ("seed", "backend", "prompts", "judge", "rlhf", "objective"),
        "minilm.run:rlhf_and_evaluation",
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def stages_of(config: Config) -> list[Stage]:
    """The stages of a run in order; what builds on pretraining builds on fine-tuning, if any."""
    if config.sft.file is None:
        return [s for s in STAGES if s.name != "sft"]
    return [
        s._replace(
            needs=tuple("sft" if n == "pretrain" and s.name != "sft" else n for n in s.needs)
        )
        for s in STAGES
    ]
