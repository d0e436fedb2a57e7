"""minilm: the whole life of a language model, each stage measured against a truth."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minilm.handle import Run

__all__ = ["Run"]


def __getattr__(name: str):
    """Loads `Run` when it is first used, so that `import minilm` costs nothing (PEP 562)."""
    if name == "Run":
        from minilm.handle import Run

        return Run
    raise AttributeError(f"module 'minilm' has no attribute '{name}'")
