"""The one extension mechanism: a registry is a dict, a choice is a name and its options."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from minilm.errors import UserError, nearest


def choose[T](registry: Mapping[str, T], name: str, where: str) -> T:
    """The row called `name`.

    Raises:
      UserError: no such row; names the key `where`, the rows there are and the nearest name.
    """
    if name not in registry:
        raise _unknown(f"unknown name '{name}'", name, registry, where, sorted(registry))
    return registry[name]


def _unknown(problem: str, name: str, known: Mapping, where: str, allowed) -> UserError:
    hint = f"did you mean '{close}'?" if (close := nearest(name, known)) else None
    return UserError(problem, where=where, allowed=allowed, hint=hint)


def bind[R](
    registry: Mapping[str, Callable[..., R]], name: str, options: Mapping[str, object], where: str
) -> Callable[..., R]:
    """The function called `name`, or imported as `module:function`, with `options` fixed.

    Raises:
      UserError: unknown name, a module that cannot be imported, an option that the function lacks
        or one that it needs and did not get.
    """
    function = imported(name, where) if ":" in name else choose(registry, name, where)
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for option in options:
        if option not in known:
            problem, allowed = f"'{name}' has no option '{option}'", sorted(known) or "no options"
            raise _unknown(problem, option, known, where, allowed)
    for option, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise UserError(f"'{name}' needs the option '{option}'", where=where)
    return functools.partial(function, **options)


def imported(name: str, where: str) -> Callable:
    """The function that `module:function` names; a module of the current folder is found too."""
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # where `python -m` looks too, but `minilm` not
        sys.path.append(here)
    try:
        found = vars(importlib.import_module(module))[attribute]
    except KeyError:
        raise UserError(f"module '{module}' has no function '{attribute}'", where=where) from None
    except Exception as error:  # the module is the user's, and runs
        raise UserError(f"cannot import module '{module}': {error!r}", where=where) from error
    if not callable(found):
        raise UserError(f"'{name}' is not a function", where=where)
    return found
