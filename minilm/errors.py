"""The one error that speaks to the user: what was wrong, where, what is allowed, what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. The command line prints it and exits with code 2, no traceback.

    Args:
      problem: what is wrong, one sentence without a full stop.
      where: the file, config key or command-line option that set it.
      value: the value seen.
      allowed: what would be accepted (a description or the accepted names).
      hint: what to do next.

    >>> print(UserError("unknown key", where="a.toml: model.layer", hint="did you mean 'layers'?"))
    a.toml: model.layer: unknown key
      hint: did you mean 'layers'?
    """

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        value: object = None,
        allowed: str | Iterable[str] | None = None,
        hint: str | None = None,
    ):
        lines = [f"{where}: {problem}" if where is not None else problem]
        if value is not None:
            seen = repr(value)
            lines.append(f"  value: {seen if len(seen) <= 200 else seen[:200] + '…'}")
        if allowed is not None:
            names = allowed if isinstance(allowed, str) else ", ".join(allowed)
            lines.append(f"  allowed: {names}")
        if hint:
            lines.append(f"  hint: {hint}")
        self.problem, self.where = problem, where
        super().__init__("\n".join(lines))


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name closest to a misspelt one, or None when nothing is close.

    >>> nearest("learning_rat", ["learning_rate", "steps"])
    'learning_rate'
    """
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None
