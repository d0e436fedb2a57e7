"""How far a reward model gets with how many pairs: accuracy and log-loss beside what is possible.

    uv run python benchmarks/reward_curve.py CONFIG --init RUN [--pairs N …] [--out FOLDER]

The pairs are sampled and labelled once; each reward model is trained on the first N of them and
judged on the same held-out ones. Every one is a run folder: what is done is skipped.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from minilm.configfile import load
from minilm.files import read_json
from minilm.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--init", type=Path, required=True, help="a run with a pretrained model")
    parser.add_argument("--pairs", type=int, nargs="+", default=[250, 1000, 4000, 16000])
    parser.add_argument("--out", type=Path, default=Path("runs/reward_curve"))
    args, overrides = parser.parse_known_args()
    config = load(args.config, overrides)
    base = args.out / "base"
    run(config, base, init=args.init, until="preferences")
    bayes = read_json(base / "preferences" / "done.json")["summary"]
    if bayes["pairs"] < max(args.pairs):
        raise SystemExit(f"only {bayes['pairs']} pairs: raise prompts.preferences")
    rows = []
    for count in args.pairs:
        reward = config.reward.model_copy(update={"max_pairs": count})
        out = args.out / f"pairs_{count}"
        run(config.model_copy(update={"reward": reward}), out, init=base, only="reward")
        found = read_json(out / "reward" / "done.json")["summary"]
        way = (found["accuracy"] - 0.5) / (bayes["bayes_accuracy"] - 0.5)
        above = found["log_loss"] - bayes["bayes_log_loss"]
        names = ("accuracy", "accuracy_low", "accuracy_high", "log_loss", "ece", "seconds")
        rows.append({"pairs": count, "way": way, "above": above} | {n: found[n] for n in names})
    draw(args.out / "reward_curve.png", rows, bayes)
    table = Table("pairs", "accuracy", "of the way", "log-loss above its floor", "ECE", "seconds")
    for row in rows:
        table.add_row(
            f"{row['pairs']:,}",
            f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]",
            f"{row['way']:.0%}",
            f"{row['above']:.3f}",
            f"{row['ece']:.3f}",
            f"{row['seconds']:.0f}",
        )
    Console().print(table)
    ceiling = {name: bayes[name] for name in ("bayes_accuracy", "bayes_log_loss")}
    print(json.dumps({"benchmark": "reward_curve", "rows": rows} | ceiling))


def draw(path: Path, rows: list[dict], bayes: dict) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    pairs = [row["pairs"] for row in rows]
    spread = [[r["accuracy"] - r["accuracy_low"] for r in rows]]
    spread.append([r["accuracy_high"] - r["accuracy"] for r in rows])
    left.errorbar(pairs, [r["accuracy"] for r in rows], spread, fmt="o-", capsize=3)
    left.axhline(bayes["bayes_accuracy"], color="#444444", lw=1, label="best possible")
    left.set(xscale="log", xlabel="pairs", title="accuracy, 95 % over prompts")
    right.plot(pairs, [r["log_loss"] for r in rows], "o-")
    right.axhline(bayes["bayes_log_loss"], color="#444444", lw=1, label="best possible")
    right.set(xscale="log", xlabel="pairs", title="log-loss, nats")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
