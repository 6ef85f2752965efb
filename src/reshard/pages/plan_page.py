"""The page of a plan: what every rank gets, where it comes from, and what was proven."""

from collections.abc import Iterator

from reshard.formats.command_words import list_layout_words
from reshard.formats.manifest import list_subset_lines
from reshard.pages.markup import Markup, Table, make_list, make_table
from reshard.pages.page import Page, Section, format_page, make_paragraph
from reshard.pages.plan_drawings import make_layers_section, make_ranks_section
from reshard.pages.plan_facts import PlanFacts, collect_facts, count_target_dtypes
from reshard.pages.plan_sources import make_sources_section
from reshard.planning.plan import Plan, describe_casts, describe_layout, has_rank_files, list_uses, name_target
from reshard.planning.reads import measure_reads
from reshard.text import format_count, format_size, shorten_name
from reshard.types import Tensor


def format_plan_page(plan: Plan) -> str:
    """The text of the page of a plan."""
    facts = collect_facts(plan)
    thing = "rank" if has_rank_files(plan) else "file"
    sections = [
        *([make_ranks_section(plan, facts, thing), make_layers_section(plan, facts, thing)] if plan.files else []),
        *([make_sources_section(plan, facts, thing)] if plan.files else []),
        make_replicas_section(facts, thing),
        make_dtypes_section(plan),
        make_uses_section(plan),
        make_proofs_section(plan),
    ]
    lead = f"{plan.path} to {name_target(plan)}, by the recipe {plan.recipe.name}."
    return format_page(
        Page("plan", f"Plan: {plan.path.name or plan.path}", lead, list_plan_facts(plan, facts), sections)
    )


def list_plan_facts(plan: Plan, facts: PlanFacts) -> list[tuple[str, str]]:
    """Lists what one looks for first."""
    things = {plan.recipe.placeholders[name].counts: count for name, count in plan.counts.items() if count}
    tensors = sum(len(file.pieces) for file in plan.files)
    reads = measure_reads(plan.source, plan.casts, plan.copies).size
    engine = ["--for", plan.recipe.engine] if plan.recipe.engine else []
    found = [
        ("To be written", f"{format_count(len(plan.files), 'files')}, {format_count(tensors, 'tensors')}"),
        ("Their size", f"{plan.size:,} bytes ({format_size(plan.size)})"),
        ("Read of the source, about", f"{reads:,} bytes ({format_size(reads)})"),
        (
            "Source",
            f"{format_count(len(plan.source.files), 'files')}, {format_count(len(plan.source.tensors), 'tensors')}",
        ),
        ("The model", ", ".join(format_count(count, name) for name, count in things.items()) or "-"),
        ("Options", " ".join([*list_layout_words(describe_layout(plan.layout)), *engine])),
    ]
    if plan.files and has_rank_files(plan):
        largest = int(facts.sizes.max())
        found.insert(2, ("Tensors of the largest rank", f"{largest:,} bytes ({format_size(largest)})"))
    return found + [("Chosen", line) for line in list_subset_lines(plan.source.subset)]


def make_replicas_section(facts: PlanFacts, thing: str) -> Section:
    """Makes the section of what several ranks hold."""
    extra, total = sum(one.extra for one in facts.replications), int(facts.sizes.sum())
    if not extra:
        text = f"No byte of a tensor is in more than one {thing} of this plan."
        return Section("replicas", "Replicated bytes", [make_paragraph(text)])
    most = int(facts.replicated.max())
    text = (
        f"Some tensors, or parts, are in several {thing}s, for each {thing} needs them whole. Beyond their first copy "
        f"they cost {extra:,} bytes ({format_size(extra)}) in all, {100 * extra / total:.2f} % of all tensors; of "
        f"the {thing} that has most of them they are {most:,} bytes ({format_size(most)})."
    )
    rows = [
        [
            shorten_name(one.module),
            f"{one.tensors:,}",
            f"{one.least:,}" if one.least == one.most else f"{one.least:,} to {one.most:,}",
            f"{one.size:,}",
            f"{one.extra:,}",
        ]
        for one in facts.replications
    ]
    once = sum(one.size for one in facts.replications)
    tensors = sum(one.tensors for one in facts.replications)
    heading = ("tensor, # is a number", "tensors", f"{thing}s that hold it", "bytes, once", "bytes of the other copies")
    table = Table(
        "Tensors that are replicated", heading, [*rows, ["total", f"{tensors:,}", "", f"{once:,}", f"{extra:,}"]]
    )
    return Section("replicas", "Replicated bytes", [make_paragraph(text), make_table(table._replace(has_total=True))])


def make_dtypes_section(plan: Plan) -> Section:
    """Makes the section of the dtypes before and after."""
    before: dict[str, list[int]] = {}
    for tensor in list_stored_tensors(plan):
        add_to(before, tensor.dtype, 1, tensor.size)
    after = count_target_dtypes(plan)
    largest = {name: max(table[name][1] for table in (before, after) if name in table) for name in {*before, *after}}
    names = sorted(largest, key=lambda name: (-largest[name], name))
    rows = [[*before.get(name, [0, 0]), *after.get(name, [0, 0])] for name in names]
    sums = [sum(column) for column in zip(*rows, strict=True)]
    heading = ("dtype", "tensors before", "bytes before", "tensors after", "bytes after")
    cells = [
        [name, *(f"{number:,}" for number in row)] for name, row in zip([*names, "total"], [*rows, sums], strict=True)
    ]
    words = "Before: each tensor of the source once, dropped ones too. After: the tensors of all files to be written."
    if plan.source.packed:
        words += (
            " Of a weight that lies packed, before are its codes, scales and all that the cast reads, each a tensor "
            "of a file; elsewhere on this page it is one tensor. What the cast does not need is left out: shapes of "
            "weights, and scales of activations and caches."
        )
    casts = describe_casts(plan)
    table = make_table(Table("Dtypes before and after", heading, cells, has_total=True))
    return Section("dtypes", "Dtypes before and after", [make_paragraph(words), table, make_list(casts)])


def list_stored_tensors(plan: Plan) -> Iterator[Tensor]:
    """Lists the tensors of the source as they are stored: of a packed weight its codes, scales and the rest."""
    for tensor in plan.source.tensors.values():
        packed = plan.source.find_packed(tensor)
        inputs = packed.list_inputs() if packed else [tensor]
        # Files have MXFP4 as U8; its own dtypes tell the casts what to read there.
        yield from (one._replace(dtype="U8") for one in inputs) if packed and packed.packing == "mxfp4" else inputs


def add_to(table: dict[str, list[int]], key: str, *numbers: int) -> None:
    """Adds numbers to the row of a key."""
    table[key] = [known + number for known, number in zip(table.get(key, [0] * len(numbers)), numbers, strict=True)]


def make_uses_section(plan: Plan) -> Section:
    """Makes the section of what becomes of the source tensors, with the notes."""
    rows = [row[:3] for row in list_uses(plan)]
    heading = ("source tensors", "tensors", "bytes")
    table = make_table(Table("Uses of the source tensors", heading, rows, has_total=True))
    notes = make_list(f"Note: {note.text}" for note in plan.notes)
    text = "Every source tensor is in one row. Indented rows tell which tensors they are, and why some are dropped."
    return Section("uses", "Used and dropped", [make_paragraph(text), table, notes])


def make_proofs_section(plan: Plan) -> Section:
    """Makes the section of what was proven before the plan was given out."""
    return Section(
        "proofs",
        "Proofs",
        [
            make_paragraph("No plan is shown that did not pass these proofs, from the headers of the source alone."),
            make_list(list_proofs(plan), class_="proven"),
            make_paragraph(
                "That the bytes on the disk are right, reshard verify tells after the conversion: it computes them "
                "anew, with code of its own, and compares every byte."
            ),
        ],
    )


def list_proofs(plan: Plan) -> Iterator[Markup | str]:
    """Lists what was proven, with its numbers."""
    headers = sum(len(file.header) for file in plan.files)
    tensors = plan.size - headers
    dropped = [share for share in plan.coverage if share.use == "dropped"]
    left, size = sum(share.tensors for share in dropped), sum(share.size for share in dropped)
    used = len(plan.source.tensors) - left
    yield (
        f"Every byte of every file to be written is written exactly once: {headers:,} bytes of headers, and "
        f"{tensors:,} bytes of tensors by {format_count(len(plan.copies), 'copies')} without a gap or an overlap "
        f"({plan.size:,} bytes in {format_count(len(plan.files), 'files')})."
    )
    yield (
        f"Every source tensor stands under exactly one row of the recipe: {len(plan.source.tensors):,} in all, "
        f"{used:,} used, {left:,} dropped with a reason ({size:,} bytes)."
    )
    yield "Every byte of each used tensor is read, and each part as often as its row says: once, or for several ranks."
