"""`minilm.Run`: a run, a stage or a checkpoint as an object for notebooks and the command line."""

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minilm import backend, checkpoint, metrics
from minilm.config import BackendConfig, Config
from minilm.errors import UserError
from minilm.files import read_json, read_jsonl, stage_folder, write_jsonl
from minilm.generate import stream
from minilm.model import Transformer
from minilm.rewards import RewardModel
from minilm.stages.evaluate import sample, texts_of
from minilm.stages.reward import load_normalization, member_folders, paid_texts
from minilm.stages.workspace import load_model
from minilm.text.formats import plain, plain_text
from minilm.text.tokenizer import Tokenizer

STAGES = ("reward", "pretrain", "sft", "rlhf")  # of a run: the last policy, else what there is


class Run:
    """What a trained run (its last policy), a stage folder or a checkpoint can do.

    Raises:
      UserError: no checkpoint there, or a damaged one.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.checkpoint = checkpoint.find(self.path, STAGES)
        self.metadata = checkpoint.metadata(self.checkpoint)

    @functools.cached_property
    def model(self) -> Transformer:
        if self.metadata["stage"] == "reward":
            raise UserError("a reward model scores, it does not write", where=self.checkpoint)
        return load_model(self.checkpoint)[0]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.checkpoint / "tokenizer.json")

    @functools.cached_property
    def config(self) -> Config:
        """The config that the checkpoint was made with."""
        return Config.model_validate(self.metadata["config"], strict=False)

    @property
    def metrics(self) -> dict[str, list[dict]]:
        """The records of `metrics.jsonl` of each stage in the run folder, by stage."""
        files = sorted(self.path.glob("*/metrics.jsonl"))
        return {f.parent.name: metrics.read(f) for f in files if ".old" not in f.parent.name}

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        *,
        max_new_tokens: int = 160,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """One completion of each prompt."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        longest = max(len(self.tokenizer.encode(p)) for p in prompts) + 1
        width = -(-longest // 16) * 16
        dials: dict[str, Any] = {"max_prompt_tokens": width, "max_new_tokens": max_new_tokens}
        dials |= {"temperature": temperature, "batch_size": min(64, len(prompts))}
        _, samples = sample(self.model, self.tokenizer, prompts, jax.random.key(seed), **dials)
        return texts_of(samples, self.tokenizer)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 160,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """A completion in pieces, as it is decoded."""
        ids, shown = [], ""
        special = {"eos_id": self.tokenizer.eos_id, "pad_id": self.tokenizer.pad_id}
        dials: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        dials |= {"top_k": top_k, "top_p": top_p}
        start = [self.tokenizer.eos_id, *self.tokenizer.encode(prompt)]
        for part in stream(self.model, start, jax.random.key(seed), **dials, **special):
            ids += part
            text = self.tokenizer.decode(ids).rstrip("\ufffd")  # half a character waits
            yield text[len(shown) :]
            shown = text

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """The run's learned rewards [N], normalised and read to the end as RLHF was paid.

        A text longer than `reward.max_tokens` is read whole too, though the model has learnt on
        none so long.

        Raises:
          UserError: the path has no reward model, or the lists differ in length.
        """
        if len(prompts) != len(completions):
            told = f"{len(prompts)} prompts, {len(completions)} completions"
            raise UserError("each prompt needs one completion", value=told)
        found = checkpoint.find(self.path, ("reward",))
        meta = checkpoint.metadata(found)
        if meta["stage"] != "reward":
            raise UserError("not a reward model", where=found, value=meta["stage"])
        config = self.config
        folders = member_folders(found.parents[1], config.reward.members)
        members = (load_model(found)[0], *(load_model(checkpoint.find(f))[0] for f in folders[1:]))
        scales = tuple(load_normalization(f) for f in folders)
        payer = RewardModel(members, scales, config.rlhf.ensemble, config.rlhf.ensemble_penalty)
        return paid_texts(payer, self.tokenizer, prompts, completions)


def score_command(path: Path, file: Path, out: Path | None) -> None:
    """`minilm score`: rows of a JSON Lines file with the run's rewards, in units of its reference.

    A row with `chosen` and `rejected` gets `reward_chosen`, `reward_rejected` and `preferred`
    ("chosen", "rejected" or "tie"); one with `completion`, or `text`, a `reward`. `prompt` is ""
    where it is missing. Texts may be conversations, and pairs have any shape that `plain` knows.

    Raises:
      UserError: no rows, or a row that has none of these texts.
    """
    rows = read_jsonl(file)
    if not rows:
        raise UserError("no rows to score", where=file)
    kinds = [("chosen", "rejected"), ("completion",), ("text",)]
    texts: list[tuple[int, str, str, str]] = []  # row, its key, prompt, completion
    for number, found in enumerate(rows):
        row = {key: plain_text(value) for key, value in plain(found).items()}
        kind = next((k for k in kinds if all(isinstance(row.get(key), str) for key in k)), None)
        if kind is None or not isinstance(row.get("prompt", ""), str):
            allowed = "`chosen` and `rejected`, `completion`, or `text`; and `prompt`"
            where = f"{file}: row {number + 1}"
            raise UserError("nothing to score", where=where, value=sorted(row), allowed=allowed)
        texts += [(number, key, row.get("prompt", ""), row[key]) for key in kind]
    _configure(path)
    rewards = Run(path).score([t[2] for t in texts], [t[3] for t in texts])
    unrounded: list[dict[str, float]] = [{} for _ in rows]
    for (number, key, _, _), reward in zip(texts, rewards.tolist(), strict=True):
        name = f"reward_{key}" if key in ("chosen", "rejected") else "reward"
        unrounded[number][key] = reward
        rows[number] |= {name: round(reward, 4)}
    for row, reward in zip(rows, unrounded, strict=True):
        if "chosen" in reward:
            gap = reward["chosen"] - reward["rejected"]
            row["preferred"] = "tie" if gap == 0 else "chosen" if gap > 0 else "rejected"
    if out is not None:
        write_jsonl(out, rows)
        return
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


def _configure(path: Path) -> None:
    """Computes as the run did that the path lies in."""
    folders = [path, *path.absolute().parents]
    stored = next(filter(None, (read_json(f / "environment.json") for f in folders)), {})
    backend.configure(BackendConfig(), stored.get("choice"))


def _row_length(run: Run) -> int:
    """Tokens of the longest rows that the run's language model has learnt on; 0: nobody knows."""
    home, lengths = run.checkpoint.parents[2], []
    for stage in ("pretrain", "sft"):  # perhaps another run's, with settings of its own
        stored = read_json(stage_folder(home, stage) / "done.json").get("sections", {})
        lengths.append(stored.get(stage, {}).get("sequence_length", 0))
    own = run.metadata.get("config", {}).get("pretrain", {})
    return max(lengths) or own.get("sequence_length", 0)


def generate_command(
    path: Path,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    count: int,
) -> None:
    """`minilm generate`: prints completions as they are decoded."""
    _configure(path)
    run = Run(path)
    step, steps = run.metadata["step"], run.metadata["steps"]
    if step < steps:
        sys.stderr.write(f"minilm: an unfinished model, step {step} of {steps}\n")
    dials: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    dials |= {"top_k": top_k, "top_p": top_p}
    known, longest = _row_length(run), max(len(run.tokenizer.encode(p)) for p in prompts)
    if 0 < known <= longest:
        sys.stderr.write(
            f"minilm: a prompt of {longest:,} tokens; the model was trained on rows of {known:,}, "
            "so what follows may be noise\n"
        )
    for prompt in prompts:
        for number in range(count):
            print(prompt, end="", flush=True)
            for piece in run.stream(prompt, **dials, seed=seed + number):
                print(piece, end="", flush=True)
            print()
