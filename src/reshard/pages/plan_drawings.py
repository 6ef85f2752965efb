"""The drawings of a plan: the memory of each rank, and the layers by rank."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from reshard.numbered_names import name_layer
from reshard.pages.bars import GB, Bar, Bars, paint_bars
from reshard.pages.columns import (
    Column,
    Line,
    describe_cells,
    group_columns,
    group_equal,
    group_lines,
    is_next_label,
    merge_lines,
    name_group,
    name_numbers,
)
from reshard.pages.heat_map import HeatMap, Run, find_level, merge_cells, paint_heat_map
from reshard.pages.legends import make_kind_legend, make_legend, make_size_legend
from reshard.pages.markup import (
    NOTHING_HERE,
    Markup,
    Table,
    cut_items,
    make_details,
    make_element,
    make_list,
    make_table,
)
from reshard.pages.module_kinds import KINDS
from reshard.pages.page import Section, make_paragraph
from reshard.pages.plan_facts import PlanFacts
from reshard.planning.plan import Plan, has_rank_files
from reshard.planning.rank_choices import GPUS
from reshard.text import format_count, format_size, shorten_name


def number_files(plan: Plan) -> list[int]:
    """The numbers of the files in words: of rank files the ranks, from 0 on; of others from 1 on."""
    return [file.rank + (0 if has_rank_files(plan) else 1) for file in plan.files]


def make_ranks_section(plan: Plan, facts: PlanFacts, thing: str) -> Section:
    """Makes the section of what is in each rank, or file."""
    numbers, shown = number_files(plan), [kind for kind in range(len(KINDS)) if facts.parts[kind].any()]
    columns = group_columns(numbers)
    largest = [max(column.files, key=lambda file: facts.sizes[file]) for column in columns]
    bars = [
        Bar(f"{thing} {column.label}", facts.parts[:, file].tolist())
        for column, file in zip(columns, largest, strict=True)
    ]
    is_grouped = len(columns) < len(numbers)
    memories = [memory for memory, _ in GPUS] if has_rank_files(plan) else []
    text = describe_sizes(facts, numbers, thing, shown)
    drawn = Bars("ranks-bars", f"Tensors of each {thing} in bytes", text, bars, memories)
    parts = [
        make_paragraph(text),
        make_paragraph(f"A bar stands for several {thing}s: the largest of them is drawn.")
        if is_grouped
        else NOTHING_HERE,
        make_kind_legend(shown),
        paint_bars(drawn),
        *(make_gpu_table(int(facts.sizes.max())) if memories else []),
        make_details(f"The numbers of each {thing}", make_parts_table(plan, facts, shown, thing)),
    ]
    return Section("ranks", f"What each {thing} holds", parts)


def describe_sizes(facts: PlanFacts, numbers: Sequence[int], thing: str, shown: Sequence[int]) -> str:
    """Describes the sizes of all ranks in a sentence or two."""
    sizes, total = facts.sizes.tolist(), int(facts.sizes.sum())
    least, most = min(sizes), max(sizes)
    places = f"{thing} {numbers[sizes.index(least)]}", f"{thing} {numbers[sizes.index(most)]}"
    each = f"Each {thing} has {most:,} bytes of tensors ({format_size(most)})."
    if least < most:
        each = f"From {least:,} bytes of tensors ({places[0]}) to {most:,} ({places[1]}, {format_size(most)})."
    kinds = sorted(shown, key=lambda kind: -int(facts.parts[kind].sum()))[:3]
    shares = [f"{KINDS[kind]} {100 * int(facts.parts[kind].sum()) / max(total, 1):.1f} %" for kind in kinds]
    return f"{each} Most of all is {', then '.join(shares)}."


def make_gpu_table(size: int) -> Iterator[Markup]:
    """Makes the table of what the largest rank takes of common GPUs. `size` is in bytes."""
    rows = [
        [
            f"{memory} GB",
            names,
            f"{100 * size / (memory * GB):.1f} %",
            "fits" if size <= memory * GB else "does not fit",
        ]
        for memory, names in GPUS
    ]
    yield make_paragraph(
        "Only weights are counted: no KV cache, no activations, nothing of the program. GB, of memories of GPUs alone, "
        "is 1,000,000,000 bytes, as they are sold; all other sizes are in powers of 1024. Dashed lines mark the "
        "memories where bars are long enough to be seen beside them."
    )
    heading = ("memory", "such as", "taken by the largest rank", "its weights")
    yield make_table(Table("The largest rank in the memory of common GPUs", heading, rows, words=(1, 3)))


def make_parts_table(plan: Plan, facts: PlanFacts, shown: Sequence[int], thing: str) -> Markup:
    """Makes the table of the bytes of each rank, by kind; rows add up to the sizes of the files."""
    lines = []
    for number, (file, name) in enumerate(zip(plan.files, number_files(plan), strict=True)):
        parts = facts.parts[shown, number].tolist()
        lines.append(Line(f"{thing} {name}", "", [*parts, sum(parts), len(file.header), file.size]))
    total = [sum(column) for column in zip(*(line.numbers for line in lines), strict=True)]
    rows = [*merge_lines(lines), ["total", *(f"{number:,}" for number in total)]]
    heading = (thing, *(KINDS[kind] for kind in shown), "all tensors", "header", "file")
    return make_table(Table(f"Bytes in each {thing}", heading, rows, has_total=True))


class Odd(NamedTuple):
    """Cells of a row that differ from the usual ones of their kind."""

    row: int
    files: Sequence[int]
    size: int
    """Of each, in bytes."""
    usual: int
    """In bytes."""


def find_odd_cells(facts: PlanFacts) -> tuple[list[Odd], list[int]]:
    """Finds the cells that differ from most cells of rows with the same tensors; and the rows of which no size is that
    of most.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for row, kind in enumerate(facts.kinds):
        groups.setdefault(kind, []).append(row)
    found: list[Odd] = []
    unsettled: list[int] = []
    for rows in groups.values():
        cells = facts.cells[rows]
        usual, count = Counter(cells.reshape(-1).tolist()).most_common(1)[0]
        if 2 * count > cells.size:
            for row in rows:
                runs = group_equal(facts.cells[row].tolist())
                found += [Odd(row, files, size, usual) for size, files in runs if size != usual]
        else:
            unsettled += rows
    return sorted(found, key=lambda odd: odd.row), sorted(unsettled)


def make_layers_section(plan: Plan, facts: PlanFacts, thing: str) -> Section:
    """Makes the section of the layers by rank."""
    numbers = number_files(plan)
    odd, unsettled = find_odd_cells(facts) if has_rank_files(plan) else ([], [])
    columns, largest = group_columns(numbers), int(facts.cells.max(initial=0))
    groups = group_layers(facts, odd)
    rows = [merge_rank_cells(facts, group, columns, numbers, thing, odd, largest) for group in groups]
    text = (
        f"{format_count(len(rows), 'rows')}: the layers, and what is in none; "
        f"{format_count(len(numbers), 'columns')}, a {thing} each. The largest cell has {largest:,} bytes."
    )
    drawn = HeatMap(
        "layers-map", f"Bytes of each layer in each {thing}", text, rows, [one.label for one in columns], thing
    )
    is_grouped = len(columns) < len(numbers)
    parts = [
        make_paragraph(
            f"The darker a cell (in a dark page, the brighter), the more bytes of a layer a {thing} holds."
            + " Layers that follow each other and are equal share a row." * (len(groups) < len(facts.rows))
        ),
        make_paragraph(f"A column stands for several {thing}s: the largest of them counts.")
        if is_grouped
        else NOTHING_HERE,
        make_size_legend(largest),
        paint_heat_map(drawn),
        *(list_odd_cells(odd, unsettled, facts, numbers) if has_rank_files(plan) else ()),
        make_details("The numbers of each layer", make_layers_table(facts, numbers, thing)),
    ]
    return Section("layers", f"Layers by {thing}", parts)


def group_layers(facts: PlanFacts, odd: Sequence[Odd]) -> list[Sequence[int]]:
    """Groups rows that follow each other: layers of the same tensors and bytes. One that stands out is alone."""
    strange = {one.row for one in odd}

    def find_key(row: int) -> tuple[object, ...]:
        kind = name_layer(facts.rows[row]).rpartition(".")[0]
        return (row,) if row in strange or not kind else (kind, facts.kinds[row], *facts.cells[row].tolist())

    return [[*group] for _, group in groupby(range(len(facts.rows)), find_key)]


def name_layers_together(facts: PlanFacts, group: Sequence[int]) -> str:
    """Names the layers of a row: `model.layers.3`, or `model.layers.3-60, each`."""
    first = facts.rows[group[0]]
    numbers = [int(facts.rows[row].rpartition(".")[2]) for row in group[1:]]
    kind, _, number = first.rpartition(".")
    return f"{kind}.{name_numbers([int(number), *numbers])}, each" if numbers else first


def merge_rank_cells(
    facts: PlanFacts,
    group: Sequence[int],
    columns: Sequence[Column],
    numbers: Sequence[int],
    thing: str,
    odd: Sequence[Odd],
    largest: int,
) -> tuple[str, list[Run]]:
    """Merges the cells of a layer, or of equal ones, into runs, with their words. Also returns its name."""
    row, name = group[0], shorten_name(name_layers_together(facts, group))
    cells, strange = facts.cells[row].tolist(), {file for one in odd if one.row == row for file in one.files}
    values = [(max(cells[file] for file in column.files), not strange.isdisjoint(column.files)) for column in columns]
    runs = merge_cells((find_level(size, largest), str(size), is_odd, "") for size, is_odd in values)
    found = []
    for run in runs:
        files = [file for column in columns[run.first : run.end] for file in column.files]
        words = describe_cells([cells[file] for file in files], [numbers[file] for file in files], thing)
        found.append(run._replace(title=f"{name}, {words}"))
    return name, found


def list_odd_cells(
    odd: Sequence[Odd], unsettled: Sequence[int], facts: PlanFacts, numbers: Sequence[int]
) -> Iterator[Markup]:
    """Lists the cells of ranks that stand out, in words, and the rows without a usual size."""
    if odd:
        items = [describe_odd(group, facts, numbers) for group in merge_odd(odd, facts)]
        yield make_element("h3", "Cells that stand out")
        yield make_legend([("outlined", "", "outlined: differs from most layers of the same tensors")])
        yield make_list(cut_items(items))
    if unsettled:
        lines = [
            Line(shorten_name(facts.rows[row]), describe_cells(facts.cells[row].tolist(), numbers, "rank", 6), ())
            for row in unsettled
        ]
        yield make_element("h3", "No usual size")
        yield make_paragraph("Of layers of the same tensors, no size is that of more than half of the cells.")
        yield make_list(cut_items([f"{name_group(group)}, {group[0].words}" for group in group_lines(lines)]))
    if not odd and not unsettled:
        yield make_paragraph("No cell stands out: layers of the same tensors have the same bytes in every rank.")


def merge_odd(odd: Sequence[Odd], facts: PlanFacts) -> list[list[Odd]]:
    """Merges what differs alike in layers that follow each other."""
    groups: list[list[Odd]] = []
    for one in sorted(odd, key=lambda one: (*one[1:], one.row)):
        before = groups[-1][-1] if groups else None
        if (
            before
            and before[1:] == one[1:]
            and one.row == before.row + 1
            and is_next_label(facts.rows[before.row], facts.rows[one.row])
        ):
            groups[-1].append(one)
        else:
            groups.append([one])
    return sorted(groups, key=lambda group: group[0].row)


def describe_odd(group: Sequence[Odd], facts: PlanFacts, numbers: Sequence[int]) -> str:
    """Describes cells that stand out: those of one size, in rows beside each other."""
    first, last = group[0], group[-1]
    rows = shorten_name(facts.rows[first.row])
    rows += f" to {shorten_name(facts.rows[last.row])}" if len(group) > 1 else ""
    places = name_numbers([numbers[file] for file in first.files])
    apart = f"{abs(first.size - first.usual):,} {'more' if first.size > first.usual else 'fewer'}"
    each = " each" * (len(group) * len(first.files) > 1)
    return (
        f"{rows}, rank{'s' * (len(first.files) > 1)} {places}: {first.size:,} bytes{each}, "
        f"where {first.usual:,} are usual ({apart})"
    )


def make_layers_table(facts: PlanFacts, numbers: Sequence[int], thing: str) -> Markup:
    """Makes the table of the layers: the numbers of the heat map."""
    lines = [
        Line(
            shorten_name(name),
            describe_cells(facts.cells[row].tolist(), numbers, thing, 6),
            [int(facts.tensors[row].sum()), int(facts.cells[row].sum())],
        )
        for row, name in enumerate(facts.rows)
    ]
    total = [f"{int(facts.tensors.sum()):,}", f"{int(facts.cells.sum()):,}"]
    heading = ("layer", f"in each {thing}", f"tensors in all {thing}s", f"bytes in all {thing}s")
    table = Table(f"Bytes of each layer in each {thing}", heading, [*merge_lines(lines), ["total", "", *total]], (1,))
    return make_table(table._replace(has_total=True))
