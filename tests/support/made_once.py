"""Checkpoints that take long to make: each is made once in a process, and copied from then on."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec

Options = ParamSpec("Options")
Write = Callable[Concatenate[Path, Options], None]


def make_once(write: Write[Options]) -> Write[Options]:
    """The same function, which writes a checkpoint into a folder; with the same options it writes by copying."""
    made: dict[str, Path] = {}

    @functools.wraps(write)
    def copy(folder: Path, /, *arguments: Options.args, **options: Options.kwargs) -> None:
        key = repr((arguments, sorted(options.items())))
        if key not in made:
            place = tempfile.mkdtemp(prefix="reshard-tests-")
            atexit.register(shutil.rmtree, place, ignore_errors=True)
            write(Path(place), *arguments, **options)
            made[key] = Path(place)
        shutil.copytree(made[key], folder, dirs_exist_ok=True)
        folder.chmod(0o755)  # not that of a temporary folder

    return copy
