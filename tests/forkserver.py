"""Runs minilm commands in processes that need not import JAX again: each is a fork of this one.

Reads requests from standard input, one JSON object a line, and answers each with the exit code of
its process (minus the signal's number if one ended it):

  words    the command, as after `minilm`, or a script's path and its arguments
  output   the file that takes what the process prints
  signal   [PATTERN, N, SIGNAL]: the process sends itself SIGNAL just before the N-th time it opens,
           makes, renames or removes a path like PATTERN; or null
  after    seconds after which it is killed, or null
"""

import fnmatch
import io
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable


def watcher(pattern: str, times: int, number: int) -> Callable[[str, tuple], None]:
    """An audit hook: Python calls it before each file operation."""
    left = times

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree"):
            left -= any(fnmatch.fnmatchcase(str(arg), pattern) for arg in args)
            if left == 0:
                left = -1
                os.kill(os.getpid(), number)

    return hook


def child(request: dict) -> int:
    handle = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if request["signal"]:
        sys.addaudithook(watcher(*request["signal"]))
    words = request["words"]
    try:
        if words[0].endswith(".py"):
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
            return 0
        from minilm.cli import main

        return main(words)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def main() -> None:
    import datasets  # noqa: F401
    import grain  # noqa: F401
    import matplotlib.figure
    import orbax.checkpoint  # noqa: F401

    import minilm.cli
    import minilm.handle
    import minilm.report
    import minilm.run
    import minilm.stages.policy
    import minilm.stages.pretrain
    import minilm.stages.rlhf  # noqa: F401

    figure = matplotlib.figure.Figure()
    figure.add_subplot().set_title("so that fonts are read once")
    figure.savefig(io.BytesIO(), format="svg")
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            code = child(request)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if request["after"]:
            time.sleep(request["after"])
            os.kill(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
