"""The files beside the tensors: which of the source go along, which are made, and which are left behind."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from reshard.errors import Problem, refuse, require_none
from reshard.execution.side_writer import SideFile
from reshard.formats.file_content import LOOKED_AT, require_side_content
from reshard.formats.huggingface import SUFFIX
from reshard.formats.json_input import require_no_pointer
from reshard.formats.part_manifests import is_part_name
from reshard.formats.target_names import JOURNAL, LOCK, MANIFEST, PARTIAL, STORE_RECORD, list_names
from reshard.formats.unfinished_downloads import UNFINISHED
from reshard.paths import AnyPath
from reshard.planning.plan import Plan
from reshard.storage.opened import measure_open_file, measure_path, open_regular_file
from reshard.target.config_files import carry_config, make_whole_files, restore_texts
from reshard.target.run_config import RUN_CONFIG, make_run_config
from reshard.target.tokenizer import choose_tokenizer
from reshard.text import format_count, format_list, format_size
from reshard.types import Note

LEFT_ENDINGS = (
    *(".bin", ".ckpt", ".distcp", ".engine", ".ggml", ".gguf", ".h5", ".hdf5", ".keras", ".llamafile", ".mlmodel"),
    *(".msgpack", ".nemo", ".npz", ".onnx", ".onnx_data", ".ot", ".pdparams", ".pickle", ".pkl", ".pt", ".pth"),
    *(".tflite", ".trt"),
)
"""Endings of weights in other formats, and of what training leaves. They stay behind: beside the weights of the target
they would be those of another model, and a loader may take them.
"""

PARTIAL_ENDINGS = (*UNFINISHED, PARTIAL, ".tmp")
"""Endings of files that a download or a conversion has not finished."""

INDEX_ENDING = re.compile(r"\.index(\.\w+)?\.json$")
"""`pytorch_model.bin.index.json` belongs to `pytorch_model.bin`."""

SPARE_ENDING = re.compile(r"(\.(bak|backup|old|orig|\d+)|~)$")
"""`model.safetensors.bak` and `pytorch_model.bin.1` are spare copies."""

QUANTIZATION_FILES = (
    *("hf_quant_config.json", "quant_config.json", "quantization_config.json", "quantize_config.json"),
    "recipe.yaml",
)
"""Files in which quantizers (ModelOpt, AWQ, AutoRound, GPTQ, llm-compressor) tell what they did: a loader would look
for scales.
"""

LARGE = 256 << 20
"""In bytes, of all copied files together: a person should know of more."""


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """What lies beside the tensors of a source, by what becomes of it. Hidden files are nobody's."""

    copied: dict[str, AnyPath]
    """Files that go along, by name. One may be a broken link."""
    left: dict[str, list[AnyPath]]
    """Files that stay behind, by the reason."""
    folders: list[str]
    """Names of folders, which stay behind."""


def find_beside(plan: Plan) -> FoundFiles:
    """Finds what lies beside the tensors of the source: in the original layout all of it, for ranks what the recipe
    carries; for chosen tensors (`--only`) nothing. Sorted by name.
    """
    found = FoundFiles({}, {}, [])
    carried, whole = plan.recipe.carry, plan.keeps_names
    # A run configuration belongs to the rank files, not to the model.
    ours = {MANIFEST, JOURNAL, LOCK, STORE_RECORD, *([RUN_CONFIG] if plan.origin.is_of_ranks else [])}
    ours |= {file.name for file in plan.source.files}
    for name in [] if "only" in plan.source.subset else list_names(plan.side_folder):
        path = plan.side_folder / name
        is_wanted = whole or any(fnmatchcase(name, pattern) for pattern in carried)
        if not is_wanted or name in ours or is_part_name(name) or name.startswith("."):
            continue
        if INDEX_ENDING.sub("", name).endswith(SUFFIX):
            continue
        if path.is_dir():
            # Beside a single file that was given lie folders of anything.
            found.folders.extend([name] if whole and plan.path.is_dir() else [])
        elif plan.source.packed and name in QUANTIZATION_FILES:
            found.left.setdefault("of the quantization", []).append(path)
        elif reason := explain_left_file(name, carried):
            found.left.setdefault(reason, []).append(path)
        elif path.is_file() or is_broken_link(path):
            found.copied[name] = path
    return found


def explain_left_file(name: str, carried: Sequence[str]) -> str:
    """The reason why a file stays behind; empty if it goes along. A pattern of the recipe that has the ending itself,
    such as `tokenizer.bin`, takes it along; `*token*` does not.
    """
    if name.lower().endswith(PARTIAL_ENDINGS):
        return "not wholly downloaded"
    if is_in_other_format(name) and not any(fnmatchcase(name, one) and is_in_other_format(one) for one in carried):
        return "in other formats"
    spared = SPARE_ENDING.sub("", name)
    if spared != name and (spared.endswith(SUFFIX) or is_in_other_format(spared)):
        return "of weights put aside"
    return ""


def is_in_other_format(name: str) -> bool:
    """Whether a file name, or a pattern of names, is of weights in another format or of their index."""
    return INDEX_ENDING.sub("", name.lower()).endswith(LEFT_ENDINGS)


def is_broken_link(path: AnyPath) -> bool:
    """Whether a path is a broken link."""
    return path.is_symlink() and not path.exists()


def add_notes(plan: Plan, beside: FoundFiles) -> Plan:
    """Adds to a plan the notes on files beside the tensors: those left behind, and large ones that go along."""
    return replace(plan, notes=(*plan.notes, *make_notes(beside)))


def make_notes(found: FoundFiles) -> Iterator[Note]:
    """Makes the notes on files beside the tensors of a source."""
    for reason, paths in found.left.items():
        yield Note("left-behind", f"left behind: {count_files(paths, reason)}")
    if found.folders:
        folders = format_count(len(found.folders), "folders")
        yield Note("left-behind", f"left behind: {folders} ({format_list(found.folders)})")
    copied = sorted(found.copied.values(), key=measure_file, reverse=True)
    if measure_files(copied) > LARGE:
        yield Note("large-side-files", f"copied along: {count_files(copied, 'beside the tensors')}")


def count_files(paths: Sequence[AnyPath], what: str) -> str:
    """Counts files for a person: number, names and size together."""
    names = format_list((path.name for path in paths), 3)
    return f"{format_count(len(paths), 'files')} {what} ({names}), {format_size(measure_files(paths))}"


def measure_files(paths: Sequence[AnyPath]) -> int:
    """The size of files together, in bytes."""
    return sum(map(measure_file, paths))


def measure_file(path: AnyPath) -> int:
    """The size of a file in bytes; 0 if it is a broken link."""
    return 0 if is_broken_link(path) else measure_path(path)


def make_files(plan: Plan) -> dict[str, bytes]:
    """Makes the files that a target needs besides tensors and copied files; returns name -> content."""
    if plan.keeps_names:
        made = make_whole_files(plan)
        return made if "only" in plan.source.subset else restore_texts(plan, made)
    text = make_run_config(plan)
    config = {} if "only" in plan.source.subset else carry_config(plan)
    return {**config, **({RUN_CONFIG: text.encode()} if text else {})}


def collect_side_files(
    plan: Plan, tokenizer: Mapping[str, AnyPath] | None = None, beside: FoundFiles | None = None
) -> dict[str, SideFile]:
    """Collects the side files: copied ones, and made ones, which replace copied ones of the same name. Sorted by name.
    The files of a `tokenizer`, name -> path, replace those of the source. The source is looked at again if what lies
    `beside` its tensors is not given.

    Raises Refused if one that is copied is a broken link or another thing than its name says, or cannot be read.
    """
    made, copied = make_files(plan), choose_tokenizer((beside or find_beside(plan)).copied, tokenizer)
    lost = [str(path) for path in copied.values() if is_broken_link(path)]
    expected, remedy = "a file that goes along", "download it again, or move the link away"
    require_none(Problem("missing-file", path, "a link to nothing", expected, remedy) for path in lost)
    sides = {name: look_at_side_file(path) for name, path in copied.items() if name not in made}
    sides |= {name: SideFile(content, len(content)) for name, content in made.items()}
    return dict(sorted(sides.items()))


def measure_lacking_sides(plan: Plan, target: AnyPath) -> int:
    """Measures the side files of a plan that its target lacks, in bytes. Raises Refused as `collect_side_files`."""
    return sum(side.size for name, side in collect_side_files(plan).items() if not (target / name).exists())


def look_at_side_file(path: AnyPath) -> SideFile:
    """Looks at a file that is going to be copied. Raises Refused if it cannot be read, or is a Git LFS pointer, a web
    page or another thing that its name does not say.
    """
    try:
        with open_regular_file(path) as file:
            (size, version), beginning = measure_open_file(file), file.read(LOOKED_AT)
    except OSError as error:
        raise refuse("cannot-read", str(path), error.strerror or str(error), "a readable file") from None
    require_no_pointer(path, beginning)
    require_side_content(path, beginning)
    return SideFile(path, size, version)
