"""The options of every command, in sections: what it works on, how it runs, what it prints."""

import argparse

from reshard.cli.help_text import describe_help
from reshard.cli.layout_options import CONVERTED, add_job
from reshard.cli.parser import ACTION, OUTPUT, RUNNING, Parser
from reshard.cli.shared_options import (
    IGNORE_HELP,
    add_config,
    add_html,
    add_ignore_extra_files,
    add_jobs,
    add_on,
    add_other_records,
    add_output,
    add_policies,
    add_progress,
    add_recipe_option,
)
from reshard.cli.values import (
    parse_fraction,
    parse_number,
    parse_numbers,
    parse_path,
    parse_positive,
    parse_size,
    parse_source,
    parse_word,
)

VERIFIED, REPAIRED, COMPARED, INSPECTED = (f"What to {verb}" for verb in ("verify", "repair", "compare", "inspect"))
"""The first section of other commands."""


def add_plan(parser: Parser) -> None:
    """Adds the options of `plan`."""
    add_source(parser)
    add_job(parser)
    parser.section(CONVERTED).add_argument(
        "--target",
        type=parse_path,
        metavar="DIR",
        help="A folder or an address: with --mp or --to hf, look whether the files can be written there; in a folder "
        "measure for two seconds how fast.",
    )
    add_html(parser, "Write a page for a browser too: what each rank holds, where it comes from, the proofs.")


def add_source(parser: Parser) -> None:
    """Adds the argument `source`."""
    what = parser.section(CONVERTED)
    what.add_argument(
        "source",
        type=parse_source,
        metavar="SOURCE",
        help="A folder of safetensors or .distcp files, one safetensors file, or an address: hf://ORG/NAME, s3://...",
    )


ON_HELP = "Let the tasks of a Ray cluster read and compare, each a part of the bytes."


def add_convert(parser: Parser) -> None:
    """Adds the options of `convert`."""
    add_source(parser)
    what, how = parser.section(CONVERTED), parser.section(RUNNING)
    what.add_argument(
        "target",
        type=parse_path,
        metavar="TARGET",
        help="The folder to write, empty or not there yet; or one in a store, such as s3://BUCKET/FOLDER.",
    )
    add_job(parser)
    how.add_argument("--dry-run", action="store_true", help="Show the plan and write nothing.")
    add_on(
        how, "Make shares by the tasks of a Ray cluster, and join them. --jobs and --max-memory are those of a task."
    )
    add_jobs(how)
    how.add_argument(
        "--max-memory",
        type=parse_size,
        default="256MiB",
        metavar="SIZE",
        help="The limit of all buffers together; the default is %(default)s.",
    )
    how.add_argument(
        "--cache",
        choices=("auto", "yes", "no"),
        default="auto",
        help="Go through the page cache or past it. By default, past it if the job is larger than a third of the free "
        "memory.",
    )
    add_policies(how)
    add_progress(parser)


def add_inspect(parser: Parser) -> None:
    """Adds the options of `inspect`."""
    what = parser.section(INSPECTED)
    what.add_argument(
        "path",
        type=parse_source,
        metavar="PATH",
        help="A folder of safetensors files in either layout, one such file, or an address of either.",
    )
    add_recipe_option(what)
    add_ignore_extra_files(what)
    add_config(what)
    what.add_argument(
        "--tensors",
        nargs="?",
        action="append",
        const="*",
        default=[],
        metavar="PATTERN",
        help="List the tensors, or those of such names, as in *.mlp.*; stands behind the path, and can be repeated.",
    )
    add_html(parser, "Write a page for a browser too: what lies there, by layer, module, dtype and file.")


def add_verify(parser: Parser) -> None:
    """Adds the options of `verify`."""
    what = parser.section(VERIFIED)
    what.add_argument(
        "target",
        type=parse_path,
        metavar="TARGET",
        help="A folder that was converted into, or its address; with --download or --sums, any checkpoint's folder.",
    )
    what.add_argument(
        "--source",
        type=parse_source,
        metavar="SOURCE",
        help="The checkpoint that it was made from. Without it, the checksums of the manifest are compared.",
    )
    add_recipe_option(what)
    what.add_argument("--ranks", type=parse_numbers, metavar="0-3,7", help="Verify the files of these ranks only.")
    add_ignore_extra_files(what, f"With --source, {IGNORE_HELP[0].lower()}{IGNORE_HELP[1:]}")
    add_config(what, "With --source: the --config that it was converted with.")
    add_other_records(what)
    parser.section(RUNNING).add_argument(
        "--sample",
        type=parse_fraction,
        metavar="1%",
        help="Compare about this share only, spread evenly, and both ends of each tensor.",
    )
    add_on(parser.section(RUNNING), ON_HELP)
    add_progress(parser)


def add_repair(parser: Parser) -> None:
    """Adds the options of `repair`."""
    what, how = parser.section(REPAIRED), parser.section(RUNNING)
    what.add_argument("target", type=parse_path, metavar="TARGET", help="A folder with its reshard.json.")
    what.add_argument(
        "--source", type=parse_source, metavar="SOURCE", help="What it was made from; for damaged files only."
    )
    add_recipe_option(what, "A recipe. By default the one that the manifest names.")
    what.add_argument("--ranks", type=parse_numbers, metavar="0-3,7", help="Repair the files of these ranks only.")
    add_ignore_extra_files(what)
    add_config(what, "The --config that it was converted with.")
    how.add_argument("--dry-run", action="store_true", help="Show what is damaged and write nothing.")
    add_jobs(how)
    add_progress(parser)


def add_diff(parser: Parser) -> None:
    """Adds the options of `diff`."""
    what = parser.section(COMPARED)
    what.add_argument(
        "a",
        type=parse_source,
        metavar="A",
        help="A checkpoint, a folder of rank files, a safetensors file, or an address.",
    )
    what.add_argument("b", type=parse_source, metavar="B", help="Another one, in whichever layout.")
    what.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="Compare the tensors of these names only, such as '*.3.*'. It can be repeated.",
    )
    what.add_argument("--dequantize", action="store_true", help="Compare weights of different dtypes in BF16.")
    add_recipe_option(what, "The recipe of both sides. By default the model decides.")
    what.add_argument(
        "--replicas",
        choices=("compare", "first"),
        default="compare",
        help="Where several ranks hold the same, compare them all, which is the default, or take the first.",
    )
    add_ignore_extra_files(what)
    add_config(what, "The folder of config.json, for a side that has none, as after a training.")
    add_on(parser.section(RUNNING), ON_HELP)
    parser.section(OUTPUT).add_argument(
        "--show",
        type=parse_positive,
        default=20,
        metavar="N",
        help="The number of lines of each table; the default is 20.",
    )
    add_html(parser, "Write a page for a browser too: how far they are apart, by layer, module and expert.")
    add_progress(parser)


def add_recipes(parser: Parser) -> None:
    """Adds the actions of `recipes`, each a parser of its own. Without one, the recipes are listed."""
    parser.set_defaults(action="list")
    actions = parser.add_subparsers(title="Actions", metavar=ACTION, prog=parser.prog)
    for action, about in (
        ("list", "List the packaged recipes, with the models they were checked against."),
        ("show", "Print a recipe."),
        ("check", "Check that a recipe fits a checkpoint."),
    ):
        words = describe_help(f"recipes {action}", parser.prog.removesuffix(" recipes"))
        own = actions.add_parser(action, help=about, **words)
        own.set_defaults(action=action)
        what = own.section("What to show" if action == "show" else "What to check")
        if action != "list":
            what.add_argument(
                "recipe", type=parse_word, metavar="NAME|FILE", help="The name of a packaged recipe, or a TOML file."
            )
        if action == "check":
            what.add_argument(
                "source", type=parse_source, metavar="SOURCE", help="The checkpoint to hold the recipe against."
            )
        # Not False: it would undo `reshard recipes --json list`.
        add_output(own, json_default=argparse.SUPPRESS)


def add_demo(parser: Parser) -> None:
    """Adds the options of `demo`."""
    parser.section("Where to run").add_argument(
        "folder",
        nargs="?",
        type=parse_path,
        metavar="FOLDER",
        help="Keep the files in this folder, empty or not there yet. By default they are removed again.",
    )


def add_deepseek(parser: Parser) -> None:
    """Adds the options of `deepseek`, by their names in all of DeepSeek's scripts."""
    what, how = parser.section(CONVERTED), parser.section(RUNNING)
    what.add_argument(
        "--hf-ckpt-path",
        type=parse_source,
        metavar="SOURCE",
        required=True,
        help="The Hugging Face checkpoint; required.",
    )
    what.add_argument(
        "--save-path",
        type=parse_path,
        metavar="TARGET",
        required=True,
        help="The folder to write, empty or not there yet.",
    )
    what.add_argument(
        "--model-parallel", type=parse_number, metavar="N", required=True, help="The number of ranks; required."
    )
    what.add_argument(
        "--n-experts",
        type=parse_number,
        metavar="N",
        help="The number of routed experts, without those of draft blocks. It is compared with the config.",
    )
    what.add_argument("--expert-dtype", choices=("fp4", "fp8"), help="With fp8, cast the FP4 experts of V4 to FP8.")
    what.add_argument(
        "--tokenizer-path",
        type=parse_path,
        metavar="FOLDER",
        help="The folder of the tokenizer. By default it is the checkpoint.",
    )
    # What refusals advise.
    add_ignore_extra_files(what)
    add_policies(how)
    add_progress(parser)
