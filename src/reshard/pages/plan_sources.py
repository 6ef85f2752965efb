"""The source files of a plan by rank: which files each rank is made of, and how many bytes of each."""

from collections.abc import Sequence

from reshard.pages.columns import MOST_SOURCE_COLUMNS, Line, group_columns, merge_lines, name_numbers
from reshard.pages.heat_map import HeatMap, find_level, merge_cells, paint_heat_map
from reshard.pages.legends import make_size_legend
from reshard.pages.markup import Markup, Table, make_details, make_table
from reshard.pages.page import Section, make_paragraph
from reshard.pages.plan_drawings import number_files
from reshard.pages.plan_facts import PlanFacts
from reshard.planning.plan import Plan
from reshard.text import format_count, format_runs, shorten_name


def make_sources_section(plan: Plan, facts: PlanFacts, thing: str) -> Section:
    """Makes the section of the source files that each rank is made of."""
    numbers, files = number_files(plan), plan.source.files
    columns = group_columns([*range(1, len(files) + 1)], MOST_SOURCE_COLUMNS)
    largest = int(facts.links.max(initial=0))
    rows = []
    for target in group_columns(numbers):
        sums = facts.links[:, list(target.files)].max(axis=1).tolist()
        cells = (max(sums[file] for file in column.files) for column in columns)
        rows.append(
            (f"{thing} {target.label}", merge_cells((find_level(size, largest), "", False, "") for size in cells))
        )
    text = (
        f"A row for each {thing}, a column for each of {format_count(len(files), 'source files')}, in the order of "
        f"their numbers below. The largest cell has {largest:,} bytes."
    )
    drawn = HeatMap(
        "sources-map",
        f"Bytes of each {thing} by source file",
        text,
        rows,
        [one.label for one in columns],
        "source file",
    )
    parts = [
        make_paragraph(
            f"{text} A computed tensor counts for the file of its weight, one that is put together for its parts."
        ),
        make_size_legend(largest),
        paint_heat_map(drawn),
        make_links_table(plan, facts),
        make_details(f"The bytes of each {thing} by source file", make_cells_table(facts, numbers, thing)),
        make_details("The source files", make_files_table(plan, facts, numbers, thing)),
    ]
    return Section("sources", f"Source files to {'rank' if thing == 'rank' else 'whole'} files", parts)


def make_links_table(plan: Plan, facts: PlanFacts) -> Markup:
    """Makes the table of the target files: which source files each reads, and how many bytes."""
    made, joined = bool(facts.made.any()), bool(facts.joined.any())
    lines = []
    for number, file in enumerate(plan.files):
        size, computed, together = (int(column[number]) for column in (facts.sizes, facts.made, facts.joined))
        parts = [size - computed - together, *[together] * joined, *[computed] * made]
        words = name_sources(facts.links[:, number].tolist())
        lines.append(Line(shorten_name(file.name), words, [*parts, len(file.header), file.size]))
    sums = [sum(column) for column in zip(*(line.numbers for line in lines), strict=True)]
    rows = [*merge_lines(lines), ["total", "", *(f"{number:,}" for number in sums)]]
    parted = ("copied", *["put together"] * joined, *["computed"] * made)
    heading = ("file", "source files", *parted, "header", "bytes of the file")
    return make_table(Table("Source files that each file is made of", heading, rows, (1,), has_total=True))


def make_cells_table(facts: PlanFacts, numbers: Sequence[int], thing: str) -> Markup:
    """Makes the table of the drawing: for each rank the bytes from each source file."""
    lines = []
    for file, name in enumerate(numbers):
        sizes = facts.links[:, file].tolist()
        lines.append(Line(f"{thing} {name}", list_links(sizes), [sum(sizes)]))
    heading = (thing, "numbers of source files: bytes from each", "bytes from all")
    return make_table(Table(f"Bytes of each {thing} by source file", heading, merge_lines(lines), words=(1,)))


def list_links(sizes: Sequence[int]) -> str:
    """Lists the source files, by their numbers from 1 on, with the bytes of each: `1-2, 5: 1,024; 3: 7`."""
    files: dict[int, list[int]] = {}
    for number, size in enumerate(sizes, 1):
        files.setdefault(size, []).append(number)
    return "; ".join(f"{', '.join(format_runs(found))}: {size:,}" for size, found in files.items() if size) or "none"


def name_sources(sizes: Sequence[int]) -> str:
    """Names the source files with a size that is not 0, by their numbers from 1 on."""
    used = [place for place, size in enumerate(sizes, 1) if size]
    if len(used) in (0, len(sizes)):
        return f"all {len(sizes):,}" if used else "none"
    return f"{len(used):,} of {len(sizes):,}: {name_numbers(used)}"


def make_files_table(plan: Plan, facts: PlanFacts, numbers: Sequence[int], thing: str) -> Markup:
    """Makes the table of the source files: where the bytes of each go."""
    lines = []
    for place, file in enumerate(plan.source.files):
        row = facts.links[place].tolist()
        users = [numbers[target] for target, size in enumerate(row) if size]
        words = name_numbers(users) or "none"
        lines.append(Line(f"{place + 1}: {shorten_name(file.name)}", words, [file.size, sum(row)]))
    rows = merge_lines(lines)
    total = [sum(column) for column in zip(*(line.numbers for line in lines), strict=True)]
    heading = ("source file", f"for the {thing}s", "bytes", "bytes to be written from there")
    rows.append(["total", "", *(f"{number:,}" for number in total)])
    return make_table(Table("Source files and where their bytes go", heading, rows, (1,), has_total=True))
