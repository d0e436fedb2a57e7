"""`python -m minilm.losses [FOLDER]` writes losses.md and its pictures from the docstrings."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from minilm.files import write_atomically
from minilm.losses import LOSSES, classification, regression
from minilm.losses.docstrings import explain
from minilm.losses.pictures import PICTURES, draw

FAMILIES = {
    "regression": "Regression",
    "classification": "Classification",
    "ranking": "Ranking",
    "language": "Language",
    "preference": "Preferences",
    "policy": "Policies",
    "regularization": "Regularisation",
}
# What makes a loss of a loss, and weights of counts.
HELPERS = (regression.asymmetric, classification.class_weights)
INTRODUCTION = """\
# Losses

Every loss of minilm: what it pays for, what it ignores, how it pulls. This page is made from the
docstrings in `minilm/losses/` by `python -m minilm.losses`; edit those.

A loss is a function from arrays to arrays. It returns one float32 value per element (per list in
ranking, one number for penalties on parameters), and leaves the average to the caller:

```python
from minilm.losses.reduce import mean
from minilm.losses.regression import quantile_loss

loss = mean(quantile_loss(predictions, targets, quantile=0.75), weights).value
```

Weights and masks belong there: an element of weight 0 does not count, and an average over nothing
is 0 with a count of 0. Values and gradients stay finite for predictions, logits and scores of
±10,000. Shapes have to match exactly. Outside `jax.jit` a label out of range, a target that is not
finite or a share above 1 is refused, with its index; under `jax.jit` there is nothing to look at
yet, and each entry says what happens.

**How to read a picture.** On the left what is paid, on the right its gradient: training moves the
argument against it. Where the gradient is 0 the loss does not care. *Convex* means that no false
valley lies between here and the minimum, as far as the loss goes; a network adds its own.
"""


def pages() -> dict[str, str]:
    """The page and its pictures, by file name inside the folder of documents."""
    return {"losses.md": page()} | {f"losses/{name}.svg": draw(name) for name in PICTURES}


def page() -> str:
    """losses.md."""
    functions = {family: list[Callable]() for family in FAMILIES}
    for function in (*LOSSES.values(), *HELPERS):
        functions[explain(function).family].append(function)
    index, entries = ["| family | loss | pays |", "|---|---|---|"], []
    for family, title in FAMILIES.items():
        entries.append(f"## {title}\n")
        for function in functions[family]:
            name, pays = explain(function).name, explain(function).pays
            index.append(f"| {title} | [{name}](#{name}) | {_cell(pays)} |")
            entries.append(_entry(function))
    return "\n".join([INTRODUCTION, *index, "", *entries])


def _entry(function: Callable) -> str:
    """One loss."""
    e = explain(function)
    rows = {
        "use": e.use,
        "rewards": e.rewards,
        "ignores": e.ignores,
        "arguments": "<br>".join(f"`{name}`: {text}" for name, text in e.args.items()),
        "returns": e.returns,
        "reference": e.reference,
    }
    parts = [
        f"### {e.name}",
        f"**{e.pays}**",
        f"```text\n{e.formula}\n```",
        *e.remarks,
        f"`{e.family}.{e.name}({_arguments(function)})`",
    ]
    if e.name in PICTURES:
        axis = PICTURES[e.name].axis
        parts.append(f"![value and gradient of {e.name} over: {axis}](losses/{e.name}.svg)")
    table = [f"| {title} | {_cell(text)} |" for title, text in rows.items()]
    return "\n\n".join([*parts, "\n".join(["| | |", "|---|---|", *table])]) + "\n"


def _arguments(function: Callable) -> str:
    """Names and defaults, as in a call."""
    parameters = inspect.signature(function).parameters.values()
    words, star = [], True
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and star:
            words, star = [*words, "*"], False
        words.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    return ", ".join(words)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def write(folder: Path) -> None:
    """Writes the page and its pictures; removes pictures of losses that are no more."""
    made = pages()
    for name, text in made.items():
        write_atomically(folder / name, text.encode("utf-8"))
    for old in (folder / "losses").glob("*.svg"):
        if f"losses/{old.name}" not in made:
            old.unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
