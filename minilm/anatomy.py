"""A closer look at a checkpoint's weights: spectra, nearest tokens, idle hidden units."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minilm.checkpoint import find, load_arrays, metadata
from minilm.errors import UserError
from minilm.files import read_jsonl, stage_folder
from minilm.generate import generate, left_pad
from minilm.model import Transformer, hidden_states, lowest_layers
from minilm.spectra import (
    Spectrum,
    active_shares,
    always,
    as_matrix,
    contributions,
    dead,
    nearest_rows,
    sparkline,
    spectrum,
)
from minilm.stages.workspace import AVERAGED, load_model
from minilm.text.tokenizer import Tokenizer

TEXTS, LENGTH = 32, 128  # what units are tried on: at most 4,096 positions
NEIGHBOURS = 8
HELD_OUT = "positions of held-out text"
SAMPLES = "positions of the model's own samples"
DIRECTIONS = "random directions (no text to be had: weights alone)"


class Weights(NamedTuple):
    """A checkpoint's model: its average over the steps where there is one, as every stage loads."""

    path: Path
    arrays: Mapping[str, np.ndarray]  # by name, without "model."
    averaged: bool
    tokenizer: Tokenizer | None  # None where none was saved
    metadata: Mapping[str, Any]


class Neighbours(NamedTuple):
    """The tokens whose rows point most nearly where a token's does."""

    token: str
    matrix: str  # "embed_tokens", or "lm_head" (its columns)
    nearest: tuple[tuple[str, float], ...]  # token and cosine, the nearest first


class Units(NamedTuple):
    """At what share of the positions each hidden unit does something, see `active_shares`."""

    source: str  # HELD_OUT, SAMPLES or DIRECTIONS
    positions: int
    layers: tuple[Float[np.ndarray, "F"], ...]


def read(path: Path) -> Weights:
    """The weights of a checkpoint, or of the one that `checkpoint.find` finds.

    Raises:
      UserError: no checkpoint there, a damaged one, or one without a model.
    """
    path = find(path)
    meta = metadata(path)
    averaged = any(key.startswith(f"{AVERAGED}.") for key in meta["arrays"])
    prefix = f"{AVERAGED if averaged else 'model'}."
    if not any(key.startswith(prefix) for key in meta["arrays"]):
        raise UserError("this checkpoint holds no model", where=path)
    arrays = {key.removeprefix(prefix): a for key, a in load_arrays(path, prefix).items()}
    file = path / "tokenizer.json"
    return Weights(path, arrays, averaged, Tokenizer.load(file) if file.exists() else None, meta)


def spectra(weights: Weights) -> dict[str, Spectrum]:
    """Figures of every matrix, by the parameter's name; vectors (norms, scalar heads) have none."""
    matrices = {name: as_matrix(name, array) for name, array in weights.arrays.items()}
    return {name: spectrum(m) for name, m in matrices.items() if m is not None}


def neighbours(weights: Weights, text: str, count: int = NEIGHBOURS) -> list[Neighbours]:
    """The nearest tokens of a text that is one token: by embedding; where untied, by head too.

    Raises:
      UserError: several tokens or none, naming them; no tokenizer or embedding in the checkpoint.
    """
    tokenizer = _tokenizer(weights)
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        split = " ".join(map(quoted, tokenizer.tokens(ids)))
        hint = f"it is split into {split}" if ids else "give a text"
        if text and len(tokenizer.encode(f" {text}")) == 1:  # as within a sentence
            hint += f"; {quoted(f' {text}')}, with a space before it, is one"
        problem = f"not one token but {len(ids)}"
        raise UserError(
            problem, where="--nearest", value=text, allowed="a text that is one token", hint=hint
        )
    return _neighbours(weights, ids[0], count)


def sample_neighbours(weights: Weights, tokens: int = 12) -> list[Neighbours]:
    """The nearest tokens of words spread evenly over the vocabulary; none without a tokenizer."""
    if weights.tokenizer is None or "embed_tokens" not in weights.arrays:
        return []
    chosen = sample_tokens(weights.tokenizer, tokens)
    return [n for i in chosen for n in _neighbours(weights, i, NEIGHBOURS)]


def sample_tokens(tokenizer: Tokenizer, count: int) -> list[int]:
    """Ids of words, evenly over the vocabulary, in which BPE has frequent tokens first.

    Words are a space and three letters or more; of a tokenizer with fewer of them, letters and
    figures of any number.
    """
    pieces = list(enumerate(tokenizer.tokens(range(2, tokenizer.vocab_size)), 2))
    words = [i for i, piece in pieces if piece[:1] == " " and piece[1:].isalpha() and piece[3:]]
    letters = [i for i, piece in pieces if piece.strip().isalnum()]
    chosen = words if len(words) >= count else letters
    count = min(count, len(chosen))
    return [chosen[k * len(chosen) // count] for k in range(count)]


def hidden_units(weights: Weights) -> Units:
    """Which hidden units of the MLPs do something, and how often.

    A unit j of a layer adds silu(x · gate_j) (x · up_j) down_j to the residual stream at a
    position whose normalised residual is x. It is negligible there if the length of that is at most
    a hundredth (`spectra.NEGLIGIBLE`) of the root mean square over the layer's units and all
    positions. A unit is dead if negligible at 99 % of the positions or more, always active if at
    1 % or fewer (`spectra.NEARLY`).

    The positions are those of the first 32 held-out documents of the run that the checkpoint lies
    in, each cut at 128 tokens; where there is no such run, of as many samples of the model's own,
    drawn with seed 0. A reward model does not write: alone, it is judged by its weights, with x in
    random directions (normal, of RMS 1, seed 0, times the norm's scale).

    Raises:
      UserError: the checkpoint does not say what model it holds.
    """
    if "model" not in weights.metadata:
        raise UserError("the checkpoint does not say what model it holds", where=weights.path)
    # In float32 whatever the run computed in: rounding is not what is asked for.
    model = load_model(weights.path, compute_dtype="float32")[0]
    documents = _held_out(weights)
    if documents:
        source, rows = HELD_OUT, documents
    elif weights.metadata.get("stage") != "reward":
        source, rows = SAMPLES, _samples(model)
    else:
        source, rows = DIRECTIONS, []
    if rows:
        tokens = np.full((len(rows), max(map(len, rows))), Tokenizer.pad_id, np.int32)
        for line, row in zip(tokens, rows, strict=True):
            line[: len(row)] = row
        real = tokens != Tokenizer.pad_id
        inputs, positions = mlp_inputs(model, tokens, real), int(real.sum())
    else:
        inputs, positions = _directions(model), TEXTS * LENGTH
    shares = []
    for layer, x in zip(model.layers, inputs, strict=True):
        kernels = (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        shares.append(active_shares(contributions(x, *(np.asarray(k[...]) for k in kernels))))
    return Units(source, positions, tuple(shares))


def render(
    path: Path, *, spectra: bool = False, nearest: str | None = None, dead_units: bool = False
) -> RenderableType:
    """What was asked for, for a terminal.

    Raises:
      UserError: as `read`, `neighbours` and `hidden_units`.
    """
    weights = read(path)
    parts: list[RenderableType] = [Text("Averaged weights:")] if weights.averaged else []
    parts += [_spectra_table(weights)] if spectra else []
    parts += [] if nearest is None else [_nearest_table(neighbours(weights, nearest))]
    parts += [_units_table(hidden_units(weights))] if dead_units else []
    return Group(*parts)


def quoted(piece: str) -> str:
    r"""A token in quotes, so that its spaces are seen; `\xc3`, half a character, stays so.

    >>> quoted(" fox"), quoted("\n")
    ("' fox'", "'\\n'")
    """
    return repr(piece).replace("\\\\", "\\")


def _spectra_table(weights: Weights) -> Table:
    """The matrices under the names that they share."""
    heads = ("matrix", "shape", "σ max", "σ min", "stable", "effective", "-4 … 4 RMS")
    # Narrow, for a terminal of 80 columns.
    table = Table(*heads, box=box.SIMPLE, padding=0, title="Singular values, ranks, weights")
    shown = set()
    for name, s in spectra(weights).items():
        *above, last = name.split(".")
        for depth, part in enumerate(above):
            branch = tuple(above[: depth + 1])
            if branch not in shown:
                shown.add(branch)
                table.add_row("  " * depth + part, style="bold")
        figures = (f"{value:.3g}" for value in s[2:6])
        line = Text(sparkline(s.histogram), no_wrap=True)
        table.add_row("  " * len(above) + last, f"{s.rows}x{s.columns}", *figures, line)
    return table


def _nearest_table(found: Sequence[Neighbours]) -> Table:
    title = f"Nearest to {quoted(found[0].token)}"
    table = Table(box=box.SIMPLE, title=Text(title))
    for each in found:
        table.add_column(each.matrix)
        table.add_column("cosine")
    for line in zip(*(each.nearest for each in found), strict=False):
        table.add_row(*(Text(c) for t, cosine in line for c in (quoted(t), f"{cosine:.3f}")))
    return table


def _units_table(units: Units) -> Table:
    title = f"Hidden units on {units.positions:,} {units.source}"
    heads = ("layer", "units", "dead", "always active", "mean active share")
    table = Table(*heads, box=box.SIMPLE, title=title)
    for number, shares in enumerate(units.layers):
        counts = (f"{int(which.sum())}" for which in (dead(shares), always(shares)))
        mean = "not finite" if np.isnan(shares).any() else f"{shares.mean():.3f}"
        table.add_row(str(number), str(len(shares)), *counts, mean)
    return table


def _tokenizer(weights: Weights) -> Tokenizer:
    if weights.tokenizer is None:
        raise UserError("no tokenizer in this checkpoint", where=weights.path)
    if "embed_tokens" not in weights.arrays:
        raise UserError("no embedding in this checkpoint", where=weights.path)
    return weights.tokenizer


def _neighbours(weights: Weights, token: int, count: int) -> list[Neighbours]:
    tokenizer, found = _tokenizer(weights), []
    matrices = {"embed_tokens": weights.arrays["embed_tokens"]}
    if "lm_head" in weights.arrays:
        matrices["lm_head"] = weights.arrays["lm_head"].T
    for name, matrix in matrices.items():
        rows = nearest_rows(matrix, token, count)
        near = zip(tokenizer.tokens(i for i, _ in rows), (c for _, c in rows), strict=True)
        found.append(Neighbours(tokenizer.tokens([token])[0], name, tuple(near)))
    return found


def _held_out(weights: Weights) -> list[list[int]]:
    """Token rows of held-out documents of the run that the checkpoint lies in, if it does."""
    path, tokenizer = weights.path.absolute(), weights.tokenizer
    if path.parent.name != "checkpoints" or tokenizer is None:
        return []
    # RUN/STAGE/checkpoints/step, or RUN/reward/member_1/checkpoints/step
    for run in path.parents[2:4]:
        file = stage_folder(run, "pretrain") / "held_out.jsonl"
        if file.exists():
            texts = [str(row["text"]) for row in read_jsonl(file)[:TEXTS]]
            ids = tokenizer.encode_batch(texts)
            return [[tokenizer.eos_id, *row][:LENGTH] for row in ids]
    return []


def _samples(model: Transformer) -> list[list[int]]:
    """Token rows that the model writes from nothing."""
    prompts = left_pad([[Tokenizer.eos_id]] * TEXTS, Tokenizer.pad_id, 1)
    dials = {"eos_id": Tokenizer.eos_id, "pad_id": Tokenizer.pad_id}
    made = generate(
        model, jnp.asarray(prompts), jax.random.key(0), max_new_tokens=LENGTH - 1, **dials
    )
    tokens, mask = np.asarray(made.tokens), np.asarray(made.mask)
    ends = (tokens == Tokenizer.eos_id) | (tokens == Tokenizer.pad_id)  # not read by the model
    kept = zip(tokens, mask & ~ends, strict=True)
    return [[Tokenizer.eos_id, *row[real].tolist()] for row, real in kept]


def mlp_inputs(
    model: Transformer, tokens: Int[np.ndarray, "B T"], real: Bool[np.ndarray, "B T"]
) -> Iterator[Float[np.ndarray, "R D"]]:
    """What each layer's gate and up projections read at the real positions.

    A model ends in a norm of its residual stream. So the layers up to this one, its MLP adding
    nothing and its own norm in the place of the last, end in what its MLP reads.
    """
    for depth in range(1, len(model.layers) + 1):
        below = lowest_layers(model, depth)
        last = below.layers[-1]
        last.mlp.down_proj = nnx.Param(jnp.zeros_like(last.mlp.down_proj[...]))
        below.norm = nnx.Param(last.post_attention_layernorm[...])
        hidden = hidden_states(below, jnp.asarray(tokens), jnp.asarray(real.astype(np.int32)))
        yield np.asarray(hidden)[real]


def _directions(model: Transformer) -> Iterator[Float[np.ndarray, "R D"]]:
    """Normalised residuals without a preferred direction, times each layer's scale."""
    shape = (TEXTS * LENGTH, model.config.embed_dim)
    x = np.random.default_rng(0).normal(size=shape)
    x /= np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    for layer in model.layers:
        yield x * np.asarray(layer.post_attention_layernorm[...])[None]
