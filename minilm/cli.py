"""The command line: a static table, so that help is instant; commands import what they need."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minilm.errors import UserError, nearest


class Command(NamedTuple):
    run: Callable[[str, list[str]], None]  # (name, words after it)
    help: str


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 2 for a user's mistake, 130 when interrupted."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_help())
        elif words[0] == "--version":
            from importlib.metadata import version

            print(f"minilm {version('minilm')}")
        else:
            _command(words[0]).run(words[0], words[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"minilm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(name: str, words: list[str]) -> None:
    parser = _parser(name, "CONFIG", "a TOML file, such as configs/quick.toml")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/ and CONFIG's stem)")
    parser.add_argument(
        "--init", type=Path, help="a run whose pretrained model this one starts from"
    )
    parser.add_argument("--redo", metavar="STAGE", help="remake this stage and what follows it")
    if name == "run":
        parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    args, config = _parse_config(parser, words)
    from minilm.run import run

    run(
        config,
        args.out or Path("runs") / Path(args.CONFIG).stem,
        until=args.until if name == "run" else None,
        redo=args.redo,
        init=args.init,
        only=None if name == "run" else name,
    )


def _generate(name: str, words: list[str]) -> None:
    parser = _parser(name, "PATH", "a run folder, a stage folder or a checkpoint")
    add = parser.add_argument
    add("--prompt", nargs="+", default=[""], metavar="TEXT", help="openings (default: none)")
    add("--max-new-tokens", type=_positive, default=160, metavar="N", help="default: 160")
    add("--temperature", type=_non_negative, default=1.0, metavar="X", help="0: the likeliest")
    add("--top-k", type=_natural, default=0, metavar="N", help="of the N likeliest; 0: of all")
    add("--top-p", type=_share, default=1.0, metavar="X", help="of the likeliest that share X")
    add("--seed", type=_natural, default=0, metavar="N", help="default: 0")
    add("--count", type=_positive, default=1, metavar="N", help="completions a prompt")
    args = parser.parse_args(words)
    from minilm.handle import generate_command

    generate_command(
        args.PATH,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        count=args.count,
    )


def _inspect(name: str, words: list[str]) -> None:
    parser = _parser(name, "PATH", "a run folder, a stage folder or a checkpoint")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="another, to compare with")
    parser.add_argument("--optimizer", action="store_true", help="list the optimizer's state too")
    args = parser.parse_args(words)
    from rich.console import Console

    from minilm import inspection

    if args.diff:
        shown = inspection.render_diff(inspection.diff(args.PATH, args.diff))
    else:
        shown = inspection.render(inspection.describe(args.PATH), optimizer=args.optimizer)
    Console().print(shown)


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


COMMANDS = {
    "run": Command(_run, "all stages in order; skips what is done, resumes what was interrupted"),
    "pretrain": Command(_run, "tokenizer and next-token training on the corpus"),
    "preferences": Command(_run, "completions of the pretrained model, compared in pairs"),
    "reward": Command(_run, "reward model on the preferences"),
    "rlhf": Command(_run, "fine-tuning on the reward model"),
    "generate": Command(_generate, "text from a trained model"),
    "inspect": Command(_inspect, "parameters and facts of a run or checkpoint, or what differs"),
    "model": Command(_model, "parameters, FLOPs and memory of a config, before anything runs"),
    "config": Command(_config, "the resolved config"),
    "report": Command(_report, "write a run's page again"),
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


def _command(name: str) -> Command:
    if name not in COMMANDS:
        close = nearest(name, COMMANDS)
        hint = f"did you mean '{close}'?" if close else "minilm --help lists them"
        raise UserError(f"unknown command '{name}'", allowed=COMMANDS, hint=hint)
    return COMMANDS[name]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, hint=f"{self.prog} --help")


def _parser(name: str, positional: str, meaning: str) -> _Parser:
    parser = _Parser(prog=f"minilm {name}", description=COMMANDS[name].help, allow_abbrev=False)
    parser.add_argument(positional, type=Path, help=meaning)
    return parser


def _parse_config(parser: _Parser, words: list[str]) -> tuple[argparse.Namespace, Any]:
    """A command's own options, and the Config that its CONFIG and `--section.key value` make."""
    from minilm import configfile

    own: list[str] = []
    overrides: list[str] = []
    target = own
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") or option == "-h":
            target = own if option in OWN_OPTIONS else overrides
            _refuse_misspelt(option, configfile.keys())
        target.append(word)
    if {"-h", "--help"} & set(own):
        usage = parser.format_usage().removeprefix("usage: ").strip()
        parser.usage = f"{usage} [--KEY VALUE ...]"
        print(f"{parser.format_help()}\nconfig keys, each an option with its default:")
        print("\n".join(_key_lines(configfile.keys())))
        raise SystemExit(0)
    args = parser.parse_args(own)
    return args, configfile.load(args.CONFIG, overrides)


OWN_OPTIONS = ("-h", "--help", "--out", "--init", "--redo", "--until")


def _refuse_misspelt(option: str, keys: Iterable[Any]) -> None:
    """A near miss of an option of ours would otherwise be called an unknown config key."""
    names = [*OWN_OPTIONS, *(f"--{key.name}" for key in keys)]
    close = nearest(option.replace("-", "_").replace("__", "--", 1), names)
    if close in OWN_OPTIONS and close != option:
        raise UserError(f"unknown option '{option}'", hint=f"did you mean '{close}'?")


def _key_lines(keys: Iterable[Any]) -> Iterator[str]:
    section = None
    for key in keys:
        above = (key.name.rpartition(".")[0], key.kind)
        if above != section:
            yield f"\n  with --corpus.kind {key.kind}:" if key.kind else ""
            section = above
        default = "required" if key.required else _shown(key.default)
        option = f"--{key.name.replace('_', '-')}"
        yield f"  {option:<44} {default:<10} {key.allowed}"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list | dict):
        return " ".join(map(str, value)) or "empty"
    return str(value)


def _type[N: (int, float)](
    number: Callable[[str], N], allowed: str, fits: Callable[[N], bool]
) -> Callable[[str], N]:
    """An argparse type that names what it allows."""

    def parse(word: str) -> N:
        try:
            value = number(word)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"'{word}' is not {allowed}")
        return value

    return parse


_positive = _type(int, "a whole number ≥ 1", lambda n: n >= 1)
_natural = _type(int, "a whole number ≥ 0", lambda n: n >= 0)
_non_negative = _type(float, "a number ≥ 0", lambda x: 0 <= x < float("inf"))
_share = _type(float, "a number > 0 and ≤ 1", lambda x: 0 < x <= 1)
