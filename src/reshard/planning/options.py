"""Checks the options of a conversion: wrong values, contradictions, and options that would do nothing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from operator import index
from typing import Any, SupportsIndex

from reshard.errors import Problem, refuse
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import has_ranks
from reshard.sources.block_scales import CAST_TO_FP8
from reshard.sources.engine_choice import choose_uncut_layout
from reshard.sources.source import Source
from reshard.text import format_runs
from reshard.types import COMPARE, FIRST, MOST_RANKS, NVFP4, RANKS, SLICED, WHOLE, Layout, Subset

WHOLE_HINT = "for rank files leave out --to hf; for whole files leave out --mp and --pad"

AS_STORED = "fp4"
"""The expert dtype that casts nothing."""


NO_CAST = "leave --cast out, and let the engine quantize when it loads; or a recipe of your own with scales (--recipe)"
"""What can be done instead of a cast to FP8 where a recipe has no block scales."""


def check_options(recipe: Recipe, layout: Layout, ranks: Sequence[int] | None) -> Iterator[Problem]:
    """Reports wrong values of options, options that contradict each other, and options that would do nothing."""
    for option, value, known in (
        ("--to", layout.to, (RANKS, WHOLE, SLICED)),
        ("--cast", layout.cast, ("", "bf16", *CAST_TO_FP8, NVFP4)),
        ("--expert-dtype", layout.expert_dtype, ("", AS_STORED, "fp8")),
    ):
        if value not in known:
            yield Problem("wrong-option", option, repr(value), "one of " + ", ".join(filter(None, known)))
    if not 1 <= layout.ranks <= MOST_RANKS:
        yield Problem("wrong-ranks", "--mp", f"{layout.ranks} ranks", f"1 to {MOST_RANKS}")
    if layout.cast in CAST_TO_FP8 and not recipe.scales:
        found = f"{layout.cast}, for {recipe.name}, whose weights have no block scales"
        yield Problem("wrong-option", "--cast", found, "a recipe with block scales", NO_CAST)
    if layout.cast in CAST_TO_FP8 and any(scale.packed for scale in recipe.scales.values()):
        expected = f"bf16; the model of {recipe.name} reads FP8 and FP4 side by side, which no cast makes"
        yield Problem("wrong-option", "--cast", layout.cast, expected)
    if layout.expert_dtype and not any(scale.packed for scale in recipe.scales.values()):
        expected = f"a recipe with packed FP4 weights; {recipe.name} has none"
        yield Problem("wrong-option", "--expert-dtype", layout.expert_dtype, expected, "leave it out")
    if layout.keep_optional and not any(rule.optional for rule in recipe.rules):
        yield Problem("wrong-option", "--mtp", "keep", f"a recipe that leaves MTP layers out; {recipe.name} does not")
    if layout.pad and not recipe.padded:
        yield Problem(
            "wrong-option", "--pad", "given", f"a recipe that says what may be padded; {recipe.name} does not"
        )
    yield from check_uncut_layout(recipe, layout)
    if layout.cast and layout.expert_dtype:
        expected = "one of them: both say what becomes of FP4 experts"
        yield Problem("wrong-option", "--expert-dtype", f"{layout.expert_dtype}, with --cast {layout.cast}", expected)
    if layout.file_size is not None and layout.file_size < 0:
        yield Problem("wrong-option", "--max-file-size", f"{layout.file_size:,} bytes", "0 or more")
    yield from check_rank_options(recipe, layout, ranks)
    if layout.to != WHOLE and layout.file_size is not None:
        is_of_ranks = layout.to == SLICED or has_ranks(recipe)
        reason = "a rank has one file" if is_of_ranks else f"the recipe {recipe.name} has one file"
        yield Problem("wrong-option", "--max-file-size", "without --to hf", f"--to hf: {reason}", "leave it out")


def check_uncut_layout(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Reports options of rank files with a layout of whole tensors."""
    if layout.to == WHOLE and (layout.pad or layout.ranks != 1):
        yield Problem("wrong-option", "--to hf", "with --mp or --pad", "neither: nothing is cut", WHOLE_HINT)
    if layout.to == SLICED and layout.pad:
        expected = "no padding: slices may be of any length"
        yield Problem("wrong-option", "--pad", "with --to dcp", expected, "leave it out")
    if layout.cast == NVFP4 and layout.to != WHOLE:
        expected = "--to hf: engines read NVFP4 from whole files"
        yield Problem("wrong-option", "--cast", f"{NVFP4}, without --to hf", expected, "add --to hf")
    if layout.keep_optional and choose_uncut_layout(recipe, layout).to == WHOLE:
        expected = "neither word: everything is kept under the names of the hub"
        yield Problem("wrong-option", "--mtp", f"keep, with --to {layout.to}", expected)


def check_rank_options(recipe: Recipe, layout: Layout, ranks: Sequence[int] | None) -> Iterator[Problem]:
    """Reports chosen ranks that are none or have no meaning, and several ranks where a recipe makes whole files."""
    if ranks is not None and not ranks:
        yield Problem("wrong-option", "--ranks", "no rank", "at least one, or leave it out")
    if layout.to == WHOLE and ranks is not None:
        yield Problem("wrong-option", "--ranks", "with --to hf", "no ranks: nothing is cut")
    if recipe.whole_only and layout.to == RANKS:
        found = f"rank files of {recipe.name}"
        yield Problem("wrong-option", "--mp", found, f"none: {recipe.whole_only}", "--to hf, or --to dcp, instead")
    if layout.ranks > 1 and layout.to == RANKS and not has_ranks(recipe):
        words = " and ".join([f"--for {recipe.engine}"] * bool(recipe.engine) + [f"--recipe {recipe.name}"])
        remedy = f"leave out --mp; rank files are made without {words}"
        found = f"{layout.ranks} ranks, for {recipe.name}"
        yield Problem("wrong-option", "--mp", found, "no number, or 1: it is whole files, which nothing cuts", remedy)


def require_layout(
    mp: int | None,
    to: str,
    cast: str | None,
    expert_dtype: str | None,
    *,
    keep_mtp: bool,
    pad: bool,
    file_size: int | None,
) -> Layout:
    """Makes the layout of a target from options; `file_size` is in bytes. Without a number of ranks that is needed,
    the layout has 0 of them. Raises Refused for wrong numbers.
    """
    ranks = int(to not in (RANKS, SLICED)) if mp is None else require_whole_number("--mp", mp)
    if mp is not None and not ranks:
        raise refuse("wrong-ranks", "--mp", "0 ranks", f"1 to {MOST_RANKS}")
    if file_size is not None:
        file_size = require_whole_number("--max-file-size", file_size)
    return Layout(ranks, to, cast or "", expert_dtype or "", keep_mtp, pad, file_size)


def split_number_of_ranks(
    mp: int | None, to: str, ranks: Iterable[int] | int | None
) -> tuple[int | None, Iterable[int] | None]:
    """The number of ranks, and the chosen ones. For slices `ranks` may be the number itself, as torch says it. Raises
    Refused for both, for a single number anywhere else, and for a choice of slices without the number of all.
    """
    if ranks is None:
        return mp, None
    if isinstance(ranks, Iterable):
        if to == SLICED and mp is None:
            chosen = sort_numbers("--ranks", ranks) or ()
            found = f"{','.join(format_runs(chosen)) or 'no rank'}, and no number of ranks"
            remedy = "add --mp N: --ranks then chooses those whose files are written"
            raise refuse("wrong-option", "--ranks", found, "with --to dcp the number of ranks, such as 8", remedy)
        return mp, ranks
    if to != SLICED:
        remedy = "mp=N is the number of ranks; ranks=range(0, 4) writes the files of these only"
        raise refuse("wrong-option", "--ranks", repr(ranks), "a list of whole numbers", remedy)
    if mp is not None:
        found = f"{ranks!r}, with --mp {mp!r}"
        raise refuse("wrong-option", "--ranks", found, "one of them: each is the number of ranks", "leave --ranks out")
    return require_whole_number("--ranks", ranks), None


def require_whole_number(option: str, value: Any) -> int:
    """Returns the value of an option as an int. Raises Refused if it is no whole number."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise refuse("wrong-option", option, repr(value), "a whole number")
    return index(value)


def check_source_options(source: Source, replicas: str, n_experts: int | None) -> Iterator[Problem]:
    """Reports options that do not suit a source: `replicas` without rank files, or a wrong number of experts."""
    yield from check_replicas(replicas)
    is_of_ranks = source.origin.is_of_ranks and not source.unstacked
    if replicas == FIRST and not is_of_ranks and source.checkpoint.boxes is None:
        expected = "rank files as the source, or a distributed checkpoint"
        yield Problem("wrong-option", "--replicas", "first", expected, "leave it out")
    placeholders = source.recipe.placeholders
    found = [count for name, count in source.matched.counts.items() if placeholders[name].counts == "experts"]
    if n_experts is not None and not found:
        expected = "none: by the names of the tensors the model has no experts"
        remedy = "leave it out; is this a DeepSeek model?"
        yield Problem("contradiction", "--n-experts", str(n_experts), expected, remedy)
    elif n_experts is not None and n_experts not in found:
        expected = f"{found[0]}, by the names of the tensors"
        yield Problem("contradiction", "--n-experts", str(n_experts), expected, "correct the option")


def check_replicas(replicas: str) -> Iterator[Problem]:
    """Finds a choice of replicas that does not exist."""
    if replicas not in (COMPARE, FIRST):
        yield Problem("wrong-option", "--replicas", repr(replicas), f"{COMPARE} or {FIRST}")


def choose_subset(
    layers: Iterable[int] | None, experts: Iterable[int] | None, only: Iterable[str], *, renumber: bool
) -> Subset:
    """The part of a checkpoint that the arguments choose. Raises Refused."""
    return Subset(sort_numbers("--layers", layers), sort_numbers("--experts", experts), renumber, list_patterns(only))


def sort_numbers(option: str, numbers: Iterable[int] | None) -> tuple[int, ...] | None:
    """The numbers of an option, each once. Raises Refused for anything but whole numbers."""
    if numbers is None:
        return None
    if isinstance(numbers, str):
        raise refuse("wrong-option", option, repr(numbers), "a list of whole numbers", "range(0, 3), or [0, 1, 2]")
    if not isinstance(numbers, Iterable):
        raise refuse("wrong-option", option, repr(numbers), "a list of whole numbers")
    return tuple(sorted({require_whole_number(option, number) for number in numbers}))


def list_patterns(only: Iterable[str]) -> tuple[str, ...]:
    """Patterns of names; a single one may come as a plain string."""
    return (only,) if isinstance(only, str) else tuple(only)


def read_sample(sample: float | Fraction | None) -> Fraction | None:
    """The part of the bytes to compare, exactly as it was written. Raises Refused."""
    if sample is None:
        return None
    try:
        part = Fraction(str(sample))
    except ValueError:
        part = Fraction(0)
    if not 0 < part <= 1:
        raise refuse("wrong-option", "--sample", str(sample), "more than 0 and at most 1")
    return part


def check_download_options(others: Mapping[str, object], sums: object, *, is_hub: bool) -> Iterator[Problem]:
    """Reports what is given beside `--download` (`is_hub`) or `--sums`; `others` are None where they are not given."""
    if is_hub and sums is not None:
        expected = "one of them: each says what the files are compared with"
        yield Problem("wrong-option", "--sums", "with --download", expected, "leave one of them out")
    chosen = "--download" if is_hub else "--sums"
    for name, value in others.items():
        if value is not None:
            expected = f"without {chosen}: that compares whole files with their hashes, and nothing else"
            yield Problem("wrong-option", name, f"with {chosen}", expected, "leave one of them out")


def check_unread_options(given: Mapping[str, object]) -> Iterator[Problem]:
    """Reports what is given beside `--checksums-only`; options that are not given are None."""
    for name, value in given.items():
        if value is not None:
            expected = "without --checksums-only: that compares sizes and ETags in a bucket, and reads no tensor"
            yield Problem("wrong-option", name, "with --checksums-only", expected, "leave one of them out")


def check_options_of_source(given: Mapping[str, object]) -> Iterator[Problem]:
    """Reports options that say how to read a source, where none is named; empty values are not given."""
    for option in filter(given.get, given):
        yield Problem("wrong-option", option, "no --source", "with --source only: a manifest needs none")
