"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, trackio."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minilm.errors import UserError


class Tracked(NamedTuple):
    """What is tracked: a stage of a run.

    Attributes:
      folder: the stage's.
      step: that training goes on from; what was told of later ones will be told again.
    """

    folder: Path
    run: str
    stage: str
    project: str
    config: Mapping[str, Any]
    step: int


class Tracker(NamedTuple):
    """log: (step, numbers by name); close: when the stage ends or is interrupted."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def tensorboard(of: Tracked) -> Tracker:
    """Event files in `tensorboard/` of the stage's folder: `tensorboard --logdir runs`."""
    library = _import("tensorboardX", "tensorboard")
    writer = library.SummaryWriter(str(of.folder / "tensorboard"), purge_step=of.step + 1)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def wandb(of: Tracked) -> Tracker:
    """A run a stage, grouped by run folder; a resumed stage goes on in its own."""
    library = _import("wandb", "wandb")
    run = library.init(
        project=of.project,
        group=of.run,
        name=f"{of.run}/{of.stage}",
        id=f"{of.run}-{of.stage}".replace("/", "-"),
        resume="allow",
        dir=str(of.folder),
        config=dict(of.config),
    )
    return Tracker(lambda step, values: run.log(dict(values), step=step), run.finish)


def trackio(of: Tracked) -> Tracker:
    """The same in trackio's local dashboard: `trackio show`."""
    library = _import("trackio", "trackio")
    run = library.init(
        project=of.project,
        group=of.run,
        name=f"{of.run}/{of.stage}",
        resume="allow",
        config=dict(of.config),
    )
    return Tracker(lambda step, values: run.log(dict(values), step=step), library.finish)


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
}


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"the package {module} is not installed",
            where="tracking.tracker",
            value=name,
            hint=f"pip install {module}, or minilm with its extra: pip install 'minilm[track]'",
        ) from error
