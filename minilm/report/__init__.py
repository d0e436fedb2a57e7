"""The run's page: one HTML file that needs nothing else, for whatever stages there are."""

from pathlib import Path

from minilm.files import write_atomically
from minilm.report.files import RunFolder
from minilm.report.page import render


def write(run: Path) -> Path:
    """Writes `report.html` into a run folder and returns its path.

    The same files give the same page, byte for byte. Stages that have not run yet say so.
    """
    page = run / "report.html"
    write_atomically(page, render(RunFolder(run)).encode("utf-8"))
    return page
