"""Options that several commands share, such as recipe, threads and output; and the records that `verify` looks into."""

import argparse

from reshard.cli.parser import OUTPUT, Parser, PrintCompletion
from reshard.cli.values import parse_path, parse_positive, parse_word

IGNORE_HELP = (
    "Leave out files and tensors that the index does not name; without an index, all files but one numbered set."
)

RECIPE_HELP = "The name of a packaged recipe, or a TOML file. By default the model decides."


CONFIG_HELP = "The folder of config.json and tokenizer, if none lie beside the source, as after a training."


def add_recipe_option(group: argparse._ArgumentGroup, about: str = RECIPE_HELP) -> None:
    """Adds the option that chooses a recipe."""
    group.add_argument("--recipe", type=parse_word, metavar="NAME|FILE", help=about)


def add_ignore_extra_files(group: argparse._ArgumentGroup, about: str = IGNORE_HELP) -> None:
    """Adds the option of every command that reads a checkpoint."""
    group.add_argument("--ignore-extra-files", action="store_true", help=about)


def add_config(group: argparse._ArgumentGroup, about: str = CONFIG_HELP) -> None:
    """Adds the folder of the config to a command that reads a source."""
    group.add_argument("--config", type=parse_path, metavar="FOLDER", help=about)


def add_jobs(group: argparse._ArgumentGroup) -> None:
    """Adds the number of threads to a command that writes."""
    group.add_argument(
        "--jobs", type=parse_positive, metavar="N", help="The number of threads. By default the processors decide."
    )


def add_on(group: argparse._ArgumentGroup, about: str) -> None:
    """Adds the cluster that a command runs on."""
    group.add_argument("--on", type=parse_word, metavar="ray[=ADDRESS]", help=about)


def add_policies(group: argparse._ArgumentGroup) -> None:
    """Adds what a refusal may advise to a command that writes."""
    group.add_argument("--allow-inexact", action="store_true", help="Round what a cast cannot express, and count it.")
    group.add_argument(
        "--restart", action="store_true", help="Throw away what an interrupted run has left, and begin again."
    )
    group.add_argument(
        "--yes", action="store_true", help="With --restart, remove the files of a finished target too, without asking."
    )


def add_html(parser: Parser, about: str) -> None:
    """Adds the option that writes a page."""
    parser.section(OUTPUT).add_argument("--html", type=parse_path, metavar="FILE", help=about)


def add_progress(parser: Parser) -> None:
    """Adds the options on what a command says while it works."""
    output = parser.section(OUTPUT)
    output.add_argument(
        "--progress",
        choices=("auto", "bar", "log", "json", "none"),
        help="How progress is shown on standard error. By default a bar on a terminal, else a line every 30 seconds.",
    )
    output.add_argument("--quiet", action="store_true", help="Print no progress and no summary, only what is wrong.")


def add_output(parser: Parser, json_default: object = False) -> None:  # noqa: FBT002
    """Adds the options that every command has, below all others."""
    output = parser.section(OUTPUT)
    output.add_argument(
        "--json", action="store_true", default=json_default, help="Print one JSON document instead of text."
    )
    add_help(output)


def add_help(group: argparse._ArgumentGroup) -> None:
    """Adds the option that prints the help."""
    group.add_argument("-h", "--help", action="help", help="Print this help.")


def add_program(parser: Parser, version: str) -> None:
    """Adds the options of the program itself."""
    options = parser.section("Options")
    options.add_argument("-V", "--version", action="version", version=version, help="Print the version.")
    options.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh"),
        help="Print the completion script of a shell (it needs the package shtab).",
    )
    add_help(options)


def add_other_records(group: argparse._ArgumentGroup) -> None:
    """Adds the options of `verify` that compare the files with other records than the manifest."""
    group.add_argument(
        "--download", action="store_true", help="Compare the files with the hashes that the hub's downloader left."
    )
    group.add_argument(
        "--sums", type=parse_path, metavar="FILE", help="Compare the files with a list that sha256sum has written."
    )
    group.add_argument(
        "--checksums-only",
        action="store_true",
        help="In a bucket: compare sizes and ETags with those of the upload, and read no tensor.",
    )
