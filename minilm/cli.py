"""The command line: a static table, so that help is instant; commands import what they need."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minilm import memory
from minilm.errors import UserError, nearest


class Command(NamedTuple):
    run: Callable[[str, list[str]], int | None]  # (name, words after it) -> exit code, None for 0
    help: str


def command_line(*first: str) -> int:
    """What a shell calls: `main` with its words after `first`.

    For any command but help the process starts again with large pages, where they are to be had.
    """
    words = [*first, *sys.argv[1:]]
    if words and words[0] in COMMANDS and not {"-h", "--help"} & set(words):
        memory.restart()
    return main(words)


def main(words: Sequence[str]) -> int:
    """Runs one command; returns the exit code: 2 for a user's mistake, 130 when interrupted."""
    words = list(words)
    code = 0
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_help())
        elif words[0] == "--version":
            from importlib.metadata import version

            print(f"minilm {version('minilm')}")
        elif words[0] in COMMANDS:
            code = COMMANDS[words[0]].run(words[0], words[1:]) or 0
        else:
            close = nearest(words[0], COMMANDS)
            hint = f"did you mean '{close}'?" if close else "minilm --help lists them"
            raise UserError(f"unknown command '{words[0]}'", allowed=COMMANDS, hint=hint)
        sys.stdout.flush()
    except UserError as error:
        print(f"minilm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "without --redo, resumes" if "--redo" in words else "resumes"
        print(f"interrupted; the same command {again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(name: str, words: list[str]) -> None:
    parser = _parser(name, "CONFIG", "a TOML file, such as configs/quick.toml")
    add = parser.add_argument
    add("--out", type=Path, help="run folder (default: runs/ and CONFIG's stem)")
    add(
        "--init",
        type=Path,
        help="a run whose pretrained model this one starts from (rlhf: whose reward model too)",
    )
    add("--redo", metavar="STAGE", help="remake this stage and what follows it")
    parser.set_defaults(until=None, only=name)
    if name == "run":
        add("--until", metavar="STAGE", help="stop after this stage")
        parser.set_defaults(only=None)
    args, config = _parse_config(parser, words)
    from minilm.run import run

    out = args.out or Path("runs") / args.CONFIG.stem
    run(config, out, until=args.until, redo=args.redo, init=args.init, only=args.only)


def _generate(name: str, words: list[str]) -> None:
    parser = _parser(name, "PATH", "a run folder, a stage folder or a checkpoint")
    add = parser.add_argument
    add("--prompt", nargs="+", default=[""], metavar="TEXT", help="openings (default: none)")
    add("--max-new-tokens", type=_number(int, 1), default=160, metavar="N", help="default: 160")
    add("--temperature", type=_number(float, 0), default=1.0, metavar="X", help="0: the likeliest")
    add("--top-k", type=_number(int, 0), default=0, metavar="N", help="the N likeliest; 0: all")
    add("--top-p", type=_number(float, 0.01, 1), default=1.0, metavar="X", help="the likeliest X")
    add("--seed", type=_number(int, 0), default=0, metavar="N", help="default: 0")
    add("--count", type=_number(int, 1), default=1, metavar="N", help="completions a prompt")
    options = vars(parser.parse_args(words))
    from minilm.handle import generate_command

    generate_command(options.pop("PATH"), options.pop("prompt"), **options)


def _inspect(name: str, words: list[str]) -> None:
    parser = _parser(name, "PATH", "a run folder, a stage folder or a checkpoint")
    add = parser.add_argument
    add("--diff", type=Path, metavar="OTHER", help="another, to compare with")
    add("--optimizer", action="store_true", help="list the optimizer's state too")
    add("--spectra", action="store_true", help="singular values, ranks and weights of each matrix")
    add("--nearest", metavar="TOKEN", help="the tokens that are embedded nearest to this one")
    add("--dead-units", action="store_true", help="hidden units that do something never or always")
    # "" is no path, so that FILE can be told from no FILE.
    add("--html", nargs="?", const="", metavar="FILE", help="all of it as a page (inspection.html)")
    args = parser.parse_args(words)
    closer = {"spectra": args.spectra, "nearest": args.nearest, "dead_units": args.dead_units}
    asked = args.html is not None or args.spectra or args.dead_units or args.nearest is not None
    if args.diff and asked:
        hint = f"{parser.prog} PATH and {parser.prog} OTHER, one after the other"
        raise UserError("--diff goes with no other view of a checkpoint", hint=hint)
    if args.html is not None:
        from minilm.report.inspection import write

        print(write(args.PATH, Path(args.html) if args.html else None, token=args.nearest))
        return
    from rich.console import Console

    from minilm import inspection

    if args.diff:
        Console().print(inspection.render_diff(inspection.diff(args.PATH, args.diff)))
        return
    Console().print(inspection.render(inspection.describe(args.PATH), optimizer=args.optimizer))
    if asked:
        from minilm import anatomy

        Console().print(anatomy.render(args.PATH, **closer))


def _model(name: str, words: list[str]) -> None:
    _, config = _parse_config(_parser(name, "CONFIG", "a TOML file"), words)
    from minilm.estimate import model_command

    model_command(config)


def _config(name: str, words: list[str]) -> None:
    _, config = _parse_config(_parser(name, "CONFIG", "a TOML file"), words)
    from minilm.configfile import dump

    print(dump(config), end="")


def _report(name: str, words: list[str]) -> None:
    args = _parser(name, "RUN", "a run folder").parse_args(words)
    from minilm.report import write

    print(write(args.RUN))


def _audit(name: str, words: list[str]) -> int:
    parser = _parser(name, "PATH", "a run folder, or a TOML file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args, overrides = parser.parse_known_args(words)
    from minilm.audit import audit_command

    return audit_command(args.PATH, as_json=args.json, overrides=overrides)


def _diagnose(name: str, words: list[str]) -> None:
    parser = _parser(name, "PATH", "a run or stage folder, a metrics.jsonl or a CSV file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(words)
    from minilm.diagnose import diagnose_command

    diagnose_command(args.PATH, as_json=args.json)


def _lr_range(name: str, words: list[str]) -> None:
    parser = _parser(name, "CONFIG", "a TOML file, such as configs/quick.toml")
    parser.add_argument(
        "--out", type=Path, help="folder of table and plot (default: runs/lr-range)"
    )
    args, config = _parse_config(parser, words)
    from minilm.lr_range import lr_range_command

    lr_range_command(config, args.out)


def _overoptimize(name: str, words: list[str]) -> None:
    parser = _parser(name, "CONFIG", "a TOML file, such as configs/overoptimize.toml")
    add = parser.add_argument
    add("--out", type=Path, help="folder of the study (default: runs/ and CONFIG's stem)")
    add("--init", type=Path, help="a finished run whose pretrained model is used")
    args, _ = _parse_config(parser, words)
    overrides = parser.parse_known_args(words)[1]
    from minilm.configfile import load
    from minilm.studies.overoptimize import overoptimize_command

    out = args.out or Path("runs") / args.CONFIG.stem
    overoptimize_command(lambda more: load(args.CONFIG, [*overrides, *more]), out, args.init)


def _evaluate(name: str, words: list[str]) -> None:
    parser = _Parser(prog=f"minilm {name}", description=COMMANDS[name].help, allow_abbrev=False)
    parser.add_argument("RUN", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, help="folder (default: evaluation in the first RUN)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(words)
    from minilm.studies.evaluation import evaluate_command

    evaluate_command(args.RUN, args.out, as_json=args.json)


def _score(name: str, words: list[str]) -> None:
    parser = _parser(name, "PATH", "a run folder, a reward stage or its checkpoint")
    add = parser.add_argument
    add("--file", type=Path, required=True, help="JSON Lines of pairs, completions or texts")
    add("--out", type=Path, help="where the rows go with their rewards (default: the screen)")
    args = parser.parse_args(words)
    from minilm.handle import score_command

    score_command(args.PATH, args.file, args.out)


def _oracle(name: str, words: list[str]) -> None:
    parser = _Parser(prog=f"minilm {name}", description=COMMANDS[name].help, allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/oracle"), help="folder (default: runs/oracle)")
    add("--algorithms", nargs="+", metavar="NAME", help="rows of its table (default: all)")
    add("--steps", type=_number(int, 1), default=300, metavar="N", help="default: 300")
    args = parser.parse_args(words)
    from minilm.algorithms import ALGORITHMS
    from minilm.studies.oracle import oracle_command

    oracle_command(args.out, args.algorithms or list(ALGORITHMS), args.steps)


def _selftest(name: str, words: list[str]) -> int:
    parser = _parser(name, "CONFIG", "a TOML file, such as configs/quick.toml")
    add = parser.add_argument
    add("--kills", type=_number(int, 1), default=20, metavar="N", help="default: 20")
    add("--kill-seed", type=_number(int, 0), default=0, metavar="N", help="of the instants")
    add("--out", type=Path, default=Path("runs/selftest"), help="folder (default: runs/selftest)")
    args, config = _parse_config(parser, words)
    from minilm.selftest import selftest_command

    return selftest_command(config, args.out, kills=args.kills, seed=args.kill_seed)


def _blame(name: str, words: list[str]) -> None:
    parser = _parser(name, "RUN", "a finished run folder")
    parser.add_argument("--out", type=Path, help="folder of the oracles (default: blame in RUN)")
    args = parser.parse_args(words)
    from minilm.studies.blame import blame_command

    blame_command(args.RUN, args.out)


COMMANDS = {
    "run": Command(_run, "all stages in order; skips what is done, resumes what was interrupted"),
    "pretrain": Command(_run, "tokenizer and next-token training on the corpus"),
    "sft": Command(_run, "supervised fine-tuning on examples of your own"),
    "preferences": Command(_run, "completions of the pretrained model, compared in pairs"),
    "reward": Command(_run, "reward model on the preferences"),
    "rlhf": Command(_run, "fine-tuning on the reward model"),
    "generate": Command(_generate, "text from a trained model"),
    "inspect": Command(_inspect, "parameters and facts of a run or checkpoint, or what differs"),
    "model": Command(_model, "parameters, FLOPs and memory of a config, before anything runs"),
    "config": Command(_config, "the resolved config"),
    "report": Command(_report, "write a run's page again"),
    "audit": Command(_audit, "what a run's or config's objectives pay for; integrity checks"),
    "diagnose": Command(_diagnose, "what training curves say: verdicts, evidence, remedies"),
    "evaluate": Command(_evaluate, "report card of the reward model; win rates between policies"),
    "score": Command(_score, "rewards of a file of pairs, completions or texts"),
    "overoptimize": Command(_overoptimize, "gold and proxy under more and more optimisation"),
    "blame": Command(_blame, "which stage holds a run back, by swapping each for its oracle"),
    "oracle": Command(_oracle, "RL algorithms beside the exact optimum of a tiny language"),
    "selftest": Command(_selftest, "kill a run at random instants: it must end as if never killed"),
    "lr-range": Command(_lr_range, "learning-rate range test: a suggestion and a plot"),
}


def _help() -> str:
    rows = "\n".join(f"  {name:<12} {command.help}" for name, command in COMMANDS.items())
    return f"""\
usage: minilm COMMAND ...

From text to a preference-tuned language model, each stage measured against a known truth.
Start with: minilm run configs/quick.toml

commands:
{rows}

  minilm COMMAND --help   a command's arguments; of those with a CONFIG, every config key too"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, hint=f"{self.prog} --help")


def _parser(name: str, positional: str, meaning: str) -> _Parser:
    parser = _Parser(prog=f"minilm {name}", description=COMMANDS[name].help, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # for the table of config keys
    parser.add_argument(positional, type=Path, help=meaning)
    return parser


def _parse_config(parser: _Parser, words: list[str]) -> tuple[argparse.Namespace, Any]:
    """A command's own options, and the Config that its CONFIG and `--section.key value` make."""
    from minilm.configfile import keys, load

    if {"-h", "--help"} & set(words):
        parser.epilog = "\n".join(["config keys, each an option with its default:", *_key_lines()])
    args, overrides = parser.parse_known_args(words)
    # A near miss of an option of ours would otherwise be called an unknown config key.
    own = ["--out", "--init", "--redo", "--until"]
    for word in overrides:
        close = nearest(word, [*own, *(f"--{key.name}" for key in keys())])
        if word.startswith("--") and close in own and close != word:
            raise UserError(f"unknown option '{word}'", hint=f"did you mean '{close}'?")
    return args, load(args.CONFIG, overrides)


def _key_lines() -> Iterator[str]:
    from minilm.configfile import describe, keys

    before = None
    for key in keys():
        section = (key.name.rpartition(".")[0], key.kind)
        if section != before:
            yield f"\n  with --{section[0]}.kind {key.kind}:" if key.kind else ""
            before = section
        default = str(key.default).lower() if isinstance(key.default, bool | None) else key.default
        option, default = f"--{key.name.replace('_', '-')}", "required" if key.required else default
        yield f"  {option:<44} {default!s:<10} {describe(key.schema)}"


def _number(kind: type, low: float | int, high: float | int = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number from `low` to `high`."""

    def number(word: str) -> Any:
        value = kind(word)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"'{word}' is not between {low} and {high}")
        return value

    return number
