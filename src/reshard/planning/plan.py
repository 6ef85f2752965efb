"""The plan of a conversion: every target file to the byte, and how each source tensor is used. Also its text."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reshard.formats.manifest import Origin, list_subset_lines
from reshard.formats.tensor_uses import TensorUse
from reshard.paths import AnyPath
from reshard.planning.copies import Copies
from reshard.planning.file_layout import Pieces, TargetFile, list_shapes
from reshard.planning.reads import measure_reads
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import has_ranks
from reshard.sources.engine_choice import choose_uncut_layout
from reshard.text import escape, format_count, format_numbers, format_size, format_table
from reshard.types import RANKS, SLICED, WHOLE, Cast, Checkpoint, Layout, Note, Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a conversion will do. Prints as a table of the files that it will write."""

    path: AnyPath
    """The source, as the caller gave it."""
    source: Checkpoint
    recipe: Recipe
    origin: Origin
    """The original checkpoint of rank files, as far as it is known."""
    layout: Layout
    counts: dict[str, int]
    """Number of members of each placeholder of the recipe."""
    config: Mapping[str, Any] | None
    """The config of the source, with the values that padding raises."""
    pieces: Pieces
    """The tensors of the target."""
    files: tuple[TargetFile, ...]
    """The files to write."""
    copies: Copies
    """`target_file` is an index into `files`; `source_file` one into the files, joins and casts of the source."""
    casts: tuple[Cast, ...]
    """The tensors to compute."""
    coverage: tuple[TensorUse, ...]
    """The uses of all source tensors."""
    notes: tuple[Note, ...]
    """What a person should know before the job: what was left aside, and what a loader may refuse."""

    @property
    def size(self) -> int:
        """Size of all files to be written, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def computes(self) -> bool:
        """Whether tensors are computed from others. Constants are made of nothing."""
        return any(cast.operation != "fill" for cast in self.casts)

    @property
    def keeps_names(self) -> bool:
        """Whether the target has the tensors under the names of the left side of its recipe."""
        return choose_uncut_layout(self.recipe, self.layout).to == WHOLE

    def tensors(self, index: int) -> Iterator[Tensor]:
        """Yields the tensors of one target file, in the order of their offsets; `index` is an index into `files`."""
        file, pieces = self.files[index], self.pieces
        start = len(file.header)
        shapes = list_shapes(pieces, file.pieces, file.rank)
        for piece, shape, end in zip(file.pieces.tolist(), shapes, file.ends.tolist(), strict=True):
            yield Tensor(pieces.names[piece], pieces.tensors[piece].dtype, shape, index, start, end - start)
            start = end

    def measure_dtypes(self, index: int) -> Mapping[str, int]:
        """Measures the bytes of each dtype in a target file; `index` is an index into `files`."""
        file, tensors = self.files[index], self.pieces.tensors
        sizes, start = Counter[str](), len(file.header)
        for piece, end in zip(file.pieces.tolist(), file.ends.tolist(), strict=True):
            sizes[tensors[piece].dtype] += end - start
            start = end
        return sizes

    @property
    def side_folder(self) -> AnyPath:
        """The folder of the config and the other files beside the tensors of the source."""
        return self.source.beside or self.source.folder

    def __str__(self) -> str:
        text = "\n".join(map(escape, [*describe_files(self), *describe_coverage(self), *describe_notes(self.notes)]))
        return text.replace("(--replicas)", "(replicas)")

    __repr__ = __str__


def has_rank_files(plan: Plan) -> bool:
    """Whether each file is that of a rank, and no whole file."""
    return plan.layout.to == SLICED or (plan.layout.to == RANKS and has_ranks(plan.recipe))


def name_target(plan: Plan) -> str:
    """Names what is to be written in words: `16 ranks`, `slices for 4 ranks (of these 0-1)`, `163 whole files`."""
    if not has_rank_files(plan):
        return format_count(len(plan.files), "whole files")
    chosen = {file.rank for file in plan.files}
    some = f" (of these {format_numbers(chosen)})" if chosen else " (all are finished)"
    target = "slices for " * (plan.layout.to == SLICED) + format_count(plan.layout.ranks, "ranks")
    return target + some * (len(chosen) < plan.layout.ranks)


def describe_files(plan: Plan, *, is_stored: bool = False) -> Iterator[str]:
    """Describes the files as a table for people. Its sizes, in bytes, add up exactly. `is_stored`: they are written
    into a store, and need no disk.
    """
    yield f"{plan.path} -> {name_target(plan)} by the recipe {plan.recipe.name}"
    yield from list_subset_lines(plan.source.subset)
    counts = {plan.recipe.placeholders[name].counts: count for name, count in plan.counts.items() if count}
    yield ", ".join(format_count(count, things) for things, count in counts.items())
    yield ""
    rows = [(file.name, f"{len(file.pieces):,}", f"{file.size:,}", format_size(file.size)) for file in plan.files]
    tensors = sum(len(file.pieces) for file in plan.files)
    total = ("total", f"{tensors:,}", f"{plan.size:,}", format_size(plan.size))
    yield from format_table(("file", "tensors", "bytes", ""), [*rows, total]).splitlines()
    yield from describe_casts(plan)
    reads = measure_reads(plan.source, plan.casts, plan.copies)
    if reads.replicas:
        yield f"reads {reads.replicas:,} bytes of it to compare what several ranks hold (--replicas)"
    yield f"reads about {reads.size:,} bytes ({format_size(reads.size)}) of the source"
    needs = f"writes {plan.size:,} bytes" if is_stored else f"writes and needs {plan.size:,} bytes of disk"
    yield f"{needs} ({format_size(plan.size)})"


def describe_coverage(plan: Plan) -> Iterator[str]:
    """Describes the uses of the source tensors as a table for people. Its sizes, in bytes, add up exactly."""
    yield ""
    yield from format_table(("source tensors", "tensors", "bytes", ""), [*list_uses(plan)]).splitlines()


def describe_notes(notes: Iterable[Note]) -> Iterator[str]:
    """Describes notes for a person, one line each."""
    yield from (f"note: {note.text}" for note in notes)


def describe_casts(plan: Plan) -> Iterator[str]:
    """Describes the casts, by operation and resulting dtype, and the config values that padding raises."""
    results = Counter((cast.operation, cast.result.dtype) for cast in plan.casts)
    for (operation, dtype), count in results.items():
        what = "made, of one value" if operation == "fill" else operation
        yield f"{what}: {format_count(count, 'tensors')} of {dtype}"
    raised = {key: value for key, value in (plan.config or {}).items() if value != (plan.source.config or {}).get(key)}
    for key, value in raised.items():
        yield f"padded: {key} from {(plan.source.config or {})[key]} to {value}"


def describe_dropped(plan: Plan) -> Iterator[str]:
    """Describes the tensors that are left out, with the reason."""
    for share in plan.coverage:
        if share.use == "dropped":
            tensors = format_count(share.tensors, "tensors")
            yield f"dropped: {tensors}, {share.size:,} bytes: {share.what}: {share.reason}"


USES = {
    "once": "used once",
    "replicated": "replicated to every rank",
    "shared": "shared by several ranks",
    "dequantized": "dequantized to BF16",
    "cast": "cast",
    "padded": "padded with zeros, scales with ones",
    "empty": "empty",
    "dropped": "dropped",
}
"""The uses of source tensors -> their words in the table, in its order."""


def list_uses(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """Lists the rows of the table of uses, with a total."""
    for use, words in USES.items():
        shares = [share for share in plan.coverage if share.use == use]
        if shares:
            size = sum(share.size for share in shares)
            yield words, f"{sum(share.tensors for share in shares):,}", f"{size:,}", format_size(size)
        if use not in ("once", "empty"):
            for share in shares:
                reason = f" ({share.reason})" if share.reason else ""
                yield f"  {share.what}{reason}", f"{share.tensors:,}", f"{share.size:,}", ""
    size = sum(share.size for share in plan.coverage)
    yield "total", f"{len(plan.source.tensors):,}", f"{size:,}", format_size(size)


def describe_layout(layout: Layout) -> dict[str, Any]:
    """Describes a layout as JSON values, without defaults."""
    defaults = asdict(Layout(0))
    return {key: value for key, value in asdict(layout).items() if value != defaults[key]}
