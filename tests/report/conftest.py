"""Run folders as the stages write them, made up: no training."""

import json
from pathlib import Path

import pytest

from minilm import configfile
from minilm.config import Config
from minilm.text.fables import generate

STEPS = (0, 10, 20, 30)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def finish(folder: Path, summary: dict) -> None:
    done = {"hash": "0", "sections": {}, "inputs": {}, "summary": summary, "wall_seconds": 61.0}
    (folder / "done.json").write_text(json.dumps(done))


class Builder:
    """Writes the stages of a run folder one by one, as `minilm run` would."""

    def __init__(self, path: Path, config: str = '[corpus]\nkind = "fables"\n', init=None):
        self.path = path
        path.mkdir()
        source = path.with_suffix(".toml")
        source.write_text(config)
        self.config: Config = configfile.load(source)
        (path / "config.toml").write_text(configfile.dump(self.config))
        environment = {"compute_dtype": "float32", "jax": "0.12", "cores": 2, "init": init}
        (path / "environment.json").write_text(json.dumps(environment))
        self.fables = self.config.corpus.kind == "fables"

    def stage(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    def pretrain(self, samples: tuple[str, ...] = ()) -> "Builder":
        folder = self.stage("pretrain")
        stories = [generate(i) for i in range(6)]
        floor = {"entropy_floor": 0.6, "excess_loss": 0.0123} if self.fables else {
            "entropy_floor": None, "excess_loss": None
        }  # fmt: skip
        write_rows(folder / "metrics.jsonl", [
            *({"step": s, "kind": "train", "loss": 5 / (1 + s), "tokens_per_second": 2e4}
              for s in STEPS[1:]),
            *({"step": s, "kind": "eval", "validation_loss": 0.6 + 4 / (1 + s),
               "entropy_floor": floor["entropy_floor"],
               "excess_loss": 4 / (1 + s) if self.fables else None} for s in STEPS),
        ])  # fmt: skip
        write_rows(folder / "held_out.jsonl", [
            {"text": s.text, "id": str(i), "logprob": s.logprob if self.fables else None}
            for i, s in enumerate(stories)
        ])  # fmt: skip
        cut = stories[0].text
        texts = [*samples, cut, cut[:100], "Once upon a time there was nothing."]
        write_rows(folder / "samples.jsonl", [{"text": t} for t in texts])
        tokens = [f" {w}" for w in cut.split()[:40]]
        losses = [0.05 * (i % 17) for i in range(len(tokens) + 1)]
        loss_map = {"tokens": tokens, "model": losses}
        if self.fables:
            loss_map["exact"] = [0.9 * x for x in losses[:-1]]
        (folder / "loss_map.json").write_text(json.dumps(loss_map))
        shares = {"parse_share": 0.81, "slip": 0.1, "break": 0.05, "no_end": 0.04}
        finish(folder, {
            "validation_loss": 0.6123, "validation_nats_per_character": 0.1301,
            "validation_bits_per_byte": 0.19, "perplexity": 1.84, "accuracy": 0.8, **floor,
            "excess_per_document": 1.1 if self.fables else None, "parameters": 1_060_000,
            "vocab_size": 2048, "held_out_documents": 6, "tokens_per_second": 21_345.0,
            "seconds": 130.0, **(shares if self.fables else {}),
        })  # fmt: skip
        return self

    def preferences(self, gold: bool = True) -> "Builder":
        folder = self.stage("preferences")
        pairs = [
            {"prompt": f"Prompt {i}.", "chosen": " A kind end.", "rejected": " A sad end.",
             "votes_chosen": 3 + i % 3, "votes": 5,
             **({"gold_chosen": 1 + i % 5 / 3, "gold_rejected": i % 4 / 2} if gold else {})}
            for i in range(40)
        ]  # fmt: skip
        write_rows(folder / "train.jsonl", pairs)
        sheet = {
            "pairs": 40, "held_out_pairs": 12, "bayes_accuracy": 0.776 if gold else None,
            "bayes_log_loss": 0.455 if gold else None, "votes_agreement": 0.8,
            "expected_agreement": 0.7, "longer_chosen": 0.5, "gold_std": 1.5 if gold else None,
        }  # fmt: skip
        (folder / "datasheet.json").write_text(json.dumps(sheet))
        finish(folder, sheet)
        return self

    def reward(self, gold: bool = True) -> "Builder":
        folder = self.stage("reward")
        write_rows(folder / "metrics.jsonl", [
            {"step": s, "kind": "train", "loss": 0.5 + 1 / (5 + s), "accuracy": 0.6 + s / 200}
            for s in STEPS[1:]
        ])  # fmt: skip
        card = {
            "accuracy": 0.7334, "accuracy_low": 0.72, "accuracy_high": 0.745, "log_loss": 0.544,
            "ece": 0.009, "gold_correlation": 0.79 if gold else None, "held_out_pairs": 12,
            "reliability": [[0.15, 0.17, 4], [0.5, 0.52, 10], [0.85, 0.83, 4]],
            "normalization": {"mean": 0.1, "std": 1.2},
        }  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(card))
        finish(folder, {k: v for k, v in card.items() if not isinstance(v, list | dict)})
        return self

    def rlhf(self, golds: tuple[float, ...] | None = (0.1, 0.7, 1.2, 1.5), text=" The end.") -> (
        "Builder"
    ):  # fmt: skip
        folder = self.stage("rlhf")
        known = {"gold": 0.1} if golds else {"gold": None}
        parse = {"parse_share": 0.9, "slip": 0.04, "break": 0.05, "no_end": 0.01}
        before = {"proxy": 0.02, "length": 60.0, "ended": 0.99, **known,
                  **(parse if self.fables else {})}  # fmt: skip
        evals = []
        for i in range(len(STEPS)):
            win = {"gold_win_rate": 0.5 + i / 10, "gold_win_rate_low": 0.47 + i / 10,
                   "gold_win_rate_high": 0.53 + i / 10} if golds else {}  # fmt: skip
            evals.append(before | {
                "proxy": 0.02 + 0.6 * i, "gold": golds[i] if golds else None, "kl": 1.3 * i,
                "entropy": 30.0 - i, **win, **{f"reference/{k}": v for k, v in before.items()},
            })  # fmt: skip
        write_rows(folder / "metrics.jsonl", [
            *({"step": s, "kind": "eval", **e} for s, e in zip(STEPS, evals, strict=True)),
            *({"step": s, "kind": "train", "objective/scores": s / 20, "objective/kl": s / 9,
               "completions/mean_length": 60.0, "policy/entropy_avg": 0.5} for s in STEPS[1:]),
        ])  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(evals[-1]))
        write_rows(folder / "samples.jsonl", [
            {"prompt": f"Opening {i}.", "before": " It was so.", "after": text,
             "proxy_before": 0.1, "proxy_after": 1.9, "kl": 3.0,
             **({"gold_before": 0.3, "gold_after": 1.5 - i} if golds else {})} for i in range(5)
        ])  # fmt: skip
        last = evals[-1]
        finish(folder, {
            "algorithm": "rloo", "seconds": 140.0, "kl": last["kl"],
            **{k: last.get(k) for k in
               ("gold_win_rate", "gold_win_rate_low", "gold_win_rate_high")},
            **{f"{k}_before": before.get(k) for k in ("gold", "proxy", "parse_share")},
            **{f"{k}_after": last.get(k) for k in ("gold", "proxy", "parse_share")},
        })  # fmt: skip
        return self


@pytest.fixture
def builder():
    """The class of run folders to build."""
    return Builder
