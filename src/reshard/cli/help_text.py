"""The texts of the help around the options: usage, description, examples, exit codes, and the page of the docs."""

from collections.abc import Mapping
from typing import NamedTuple, TypedDict


class HelpText(NamedTuple):
    """The help of a command or an action, without its options."""

    usage: str
    """What stands behind the name of the command."""
    description: str
    examples: tuple[str, ...]
    codes: str
    page: str


class HelpWords(TypedDict):
    """The help as keyword arguments of argparse."""

    usage: str
    description: str
    epilog: str


CHECKED_CODES = "0 if all is equal, 1 if there are differences, 2 if it is refused."
CONVERTED_CODES = "0 if it is converted, 2 if it is refused, 130 if it is interrupted."
LOOKED_CODES = "0 if it is done, 2 if it is refused."

PROGRAM = HelpText(
    "COMMAND ...",
    "Turn the weights of a large model from any layout into any other, and prove every byte.",
    (
        "reshard demo",
        "reshard convert DeepSeek-V3 DeepSeek-V3-mp16 --mp 16",
        "reshard verify DeepSeek-V3-mp16 --source DeepSeek-V3",
    ),
    "0 if it is done or equal, 1 if verify or diff has found differences,\n"
    "2 if it is refused or an option is wrong, 70 for a fault of reshard itself,\n"
    "130 if it is interrupted, 141 if the reader of its output has gone.",
    "README.md",
)

HELP: Mapping[str, HelpText] = {
    "convert": HelpText(
        "SOURCE TARGET --mp N [options]",
        "Write the file of each rank; or whole files with --to hf, or slices with --to dcp. All is\n"
        "checked before the first byte is written, and the same command resumes after an interruption.",
        (
            "reshard convert DeepSeek-V3 DeepSeek-V3-mp16 --mp 16",
            "reshard convert DeepSeek-V3 DeepSeek-V3-bf16 --to hf --cast bf16",
            "reshard convert DeepSeek-V3-mp16 DeepSeek-V3-again --to hf",
            "reshard convert Llama-3.1-8B Llama-3.1-8B-dcp --to dcp --ranks 8",
        ),
        CONVERTED_CODES,
        "docs/convert.md",
    ),
    "plan": HelpText(
        "SOURCE [--mp N] [options]",
        "Show what convert would write, from the headers alone; without --mp the numbers of ranks that work.",
        (
            "reshard plan DeepSeek-V3",
            "reshard plan DeepSeek-V3 --mp 16",
            "reshard plan DeepSeek-V3 --to hf --cast bf16 --json",
        ),
        LOOKED_CODES,
        "docs/convert.md",
    ),
    "inspect": HelpText(
        "PATH [options]",
        "Show what a checkpoint holds: its layout, recipe, layers and dtypes.",
        ("reshard inspect DeepSeek-V3", "reshard inspect DeepSeek-V3-mp16/model0-mp16.safetensors"),
        LOOKED_CODES,
        "docs/what-lies-there.md",
    ),
    "verify": HelpText(
        "TARGET [--source SOURCE] [options]",
        "Compare every byte of a target with its source, or with the checksums of its manifest.",
        (
            "reshard verify DeepSeek-V3-mp16 --source DeepSeek-V3",
            "reshard verify DeepSeek-V3-mp16",
            "reshard verify DeepSeek-V3 --download",
        ),
        CHECKED_CODES,
        "docs/verify.md",
    ),
    "repair": HelpText(
        "TARGET [--source SOURCE] [options]",
        "Compare a target with the checksums of its manifest, and write its damaged and missing\n"
        "files again. A new file takes its place when it has these checksums, not before.",
        (
            "reshard repair DeepSeek-V3-mp16 --source DeepSeek-V3",
            "reshard repair DeepSeek-V3-mp16 --dry-run",
            "reshard repair DeepSeek-V3-mp16 --source DeepSeek-V3 --ranks 4-7",
        ),
        "0 if all is as it was written, 1 if something still differs, 2 if it is refused,\n130 if it is interrupted.",
        "docs/repair.md",
    ),
    "diff": HelpText(
        "A B [options]",
        "Compare two checkpoints of any layout, tensor by tensor.",
        ("reshard diff DeepSeek-V3 DeepSeek-V3-0324 --only '*.layers.3.*'", "reshard diff before after --dequantize"),
        CHECKED_CODES,
        "docs/diff.md",
    ),
    "recipes": HelpText(
        "[list | show | check] [options]",
        "List, show or check recipes. Without an action, list the packaged ones.",
        ("reshard recipes", "reshard recipes show deepseek-v3", "reshard recipes check mine.toml MyModel"),
        LOOKED_CODES,
        "docs/recipes.md",
    ),
    "recipes list": HelpText(
        "[options]",
        "List the packaged recipes, each with the models that it was checked against.",
        ("reshard recipes list", "reshard recipes list --json"),
        LOOKED_CODES,
        "docs/recipes.md",
    ),
    "recipes show": HelpText(
        "NAME|FILE [options]",
        "Print a recipe: the text of its file, or its parsed rules with --json.",
        ("reshard recipes show deepseek-v3 > mine.toml", "reshard recipes show mine.toml --json"),
        LOOKED_CODES,
        "docs/recipes.md",
    ),
    "recipes check": HelpText(
        "NAME|FILE SOURCE [options]",
        "Check that a recipe fits a checkpoint: every tensor stands under one rule and agrees\n"
        "with the config, and none is missing.",
        ("reshard recipes check mine.toml MyModel", "reshard recipes check deepseek-v3 DeepSeek-V3 --json"),
        "0 if it fits, 2 if it does not.",
        "docs/tutorial-recipe.md",
    ),
    "demo": HelpText(
        "[FOLDER] [options]",
        "Make a small checkpoint of DeepSeek-V3's true layout, convert it for 4 ranks, verify it.",
        ("reshard demo", "reshard demo try"),
        CHECKED_CODES,
        "README.md",
    ),
    "deepseek": HelpText(
        "--hf-ckpt-path SOURCE --save-path TARGET --model-parallel N [options]",
        "Convert, by the options of DeepSeek's inference/convert.py.",
        (
            "reshard deepseek --hf-ckpt-path V3 --save-path V3-mp16 --n-experts 256 --model-parallel 16",
            "reshard deepseek --hf-ckpt-path V4 --save-path V4-mp8 --model-parallel 8 --expert-dtype fp8",
        ),
        CONVERTED_CODES,
        "docs/convert.md",
    ),
}
"""The help of each command and action."""


def describe_help(name: str, program: str) -> HelpWords:
    """Describes a command or an action for argparse; an empty name is the program itself."""
    text = HELP[name] if name else PROGRAM
    examples = "\n".join(f"  {example}" for example in text.examples)
    codes = "\n  ".join(text.codes.split("\n"))
    return {
        "usage": " ".join(filter(None, [program, name, text.usage])),
        "description": text.description,
        "epilog": f"Examples:\n{examples}\n\nExit code:\n  {codes}\n\n"
        f"Documentation: {text.page}, in the repository of reshard",
    }
