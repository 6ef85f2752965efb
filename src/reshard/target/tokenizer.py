"""The tokenizer of a target, taken from another folder than the source."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from reshard.errors import Problem, Refused, refuse
from reshard.paths import AnyPath
from reshard.recipe_types import Recipe
from reshard.text import format_list
from reshard.types import Note

WORD = "token"
"""Part of the name of every file of a tokenizer."""

TOKENIZER = "tokenizer.json"
"""The tokenizer itself, where a recipe names it."""

CONFIG_OF_TOKENIZER = "tokenizer_config.json"
"""What most loaders of a tokenizer look for, too."""


def find_tokenizer(folder: AnyPath | None, recipe: Recipe) -> Mapping[str, AnyPath] | None:
    """Finds the tokenizer files in a folder, those that the recipe carries; name -> path. None without a folder.

    Raises Refused if the recipe carries none, or if the folder has no tokenizer.
    """
    if folder is None:
        return None
    patterns = list_tokenizer_patterns(recipe)
    if not patterns:
        expected = f"a recipe that carries a tokenizer; {recipe.name} does not"
        raise refuse("wrong-option", "--tokenizer-path", "given", expected, "leave it out")
    if folder.exists() and not folder.is_dir():
        expected = f"the folder of {format_list(patterns)}"
        raise refuse("wrong-option", "--tokenizer-path", f"{folder} is a file", expected, "the folder that it lies in")
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        found, expected = error.strerror or str(error), "the folder of a tokenizer"
        raise refuse("cannot-read", str(folder), found, expected, "correct --tokenizer-path") from None
    files = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    lacking = list_lacking(patterns, files)
    if not files or TOKENIZER in lacking:
        remedy = "download it, or correct --tokenizer-path"
        raise Refused(
            Problem("missing-file", str(folder / name), "not there", "a file of the tokenizer", remedy)
            for name in lacking
        )
    return {name: folder / name for name in files}


def note_lacking(
    tokenizer: Mapping[str, AnyPath] | None, recipe: Recipe, sides: Mapping[str, AnyPath]
) -> tuple[Note, ...]:
    """Notes the files that the folder of a tokenizer lacks: they are not taken from the source, which has `sides`."""
    if not tokenizer:
        return ()
    patterns = list_tokenizer_patterns(recipe)
    # `*token*` names no file: then those of the source tell what a tokenizer has.
    known = [name for name in (CONFIG_OF_TOKENIZER, *sides) if any(fnmatchcase(name, one) for one in patterns)]
    wanted = [*(one for one in patterns if "*" not in one), *known]
    lacking = format_list(name for name in dict.fromkeys(wanted) if name not in tokenizer)
    folder = next(iter(tokenizer.values())).parent
    return (Note("no-tokenizer-file", f"without {lacking}: not in {folder}"),) if lacking else ()


def list_tokenizer_patterns(recipe: Recipe) -> list[str]:
    """Lists the patterns of a recipe that carry tokenizer files."""
    return [pattern for pattern in recipe.carry if WORD in pattern]


def list_lacking(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Lists the patterns that no name fits."""
    return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


def choose_tokenizer(sides: Mapping[str, AnyPath], tokenizer: Mapping[str, AnyPath] | None) -> dict[str, AnyPath]:
    """Chooses the side files: those of a source, and in the place of its tokenizer another one; name -> path."""
    if tokenizer is None:
        return dict(sides)
    return {name: path for name, path in sides.items() if WORD not in name} | dict(tokenizer)
