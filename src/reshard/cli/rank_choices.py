"""Prints the numbers of ranks that work, for `plan` without one."""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from reshard import __version__
from reshard.cli.outcome import PROVEN
from reshard.cli.terminal import print_json
from reshard.errors import refuse, require_none
from reshard.formats.manifest import list_subset_lines
from reshard.formats.remote_names import read_location, require_path, restore_address
from reshard.planning.options import check_source_options, choose_subset, require_layout
from reshard.planning.plan import describe_notes
from reshard.planning.rank_choices import GPUS, MOST_TRIED, RankChoice, list_rank_choices
from reshard.sources.source import Source, read_chosen
from reshard.target.manifest_writer import describe_made_with
from reshard.text import escape, format_command_lines, format_count, format_size, format_table

MOST_WEIGHTS = 90
"""Percent of a GPU's memory that the weights may take: some of it must be left for activations and the KV cache."""


def print_choices(options: argparse.Namespace) -> int:
    """Prints the numbers of ranks that work as a table or JSON. Returns the exit code. Raises Refused."""
    layout = require_layout(
        None,
        options.to,
        options.cast,
        options.expert_dtype,
        keep_mtp=options.mtp == "keep",
        pad=options.pad,
        file_size=options.max_file_size,
    )
    subset = choose_subset(options.layers, options.experts, options.only, renumber=options.renumber)
    source = read_chosen(
        require_path(options.source),
        layout,
        subset,
        options.recipe,
        options.for_engine,
        options.replicas,
        ignore_extra_files=options.ignore_extra_files,
        config_folder=read_location(options.config),
    )
    require_none(check_source_options(source, options.replicas, None))
    for name in ("ranks", "target", "html"):
        if getattr(options, name) is not None:
            remedy = f"add --mp N{' or --to hf' if name != 'ranks' else ''}; without --{name}, plan shows which N work"
            raise refuse("wrong-option", f"--{name}", "no number of ranks", "--mp N with it", remedy)
    choices = list_rank_choices(source, layout, subset.only)
    if options.json:
        print_json(describe_choice_facts(source, choices))
    else:
        lines = [*describe_choices(source, choices), *format_command_lines("next", make_next_command(options, choices))]
        print("\n".join(map(escape, lines)))
    return PROVEN


def describe_choices(source: Source, choices: Sequence[RankChoice]) -> Iterator[str]:
    """Describes the numbers of ranks that work as a table for people."""
    tensors = format_count(len(source.checkpoint.tensors), "tensors")
    yield f"{source.path}: {tensors}, by the recipe {source.recipe.name}"
    yield from list_subset_lines(source.checkpoint.subset)
    yield f"Of the numbers of ranks from 1 to {MOST_TRIED} these work:"
    yield ""
    rows = []
    for choice in choices:
        gpu = find_smallest_gpu(choice.size)
        size = f"{choice.size:,}", format_size(choice.size)
        word = "--pad" if choice.needs_pad else ""
        rows.append((f"{choice.ranks}", f"{choice.tensors:,}", *size, f"{gpu} GB" if gpu else "-", word))
    heading = ("ranks", "tensors", "largest rank", "", "GPU from", "")
    yield from format_table(heading, rows).splitlines()
    yield ""
    yield f"GPU from: the weights fill at most {MOST_WEIGHTS} %; activations and KV cache need the rest"
    yield "; ".join(f"{memory} GB: {names}" for memory, names in GPUS)
    yield from describe_notes(source.checkpoint.notes)


def describe_choice_facts(source: Source, choices: Sequence[RankChoice]) -> dict[str, Any]:
    """Describes the numbers of ranks that work as JSON values."""
    return {
        "reshard": __version__,
        "recipe": describe_made_with(source.recipe),
        "tried": [1, MOST_TRIED],
        "choices": [
            {
                "ranks": choice.ranks,
                "pad": choice.needs_pad,
                "tensors": choice.tensors,
                "bytes": choice.size,
                "gpu_gb": find_smallest_gpu(choice.size),
            }
            for choice in choices
        ],
        "notes": [note._asdict() for note in source.checkpoint.notes],
    }


def find_smallest_gpu(size: int) -> int | None:
    """Finds the smallest memory, in GB, that holds tensors of `size` bytes and leaves some room; None if none does."""
    return next((memory for memory, _ in GPUS if size * 100 <= memory * 10**9 * MOST_WEIGHTS), None)


def make_next_command(options: argparse.Namespace, choices: Sequence[RankChoice]) -> str:
    """Makes the shell command that converts for the fewest ranks, but more than one, that fit the smallest GPU."""
    several = [choice for choice in choices if choice.ranks > 1] or choices
    fitting = [choice for choice in several if find_smallest_gpu(choice.size) == GPUS[0][0]]
    choice = fitting[0] if fitting else several[-1]
    words = ["reshard", "convert", restore_address(options.source), "TARGET", "--mp", str(choice.ranks)]
    for option in ("cast", "expert-dtype", "recipe", "for"):
        if value := getattr(options, {"for": "for_engine"}.get(option, option.replace("-", "_"))):
            words += [f"--{option}", value]
    for name, usual in (("mtp", "drop"), ("replicas", "compare")):
        words += [f"--{name}", getattr(options, name)] if getattr(options, name) != usual else []
    for name in ("layers", "experts"):
        if (numbers := getattr(options, name)) is not None:
            words += [f"--{name}", ",".join(map(str, numbers))]
    words += [word for pattern in options.only for word in ("--only", pattern)]
    words += ["--renumber"] if options.renumber else []
    words += ["--pad"] if options.pad or choice.needs_pad else []
    words += ["--config", restore_address(options.config)] if options.config else []
    words += ["--ignore-extra-files"] if options.ignore_extra_files else []
    return shlex.join(words)
