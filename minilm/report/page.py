"""The page: what the files of a run say, brought into figures and handed to the template."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from minilm.config import FablesCorpus
from minilm.report import plots
from minilm.report.files import Figures, RunFolder
from minilm.report.plots import Line, Panel
from minilm.text.fables import parse

GOODHART_DROP = 0.3  # gold this far below its peak, while proxy rose, is called Goodhart
LOUD = 5.0  # nats at which a token's colour is full

type Number = float | int


def environment() -> Environment:
    """Templates that escape what they show, control characters too."""
    made = Environment(
        loader=PackageLoader("minilm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) else value,
    )
    made.filters |= {f.__name__: f for f in (fixed, percent, count, duration, shade)}
    return made


def render(run: RunFolder) -> str:
    """The page as HTML: a function of the folder's files alone."""
    corpus, stages = run.config.corpus, ("pretrain", "preferences", "reward", "rlhf")
    records = {stage: run.json(stage, "done.json") for stage in stages}
    evaluations, samples = run.evaluations("rlhf"), run.rows("rlhf", "samples.jsonl")
    pairs = run.rows("preferences", "train.jsonl")[:200]

    def disagreement(pair: Figures) -> float:
        """A pair that most but not all raters agree on shows what a label is."""
        return abs((pair["votes_chosen"] or 1) / (pair["votes"] or 1) - 0.8)

    return (
        environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            size=corpus.size if isinstance(corpus, FablesCorpus) else None,
            done={stage: Figures(record["summary"] or {}) for stage, record in records.items()},
            seconds=sum(record["wall_seconds"] or 0.0 for record in records.values()),
            first=next(iter(run.metrics("pretrain", "eval")), Figures()),
            text=_text(run),
            plots=_plots(run),
            stories=_stories(run),
            charges=_charges(run.json("pretrain", "loss_map.json")),
            pair=min(pairs, key=disagreement, default=None),
            goodhart=goodhart(evaluations),
            judged=any(r["gold"] is not None for r in evaluations),
            completions=_completions(samples),
            samples=samples,
            loud=LOUD,
        )
    )


def _plots(run: RunFolder) -> dict[str, Markup | None]:
    """Every figure by name, None where there is nothing to draw."""
    train, held_out = run.metrics("pretrain", "train"), run.metrics("pretrain", "eval")
    reward, policy = run.metrics("reward", "train"), run.metrics("rlhf", "train")
    table = run.json("reward", "evaluation.json")["reliability"]
    above = [r for r in held_out if r["excess_loss"] is not None and r["excess_loss"] > 0]
    floor = (next((r["entropy_floor"] for r in held_out[::-1]), None), "entropy floor")
    bayes = (run.json("preferences", "datasheet.json")["bayes_log_loss"], "Bayes floor")
    pairs = [p for p in run.rows("preferences", "train.jsonl") if p["gold_chosen"] is not None]
    gold = [
        (name, [p[f"gold_{name}"] for p in pairs], colour)
        for name, colour in (("chosen", plots.GOLD), ("rejected", plots.SOFT))
    ]
    loss = [
        _line(train, "loss", "training", plots.TRAIN),
        _line(held_out, "validation_loss", "held out", plots.MODEL, "o"),
    ]
    excess = _line(above, "excess_loss", "held out", plots.MODEL, "o")
    votes = _line(reward, "loss", "training", plots.TRAIN)
    accuracy = _line(reward, "accuracy", "training", plots.TRAIN)
    during = [
        Panel("proxy", [_line(policy, "objective/scores", "proxy", plots.PROXY)]),
        Panel("KL, nats", [_line(policy, "objective/kl", "KL", plots.MODEL)]),
        Panel("tokens", [_line(policy, "completions/mean_length", "length", plots.SOFT)]),
    ]
    after = run.evaluations("rlhf")
    proxy = _line(after, "proxy", "proxy", plots.PROXY, "o", x="kl")
    truth = _line(after, "gold", "gold", plots.GOLD, "o", x="kl")
    parses = _line(after, "parse_share", "parse share", plots.PARSE, "o", x="kl")
    wins = _line(after, "gold_win_rate", "gold win rate", plots.GOLD, "o", x="kl")
    axis = "KL to the model before, nats a completion"
    return {
        "loss": plots.curves("loss", "step", [Panel("nats/token", loss, floor)]),
        "excess": plots.curves("excess", "step", [Panel("nats/token", [excess], scale="log")]),
        "gold": plots.histograms("gold", "gold score", gold) if pairs else None,
        "reward": plots.curves("reward", "step", [Panel("nats", [votes], bayes)]),
        "accuracy": plots.curves("accuracy", "step", [Panel("share", [accuracy])]),
        "reliability": plots.reliability("reliability", table) if table else None,
        "policy": plots.curves("policy", "step", during, height=4.0),
        "scores": plots.curves("scores", axis, [Panel("score", [proxy, truth])]),
        "shares": plots.curves("shares", axis, [Panel("share", [parses, wins], scale="share")]),
    }


def _line(
    rows: Sequence[Figures], key: str, label: str, colour: str, marks: str = "", x: str = "step"
) -> Line:
    """A curve of one figure, with its interval and its value before training, where given."""
    first = rows[0] if rows else Figures()
    ends = [r[f"{key}_low"] for r in rows], [r[f"{key}_high"] for r in rows]
    band, start = ends if f"{key}_low" in first else None, first[f"reference/{key}"]
    return Line([r[x] for r in rows], [r[key] for r in rows], label, colour, marks, band, start)


def _text(run: RunFolder) -> Figures | None:
    """What the held-out documents tell of the text."""
    documents = run.rows("pretrain", "held_out.jsonl")
    if not documents:
        return None
    words = [d["text"].split() for d in documents]
    known = [d["logprob"] for d in documents if d["logprob"] is not None]
    return Figures(
        documents=len(documents),
        words=sum(map(len, words)),
        characters=sum(len(d["text"]) for d in documents),
        distinct=len({w.strip(".,;:!?\"'()“”‘’").lower() for text in words for w in text}),
        nats=-sum(known) if len(known) == len(documents) else None,
        example=documents[0]["text"],
    )


def _stories(run: RunFolder) -> list[Figures]:
    """The first two samples and the first of each way to fail; `rest` is what left the grammar."""
    corpus, shown, seen = run.config.corpus, [], set()
    for number, text in enumerate(row["text"] for row in run.rows("pretrain", "samples.jsonl")):
        if not isinstance(corpus, FablesCorpus):
            shown += [Figures(text=text)] if number < 3 else []
            continue
        read = parse(text, size=corpus.size)
        if number < 2 or (read.failure and read.failure not in seen):
            seen.add(read.failure)
            cut = read.prefix if read.failure == "break" else len(text)
            shown.append(Figures(text=text[:cut], rest=text[cut:], kind=read.failure or "whole"))
    return shown


def _charges(stored: Figures) -> Figures | None:
    """Tokens of one story with the model's and the grammar's charge; end-of-text comes last."""
    if not stored:
        return None
    pieces = [*stored["tokens"], "⟨end⟩"][: len(stored["model"])]
    model, known = stored["model"][: len(pieces)], stored["exact"] is not None
    # After its last full stop a story ends for certain: the grammar charges nothing.
    exact = [*(stored["exact"] or [0.0] * len(stored["tokens"])), 0.0][: len(pieces)]
    tokens = [
        Figures(piece=p, model=m, exact=e, over=m - e, before="".join(pieces[max(0, i - 6) : i]))
        for i, (p, m, e) in enumerate(zip(pieces, model, exact, strict=True))
    ]
    worst = sorted(tokens, key=lambda token: -token["over"])[:5]
    return Figures(tokens=tokens, known=known, model=sum(model), exact=sum(exact), worst=worst)


def _completions(rows: Sequence[Figures]) -> list[Figures]:
    """The first three prompts, and the one whose completion the proxy overrates most."""
    rest = [r for r in rows[3:] if r["gold_after"] is not None]
    most = max(rest, key=lambda r: r["proxy_after"] - r["gold_after"], default=None)
    return [*rows[:3], *([Figures(most, why="where proxy and gold differ most")] if most else [])]


def goodhart(evaluations: Sequence[Mapping[str, Any]]) -> str | None:
    """One sentence with figures where gold turned down under a rising proxy, else None."""
    known = [e for e in evaluations if e["gold"] is not None]
    if not known:
        return None
    peak, last = max(known, key=lambda e: e["gold"]), known[-1]
    drop = peak["gold"] - last["gold"]
    if drop < GOODHART_DROP or last["proxy"] <= peak["proxy"]:
        return None
    return (
        f"Goodhart: gold peaked at {peak['gold']:.2f} at KL {peak['kl']:.1f} (step {peak['step']}) "
        f"and then fell by {drop:.2f} to {last['gold']:.2f} at KL {last['kl']:.1f}, while proxy "
        f"rose from {peak['proxy']:.2f} to {last['proxy']:.2f}."
    ).replace("-", "−")


def shade(nats: Number) -> str:
    """Opacity of a token's colour: the root, so that small charges are seen too."""
    return f"{min(1.0, max(0.0, nats) / LOUD) ** 0.5:.2f}"


def fixed(value: Number | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(share: Number | None, digits: int = 0) -> str:
    return "–" if share is None else f"{fixed(100 * share, digits)} %"


def count(number: Number | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


def duration(seconds: Number | None) -> str:
    if seconds is None or seconds < 60:
        return f"{fixed(seconds, 1)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s"


def visible(text: str) -> str:
    """Control, direction-changing and unpaired characters as escapes: a page must not obey them."""
    if isinstance(text, Markup) or text.isprintable():
        return text
    odd = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")} - {"\n", "\t"}
    return text.translate({ord(c): ascii(c)[1:-1] for c in odd})
