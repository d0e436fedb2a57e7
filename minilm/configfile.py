"""TOML and `--section.key value` options to one validated Config, and back. Imports no JAX.

What a key takes is read from the JSON schema that pydantic makes of Config, so that errors, help
and the parsing of options can't disagree with the validation.
"""

import contextlib
import functools
import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from minilm.config import Config, Section
from minilm.errors import UserError, nearest

type Schema = dict[str, Any]
NAMED = "NAME"  # stands for the user's own name in a key


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, lays options over it and validates the whole once.

    Args:
      overrides: command-line words, `--model.num-layers 4` or `--model.num-layers=4`; a key that
        holds a list takes several words; `none` empties an optional key.
    Raises:
      UserError: a mistake in either; names the file or option, the key and what it takes.
    """
    path = Path(path)
    document = _read(path)
    options = _options(overrides)

    def where(key: str) -> str:
        under = [o for name, (o, _) in options.items() if key and f"{name}.".startswith(f"{key}.")]
        return ", ".join(under) or f"{path}: {key}".removesuffix(": ")

    # A kind decides which keys its section has, so it is laid first.
    for key in sorted(options, key=lambda key: not key.endswith(".kind")):
        _place(document, key, *options[key])
    for key, value in leaves(document):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError("must be finite", where=where(key), value=value)
    for key in keys():
        section = document.get(key.name.removesuffix(".kind"))
        if key.name.endswith(".kind") and isinstance(section, dict):
            section.setdefault("kind", key.default)
    try:
        return Config.model_validate_json(json.dumps(document, default=str))
    except ValidationError as invalid:
        # A misspelt key may be why another is missing.
        errors = sorted(invalid.errors(), key=lambda error: error["type"] != "extra_forbidden")
        raise _explained(errors[0], document, where) from None


def dump(config: Config) -> str:
    """The resolved config as TOML, which `load` reads back to an equal one. None is left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def sections(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Resolved JSON-able values of the named sections or dotted keys, for hashing.

    The model's is without what says how it is computed: a run may go on otherwise, on another
    device say.
    """
    document = config.model_dump(mode="json")
    found = {name: functools.reduce(dict.__getitem__, name.split("."), document) for name in names}
    for how in ("attention", "remat", "scan_layers"):
        found.get("model", {}).pop(how, None)
    return found


def defaults(config: Config) -> set[str]:
    """Dotted keys that have their default's value."""
    every = config.model_dump(mode="json")
    given = config.model_dump(mode="json", exclude_defaults=True)
    return dict(leaves(every)).keys() - dict(leaves(given)).keys()


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ, those of one side only included.

    >>> changed_keys({"model": {"num_layers": 4, "mlp_dim": 8}}, {"model": {"num_layers": 2}})
    ['model.mlp_dim', 'model.num_layers']
    """
    before, after = dict(leaves(old)), dict(leaves(new))
    same = {key for key in before.keys() & after.keys() if before[key] == after[key]}
    return sorted((before.keys() | after.keys()) - same)


def leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class Key(NamedTuple):
    """One key of the config, for parsing, help and hints."""

    name: str
    schema: Schema
    default: Any  # None where there is none
    required: bool
    kind: str | None  # of its section, where sections of several kinds exist


@functools.cache
def keys() -> tuple[Key, ...]:
    """Every key of the config, with what it takes and its default."""
    return tuple(_keys(Config, "", None))


def _keys(model: type[Section], prefix: str, kind: str | None) -> Iterator[Key]:
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        types = get_args(field.annotation) or (field.annotation,)
        kinds = [t for t in types if isinstance(t, type) and issubclass(t, Section)]
        if kinds and get_origin(field.annotation) is dict:
            yield from _keys(kinds[0], f"{prefix}{name}.{NAMED}.", kind)
            continue
        if len(kinds) > 1:
            schema = {"enum": [section.model_fields["kind"].default for section in kinds]}
            yield Key(f"{prefix}{name}.kind", schema, field.default.kind, False, None)
        for section in kinds:
            own = section.model_fields["kind"].default if len(kinds) > 1 else kind
            yield from _keys(section, f"{prefix}{name}.", own)
        if not kinds and not (kind and name == "kind"):
            schema = properties[name]
            yield Key(f"{prefix}{name}", schema, schema.get("default"), field.is_required(), kind)


def describe(schema: Schema) -> str:
    """What a key takes, in words.

    >>> describe({"type": "integer", "minimum": 1})
    'a whole number ≥ 1'
    """
    if "anyOf" in schema:
        return " or ".join(describe(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"'{name}'" for name in schema["enum"])
    if schema["type"] == "array":
        return f"a list, each {describe(schema['items'])}"
    if schema["type"] == "object":
        return f"a table, each value {describe(schema['additionalProperties'])}"
    bounds = [f"{sign} {schema[name]:.10g}" for name, sign in BOUNDS.items() if name in schema]
    return f"{TYPES[schema['type']][0]} {' and '.join(bounds)}".strip()


TYPES: dict[str, tuple[str, Callable[[str], Any]]] = {  # in words, and how a word is parsed
    "integer": ("a whole number", int),
    "number": ("a number", float),
    "boolean": ("true or false", {"true": True, "false": False}.__getitem__),
    "null": ("none", {"none": None}.__getitem__),
    "string": ("text", {}.__getitem__),  # no word: what is nothing else stays as it is
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        close = nearest(path.name, [p.name for p in path.parent.glob("*.toml")])
        hint = f"did you mean '{path.parent / close}'?" if close else None
        raise UserError("no such config file", where=path, hint=hint) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path) from None
    except ValueError as error:
        raise UserError(f"not TOML: {error}", where=path) from None


def _options(words: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
    """Command-line words by key: the option as written, and its values."""
    options: dict[str, tuple[str, list[str]]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            values = [value] if equals else []
            options[option[2:].replace("-", "_")] = (option, values)
        elif values is None:
            raise UserError(f"unexpected argument '{word}'", allowed="--model.num-layers 4 etc.")
        else:
            values.append(word)
    return options


def _place(document: dict[str, Any], key: str, option: str, words: list[str]) -> None:
    """Writes one option into the document. Unknown keys are left for the validation to name."""
    schema = _schema_of(key)
    if schema and not words:
        raise UserError("needs a value", where=option, allowed=describe(schema))
    *section, name = key.split(".")
    table = document
    for part in section:
        if not isinstance(table.get(part), dict):
            table[part] = {}
        table = table[part]
    if name == "kind":
        several = [k for k in keys() if k.kind and k.name.startswith(key.removesuffix("kind"))]
        kept = {k.name for k in several if k.kind == words[0]}
        for other in several if kept else ():
            if other.name not in kept:  # the former kind's
                table.pop(other.name.rpartition(".")[2], None)
    values = [_parsed(word, schema.get("items", schema)) for word in words]
    table[name] = values[0] if len(values) == 1 and "items" not in schema else values


def _schema_of(key: str) -> Schema:
    """What a key takes; empty where there is no such key."""
    schemas, key = {known.name: known.schema for known in keys()}, _general(key)
    table = schemas.get(key.rpartition(".")[0], {})
    return schemas.get(key) or table.get("additionalProperties", {})


def _general(key: str) -> str:
    """The key with NAME for what the user has named: `objective.z_loss.weight`."""
    parts = key.split(".")
    named = {known.name.split(".")[0] for known in keys() if f".{NAMED}." in known.name}
    return ".".join([parts[0], NAMED, *parts[2:]]) if parts[0] in named and parts[1:] else key


def _parsed(word: str, schema: Schema) -> Any:
    """The word as what the key takes; the bare word where it isn't that, for validation to name."""
    for choice in schema.get("anyOf", [schema]):
        with contextlib.suppress(KeyError, ValueError):
            return TYPES[choice["type"]][1](word)
    return word


def _explained(error: ErrorDetails, document: Any, where: Callable[[str], str]) -> UserError:
    """One of pydantic's complaints in our words; what is allowed comes from the schema."""
    names: list[str] = []
    for part in error["loc"]:  # kinds, members of unions and list indices beside the keys
        if isinstance(document, dict) and part in document:
            names.append(str(part))
            document = document[part]
    if error["type"] == "missing":
        names.append(str(error["loc"][-1]))
    key, value = ".".join(names), error["input"]
    if error["type"] == "extra_forbidden":
        return _unknown(key, where(key))
    if error["type"] == "value_error":
        return UserError(str(error.get("ctx", {})["error"]), where=where(key))
    if error["type"] == "union_tag_invalid":
        key, value = f"{key}.kind", value["kind"]
    schema = _schema_of(key)
    if not schema:
        return UserError("must be a section", where=where(key), value=value, allowed=_below(key))
    close = nearest(str(value), schema.get("enum", ()))
    problem, hint = "wrong value", f"did you mean '{close}'?" if close else None
    if error["type"] == "missing":
        problem, value, hint = "is required", None, f"pass --{key.replace('_', '-')}"
    return UserError(problem, where=where(key), value=value, allowed=describe(schema), hint=hint)


def _unknown(key: str, where: str) -> UserError:
    section, _, name = key.rpartition(".")
    names = [n for k in keys() for n in (k.name, k.name.rpartition(".")[0])]
    close = nearest(_general(key), names) or next(
        (n for n in names if n.endswith(f".{name}")), None
    )
    hint = f"did you mean {close}?" if close else None
    if kinds := [f"'{k.kind}'" for k in keys() if k.name == key]:
        hint = f"'{name}' belongs to {section}.kind = {' or '.join(kinds)}"
    problem = f"unknown key in section {section}" if section else "unknown key"
    return UserError(problem, where=where, allowed=_below(section), hint=hint)


def _below(section: str) -> list[str]:
    """Names of the keys and sections in a section, whatever its kind."""
    start = f"{_general(section)}." if section else ""
    names = [k.name.removeprefix(start).split(".")[0] for k in keys() if k.name.startswith(start)]
    return list(dict.fromkeys(names))
