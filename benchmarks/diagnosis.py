"""The confusion matrix of the diagnosis on the stored bank of labelled runs.

uv run python benchmarks/diagnosis.py [--half odd|even|both] [--bank FOLDER]

Limits were set on even seeds, so the odd half is the one to report.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Column, Table

from minilm.diagnose import HEALTHY, Verdict, diagnose

BANK = Path(__file__).parents[1] / "tests/data/curves"
HALVES = {"even": (0,), "odd": (1,), "both": (0, 1)}


class Case(NamedTuple):
    """A stored run: its cause, and what is said of it."""

    file: Path
    label: str
    found: list[Verdict]

    @property
    def said(self) -> str:
        """The first verdict; `healthy` where nothing is wrong."""
        return "healthy" if self.found[0].name in HEALTHY else self.found[0].name


def cases(half: str, bank: Path = BANK) -> list[Case]:
    """The runs of one half, each diagnosed from its file alone."""
    out = []
    for file in sorted(bank.glob("*.csv")):
        label, _, seed = file.stem.rpartition("-")
        if int(seed) % 2 in HALVES[half]:
            out.append(Case(file, label, diagnose(file)))
    return out


def recalls(found: Sequence[Case]) -> dict[str, float]:
    """Share of each cause's runs whose first verdict is that cause."""
    count = Counter(case.label for case in found)
    right = Counter(case.label for case in found if case.said == case.label)
    return {label: right[label] / count[label] for label in sorted(count)}


def matrix(found: Sequence[Case]) -> Table:
    """Rows: injected cause. Columns: first verdict, numbered as the rows are."""
    labels = sorted({case.label for case in found} | {case.said for case in found})
    numbers = [Column(str(n), justify="right") for n in range(1, len(labels) + 1)]
    cause = Column("injected cause", no_wrap=True)
    table = Table(Column("", justify="right"), cause, *numbers, Column("recall", justify="right"))
    table.box, table.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    counts = Counter((case.label, case.said) for case in found)
    share = recalls(found)
    for n, label in enumerate(labels, 1):
        cells = [str(counts[label, said] or "·") for said in labels]
        table.add_row(str(n), label, *cells, f"{share[label]:.2f}" if label in share else "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=HALVES, default="odd", help="default: odd")
    parser.add_argument("--bank", type=Path, default=BANK, help="folder of LABEL-SEED.csv")
    args = parser.parse_args()
    found = cases(args.half, args.bank)
    share = recalls(found)
    alarms = [case for case in found if case.label == "healthy" and case.said != "healthy"]
    healthy = sum(case.label == "healthy" for case in found)
    macro = sum(share.values()) / len(share)
    console = Console()
    console = console if console.is_terminal and console.width >= 120 else Console(width=120)
    console.print(matrix(found))
    for case in found:
        if case.said != case.label:
            console.print(f"{case.file.name}: {', '.join(v.name for v in case.found)}")
    console.print(f"{len(found)} runs ({args.half} seeds): macro-recall {macro:.3f}, ", end="")
    console.print(f"{len(alarms)} false alarms on {healthy} healthy runs")
    result = {"half": args.half, "runs": len(found), "macro_recall": macro, "recall": share}
    print(json.dumps({"benchmark": "diagnosis", **result, "false_alarms": len(alarms)}))


if __name__ == "__main__":
    main()
