"""The notebook runs from top to bottom, and is stored without its outputs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PATH = ROOT / "notebooks" / "minilm.ipynb"
CODE = [c.source for c in nbformat.read(PATH, as_version=4).cells if c.cell_type == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory, tiny, compiled):
    """The notebook's code cells after a run with the config of seconds, in a kernel of its own."""
    folder = tmp_path_factory.mktemp("notebook")
    book = nbformat.read(PATH, as_version=4)
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": PATH.parent}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILM_CONFIG", str(tiny))
        patch.setenv("MINILM_RUN", str(folder / "run"))
        patch.setenv("IPYTHONDIR", str(folder))  # no history in the user's folder
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
        client.execute()
    assert (folder / "run/report.html").exists()
    return [c for c in book.cells if c.cell_type == "code"]


def printed(cells) -> str:
    return "".join(o.text for c in cells for o in c.outputs if o.output_type == "stream")


def test_it_runs_all_stages_and_draws_every_plot(executed):
    asked = sum("plt.show()" in cell.source for cell in executed)
    drawn = [o for c in executed for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(drawn) == asked > 0
    last = printed(executed[-1:])
    for figure in ("held-out loss", "stories that parse", "reward model's accuracy", "win rate"):
        assert figure in last


def test_the_step_taken_apart_lowers_the_loss_and_is_the_step_that_trains(executed):
    text = printed(executed)
    before, after = map(float, re.search(r"loss before (\S+), after (\S+)", text).groups())
    assert after < before
    whole = float(re.search(r"make_train_step: loss (\S+),", text)[1])
    assert whole == pytest.approx(before, abs=1e-4)
    assert float(re.search(r"largest difference of a parameter: (\S+)", text)[1]) < 1e-5


def test_outputs_are_stripped():
    cells = nbformat.read(PATH, as_version=4).cells
    assert [c for c in cells if c.cell_type == "code" and (c.outputs or c.execution_count)] == []


def test_no_path_of_a_machine_is_inside():
    text = PATH.read_text(encoding="utf-8")
    assert re.findall(r"(?:/home|/root|/Users|/tmp|/work|/content|[A-Z]:\\)[/\\]\w+", text) == []


class Machine:
    """A machine outside of a clone, with what the first cell starts there recorded."""

    def __init__(self, tmp_path: Path, monkeypatch, driver: str | None = None):
        self.commands, self.restarted = [], False
        self._driver = driver
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(subprocess, "run", self._run)
        monkeypatch.setattr(shutil, "which", lambda name: name if driver else None)

    def _run(self, command, **options):
        self.commands.append(command)
        if command[0] == "git":
            (Path.cwd() / "minilm/minilm").mkdir(parents=True)
            (Path.cwd() / "minilm/minilm/cli.py").touch()
        return SimpleNamespace(stdout=self._driver)

    def first_cell(self, repo: str) -> dict:
        def shutdown(restart: bool) -> None:
            self.restarted = restart

        kernel = SimpleNamespace(do_shutdown=shutdown)
        names = {"get_ipython": lambda: SimpleNamespace(kernel=kernel)}
        exec(CODE[0].replace('REPO = ""', f'REPO = "{repo}"'), names)
        return names


def test_outside_of_a_clone_the_first_cell_asks_for_the_repository(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="put the address of the repository into REPO"):
        Machine(tmp_path, monkeypatch).first_cell("")


def test_the_first_cell_fetches_the_repository_and_then_knows_the_clone(
    tmp_path, monkeypatch, capsys
):
    machine = Machine(tmp_path, monkeypatch)
    for _ in range(2):
        monkeypatch.chdir(tmp_path)
        assert machine.first_cell("https://example.org/minilm")["ROOT"] == tmp_path / "minilm"
    clone = ["git", "clone", "--depth", "1", "https://example.org/minilm", "minilm"]
    assert machine.commands == [clone]
    assert not machine.restarted


@pytest.mark.parametrize(
    ("driver", "extra"),
    [
        (None, []),
        ("| Driver Version: 550.54  CUDA Version: 12.4 |", ["jax[cuda12]"]),
        ("| Driver Version: 580.65  CUDA Version: 13.0 |", ["jax[cuda13]"]),
    ],
)
def test_what_is_not_installed_is_installed_and_the_kernel_restarts(
    driver, extra, tmp_path, monkeypatch
):
    def unknown(name: str) -> str:
        import importlib.metadata

        raise importlib.metadata.PackageNotFoundError(name)

    machine = Machine(tmp_path, monkeypatch, driver)
    monkeypatch.setattr("importlib.metadata.version", unknown)
    with pytest.raises(SystemExit, match="run the notebook again"):
        machine.first_cell("https://example.org/minilm")
    install = next(c for c in machine.commands if c[0] == "uv")
    assert install[:5] == ["uv", "pip", "install", "--python", sys.executable]
    assert install[5:] == ["-c", "constraints.txt", "--editable", ".", *extra]
    assert machine.restarted
    assert Path.cwd() == tmp_path / "minilm"
