"""Large pages for what JAX allocates.

XLA's CPU backend allocates a step's memory anew each time, and the kernel maps it page by page: for
a model of a million parameters 40,000 faults a step, a fifth of its time. glibc asks for large
pages instead where its environment says so, but reads that at a program's start alone.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
LARGE_PAGES = "glibc.malloc.hugetlb=1"  # madvise for large pages; since glibc 2.35
OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment(
    known: Mapping[str, str] = os.environ, offered: Path = OFFERED, libc: str | None = None
) -> dict[str, str]:
    """What a program that computes is to be started with beside `known`; empty where nothing helps.

    Nothing does where the kernel gives large pages unasked or never, where the C library is not a
    recent glibc, and where the user has tuned it.

    Args:
      offered: the kernel's list of modes, the chosen one in brackets.
      libc: its name and version, such as "glibc 2.36"; None asks the system.
    """
    try:
        name, version = (libc or os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        recent = name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
        asked = "[madvise]" in offered.read_text()
    except (OSError, ValueError, AttributeError):  # another system, another library
        return {}
    return {TUNABLES: LARGE_PAGES} if recent and asked and TUNABLES not in known else {}


def restart() -> None:
    """Starts this program again with the `environment`, once; returns where there is no reason to.

    Call it before anything has been done. A host that runs us as a script (a notebook, `runpy`,
    standard input) is not this program, and goes on.
    """
    name, *words = sys.argv
    ours = Path(name).is_file() and (
        name in sys.orig_argv or sys.orig_argv[1:3] == ["-m", "minilm"]
    )
    same = not words or sys.orig_argv[-len(words) :] == words
    privileged = sys.platform != "win32" and os.getuid() != os.geteuid()  # loses what it is given
    if ours and same and not privileged and (more := environment()):
        os.environ.update(more)  # so that the next time there is nothing to add
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
