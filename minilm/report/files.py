"""What a run folder holds, read without JAX, so that `minilm report` answers at once."""

from pathlib import Path
from typing import Any

from minilm import configfile, metrics
from minilm.errors import UserError
from minilm.files import read_json, read_jsonl, stage_folder


class Figures(dict[str, Any]):
    """A JSON object; what a stage has not written (yet, or for want of a truth) is None."""

    def __missing__(self, key: str) -> None:
        return None


class RunFolder:
    """A run folder, of which any file but the config may be missing: it then reads as empty."""

    def __init__(self, path: Path):
        file = path / "config.toml"
        if not file.is_file():
            hint = "give the folder that `minilm run CONFIG` made, such as runs/quick"
            raise UserError("not a run folder: there is no config.toml", where=path, hint=hint)
        self.config = configfile.load(file)
        self.config_text = file.read_text(encoding="utf-8")
        self.name = "/".join(path.resolve().parts[-2:])  # as commands name it: runs/quick
        self._path = path
        self.environment = Figures(read_json(path / "environment.json"))
        self.init: str | None = self.environment["init"]  # what was given as --init

    def _file(self, stage: str, file: str) -> Path:
        return stage_folder(self._path, stage) / file

    def json(self, stage: str, file: str) -> Figures:
        return Figures(read_json(self._file(stage, file)))

    def rows(self, stage: str, file: str) -> list[Figures]:
        """The objects of a JSON Lines file."""
        path = self._file(stage, file)
        return [Figures(row) for row in read_jsonl(path)] if path.exists() else []

    def metrics(self, stage: str, kind: str) -> list[Figures]:
        """The "train" or "eval" records of a stage, in the order of their steps."""
        path = self._file(stage, "metrics.jsonl")
        records = metrics.read(path) if path.exists() else []
        return [Figures(r) for r in records if r["kind"] == kind]

    def evaluations(self, stage: str) -> list[Figures]:
        """Its "eval" records, up to the model that it kept."""
        path = self._file(stage, "metrics.jsonl")
        return [Figures(r) for r in metrics.evaluations(path.parent)] if path.exists() else []
