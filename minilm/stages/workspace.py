"""Where a stage finds its inputs: the run folder, another run's pretrained model, checkpoints."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from minilm import checkpoint, configfile
from minilm.config import Config, ModelConfig
from minilm.errors import UserError
from minilm.files import init_of, read_json, read_jsonl, stage_folder
from minilm.model import Transformer
from minilm.step import AVERAGE
from minilm.text.store import Document
from minilm.text.tokenizer import Tokenizer
from minilm.trackers import TRACKERS, Tracked, Tracker

AVERAGED = f"extra.{AVERAGE}"  # where a checkpoint has the model's average


@dataclasses.dataclass(frozen=True)
class Workspace:
    """One run folder, `out`, seen by its stages."""

    config: Config
    out: Path
    init: Path | None  # another run folder, whose tokenizer and `borrowed` stages are used
    compute_dtype: str  # chosen by the backend, stored with the run
    borrowed: tuple[str, ...] = ("pretrain",)

    def stage(self, name: str) -> Path:
        """The folder of a stage, which may be another run's."""
        if self.init and name.partition("/")[0] in self.borrowed:
            return stage_folder(self.init, name)
        return self.out / name

    @property
    def base(self) -> str:
        """The stage whose model writes the completions that are compared, and starts RLHF."""
        return "sft" if self.config.sft.file else "pretrain"

    @property
    def tokenizer_file(self) -> Path:
        return stage_folder(self.init or self.out, "tokenizer.json")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_file)

    def held_out(self) -> list[Document]:
        """The held-out documents that pretraining set apart."""
        path = self.stage("pretrain") / "held_out.jsonl"
        return [Document(**row) for row in read_jsonl(path)]

    def metadata(self, stage: str, *, scalar_head: bool = False) -> dict:
        """What a checkpoint needs besides arrays, so that it can be used alone."""
        return {
            "stage": stage,
            "config": self.config.model_dump(mode="json"),
            "model": self.config.model.model_dump(mode="json"),
            "vocab_size": self.tokenizer.vocab_size,
            "compute_dtype": self.compute_dtype,
            "scalar_head": scalar_head,
            "tokenizer": self.tokenizer.digest,
        }

    def tracker(self, stage: str) -> Callable[[int], Tracker] | None:
        """What opens the configured tracker, given the step that a stage goes on from."""
        tracking, folder = self.config.tracking, self.stage(stage)
        if tracking.tracker == "none":
            return None
        config = self.config.model_dump(mode="json")
        of = Tracked(folder, self.out.resolve().name, stage, tracking.project, config, 0)
        return lambda step: TRACKERS[tracking.tracker](of._replace(step=step))

    def load(self, stage: str, *, scalar_head: bool | None = None) -> Transformer:
        """The last checkpoint of a stage as a model, checked against this run's tokenizer."""
        path = checkpoint.find(self.stage(stage))
        model, meta = load_model(path, scalar_head=scalar_head, compute_dtype=self.compute_dtype)
        found, own = meta["tokenizer"], self.tokenizer.digest
        if found != own:
            problem = f"the {stage} model was trained with another tokenizer"
            hint = f"--redo {stage}, or start a new run folder with --out"
            raise UserError(problem, where=path, value=found[:12], allowed=own[:12], hint=hint)
        if meta["step"] < meta["steps"]:  # good enough to resume from, not to build on
            problem = f"the last checkpoint of {stage} is damaged or gone: this one is of step "
            problem += f"{meta['step']} of {meta['steps']}"
            raise UserError(problem, where=path, hint=f"--redo {stage}")
        return model


def open_run(run: Path) -> Workspace:
    """A run folder as its stages saw it.

    Raises:
      UserError: not a run folder, or a config that is no longer valid.
    """
    if not (run / "config.toml").is_file():
        hint = "give the folder that `minilm run CONFIG` made, such as runs/quick"
        raise UserError("not a run folder: there is no config.toml", where=run, hint=hint)
    config = configfile.load(run / "config.toml")
    environment = read_json(run / "environment.json")
    borrowed = tuple(environment.get("borrowed", ("pretrain",)))
    return Workspace(
        config, run, init_of(run), environment.get("compute_dtype", "float32"), borrowed
    )


def load_model(
    path: Path, *, scalar_head: bool | None = None, compute_dtype: str | None = None
) -> tuple[Transformer, dict]:
    """A checkpoint's model and metadata; `scalar_head` (None: as saved) adds or drops a head.

    Raises:
      UserError: damaged or foreign checkpoint, naming the parameters that do not fit.
    """
    meta = checkpoint.metadata(path)
    config = ModelConfig.model_validate_json(json.dumps(meta["model"]))
    shape = {"compute_dtype": compute_dtype or meta["compute_dtype"], "rngs": nnx.Rngs(0)}
    model = Transformer(config, meta["vocab_size"], scalar_head=meta["scalar_head"], **shape)
    averaged = any(key.startswith(AVERAGED) for key in meta["arrays"])
    model = checkpoint.restore(path, model, prefix=AVERAGED if averaged else "model")
    if scalar_head is not None and scalar_head != meta["scalar_head"]:
        known = checkpoint.flatten(model)
        model = Transformer(config, meta["vocab_size"], scalar_head=scalar_head, **shape)
        leaves = [known.get(name, leaf) for name, leaf in checkpoint.flatten(model).items()]
        model = jax.tree.unflatten(jax.tree.structure(model), leaves)
    return model, meta
