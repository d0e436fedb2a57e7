"""TOML and `--section.key value` options to one validated Config, and back. Imports no JAX.

What a key takes is read from the JSON schema that pydantic makes of Config, so that errors, help
and the parsing of options can't disagree with the validation.
"""

import functools
import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from minilm.config import Config
from minilm.errors import UserError, nearest

type Dotted = tuple[str, ...]  # a key, split at its dots
type Schema = dict[str, Any]
type Where = Callable[[Dotted], str]  # the file or the options that set a key


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, lays options over it and validates the whole once.

    Args:
      overrides: command-line words, `--model.num-layers 4` or `--model.num-layers=4`; a key that
        holds a list takes several words; `none` empties an optional key.
    Raises:
      UserError: no such file, not TOML, unknown key, wrong type, value out of bounds, an
        impossible combination.
    """
    path = Path(path)
    document = _read(path)
    in_file = {tuple(name.split(".")[:n]) for name, _ in _leaves(document) for n in range(9)}
    options: dict[Dotted, str] = {}

    def where(key: Dotted) -> str:
        if key in options:
            return options[key]
        below = ", ".join(option for other, option in options.items() if other[: len(key)] == key)
        place = f"{path}: {'.'.join(key)}" if key else str(path)
        if not below or not key:
            return place
        return f"{place} (with {below})" if key in in_file else below

    _check(document, _schema(), (), where)
    # A kind decides which keys its section has, so it is laid first.
    for key, option, words in sorted(_options(overrides), key=lambda o: o[0][-1] != "kind"):
        options[key] = option
        _place(document, key, option, words)
    _check(document, _schema(), (), where)
    try:
        return Config.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise _explained(error.errors()[0], document, where) from None


def dump(config: Config) -> str:
    """The resolved config as TOML, which `load` reads back to an equal one. None is left out."""

    def without_none(table: dict[str, Any]) -> dict[str, Any]:
        return {
            key: without_none(value) if isinstance(value, dict) else value
            for key, value in table.items()
            if value is not None
        }

    return tomli_w.dumps(without_none(config.model_dump(mode="json")))


def sections(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Resolved JSON-able values of the named sections or dotted keys, for hashing."""
    document = config.model_dump(mode="json")
    return {
        name: functools.reduce(lambda table, part: table[part], name.split("."), document)
        for name in names
    }


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ, those of one side only included.

    >>> changed_keys({"model": {"num_layers": 4, "mlp_dim": 8}}, {"model": {"num_layers": 2}})
    ['model.mlp_dim', 'model.num_layers']
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    absent = object()
    return sorted(
        key
        for key in before.keys() | after.keys()
        if before.get(key, absent) != after.get(key, absent)
    )


class Key(NamedTuple):
    """One key of the config, for help and for hints."""

    name: str
    allowed: str
    default: Any  # None where there is none
    required: bool
    kind: str | None  # of its section, where sections of several kinds exist


def keys() -> Iterator[Key]:
    """Every key of the config, with what it takes and its default."""
    return _keys(_schema(), (), None, {})


def _keys(schema: Schema, prefix: Dotted, kind: str | None, defaults: Any) -> Iterator[Key]:
    for name, child in schema["properties"].items():
        key = (*prefix, name)
        default = defaults.get(name, child.get("default"))
        if child.get("discriminator"):
            members = _members(child)
            yield Key(".".join((*key, "kind")), _one_of(members), default["kind"], False, None)
            for member, below in members.items():
                own = default if default["kind"] == member else {}
                found = _keys(below, key, member, own)
                yield from (k for k in found if k.name != ".".join((*key, "kind")))
        elif "properties" in (section := _resolved(child)):
            yield from _keys(section, key, kind, default or {})
        else:
            required = name in schema.get("required", ())
            yield Key(".".join(key), describe(child), default, required, kind)


def describe(schema: Schema) -> str:
    """What a key takes, in words.

    >>> describe({"type": "integer", "minimum": 1})
    'a whole number ≥ 1'
    """
    schema = _resolved(schema)
    if "anyOf" in schema:
        return " or ".join(describe(choice) for choice in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return _one_of(schema.get("enum") or [schema["const"]])
    if schema.get("type") == "array":
        return f"a list, each {describe(schema['items'])}"
    if "additionalProperties" in schema and "properties" not in schema:
        return f"a table, each value {describe(schema['additionalProperties'])}"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in BOUNDS.items() if name in schema]
    return " ".join([NOUNS.get(schema.get("type", ""), "a section"), " and ".join(bounds)]).strip()


NOUNS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "none",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@functools.cache
def _schema() -> Schema:
    return Config.model_json_schema()


def _resolved(schema: Schema) -> Schema:
    """The schema itself where it is a reference."""
    if "$ref" not in schema:
        return schema
    return _schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]]


def _members(schema: Schema) -> dict[str, Schema]:
    """The sections of a union by kind."""
    mapping = schema["discriminator"]["mapping"]
    return {kind: _resolved({"$ref": reference}) for kind, reference in mapping.items()}


def _section(schema: Schema, table: Mapping[str, Any]) -> Schema:
    """The section that a table is, by its kind where there are several; unknown kinds: none."""
    if "discriminator" not in schema:
        return _resolved(schema)
    members, kind = _members(schema), table.get("kind", schema["default"]["kind"])
    return members.get(kind, {}) if isinstance(kind, str) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        hint = f"did you mean '{path.parent / close}'?" if close else None
        raise UserError("no such config file", where=path, hint=hint) from None
    except IsADirectoryError:
        raise UserError("a folder, not a file", where=path, allowed="a .toml file") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path) from None
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte {error.start})"
        raise UserError(problem, where=path, allowed="a .toml file") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"not TOML: {error}", where=path) from None


def _options(words: Sequence[str]) -> list[tuple[Dotted, str, list[str]]]:
    """Groups command-line words into (key, option as written, its values)."""
    grouped: list[tuple[Dotted, str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            option, equals, value = word.partition("=")
            key = tuple(option.removeprefix("--").replace("-", "_").split("."))
            grouped.append((key, option, [value] if equals else []))
        elif grouped:
            grouped[-1][2].append(word)
        else:
            example = "options such as --model.num-layers 4"
            raise UserError(f"unexpected argument '{word}'", allowed=example)
    return grouped


def _place(document: dict[str, Any], key: Dotted, option: str, words: list[str]) -> None:
    """Writes one option into the document. Unknown keys are left for `_check` to name."""
    table: Any = document
    schema: Schema = _schema()
    for part in key[:-1]:
        child = schema.get("properties", {}).get(part, {})
        table = table.setdefault(part, {})
        scalar = child and not {"$ref", "discriminator", "additionalProperties"} & child.keys()
        if scalar or not isinstance(table, dict):
            raise UserError(f"'{part}' has no keys below it", where=option)
        schema = _section(child, table)
        if key[-1] == "kind" and "discriminator" in child:
            _forget_other_kind(table, child, words[-1] if words else "")
            schema = {"properties": {"kind": {"type": "string", "enum": list(_members(child))}}}
    last = schema.get("properties", {}).get(key[-1]) or schema.get("additionalProperties") or {}
    section = _section(last, {})
    if "properties" in section:
        raise UserError("a section, not a key", where=option, allowed=section["properties"])
    if last.get("type") == "array" and words:
        table[key[-1]] = [_parsed(word, last["items"]) for word in words]
    elif len(words) == 1:
        table[key[-1]] = _parsed(words[0], last)
    elif last:
        problem = f"takes one value, got {len(words)}" if words else "needs a value"
        raise UserError(problem, where=option, value=words or None, allowed=describe(last))
    else:
        table[key[-1]] = words


def _forget_other_kind(table: dict[str, Any], schema: Schema, kind: str) -> None:
    """Drops keys that belong to the section's former kind and not to the new one."""
    new = _members(schema).get(kind)
    if new:
        former = _section(schema, table).get("properties", {})
        for name in former.keys() - new["properties"].keys():
            table.pop(name, None)


def _parsed(word: str, schema: Schema) -> Any:
    """The word as what the key takes; the bare word where it isn't that, for validation to name."""
    for choice in schema.get("anyOf", [schema]):
        try:
            match choice.get("type"):
                case "integer":
                    return int(word)
                case "number":
                    return float(word)
                case "boolean" if word.lower() in ("true", "false"):
                    return word.lower() == "true"
                case "null" if word.lower() == "none":
                    return None
        except ValueError:
            continue
    return word


def _check(table: Any, schema: Schema, prefix: Dotted, where: Where) -> None:
    """Names unknown keys and values no config can hold; fills in the kind of a union section."""
    for name, value in table.items():
        key = (*prefix, name)
        child = schema["properties"].get(name)
        if child is None:
            raise _unknown(key, schema, where)
        if "discriminator" in child and isinstance(value, dict):
            value.setdefault("kind", child["default"]["kind"])
        section = _section(child, value if isinstance(value, dict) else {})
        if "properties" not in section:
            _check_storable(value, key, where)
        elif isinstance(value, dict):
            _check(value, section, key, where)
        else:
            allowed = ", ".join(section["properties"])
            raise UserError(
                "must be a section", where=where(key), value=value, allowed=f"a table of {allowed}"
            )


def _check_storable(value: Any, key: Dotted, where: Where) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _check_storable(item, (*key, name), where)
    elif isinstance(value, list):
        for item in value:
            _check_storable(item, key, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError("must be finite", where=where(key), value=value, allowed="a finite number")
    elif not isinstance(value, str | int | float | None):
        raise UserError(
            f"a TOML {type(value).__name__} has no place in a config",
            where=where(key),
            value=str(value),
            allowed="text, numbers, true, false, lists and tables",
        )


def _unknown(key: Dotted, schema: Schema, where: Where) -> UserError:
    *above, name = key
    section, here = ".".join(above), list(schema["properties"])
    everywhere = list(keys())
    elsewhere = list(dict.fromkeys(k.name for k in everywhere if k.name.split(".")[-1] == name))
    kinds = [k.kind for k in everywhere if k.kind and k.name == ".".join(key)]
    leaves = {k.name.split(".")[-1]: k.name for k in everywhere}
    if kinds:
        hint = f"'{name}' belongs to {section}.kind = " + " or ".join(f"'{k}'" for k in kinds)
    else:
        close = nearest(name, here)
        if close:
            elsewhere = [".".join([*above, close]), *elsewhere]
        elif not elsewhere and (close := nearest(name, leaves)):
            elsewhere = [leaves[close]]
        hint = f"did you mean {' or '.join(elsewhere[:3])}?" if elsewhere else None
    problem = f"unknown key in section {section}" if section else "unknown key"
    return UserError(problem, where=where(key), allowed=here, hint=hint)


def _explained(error: ErrorDetails, document: dict[str, Any], where: Where) -> UserError:
    """Pydantic's first complaint in our words; what is allowed comes from the schema."""
    schema, key = _schema(), []
    value: Any = document
    for part in error["loc"]:
        if "discriminator" in schema:  # pydantic puts the kind into the location
            schema = _members(schema)[str(part)]
            continue
        below = _resolved(schema).get("properties", {}).get(str(part))
        below = below or schema.get("additionalProperties") or schema.get("items")
        if not isinstance(below, dict):
            break
        schema = below
        if isinstance(part, str):
            key.append(part)
        value = value.get(part) if isinstance(value, dict) else value
    if error["type"] == "union_tag_invalid":
        key, value, schema = [*key, "kind"], value["kind"], {"enum": list(_members(schema))}
    place, allowed = where(tuple(key)), describe(schema)
    if error["type"] == "missing":
        option = "--" + ".".join(key).replace("_", "-")
        return UserError("is required", where=place, allowed=allowed, hint=f"pass {option}")
    if error["type"] == "value_error":
        return UserError(str(error.get("ctx", {})["error"]), where=place)
    close = nearest(str(value), schema.get("enum", ()))
    hint = f"did you mean '{close}'?" if close else None
    kind = "value" if "enum" in schema or isinstance(value, int | float) else "type"
    return UserError(f"wrong {kind}", where=place, value=value, allowed=allowed, hint=hint)


def _one_of(names: Any) -> str:
    return " or ".join(f"'{name}'" for name in names)


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
