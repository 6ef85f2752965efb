"""The page of a difference of two checkpoints: how far they are apart, by layer, module and expert, worst first."""

from collections.abc import Iterator, Sequence

from reshard.inspection.diff_groups import GroupDifference
from reshard.inspection.diff_report import DiffReport, ValueDifference, describe_verdict, format_share
from reshard.inspection.value_sums import OverallDistance
from reshard.pages.diff_cells import MARKS, CellTable, DiffCell, sort_worst, tabulate_experts, tabulate_modules
from reshard.pages.heat_map import LETTERED, HeatMap, merge_cells, paint_heat_map
from reshard.pages.legends import make_legend
from reshard.pages.markup import Markup, Table, make_details, make_element, make_list, make_table
from reshard.pages.page import Page, Section, format_page, make_paragraph
from reshard.text import format_count, format_runs, format_size, shorten_name

MOST_MODULES = 40
"""Rows of a heat map; the worst come first."""

MOST_COLUMNS_DRAWN = 512

MOST_WITH_LETTERS = 128
"""Columns. In more, a cell is too narrow for a letter."""

FIRST_EXPERTS = 12
"""Rows of a table that is open from the beginning."""

MOST_TABLES = 6
"""Kinds of layers that are drawn."""

MOST_ROWS_SHOWN = 100
"""Rows of a table."""

RARE = ("NaNs in A", "NaNs in B", "infinite")
"""Columns that are left out where they have nothing."""

HEADING = ("tensor", "dtype", "elements that differ", "relative norm", "cosine", *RARE)

STEPS = ("to 0.001 %", "to 0.01 %", "to 0.1 %", "to 1 %", "to 10 %", "to 100 %", "100 % and more")


def format_diff_page(report: DiffReport) -> str:
    """The text of the page of a difference."""
    experts = tabulate_experts(report)
    sections = [
        make_modules_section(report),
        *([make_experts_section(experts)] if experts else []),
        make_tensors_section(report),
        make_unpaired_section(report),
    ]
    lead = describe_verdict(report)
    title = "Difference: none" if report.is_same else "Difference"
    return format_page(Page("diff", title, f"{lead[0].upper()}{lead[1:]}.", list_diff_facts(report), sections))


def list_diff_facts(report: DiffReport) -> list[tuple[str, str]]:
    """Lists what one looks for first."""
    sides = [
        (letter, f"{path} ({f'rank files by the recipe {recipe}' if recipe else 'by its own names'})")
        for letter, path, recipe in zip("AB", (report.a, report.b), report.recipes, strict=True)
    ]
    counts = [(kind[0].upper() + kind[1:], format_count(count, "tensors")) for kind, count in report.counts.items()]
    compared = ("Compared of each", f"{report.compared:,} bytes ({format_size(report.compared)})")
    changed = [
        (f"{words} to be compared", format_count(count, "tensors"))
        for words, count in (("Dequantized", report.dequantized), ("Rounded to BF16", report.rounded))
        if count
    ]
    return [*sides, *counts, compared, *changed]


def make_modules_section(report: DiffReport) -> Section:
    """Makes the section of the modules by layer."""
    text = (
        "A row for each module that differs, the worst first; a column for each layer. The colour is the relative norm "
        "of the worst tensor in a cell: the length of A - B, as a vector, divided by that of A. Cells with a letter "
        "have a colour of their own, and come first: see the letter."
    )
    tables = tabulate_modules(report)
    if report.is_same:
        parts = [make_paragraph(f"All {format_count(report.same, 'tensors')} are equal bit by bit.")]
    else:
        differing = [table for table in tables if any(cell.different for _, _, cell in table.cells)]
        shown = [
            part
            for number, one in enumerate(differing[:MOST_TABLES])
            for part in paint_modules(one, f"modules-{number}")
        ]
        parts = [make_paragraph(text), make_diff_legend(differing), *shown]
        if len(differing) > MOST_TABLES:
            parts.append(
                make_paragraph(f"{len(differing) - MOST_TABLES:,} more kinds of layers are in the tables only.")
            )
        parts += [
            make_details("All layers, the worst first", make_group_table("layer", report.layers)),
            make_details("All modules, the worst first", make_group_table("module, # is a number", report.modules)),
        ]
    return Section("modules", "By layer and module", parts)


def make_diff_legend(tables: Sequence[CellTable], *, has_letters: bool = True) -> Markup:
    """Makes the legend of the heat maps: the colours, and the letters that are in them, or the outline."""
    used = {cell.mark for table in tables for _, _, cell in table.cells}
    steps = [(f"s{level}", "", words) for level, words in enumerate(STEPS, 1)]
    marks = [(f"s{LETTERED}", letter, words) for letter, words in MARKS.items() if letter in used]
    if marks and not has_letters:
        marks = [(f"s{LETTERED} outlined", "", "outlined: " + ", or ".join(words for _, _, words in marks))]
    return make_legend([("s0", "", "equal"), *steps, *marks])


def paint_modules(table: CellTable, name: str) -> Iterator[Markup]:
    """Draws the modules of a kind of layer, with the same in a table."""
    differing = {row: cells for row, cells in table.rows.items() if any(cell.different for cell in cells.values())}
    shown, columns = [*differing][:MOST_MODULES], table.columns[:MOST_COLUMNS_DRAWN]
    rows = [
        (shorten_name(row), merge_cells(make_diff_cell(differing[row].get(one), one) for one in columns))
        for row in shown
    ]
    heading = shorten_name(table.heading) or "in no layer"
    worst = sort_worst(table.cells)
    count = f"{format_count(len(worst), 'cells')} {'differs' if len(worst) == 1 else 'differ'}"
    text = f"{count}, the worst in {describe_cell(*worst[0])}."
    title = f"Relative difference by module and layer, {heading}"
    yield make_element("h3", heading)
    yield paint_heat_map(HeatMap(name, title, text, rows, columns, "layer" if table.heading else ""))
    equal = len(table.rows) - len(differing)
    cut = len(differing) - len(shown) + len(table.columns) - len(columns)
    words = [f"{format_count(equal, 'more modules')} {'is' if equal == 1 else 'are'} equal everywhere."] * bool(equal)
    words += ["Not all rows and columns are drawn: the tables have more."] if cut else []
    yield make_paragraph(" ".join([text, *words]))
    lines = [describe_module(table, row) for row in [*differing][:MOST_ROWS_SHOWN]]
    heads = ("module, # is a number", "layers that differ", "of", "worst", "how far")
    yield make_details(f"The same in words, {heading}", make_table(Table(title, heads, lines, words=(1, 3, 4))))


def make_diff_cell(cell: DiffCell | None, column: str) -> tuple[int, str, bool, str]:
    """Makes a cell of a heat map: its level, words, outline and mark."""
    cell = cell or DiffCell()
    words = f"{column}: {cell.describe()}" if cell.different else ""
    return cell.level, words.lstrip(": "), False, cell.mark


def describe_cell(row: str, column: str, cell: DiffCell) -> str:
    """Says where a cell is, and how far it is apart."""
    layer = f", layer {column}" if column else ""
    return f"{shorten_name(row)}{layer} ({cell.describe()})"


def describe_module(table: CellTable, row: str) -> Sequence[str]:
    """The cells of a module as a row of a table."""
    cells = table.rows[row]
    differing = sort_worst((row, column, cell) for column, cell in cells.items())
    numbers = format_runs(int(column) for _, column, _ in differing if column)
    _, worst, cell = differing[0]
    return [
        shorten_name(row),
        ", ".join(numbers[:12]) + ", ..." * (len(numbers) > 12),
        f"{len(cells):,}",
        worst,
        cell.describe(),
    ]


def make_experts_section(table: CellTable) -> Section:
    """Makes the section of the experts by layer."""
    worst, every = sort_worst(table.cells), [*table.cells]
    text = f"{len(worst):,} of {format_count(len(every), 'experts')} {'differs' if len(worst) == 1 else 'differ'}"
    if not worst:
        return Section("experts", "By layer and expert", [make_paragraph(f"{text}: all are equal.")])
    text = f"{text}, the worst in {shorten_name(worst[0][0])}, expert {worst[0][1]} ({worst[0][2].describe()})."
    columns = table.columns[:MOST_COLUMNS_DRAWN]
    has_letters = len(columns) <= MOST_WITH_LETTERS
    rows = [
        (shorten_name(layer), merge_cells(make_expert_cell(cells.get(one), has_letters=has_letters) for one in columns))
        for layer, cells in table.rows.items()
    ]
    drawn = HeatMap("experts-map", "Relative difference by layer and expert", text, rows, columns, "expert")
    found = [
        [shorten_name(layer), expert, f"{cell.different:,}", f"{cell.tensors:,}", cell.describe()]
        for layer, expert, cell in worst[:MOST_ROWS_SHOWN]
    ]
    heading = ("layer", "expert", "tensors that differ", "of", "the worst of them")
    first, more = (
        "Experts that differ, the worst first",
        f"The first {len(found)} of {len(worst):,} experts that differ",
    )
    parts = [
        make_paragraph(text),
        make_diff_legend([table], has_letters=has_letters),
        paint_heat_map(drawn),
        make_table(Table(first, heading, found[:FIRST_EXPERTS], words=(4,))),
        make_details("Experts that differ, by layer", make_list(list_layers_of_experts(table))),
    ]
    if len(found) > FIRST_EXPERTS:
        parts.append(make_details(more, make_table(Table(more, heading, found, words=(4,)))))
    return Section("experts", "By layer and expert", parts)


def make_expert_cell(cell: DiffCell | None, *, has_letters: bool) -> tuple[int, str, bool, str]:
    """Makes a cell without words of its own: there may be 20,000 of them. One that is too narrow for its letter is
    outlined.
    """
    cell = cell or DiffCell()
    return cell.level, "", bool(cell.mark) and not has_letters, cell.mark if has_letters else ""


def list_layers_of_experts(table: CellTable) -> Iterator[str]:
    """Lists the experts that differ in each layer."""
    for layer, cells in table.rows.items():
        numbers = format_runs(int(expert) for expert, cell in cells.items() if cell.different)
        if numbers:
            yield f"{shorten_name(layer)}: {', '.join(numbers[:40])}{', ...' * (len(numbers) > 40)}"


def make_group_table(what: str, groups: Sequence[GroupDifference]) -> Markup:
    """Makes the table of layers, or of modules, the worst first."""
    rows = [
        [
            shorten_name(group.name) or "in no layer",
            f"{group.tensors:,}",
            f"{group.different:,}",
            f"{group.unpaired:,}",
            *format_measures(group.overall),
            f"{sum(group.nans):,}",
            f"{group.infinite:,}",
        ]
        for group in groups[:MOST_ROWS_SHOWN]
    ]
    heading = (what, "tensors", "other values", "unpaired", "relative norm", "cosine", "NaNs", "infinite")
    more = [make_paragraph(f"and {len(groups) - len(rows):,} more")] if len(groups) > len(rows) else []
    caption = f"By {what}: the relative norm is that of all tensors with other values together"
    return make_element("div", make_table(Table(caption, heading, rows)), *more)


def format_measures(overall: OverallDistance) -> Sequence[str]:
    """Formats relative norm and cosine; a hyphen for what is not known."""
    relative = "-" if overall.relative_norm is None else format_share(overall.relative_norm)
    return relative, "-" if overall.cosine is None else f"{overall.cosine:.6f}"


def make_tensors_section(report: DiffReport) -> Section:
    """Makes the section of the worst tensors."""
    if not report.values:
        return Section("tensors", "Worst tensors", [make_paragraph("No tensor has other values.")])
    rows = [make_tensor_row(found) for found in report.values[:MOST_ROWS_SHOWN]]
    shown = [place for place, name in enumerate(HEADING) if name not in RARE or any(row[place] != "0" for row in rows)]
    cells = [[row[place] for place in shown] for row in rows]
    heading = [HEADING[place] for place in shown]
    table = make_table(Table("Tensors with other values, the worst first", heading, cells, words=(1,)))
    more = len(report.values) - len(rows)
    parts = [table, make_paragraph(f"and {more:,} more; reshard diff --json lists them all")] if more else [table]
    if any(found.is_coded for found in report.values):
        parts.append(make_paragraph("* codes of block-scaled weights, as they are stored: not their numbers."))
    return Section("tensors", "Worst tensors", parts)


def make_tensor_row(found: ValueDifference) -> Sequence[str]:
    """Formats a tensor with other values as a row of a table."""
    unusual = found.apart.unusual
    return (
        shorten_name(found.name),
        found.dtype + "*" * found.is_coded,
        format_share(found.apart.different / found.elements),
        *format_measures(found.overall),
        *(f"{count:,}" for count in (*unusual.nans, unusual.infinite)),
    )


def make_unpaired_section(report: DiffReport) -> Section:
    """Makes the section of what was not compared, with the notes."""
    parts = []
    if report.kinds:
        rows = [[shorten_name(kind.name), kind.a, kind.b] for kind in report.kinds[:MOST_ROWS_SHOWN]]
        parts.append(make_table(Table("Tensors of another dtype or shape", ("tensor", "A", "B"), rows, words=(1, 2))))
        parts += make_rest(len(report.kinds))
    for side, names in (("A", report.only_a), ("B", report.only_b)):
        if names:
            parts.append(make_element("h3", f"Only in {side}: {format_count(len(names), 'tensors')}"))
            parts += [make_list(map(shorten_name, names[:MOST_ROWS_SHOWN])), *make_rest(len(names))]
    if not parts:
        parts.append(make_paragraph("Every tensor is on both sides, of one dtype and shape."))
    aside = (f"{left.side} holds {len(left.names):,} more {left.reason}" for left in report.left_aside)
    parts.append(make_list([*aside, *(f"Note: {note.text}" for note in report.notes)]))
    return Section("unpaired", "On one side only, or of another kind", parts)


def make_rest(count: int) -> list[Markup]:
    """Says how many are not listed."""
    more = count - MOST_ROWS_SHOWN
    return [make_paragraph(f"and {more:,} more; reshard diff --json lists them all")] if more > 0 else []
