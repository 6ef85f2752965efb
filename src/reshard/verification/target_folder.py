"""Lists and reads the tensor files of a target folder; checks its index and config."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from reshard.errors import Problem, Refused, refuse
from reshard.formats.huggingface import (
    CONFIG,
    INDEX,
    SINGLE,
    is_safetensors_name,
    read_described_header,
    read_stated_ranks,
)
from reshard.formats.json_input import read_object
from reshard.formats.manifest import read_valid_manifest
from reshard.formats.part_manifests import is_of_slices, require_shares_joined
from reshard.formats.remote_names import restore_address, suggest_download, suggest_near
from reshard.formats.share_names import find_share_of_folder
from reshard.formats.slice_names import is_sliced_folder, name_slices, parse_shard_numbers
from reshard.formats.target_names import require_finished
from reshard.paths import AnyPath, RemotePath
from reshard.recipe_types import Recipe
from reshard.recipes.formulas import compute_shape, parse_shape
from reshard.recipes.recipe import has_ranks
from reshard.storage.opened import measure_path
from reshard.storage.remote_store import fetch_heads
from reshard.text import format_list, format_runs
from reshard.types import MOST_RANKS, File, Tensor
from reshard.verification.expected import DEQUANTIZE, FP4_TO_FP8, QUANTIZE, ROUND

CONVERT_AGAIN_HINT = "convert again, into another folder"

PADDING = "zeros, behind the last row of"
"""How the expected of a problem begins where only padding differs, which no reading of rank files looks at."""

REPAIR_HINT = "reshard repair writes it again"

COPY_AGAIN_HINT = f"{REPAIR_HINT}; or copy the file here again"

MISSING_FILE_HINT = "copy it there, or convert again"

LOST_FILE_HINT = f"copy it there, or {REPAIR_HINT}"

PUT_AGAIN_HINT = "put the sound file there in its place; or convert again, with --restart --yes"
"""The hint for a file in a store, where nothing is repaired."""

PUT_LOST_HINT = "run the same convert again, which writes what is missing and nothing else; or put the file there"
"""The hint for a file that is not in a store any more."""

HINTS_OF_STORES = {
    COPY_AGAIN_HINT: PUT_AGAIN_HINT,
    LOST_FILE_HINT: PUT_LOST_HINT,
    REPAIR_HINT: PUT_AGAIN_HINT,
}
"""In the order in which they are looked for: the last one stands in the others."""


class TargetFolder(NamedTuple):
    """The tensor files that a target folder should have."""

    names: Mapping[int, str]
    """By rank; with whole files, by a running number."""
    ranks: int
    """How many; 1 with whole files."""
    is_whole: bool
    """Whether the files hold whole tensors under the names of the source, instead of one rank each."""
    extra: Sequence[str]
    """Names of tensor files that do not belong to the set of rank files."""
    is_joint: bool = False
    """Whether all files together are the right side of a recipe, which has no ranks."""
    is_sliced: bool = False
    """Whether each file has slices of whole tensors: all of them together are whole files, or the right side."""
    is_share: bool = False
    """Whether these whole files are those of a share: other processes make the others."""

    def find_rank(self, number: int) -> int:
        """The rank that a file holds, by its number."""
        return 0 if self.is_whole or self.is_joint else number


class TargetHeader(NamedTuple):
    """A file of the target and the tensors in its header."""

    number: int
    """Its rank; with whole files, a running number."""
    file: File
    tensors: Sequence[Tensor]
    said: Mapping[str, Any]
    """The metadata of the header: of some recipes rank and number of ranks."""


def require_target_folder(target: AnyPath) -> None:
    """Raises Refused if `target` is no folder, or if its conversion has not finished."""
    if not target.is_dir():
        found = "a file" if target.exists() else "no such folder"
        remedy = suggest_near(target) or (isinstance(target, Path) and suggest_download(target)) or "is the path right?"
        raise refuse("empty-target", restore_address(target), found, "a folder that was converted into", remedy)
    require_finished(target)
    require_shares_joined(target)


def reword_for_store(target: AnyPath, problems: Iterable[Problem]) -> Iterator[Problem]:
    """The problems of a target; if it lies in a store, without the hint to repair it."""
    for problem in problems:
        remedy = problem.remedy
        for hint, other in HINTS_OF_STORES.items() if isinstance(target, RemotePath) else ():
            remedy = remedy.replace(hint, other)
        yield replace(problem, remedy=remedy)


def list_target_files(target: AnyPath, recipe: Recipe) -> TargetFolder:
    """Lists the tensor files that a folder should have. The number of ranks is the one that most file names say, or
    most headers, where names do not; if no file is named like a rank file, all are whole files. Raises Refused if there
    are no tensor files.
    """
    pattern = re.escape(recipe.files).replace(r"\{rank\}", r"(\d+)").replace(r"\{ranks\}", r"(\d+)")
    require_target_folder(target)
    entries = sorted(path.name for path in target.iterdir() if path.is_file())
    tensor_files = [name for name in entries if is_safetensors_name(name)]
    manifest = read_valid_manifest(target)
    if is_sliced_folder(tensor_files) or is_of_slices(manifest):
        return list_sliced_files(manifest, recipe, tensor_files)
    fitting = [found for name in entries if (found := re.fullmatch(pattern, name))]
    is_share = find_share_of_folder(target) is not None and bool(manifest)
    if not has_ranks(recipe) and tensor_files:
        names = [SINGLE] if SINGLE in tensor_files else tensor_files  # the one that loaders find without an index
        extra = [name for name in tensor_files if name not in names]
        return TargetFolder(dict(enumerate(names)), 1, is_whole=False, extra=extra, is_joint=True, is_share=is_share)
    if not fitting and tensor_files:
        return TargetFolder(dict(enumerate(tensor_files)), 1, is_whole=True, extra=(), is_share=is_share)
    if not fitting:
        lacking = f"no file such as {recipe.files.format(rank='0', ranks='N')}"
        raise refuse("empty-target", str(target), lacking, "a folder of rank files", "is it the right folder?")
    if "{ranks}" in recipe.files:
        ranks = Counter(max(map(int, found.groups())) for found in fitting).most_common(1)[0][0]
    else:
        said = Counter(filter(None, (read_stated_ranks(target / found[0]) for found in fitting)))
        ranks = said.most_common(1)[0][0] if said else 1 + max(int(found[1]) for found in fitting)
    if ranks > MOST_RANKS:
        raise refuse("wrong-ranks", fitting[0][0], f"{ranks} ranks", f"at most {MOST_RANKS}")
    by_rank = {rank: recipe.files.format(rank=rank, ranks=ranks) for rank in range(ranks)}
    known = set(by_rank.values())
    return TargetFolder(by_rank, ranks, is_whole=False, extra=[name for name in tensor_files if name not in known])


def list_sliced_files(manifest: Mapping[str, Any], recipe: Recipe, names: Sequence[str]) -> TargetFolder:
    """Lists the files of slices that a folder should have: as many as its manifest tells, else as the names count."""
    told = manifest["ranks"] if is_of_slices(manifest) else max(shard for shard, _, _ in parse_shard_numbers(names))
    ranks = min(max(told, 1), MOST_RANKS)
    known = name_slices(ranks)
    extra = [name for name in names if name not in known]
    is_whole = has_ranks(recipe)
    return TargetFolder(dict(enumerate(known)), ranks, is_whole, extra, is_joint=not is_whole, is_sliced=True)


def measure_target_files(target: AnyPath, recipe: Recipe, ranks: Collection[int] | None) -> int:
    """The bytes of the tensor files that a verification reads: all that there are, or those of some ranks. Raises
    Refused as `list_target_files`.
    """
    names = choose_files(list_target_files(target, recipe), ranks).values()
    return sum(measure_path(target / name) for name in names if (target / name).is_file())


def choose_files(folder: TargetFolder, ranks: Collection[int] | None) -> Mapping[int, str]:
    """Chooses the files of some ranks by their number, or all. Raises Refused for ranks that there are not, and for any
    where the files are whole.
    """
    if ranks is None:
        return folder.names
    if folder.is_sliced:
        remedy = "leave --source out: the checksums of the manifest prove the files of some ranks"
        raise refuse("wrong-option", "--ranks", "some slices, with --source", "all: only so are tensors whole", remedy)
    if folder.is_whole or folder.is_joint:
        raise refuse_ranks_of_whole_files()
    if unknown := sorted(set(ranks) - set(range(folder.ranks))):
        raise refuse("unknown-rank", "--ranks", f"rank {unknown[0]}", f"ranks from 0 to {folder.ranks - 1}")
    return {number: name for number, name in folder.names.items() if number in ranks}


def refuse_ranks_of_whole_files() -> Refused:
    """Makes the refusal of `--ranks` for a target that has none."""
    found, remedy = "a target of whole files", "leave it out: all files are verified"
    return refuse("wrong-option", "--ranks", found, "a target of rank files", remedy)


def read_target_headers(target: AnyPath, names: Mapping[int, str]) -> tuple[list[TargetHeader], list[Problem]]:
    """Reads the headers of the files; the problems are of files that are missing or cannot be read."""
    files: list[TargetHeader] = []
    problems: list[Problem] = []
    fetch_heads(target, names.values())
    here = ",".join(format_runs(number for number, name in names.items() if (target / name).exists()))
    remedy = f"for the ranks that are here: --ranks {here}; else {MISSING_FILE_HINT}" if here else MISSING_FILE_HINT
    for number, name in names.items():
        if not (target / name).exists():  # never of whole files: those are what lies there
            found = "a link to nothing" if (target / name).is_symlink() else "no such file"
            problems.append(Problem("missing-file", name, found, f"one of {len(names)} files", remedy))
            continue
        try:
            files.append(TargetHeader(number, *read_described_header(target / name, number)))
        except Refused as refused:
            problems.extend(refused.problems)
    return files, problems


CONFIG_DTYPE_KEYS = ("torch_dtype", "dtype")
"""The config keys for the dtype of the weights: the old one and the new one."""


def check_index_and_config(
    target: AnyPath,
    files: Sequence[TargetHeader],
    config: Mapping[str, Any] | None,
    conversions: Collection[str],
    recipe: Recipe,
    *,
    is_power: bool,
) -> Iterator[Problem]:
    """Wrong entries in the index and the config of a target of whole files; `config` is the config of the source."""
    for check in (
        check_target_index(target, files),
        check_target_config(target, files, config, conversions, recipe, is_power=is_power),
    ):
        try:
            yield from check
        except Refused as refused:
            yield from refused.problems


def check_target_index(
    target: AnyPath, files: Sequence[TargetHeader], own: Collection[str] | None = None
) -> Iterator[Problem]:
    """Tensors that the index does not have in the right file. A single file needs no index. Of a share, `own` has the
    names of its files: the index names others too.
    """
    index = read_object(target / INDEX)
    if index is None:
        if len(files) > 1:
            yield Problem("missing-file", INDEX, "no such file", f"one, for {len(files)} files", CONVERT_AGAIN_HINT)
        return
    named = index.get("weight_map")
    named = named if isinstance(named, dict) else {}
    file_names = {tensor.name: file.file.name for file in files for tensor in file.tensors}
    if own is not None:
        named = {name: file for name, file in named.items() if file in own or name in file_names}
    for name in sorted(file_names.keys() | named.keys()):
        if named.get(name) != file_names.get(name):
            found = f"in {named[name]}" if name in named else "not named"
            expected = f"in {file_names[name]}" if name in file_names else "not named: it is in no file"
            yield Problem("wrong-index", f"{INDEX}: {name}", found, expected, CONVERT_AGAIN_HINT)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(tensor.size for file in files for tensor in file.tensors)
    if own is None and total is not None and total != size:
        yield Problem("wrong-index", f"{INDEX}: total_size", json.dumps(total), f"{size}", CONVERT_AGAIN_HINT)


def check_target_config(
    target: AnyPath,
    files: Sequence[TargetHeader],
    config: Mapping[str, Any] | None,
    conversions: Collection[str],
    recipe: Recipe,
    *,
    is_power: bool,
) -> Iterator[Problem]:
    """Config keys that differ from the source, or that do not match the conversions of the weights."""
    if config is None:
        return
    found = read_object(target / CONFIG)
    if found is None:
        yield Problem("missing-file", CONFIG, "no such file", "that of the source", CONVERT_AGAIN_HINT)
        return
    if not has_ranks(recipe) and not read_valid_manifest(target):
        yield from check_told_sizes(config, found, recipe)
        return
    # Keys about the dtype of weights are checked below, if the weights were converted.
    done, quantization = set(conversions), ("quantization_config", "expert_dtype")
    is_bf16 = DEQUANTIZE in done or (ROUND in done and bool(recipe.scales))
    changed = set(CONFIG_DTYPE_KEYS) if done & {DEQUANTIZE, QUANTIZE, ROUND} else set()
    changed |= set(quantization) if is_bf16 or done & {QUANTIZE, FP4_TO_FP8} else set()
    for key in sorted((config.keys() | found.keys()) - changed):
        if key in CONFIG_DTYPE_KEYS and found.get(key) == "bfloat16":
            continue
        if found.get(key) != config.get(key):
            yield make_config_problem(key, found, format_config_value(config, key))
    for key in quantization if is_bf16 else ():
        if key in found:
            yield make_config_problem(key, found, "nothing: the weights are BF16")
    said = [found[key] for key in CONFIG_DTYPE_KEYS if key in found]
    if done & {DEQUANTIZE, ROUND} and (not said or any(value != "bfloat16" for value in said)):
        yield make_config_problem("torch_dtype", found, '"bfloat16"')
    if FP4_TO_FP8 in done:
        yield from check_expert_dtype(config, found)
    if QUANTIZE in done:
        yield from check_quantization_config(files, found, recipe, is_power=is_power)


def check_told_sizes(config: Mapping[str, Any], found: Mapping[str, Any], recipe: Recipe) -> Iterator[Problem]:
    """A config that another program than reshard wrote, with other sizes than the source's: it has keys of its own."""
    sizes = [place.size for place in recipe.placeholders.values() if place.size]
    formulas = [formula for rule in recipe.rules if rule.shape for formula in parse_shape(rule.shape)[1]]
    for formula in dict.fromkeys((*sizes, *formulas)):
        wanted, told = (compute_shape(f"[{formula}]", one, recipe.sizes)[0] for one in (config, found))
        if None not in (wanted, told) and wanted != told:
            expected = f"{wanted}, as that of the source says"
            yield Problem("wrong-config", f"{CONFIG}: {formula}", f"{told}", expected, CONVERT_AGAIN_HINT)


def check_expert_dtype(config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Problem]:
    """A config that still says that the experts are FP4, or that differs in more than this."""
    if "expert_dtype" in found:
        yield make_config_problem("expert_dtype", found, "nothing: the experts are FP8")
    if drop_expert_dtype(config) != found.get("quantization_config"):
        yield make_config_problem("quantization_config", found, json.dumps(drop_expert_dtype(config)))


def drop_expert_dtype(config: Mapping[str, Any]) -> Any:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return quantization
    return {key: value for key, value in quantization.items() if key != "expert_dtype"}


def check_quantization_config(
    files: Sequence[TargetHeader], found: Mapping[str, Any], recipe: Recipe, *, is_power: bool
) -> Iterator[Problem]:
    """A `quantization_config` that does not describe the new FP8 weights, or does not exempt the other matrices."""
    said = found.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    block = list(next(iter(recipe.scales.values())).block)
    expected = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
    expected |= {"scale_fmt": "ue8m0"} if is_power else {}
    if any(said.get(key) != value for key, value in expected.items()) or ("scale_fmt" in said) != is_power:
        yield make_config_problem("quantization_config", found, f"{json.dumps(expected)} at least")
    exempt = said.get("modules_to_not_convert")
    tensors = [tensor for file in files for tensor in file.tensors if tensor.name.endswith(".weight")]
    plain = [one.name.removesuffix(".weight") for one in tensors if len(one.shape) == 2 and one.dtype in PLAIN_DTYPES]
    if lacking := set(plain).difference(exempt if isinstance(exempt, list) else ()):
        expected_names = f"in modules_to_not_convert: {format_list(sorted(lacking))}"
        yield make_config_problem("quantization_config", found, expected_names)


PLAIN_DTYPES = ("BF16", "F16", "F32")
"""Of matrices that are not quantized."""


def make_config_problem(key: str, found: Mapping[str, Any], expected: str) -> Problem:
    return Problem("wrong-config", f"{CONFIG}: {key}", format_config_value(found, key), expected, CONVERT_AGAIN_HINT)


def format_config_value(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key]) if key in config else "nothing"
