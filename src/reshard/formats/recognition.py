"""Recognises what lies at a path that is no checkpoint: another format, a cache, an adapter; and gives the way on."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from reshard.errors import Refused, refuse
from reshard.formats.distcp_metadata import METADATA
from reshard.formats.file_content import decode_text, may_be_safetensors
from reshard.formats.folders_below import MOST_FOLDERS, WEIGHTS, list_saves, list_weight_folders, split_numbers
from reshard.formats.json_input import read_object, shorten_json
from reshard.formats.other_formats import (
    ACCELERATE,
    COPY_METADATA,
    FORMATS,
    LEFTOVERS,
    MEGATRON_NAMES,
    OWN_LAYOUT,
    SHARDED_SAFETENSORS,
    SLICES,
    VLLM_PARTS,
    VLLM_RANKS,
    OtherFormat,
    find_other_format,
)
from reshard.formats.unfinished_downloads import (
    FINISH,
    find_unfinished_weights,
    list_entries,
    remove_ending,
)
from reshard.paths import AnyPath
from reshard.storage.opened import open_regular_file
from reshard.text import format_count, format_list
from reshard.types import Checkpoint

ADAPTER_CONFIG = "adapter_config.json"

ADAPTER_FILE = re.compile(r"adapter_model(?:-.*)?\.(?:safetensors|bin)")

ADAPTER_TENSOR = re.compile(
    r"lora_(?:unet|te\d?)_.*|(?:.*[._])?"
    r"(?:lora_(?:[ABE]|embedding_[AB]|magnitude_vector|up|down)|ia3_l|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|oft_[rR]"
    r"|boft_[Rs]|vera_lambda_[bd]|prompt_embeddings)(?:[._].*)?",
    re.DOTALL,
)
"""Names of the tensors of adapters, as peft and the trainers of diffusion models write them."""

OWN_TENSOR = re.compile(r"(?:.*\.)?(?:tok_embeddings|layers\.\d+\.attention\.wq)\.weight", re.DOTALL)
"""Names that only Meta and Mistral use: with transformers they are `embed_tokens` and `self_attn.q_proj`."""

PIPELINE = "model_index.json"

MOST_STEPS = 10
"""Folders that are named to choose from."""

SAFETENSORS = "a folder of safetensors files, or of a torch distributed checkpoint (.distcp and .metadata)"

SHARDING_KEY = b'"DCP_SHARDING_INFO"'
"""In the metadata of slices: the place of each in its tensor."""

SAVED_OFFSETS = re.compile(rb'saved_offsets[\\]*"\s*:\s*\[([^\]]*)\]')
"""The offsets of a slice within its tensor, in JSON that is a string of the header."""


def require_safetensors_file(path: AnyPath) -> None:
    """Raises Refused if a single file is no safetensors file by its beginning, and by its name another thing."""
    beginning = b""
    with suppress(OSError, Refused), open_regular_file(path) as file:
        beginning = file.read(9)
    whole_name = remove_ending(path.name)
    if whole_name:
        raise refuse("unfinished-download", str(path), f"the beginning of {whole_name}", "the whole file", FINISH)
    if may_be_safetensors(beginning) or path.name.endswith(WEIGHTS):
        return
    if path.name.endswith(".json"):
        raise refuse("other-format", str(path), "a JSON file", SAFETENSORS, f"name its folder: {path.parent}")
    if known := find_other_format([path.name], [*FORMATS, *LEFTOVERS]):
        raise refuse_format(path, path.parent, *known)
    if decode_text(beginning) and not beginning.startswith((b"<", b"version ")):  # a web page, or a pointer of Git LFS
        raise refuse("other-format", str(path), "a text, no safetensors file", SAFETENSORS, "is the path right?")


def require_whole_files(source: AnyPath, names: Sequence[str]) -> None:
    """Raises Refused if the files of a folder are slices or ranks of a layout that is not read, by their names."""
    shown = [name for name in names if not name.startswith(".")]
    parts = list(filter(VLLM_PARTS.pattern.fullmatch, shown))
    slices = shown if all(map(SHARDED_SAFETENSORS.pattern.fullmatch, shown)) else []
    for form, fitting in ((SHARDED_SAFETENSORS, slices), (VLLM_PARTS, parts)):
        if fitting and source.is_dir():
            raise refuse_format(source, source, name_subfolders(form, source), fitting)


def require_no_slices(path: AnyPath, header: bytes) -> None:
    """Raises Refused if the header of a file says that it holds slices of tensors: they do not begin at 0, or the file
    has the name of a slice. torch writes the offsets of whole tensors too: all 0, as those of the first slice are.
    """
    if not (SHARDING_KEY in header and header.startswith(b'{"__metadata__":')):
        return
    is_named = SHARDED_SAFETENSORS.pattern.fullmatch(path.name)
    if is_named or any(re.search(rb"[1-9]", offsets) for offsets in SAVED_OFFSETS.findall(header)):
        raise refuse_format(path, path.parent, SHARDED_SAFETENSORS, [])


def refuse_format(subject: AnyPath, folder: AnyPath, form: OtherFormat, fitting: Sequence[str]) -> Refused:
    """Makes the refusal of a format, with the names that show it."""
    named = f": {format_list(fitting, 3)}" if fitting and [subject.name] != list(fitting) else ""
    remedy = form.remedy.replace("{path}", str(folder))
    return refuse("other-format", str(subject), form.name + named, SAFETENSORS, remedy)


def refuse_other_content(folder: AnyPath) -> Refused:
    """Makes the refusal of a folder without safetensors files, by what else lies in it."""
    for explain in (explain_hub_cache, explain_begun_weights, explain_pipeline, explain_adapter_folder, explain_weights,
                    explain_subfolders, explain_weights_below, explain_leftovers, explain_begun_blob):  # fmt: skip
        if refused := explain(folder):
            return refused
    return refuse(
        "empty-source", str(folder), f"no file that ends in {WEIGHTS}", "a checkpoint", "is it the right folder?"
    )


def explain_begun_weights(folder: AnyPath) -> Refused | None:
    """Explains a folder in which the first file of weights is not downloaded yet."""
    if any(remove_ending(name) for name in list_entries(folder)) and (begun := find_unfinished_weights(folder)):
        return refuse("unfinished-download", str(folder), f"only {begun}", "the whole files", FINISH)
    return None


def explain_begun_blob(folder: AnyPath) -> Refused | None:
    """Explains a folder whose hub records show a begun download, and in which nothing else tells what it is."""
    if begun := find_unfinished_weights(folder):
        return refuse("unfinished-download", str(folder), f"no weights yet: {begun}", "the whole files", FINISH)
    return None


def explain_hub_cache(folder: AnyPath) -> Refused | None:
    """Explains the root of a cached repository, a folder of it that is not a snapshot, and a folder of such roots."""
    for root in (folder, folder.parent):
        if (root / "snapshots").is_dir() and (root == folder or folder.name in {"snapshots", "blobs", "refs"}):
            return refuse_cache(folder, "a repository in the cache of the hub", list_snapshots(root))
    for above in (folder, folder / "hub"):
        roots = [above / name for name in list_entries(above) if name.startswith("models--")]
        if roots:
            snapshots = [path for root in roots[:MOST_FOLDERS] for path in list_snapshots(root)]
            return refuse_cache(folder, "the cache of the hub", snapshots)
    return None


def list_snapshots(root: AnyPath) -> list[AnyPath]:
    """Lists the snapshots of a cached repository: the one of the branch main alone, if there is one."""
    found = [root / "snapshots" / name for name in list_entries(root / "snapshots")]
    with suppress(OSError, UnicodeError), open_regular_file(root / "refs" / "main") as file:
        main = root / "snapshots" / file.read(100).decode().strip()
        return [main] if main in found else found
    return found


def refuse_cache(folder: AnyPath, found: str, snapshots: Sequence[AnyPath]) -> Refused:
    """Makes the refusal that names the snapshots to use."""
    if not snapshots:
        return refuse("hub-cache", str(folder), f"{found}, without a snapshot", "a snapshot", "download it again")
    word = "name the snapshot" if len(snapshots) == 1 else "name one of its snapshots"
    return refuse("hub-cache", str(folder), found, "a snapshot", f"{word}: {format_list(map(str, snapshots))}")


def explain_pipeline(folder: AnyPath) -> Refused | None:
    """Explains the folder of a diffusion pipeline, which has several models in folders of their own."""
    if not (folder / PIPELINE).is_file():
        return None
    found = f"a diffusion pipeline ({PIPELINE}): several models, each in its folder"
    models = format_list(str(folder / name) for name in list_weight_folders(folder))
    remedy = f"name the folder of one model: {models or 'but none of them has safetensors files here'}"
    return refuse("other-format", str(folder), found, "the folder of one model", remedy)


def explain_adapter_folder(folder: AnyPath) -> Refused | None:
    """Explains the folder of an adapter without safetensors files."""
    names = list_entries(folder)
    if not any(ADAPTER_FILE.fullmatch(name) for name in names):
        return None
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names):
        return None  # a model with its adapter beside it: the model decides
    return refuse_adapter(folder, folder)


def refuse_adapter(subject: AnyPath, folder: AnyPath) -> Refused:
    """Makes the refusal of an adapter, with the name of its base if its config tells it."""
    config: dict[str, Any] = {}
    with suppress(Refused):
        config = read_object(folder / ADAPTER_CONFIG) or {}
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    word = f" ({kind[:20]})" if isinstance(kind, str) and kind else ""
    model = shorten_json(base) if isinstance(base, str) and base else ""
    merged = f'PeftModel.from_pretrained(MODEL, {json.dumps(str(folder))}).merge_and_unload().save_pretrained("NEW")'
    named = f"where MODEL is {model or 'that model'} loaded by AutoModelForCausalLM.from_pretrained"
    remedy = f"merge it into its base model with peft, then convert NEW: {merged}, {named}"
    found = f"an adapter{word}{f' of {model}' if model else ''}: changes to a model, not a model"
    return refuse("adapter", str(subject), found, "the weights of a whole model", remedy)


def explain_weights(folder: AnyPath) -> Refused | None:
    """Explains a folder that has weights in another format; also names its sub-folders with safetensors files."""
    known = find_other_format(list_visible(folder), FORMATS)
    if not known:
        return None
    return refuse_format(folder, folder, name_subfolders(known[0], folder), known[1])


def name_subfolders(form: OtherFormat, folder: AnyPath) -> OtherFormat:
    """Adds the sub-folders with safetensors files to the hint, such as `consolidated` beside slices."""
    if not (names := list_weight_folders(folder)):
        return form
    beside = format_list(str(folder / name) for name in names)
    return form._replace(remedy=f"{form.remedy}; or name a sub-folder with safetensors files: {beside}")


def explain_weights_below(folder: AnyPath) -> Refused | None:
    """Explains a folder below which there are distributed checkpoints, such as the steps of a training: it names them,
    for each may be read by itself; or weights in another format only, such as `original`.
    """
    expected = "one checkpoint"
    if saves := list_saves(folder):
        found = f"a torch distributed checkpoint (DCP) in {format_count(len(saves), 'folders')} below"
        word = "name one of them" if len(saves) > 1 else "name it"
        return refuse("empty-source", str(folder), found, expected, f"{word}: {format_list(saves, MOST_STEPS)}")
    broken: list[str] = []
    for name in sorted(list_visible(folder)[:MOST_FOLDERS], key=split_numbers):
        if not (name.endswith("/") and (known := find_other_format(list_visible(folder / name), FORMATS))):
            continue
        form, fitting = known
        if form.name not in (SLICES, ACCELERATE):
            return refuse_format(folder, folder / name, form, [name + path for path in fitting])
        broken.append(name)
    found = f"{SLICES} without {METADATA}, which is saved last: {format_list(broken, MOST_STEPS)}"
    return refuse("empty-source", str(folder), found, expected, COPY_METADATA) if broken else None


def explain_leftovers(folder: AnyPath) -> Refused | None:
    """Explains a folder without weights, but with archives or the state of a training."""
    known = find_other_format(list_visible(folder), LEFTOVERS)
    return refuse_format(folder, folder, *known) if known else None


def list_visible(folder: AnyPath) -> list[str]:
    """Lists the names in a folder that do not begin with a dot; those of folders end in a slash."""
    names = (name for name in list_entries(folder) if not name.startswith("."))
    return [f"{name}/" if (folder / name).is_dir() else name for name in names]


def explain_subfolders(folder: AnyPath) -> Refused | None:
    """Explains a folder whose sub-folders hold checkpoints: it names them."""
    if not (names := list_weight_folders(folder)):
        return None
    remedy = f"name the folder of one of them: {format_list((str(folder / name) for name in names), MOST_STEPS)}"
    return refuse("empty-source", str(folder), "safetensors files in its sub-folders only", "one checkpoint", remedy)


def require_no_vllm_ranks(source: AnyPath, names: Sequence[str]) -> None:
    """Raises Refused if all files are ranks of vLLM by their names: they must not be taken for whole files."""
    if names and all(map(VLLM_RANKS.pattern.fullmatch, names)):
        raise refuse_format(source, source, VLLM_RANKS, names)


def require_model(checkpoint: Checkpoint) -> None:
    """Raises Refused if a checkpoint that no recipe fits is an adapter, parts of vLLM, or models of a pipeline."""
    folder, names = checkpoint.folder, [file.name for file in checkpoint.files]
    subject = folder / names[0] if len(names) == 1 else folder
    if all(map(ADAPTER_FILE.fullmatch, names)) or (
        checkpoint.tensors and all(map(ADAPTER_TENSOR.fullmatch, checkpoint.tensors))
    ):
        raise refuse_adapter(subject, folder)
    if all(map(VLLM_PARTS.pattern.fullmatch, names)):
        raise refuse_format(subject, folder, VLLM_PARTS, names)
    if refused := explain_pipeline(folder) or explain_own_layout(checkpoint):
        raise refused


def require_no_megatron(checkpoint: Checkpoint) -> None:
    """Raises Refused if a checkpoint that no packaged recipe fits has the names of Megatron's layers."""
    if shown := [name for name in checkpoint.tensors if MEGATRON_NAMES.pattern.fullmatch(name)]:
        found = f"{MEGATRON_NAMES.name} {format_list(shown, 2)}"
        expected = "tensors under the names of Hugging Face"
        raise refuse("other-format", str(checkpoint.folder), found, expected, MEGATRON_NAMES.remedy)


def explain_own_layout(checkpoint: Checkpoint) -> Refused | None:
    """Explains tensors under the names that Meta and Mistral give them, alone or beside those of Hugging Face."""
    shown = [name for name in checkpoint.tensors if OWN_TENSOR.fullmatch(name)]
    if len({name.endswith("tok_embeddings.weight") for name in shown}) < 2:  # one of each kind
        return None
    numbers = sorted({checkpoint.tensors[name].file for name in shown})
    files = [file.name for file in checkpoint.files]
    named = [files[number] for number in numbers if number < len(files)]
    is_extra = bool(named) and len(named) < len(files) and checkpoint.may_be_extra.issuperset(named)
    remedy = "--ignore-extra-files leaves it out: the other files are read alone" if is_extra else OWN_LAYOUT.remedy
    subject = checkpoint.folder / named[0] if len(named) == 1 else checkpoint.folder
    found = f"{OWN_LAYOUT.name} {format_list(shown, 2)}"
    return refuse("other-format", str(subject), found, "tensors under the names of Hugging Face", remedy)
