"""The command line: every command with its options; parses, runs the command, tells refusals, gives the exit code.

`reshard --help` loads only this module. The module of a command is named here and imported when the command runs.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from importlib import import_module
from pathlib import Path

from reshard import __version__
from reshard.cli.terminal import INTERRUPTED, REFUSED, print_aside, print_json
from reshard.errors import Refused, summarize_problems
from reshard.text import escape

Parser = argparse.ArgumentParser

Run = Callable[[argparse.Namespace], int]


@dataclass(frozen=True, slots=True)
class Command:
    """One sub-command: its name, its options, and the function that runs it."""

    name: str
    about: str
    """Its line in the help."""
    add_options: Callable[[Parser], None]
    """Adds its options to a parser."""
    run: str
    """The function that runs it, as `module:function`."""


def add_source(parser: Parser) -> None:
    """Adds the argument `source`."""
    parser.add_argument("source", type=Path, help="a folder of safetensors files, or one such file")


def add_job(parser: Parser) -> None:
    """Adds the options that choose what to convert: those of `plan` and `convert`."""
    add_source(parser)
    parser.add_argument("--mp", type=int, metavar="N", help="number of ranks (model parallel)")
    parser.add_argument("--to", choices=("ranks", "hf"), default="ranks", help="hf: stay whole, in the source's layout")
    parser.add_argument("--cast", choices=("bf16", "fp8", "fp8-ue8m0"), default="", help="of all block-scaled weights")
    parser.add_argument("--expert-dtype", choices=("fp4", "fp8"), default="", help="fp8: cast FP4 experts")
    parser.add_argument("--mtp", choices=("drop", "keep"), default="drop", help="keep what a recipe drops: MTP layers")
    parser.add_argument(
        "--pad", action="store_true", help="widen weights with zeros where blocks do not suit the ranks"
    )
    parser.add_argument(
        "--max-file-size",
        type=parse_size,
        metavar="SIZE",
        help="with --to hf; default: the files that rank files once came from, or 5GB",
    )
    parser.add_argument(
        "--replicas",
        choices=("compare", "first"),
        default="compare",
        help="of what several ranks of a source hold: all must be equal, or take the first",
    )
    parser.add_argument("--layers", type=parse_numbers, metavar="0-3,7", help="convert these layers only")
    parser.add_argument(
        "--experts", type=parse_numbers, metavar="0-15", help="convert these experts of each layer only"
    )
    parser.add_argument("--renumber", action="store_true", help="number the layers and experts that are left from 0 on")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="write the tensors of these names only; repeatable",
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a packaged recipe or a TOML file; default: by the model")
    parser.add_argument("--ranks", type=parse_numbers, metavar="0-3,7", help="write the files of these ranks only")
    parser.add_argument(
        "--ignore-extra-files", action="store_true", help="leave out files and tensors that are not of the checkpoint"
    )


def add_progress(parser: Parser) -> None:
    """Adds the options on what a command says while it works."""
    parser.add_argument(
        "--progress",
        choices=("auto", "bar", "log", "json", "none"),
        help="on standard error; auto, the default: a bar on a terminal, else a line every 30 seconds",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary, only what is wrong")


def add_convert(parser: Parser) -> None:
    """Adds the options of `convert`."""
    add_job(parser)
    parser.add_argument("target", type=Path, help="the folder to write, empty or not there")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, write nothing")
    parser.add_argument("--jobs", type=parse_positive, metavar="N", help="threads; default: by the processors")
    parser.add_argument(
        "--max-memory", type=parse_size, default="256MiB", metavar="SIZE", help="of all buffers; default: %(default)s"
    )
    parser.add_argument(
        "--cache",
        choices=("auto", "yes", "no"),
        default="auto",
        help="go through the page cache; auto: unless the job is larger than a third of the free memory",
    )
    parser.add_argument("--allow-inexact", action="store_true", help="round what a cast cannot express, and say so")
    parser.add_argument(
        "--restart", action="store_true", help="throw away what an interrupted run has left, and begin again"
    )
    add_progress(parser)


def add_inspect(parser: Parser) -> None:
    """Adds the options of `inspect`."""
    parser.add_argument("path", type=Path, help="a folder of safetensors files in either layout, or one such file")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a packaged recipe or a TOML file; default: by the model")


def add_verify(parser: Parser) -> None:
    """Adds the options of `verify`."""
    parser.add_argument("target", type=Path, help="a folder of rank files; with --download or --sums: any checkpoint")
    parser.add_argument(
        "--source", type=Path, help="what it was made from; without it the manifest's checksums are compared"
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a packaged recipe or a TOML file; default: by the model")
    parser.add_argument(
        "--ranks", type=parse_numbers, metavar="0-3,7", help="with --source: the files of these ranks only"
    )
    parser.add_argument("--ignore-extra-files", action="store_true", help="with --source: as for convert")
    parser.add_argument(
        "--sample",
        type=parse_share,
        metavar="1%",
        help="compare about so much, spread evenly, and both ends of each tensor",
    )
    parser.add_argument(
        "--download", action="store_true", help="compare the files with the hashes that the hub's downloader left there"
    )
    parser.add_argument("--sums", type=Path, metavar="FILE", help="compare the files with a list made by sha256sum")
    add_progress(parser)


def add_diff(parser: Parser) -> None:
    """Adds the options of `diff`."""
    parser.add_argument("a", type=Path, metavar="A", help="a checkpoint, rank files, or one safetensors file")
    parser.add_argument("b", type=Path, metavar="B", help="another, in whichever layout")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors of such names, as in '*.3.*'; repeatable",
    )
    parser.add_argument(
        "--dequantize", action="store_true", help="compare scaled weights with those of another dtype in BF16"
    )
    parser.add_argument("--show", type=parse_positive, default=20, metavar="N", help="lines of each table; default: 20")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="of both sides; default: by the model")
    parser.add_argument(
        "--replicas", choices=("compare", "first"), default="compare", help="of what several ranks hold: as for convert"
    )
    parser.add_argument("--ignore-extra-files", action="store_true", help="as for convert")
    add_progress(parser)


ACTIONS = ("list", "show", "check")
"""The actions of the command `recipes`."""


def parse_action(text: str) -> str:
    """Parses an action of `recipes`. Raises ArgumentTypeError for other words."""
    if text not in ACTIONS:
        expected = f"{', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}; for a recipe: reshard recipes show {text!r}")
    return text


def add_recipes(parser: Parser) -> None:
    """Adds the options of `recipes`."""
    parser.add_argument("action", nargs="?", type=parse_action, metavar=f"{{{','.join(ACTIONS)}}}", default="list")
    parser.add_argument("recipe", nargs="?", metavar="NAME|FILE", help="for show and check")
    parser.add_argument("source", nargs="?", type=Path, help="for check: a checkpoint to hold the recipe against")


def add_demo(parser: Parser) -> None:
    """Adds the options of `demo`."""
    parser.add_argument("folder", nargs="?", type=Path, help="keep the files there; default: a temporary folder")


def add_deepseek(parser: Parser) -> None:
    """Adds the options of `deepseek`, by their names in all of DeepSeek's scripts."""
    parser.add_argument("--hf-ckpt-path", type=Path, required=True, help="the Hugging Face checkpoint")
    parser.add_argument("--save-path", type=Path, required=True, help="the folder to write, empty or not there")
    parser.add_argument("--n-experts", type=int, help="number of routed experts, without draft blocks'; checked")
    parser.add_argument("--model-parallel", type=int, required=True, help="number of ranks")
    parser.add_argument("--expert-dtype", choices=("fp4", "fp8"), help="of V4's experts: fp8 casts FP4 ones")
    parser.add_argument("--tokenizer-path", type=Path, help="the tokenizer's folder; default: the checkpoint")
    for option in ("--ignore-extra-files", "--allow-inexact", "--restart"):  # what refusals advise
        parser.add_argument(option, action="store_true", help="as for convert")
    add_progress(parser)


COMMANDS = (
    Command("convert", "write the file of each rank", add_convert, "reshard.cli.convert:run_convert"),
    Command("plan", "show what convert would write, from the headers alone", add_job, "reshard.cli.convert:run_plan"),
    Command("inspect", "show what a checkpoint holds", add_inspect, "reshard.cli.inspect:run_inspect"),
    Command("verify", "compare every byte of the rank files", add_verify, "reshard.cli.verify:run_verify"),
    Command("diff", "compare two checkpoints, tensor by tensor", add_diff, "reshard.cli.diff:run_diff"),
    Command("recipes", "list, show or check recipes", add_recipes, "reshard.cli.inspect:run_recipes"),
    Command("demo", "make a small checkpoint, convert it, verify it", add_demo, "reshard.cli.demo:run_demo"),
    Command(
        "deepseek", "convert, by the options of DeepSeek's scripts", add_deepseek, "reshard.cli.convert:run_deepseek"
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code: 0 proven, 1 problems found, 2 refused, 130 interrupted."""
    as_json = False
    try:
        options = parse_arguments(arguments)
        as_json = options.json
        module, function = options.run.split(":")
        run: Run = getattr(import_module(module), function)
        return run(options)
    except Refused as refused:
        if as_json:
            print_json({"status": "refused", **summarize_problems(refused.problems)})
        print_aside(f"reshard: refused\n{refused}")
        return REFUSED
    except OSError as error:
        what = f"{escape(str(error.filename or ''))}: {error.strerror or error}"
        print_aside(f"reshard: refused\n{what}")
        return REFUSED
    except KeyboardInterrupt as interrupt:
        print_aside("; ".join(["reshard: interrupted", *map(str, interrupt.args)]))
        return INTERRUPTED


OTHER_WORDS = dict.fromkeys(
    ("--tp", "--model-parallel", "--tensor-parallel", "--tensor-parallel-size", "--world-size", "--tp-size"), "--mp"
)
"""Option names of other programs -> our option."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options. An unknown option ends the program with the usage of its command and the nearest option."""
    options, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        parser: Parser = options.parser
        names = [name for action in parser._actions for name in action.option_strings]  # noqa: SLF001
        wanted = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
        nearest = [OTHER_WORDS[wanted]] if OTHER_WORDS.get(wanted) in names else get_close_matches(wanted, names, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        parser.error(f"unrecognized arguments: {escape(' '.join(unknown))}{hint}")
    options.words = [*(sys.argv[1:] if arguments is None else arguments)]
    return options


def make_parser() -> Parser:
    """Makes the parser of all commands."""
    about = "Turns a checkpoint into the files that each rank loads."
    parser = Parser(prog="reshard", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"reshard {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.about,
            description=command.about[0].upper() + command.about[1:] + ".",
            allow_abbrev=False,
        )
        command.add_options(sub)
        sub.add_argument("--json", action="store_true", help="print JSON instead of text")
        sub.set_defaults(run=command.run, parser=sub)
    return parser


def parse_positive(text: str) -> int:
    """Parses a whole number from 1 to 9999. Raises ArgumentTypeError."""
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 9999")
    return int(text)


def parse_share(text: str) -> Fraction:
    """Parses a percentage above 0 and up to 100 into a fraction: `0.5%` -> 1/200. Raises ArgumentTypeError."""
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1% or 0.5%")
    value = Fraction(found[1]) / 100
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: more than 0%, at most 100%")
    return value


UNITS = {
    "": 1,
    **{unit: 1 << 10 * (power + 1) for power, unit in enumerate("kmgt")},
    **{f"{unit}ib": 1 << 10 * (power + 1) for power, unit in enumerate("kmgt")},
    **{f"{unit}b": 1000 ** (power + 1) for power, unit in enumerate("kmgt")},
}
"""Units of size by name in lower case, in bytes. A single letter is the binary unit."""


def parse_size(text: str) -> int:
    """Parses a size into bytes: `256MiB` -> 268435456, `1.5kB` -> 1500, `12` -> 12. Raises ArgumentTypeError."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmgt](?:i?b)?)?", text.strip().lower())
    if not found:
        units = "KiB, MiB, GiB, TiB (or K, M, G, T), kB, MB, GB, TB, or none for bytes"
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 256MiB or 1.5GB; the units are {units}")
    return int(Fraction(found[1]) * UNITS[found[2] or ""])


def parse_numbers(text: str) -> list[int]:
    """Parses numbers and ranges: `0-3,7` -> [0, 1, 2, 3, 7]. Raises ArgumentTypeError."""
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is not like 0-3,7")
        found |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return sorted(found)
