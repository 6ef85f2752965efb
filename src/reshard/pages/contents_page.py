"""The page of a checkpoint's contents: layers and modules, kinds, dtypes and files. Needs no numpy."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from reshard.formats.folders_below import split_numbers
from reshard.inspection.contents import Content
from reshard.inspection.tensor_list import ListedTensor
from reshard.inspection.unfinished import describe_unfinished
from reshard.numbered_names import split_name
from reshard.pages.bars import Bar, Bars, paint_bars
from reshard.pages.columns import Line, group_columns, merge_lines, name_numbers
from reshard.pages.heat_map import NOT_THERE, HeatMap, find_level, merge_cells, paint_heat_map
from reshard.pages.legends import make_kind_legend, make_legend, make_size_legend
from reshard.pages.markup import Markup, Table, cut_items, make_details, make_element, make_list, make_table
from reshard.pages.module_kinds import KINDS, find_module_kind, split_at_layer
from reshard.pages.page import Page, Section, format_page, make_paragraph
from reshard.text import format_count, format_percent, format_size, shorten_name

Cells = Mapping[str, Mapping[str, int]]
"""Bytes by module and by the number of the layer."""

MOST_MODULE_ROWS = 60
"""Of a drawing; the largest are drawn."""

MOST_LAYERS_DRAWN = 512

MOST_LAYER_KINDS = 6

MOST_TENSORS_SHOWN = 300
"""Of a list of tensors."""


def format_contents_page(content: Content, tensors: Sequence[ListedTensor]) -> str:
    """The text of the page of a checkpoint. `tensors` are all of it; none where only an unfinished run is there."""
    files = {file.name for file in content.by_file}
    tensors = [one for one in tensors if content.boxes or one.file in files]  # not of files that were left aside
    sections = []
    if content.unfinished:
        lines = (make_paragraph(line) for line in describe_unfinished(content.unfinished))
        sections.append(Section("unfinished", "Unfinished", [*lines]))
    if tensors:
        sections += [make_kinds_section(tensors), make_places_section(tensors), make_stored_section(content, tensors)]
    elif content.files:
        lacking = make_paragraph("The tensors are not drawn: some files of the same checkpoint are not there.")
        sections.append(Section("lacking", "Tensors", [lacking]))
    if content.listed is not None:
        sections.append(make_listed_section(content.listed))
    if content.names:
        sections.append(make_names_section(content.names))
    if content.notes or content.remark:
        remarks = [make_paragraph(line) for line in content.remark.split("\n") if line]
        sections.append(
            Section("notes", "Notes", [make_list(f"Note: {note.text}" for note in content.notes), *remarks])
        )
    return format_page(Page("inspect", *describe_content(content), list_content_facts(content), sections))


def describe_content(content: Content) -> tuple[str, str]:
    """The heading of the page and its first sentence. The heading says how far an unfinished conversion is."""
    name = content.path.rstrip("/").rpartition("/")[2] or content.path
    recipe = f", recipe {content.recipe}" if content.recipe else ""
    known = f"{content.layout} layout" if content.layout else "no known layout"
    lead = f"{content.path}: {known if content.files else 'an unfinished conversion'}{recipe}."
    if found := content.unfinished:
        return f"Unfinished ({format_percent(found.durable, found.size)}): {name}", lead
    return f"{'Contents' if content.files else 'Unfinished'}: {name}", lead


def list_content_facts(content: Content) -> list[tuple[str, str]]:
    """Lists what one looks for first; nothing where no file is finished."""
    if not content.files:
        return []
    made = ", ".join(f"{option} {value}".rstrip() for option, value in content.made.items())
    found = [
        ("Files", f"{content.files:,}"),
        ("Tensors", f"{content.tensors:,}"),
        ("Bytes of tensors", f"{content.size:,} ({format_size(content.size)})"),
        ("Cut for", format_count(content.ranks, "ranks") if content.ranks else ""),
        ("The model", ", ".join(format_count(count, name) for name, count in content.counts.items())),
        ("Dtypes", ", ".join(content.dtypes)),
        ("Made with", made),
        ("A subset", content.subset),
        ("Stored in", format_count(content.boxes, "parts") if content.boxes else ""),
        ("Recipe", content.reason),
    ]
    return [(name, value) for name, value in found if value]


def make_kinds_section(tensors: Sequence[ListedTensor]) -> Section:
    """Makes the section of the kinds and the dtypes."""
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for tensor in tensors:
        key = find_module_kind(split_name(tensor.name)[0]), tensor.dtype
        counts[key] += 1
        sizes[key] += tensor.size
    dtypes = sorted({dtype for _, dtype in sizes}, key=lambda name: (-sum(sizes[kind, name] for kind in KINDS), name))
    kinds = [kind for kind in KINDS if any(counts[kind, dtype] for dtype in dtypes)]
    total = sum(tensor.size for tensor in tensors)
    rows = []
    for kind in kinds:
        size = sum(sizes[kind, dtype] for dtype in dtypes)
        number = sum(counts[kind, dtype] for dtype in dtypes)
        rows.append(
            [
                kind,
                f"{number:,}",
                *(f"{sizes[kind, dtype]:,}" for dtype in dtypes),
                f"{size:,}",
                f"{100 * size / max(total, 1):.1f} %",
            ]
        )
    by_dtype = [f"{sum(sizes[kind, dtype] for kind in kinds):,}" for dtype in dtypes]
    rows.append(["total", f"{len(tensors):,}", *by_dtype, f"{total:,}", ""])
    heading = ("kind", "tensors", *(f"bytes of {dtype}" for dtype in dtypes), "all bytes", "share")
    by_count = [
        [dtype, f"{sum(counts[kind, dtype] for kind in kinds):,}", size]
        for dtype, size in zip(dtypes, by_dtype, strict=True)
    ]
    by_count.append(["total", f"{len(tensors):,}", f"{total:,}"])
    parts = [
        make_paragraph("The kinds are told by the words of the names alone."),
        make_table(Table("Bytes by kind and dtype", heading, rows, has_total=True)),
        make_table(Table("Tensors and bytes by dtype", ("dtype", "tensors", "bytes"), by_count, has_total=True)),
    ]
    return Section("kinds", "Kinds and dtypes", parts)


def make_places_section(tensors: Sequence[ListedTensor]) -> Section:
    """Makes the section of layers and modules."""
    tables = tabulate_sizes(tensors)
    kinds = sorted(tables, key=lambda kind: (not kind, split_numbers(kind)))
    largest = max(size for table in tables.values() for cells in table.values() for size in cells.values())
    text = "A row for each module, the largest first, with # for a number in its name; a column for each layer. "
    text += "The darker a cell (in a dark page, the brighter), the more bytes a module has in a layer."
    parts = [make_paragraph(text), make_size_legend(largest)]
    for number, kind in enumerate(kinds[:MOST_LAYER_KINDS]):
        parts += paint_sizes(kind, tables[kind], f"places-{number}", largest)
    if len(kinds) > MOST_LAYER_KINDS:
        parts.append(make_paragraph(f"{len(kinds) - MOST_LAYER_KINDS:,} more kinds of layers are not drawn."))
    return Section("places", "Layers and modules", parts)


def tabulate_sizes(tensors: Sequence[ListedTensor]) -> dict[str, dict[str, dict[str, int]]]:
    """Bytes by kind of layer, module and number of the layer."""
    tables: dict[str, dict[str, dict[str, int]]] = {}
    for tensor in tensors:
        kind, number, module = split_at_layer(tensor.name)
        cells = tables.setdefault(kind, {}).setdefault(module, {})
        cells[number] = cells.get(number, 0) + tensor.size
    return tables


def paint_sizes(kind: str, table: Cells, name: str, largest: int) -> Iterator[Markup]:
    """Draws the bytes of a kind of layer by module and layer, with the same in a table."""
    modules = sorted(table, key=lambda module: (-sum(table[module].values()), module))
    columns = sorted({number for cells in table.values() for number in cells}, key=lambda text: (len(text), text))
    shown, drawn = modules[:MOST_MODULE_ROWS], columns[:MOST_LAYERS_DRAWN]
    usual = {module: find_usual(table[module]) for module in modules}
    rows = []
    for module in shown:
        cells = (make_size_cell(table[module].get(column), usual[module], largest) for column in drawn)
        rows.append((shorten_name(module) or "(itself)", merge_cells(cells)))
    heading = shorten_name(kind) or "in no layer"
    total = sum(size for cells in table.values() for size in cells.values())
    text = f"{format_count(len(modules), 'modules')} in {format_count(len(columns), 'layers')}, {total:,} bytes."
    if not kind:
        text = f"{format_count(len(modules), 'tensors')} in no layer, {total:,} bytes."
    yield make_element("h3", heading)
    yield make_paragraph(text)
    title = f"Bytes by module and layer, {heading}"
    yield paint_heat_map(HeatMap(name, title, text, rows, drawn, "layer" if kind else ""))
    odd = [words for module in modules for words in describe_odd_layers(module, table[module], usual[module])]
    if odd:
        if any(run.is_odd for _, runs in rows for run in runs):
            yield make_legend([("outlined", "", "outlined: differs from most layers")])
        yield make_list(cut_items(odd))
    lines = [
        Line(shorten_name(module) or "(itself)", name_layers(table[module]), [sum(table[module].values())])
        for module in modules
    ]
    rows_of_table = [*merge_lines(lines), ["total", "", f"{total:,}"]]
    made = make_table(Table(title, ("module", "layers", "bytes"), rows_of_table, words=(1,), has_total=True))
    yield make_details(f"The numbers, {heading}", made)


def find_usual(cells: Mapping[str, int]) -> int | None:
    """Finds the size that most layers have of a module, in bytes; None if there is none."""
    size, count = Counter(cells.values()).most_common(1)[0]
    return size if 2 * count > len(cells) else None


def make_size_cell(size: int | None, usual: int | None, largest: int) -> tuple[int, str, bool, str]:
    """Makes a cell of a heat map: its level, words, outline and mark."""
    if size is None:
        return NOT_THERE, "", False, ""
    return find_level(size, largest), f"{size:,} bytes ({format_size(size)})", usual not in (None, size), ""


def describe_odd_layers(module: str, cells: Mapping[str, int], usual: int | None) -> Iterator[str]:
    """Describes the layers in which a module has another size than in most; all, where no size is that of most."""
    sizes: dict[int, list[int]] = {}
    for number, size in cells.items():
        if size != usual and number:
            sizes.setdefault(size, []).append(int(number))
    for size, layers in sizes.items():
        where = f"layer{'s' * (len(layers) > 1)} {name_numbers(layers)}"
        apart = "no size is usual" if usual is None else f"where {usual:,} are usual"
        yield f"{shorten_name(module)}, {where}: {size:,} bytes, {apart}"


def name_layers(cells: Mapping[str, int]) -> str:
    """Names the layers that a module is in, by their runs."""
    return name_numbers([int(number) for number in cells if number]) or "-"


def make_stored_section(content: Content, tensors: Sequence[ListedTensor]) -> Section:
    """Makes the section of the files."""
    sizes, counts = [sum(file.dtypes.values()) for file in content.by_file], Counter(one.file for one in tensors)
    lines = [
        Line(f"{place}: {shorten_name(file.name)}", "", [*([] if content.boxes else [counts[file.name]]), size])
        for place, (file, size) in enumerate(zip(content.by_file, sizes, strict=True), 1)
    ]
    sums = [sum(column) for column in zip(*(line.numbers for line in lines), strict=True)]
    rows = [*merge_lines(lines), ["total", *(f"{number:,}" for number in sums)]]
    heading = ("file", *([] if content.boxes else ["tensors"]), "bytes")
    caption = "Bytes of each file" if content.boxes else "Tensors and bytes of each file"
    table = make_table(Table(caption, heading, rows, has_total=True))
    text = f"{format_count(len(sizes), 'files')}; the largest has {max(sizes):,} bytes of tensors."
    # A tensor in several parts does not tell how much of it lies in which file: no bar can be drawn.
    drawn = [make_paragraph(text)] if content.boxes else paint_files(content, tensors, text)
    return Section("stored", "Files", [*drawn, make_details("The numbers of each file", table)])


def paint_files(content: Content, tensors: Sequence[ListedTensor], text: str) -> Iterator[Markup]:
    """Draws a bar for each file, of the kinds in it."""
    places = {file.name: place for place, file in enumerate(content.by_file)}
    sizes = [[0] * len(KINDS) for _ in places]
    for tensor in tensors:
        sizes[places[tensor.file]][KINDS.index(find_module_kind(split_name(tensor.name)[0]))] += tensor.size
    columns = group_columns([*range(1, len(places) + 1)])
    largest = [max(column.files, key=lambda place: sum(sizes[place])) for column in columns]
    bars = [Bar(f"file {column.label}", sizes[place]) for column, place in zip(columns, largest, strict=True)]
    more = " A bar stands for several files: the largest of them is drawn." * (len(columns) < len(places))
    yield make_paragraph(text + more)
    yield make_kind_legend([kind for kind in range(len(KINDS)) if any(row[kind] for row in sizes)])
    yield paint_bars(Bars("stored-bars", "Bytes of each file", text, bars, ()))


def make_listed_section(listed: Sequence[ListedTensor]) -> Section:
    """Makes the section of the tensors that were asked for."""
    size = sum(tensor.size for tensor in listed)
    rows = [
        [shorten_name(one.name), one.dtype, str([*one.shape]), f"{one.size:,}", shorten_name(one.file)]
        for one in listed[:MOST_TENSORS_SHOWN]
    ]
    more = len(listed) - len(rows)
    text = f"{format_count(len(listed), 'tensors')}, {size:,} bytes ({format_size(size)})."
    words = f"{text} The first {len(rows):,} are shown; --json lists them all." if more else text
    heading = ("tensor", "dtype", "shape", "bytes", "file")
    table = make_table(Table("Tensors of the names that were asked for", heading, rows, words=(1, 2, 4)))
    return Section("listed", "Listed tensors", [make_paragraph(words), table])


def make_names_section(names: Mapping[str, tuple[int, str]]) -> Section:
    """Makes the section of the names, where no recipe fits."""
    rows = [[shorten_name(name), f"{count:,}", kind] for name, (count, kind) in [*names.items()][:MOST_TENSORS_SHOWN]]
    more = len(names) - len(rows)
    table = make_table(Table("Names, with # for a number", ("name", "tensors", "dtype and shape"), rows, words=(2,)))
    return Section(
        "names", "Names", [table, *[make_paragraph(f"and {more:,} more; --json lists them all")] * (more > 0)]
    )
