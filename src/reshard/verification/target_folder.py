"""Lists and reads the tensor files of a target folder; checks its index and config."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reshard.errors import Problem, Refused, refuse
from reshard.formats.huggingface import CONFIG, INDEX, SUFFIX, read_header
from reshard.formats.json_input import read_object
from reshard.formats.target_names import require_finished
from reshard.types import MOST_RANKS, File, Recipe, Tensor
from reshard.verification.expected import DEQUANTIZE, FP4_TO_FP8, QUANTIZE

AGAIN = "remove the file and convert again"

MISSING = "copy it there, or convert again"


class Folder(NamedTuple):
    """The tensor files that a target folder should have."""

    names: Mapping[int, str]
    """By rank; with whole files, by a running number."""
    ranks: int
    """How many; 1 with whole files."""
    is_whole: bool
    """Whether the files hold whole tensors under the names of the source, instead of one rank each."""
    extra: Sequence[str]
    """Names of tensor files that do not belong to the set of rank files."""


class Found(NamedTuple):
    """A file of the target and the tensors in its header."""

    number: int
    """Its rank; with whole files, a running number."""
    file: File
    tensors: Sequence[Tensor]


def require_folder(target: Path) -> None:
    """Raises Refused if `target` is no folder, or if its conversion has not finished."""
    if not target.is_dir():
        found = "a file" if target.exists() else "no such folder"
        raise refuse("empty-target", str(target), found, "a folder that was converted into", "is the path right?")
    require_finished(target)


def look_at(target: Path, recipe: Recipe) -> Folder:
    """Lists the tensor files that a folder should have. The number of ranks is the one that most file names say; if no
    file is named like a rank file, all are whole files. Raises Refused if there are no tensor files.
    """
    pattern = re.escape(recipe.files).replace(r"\{rank\}", r"(\d+)").replace(r"\{ranks\}", r"(\d+)")
    require_folder(target)
    paths = [path for path in sorted(target.iterdir()) if path.is_file()]
    tensor_files = [path.name for path in paths if path.name.endswith(SUFFIX)]
    fitting = [found for path in paths if (found := re.fullmatch(pattern, path.name))]
    if not fitting and tensor_files:
        return Folder(dict(enumerate(tensor_files)), 1, is_whole=True, extra=())
    if not fitting:
        lacking = f"no file such as {recipe.files.format(rank='0', ranks='N')}"
        raise refuse("empty-target", str(target), lacking, "a folder of rank files", "is it the right folder?")
    ranks = Counter(max(map(int, found.groups())) for found in fitting).most_common(1)[0][0]
    if ranks > MOST_RANKS:
        raise refuse("wrong-ranks", fitting[0][0], f"{ranks} ranks", f"at most {MOST_RANKS}")
    names = {rank: recipe.files.format(rank=rank, ranks=ranks) for rank in range(ranks)}
    known = set(names.values())
    return Folder(names, ranks, is_whole=False, extra=[name for name in tensor_files if name not in known])


def read_found(target: Path, names: Mapping[int, str]) -> tuple[list[Found], list[Problem]]:
    """Reads the headers of the files; the problems are of files that are missing or cannot be read."""
    files: list[Found] = []
    problems: list[Problem] = []
    for number, name in names.items():
        if not (target / name).exists():
            found = "a link to nothing" if (target / name).is_symlink() else "no such file"
            problems.append(Problem("missing-file", name, found, f"one of {len(names)} files", MISSING))
            continue
        try:
            files.append(Found(number, *read_header(target / name, number)))
        except Refused as refused:
            problems.extend(refused.problems)
    return files, problems


DTYPES = ("torch_dtype", "dtype")
"""The config keys for the dtype of the weights: the old one and the new one."""


def beside_problems(
    target: Path,
    files: Sequence[Found],
    config: Mapping[str, Any] | None,
    conversions: Collection[str],
    recipe: Recipe,
    *,
    is_power: bool,
) -> Iterator[Problem]:
    """Wrong entries in the index and the config of a target of whole files; `config` is the config of the source."""
    for check in (
        index_problems(target, files),
        config_problems(target, config, conversions, recipe, is_power=is_power),
    ):
        try:
            yield from check
        except Refused as refused:
            yield from refused.problems


def index_problems(target: Path, files: Sequence[Found]) -> Iterator[Problem]:
    """Tensors that the index does not have in the right file. A single file needs no index."""
    index = read_object(target / INDEX)
    if index is None:
        if len(files) > 1:
            yield Problem("missing-file", INDEX, "no such file", f"one, for {len(files)} files", AGAIN)
        return
    named = index.get("weight_map")
    named = named if isinstance(named, dict) else {}
    file_names = {tensor.name: file.file.name for file in files for tensor in file.tensors}
    for name in sorted(file_names.keys() | named.keys()):
        if named.get(name) != file_names.get(name):
            found = f"in {named[name]}" if name in named else "not named"
            expected = f"in {file_names[name]}" if name in file_names else "not named: it is in no file"
            yield Problem("wrong-index", f"{INDEX}: {name}", found, expected, AGAIN)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(tensor.size for file in files for tensor in file.tensors)
    if total is not None and total != size:
        yield Problem("wrong-index", f"{INDEX}: total_size", json.dumps(total), f"{size}", AGAIN)


def config_problems(
    target: Path, config: Mapping[str, Any] | None, conversions: Collection[str], recipe: Recipe, *, is_power: bool
) -> Iterator[Problem]:
    """Config keys that differ from the source, or that do not match the conversions of the weights."""
    if config is None:
        return
    found = read_object(target / CONFIG)
    if found is None:
        yield Problem("missing-file", CONFIG, "no such file", "that of the source", AGAIN)
        return
    # Keys about the dtype of weights are checked below, if the weights were converted.
    changed = {"quantization_config", "expert_dtype", *DTYPES} if set(conversions) & {DEQUANTIZE, QUANTIZE} else set()
    changed |= {"quantization_config", "expert_dtype"} if FP4_TO_FP8 in conversions else set()
    for key in sorted((config.keys() | found.keys()) - changed):
        if key in DTYPES and found.get(key) == "bfloat16":
            continue
        if found.get(key) != config.get(key):
            yield wrong(key, found, text_of(config, key))
    if DEQUANTIZE in conversions:
        for key in ("quantization_config", "expert_dtype"):
            if key in found:
                yield wrong(key, found, "nothing: the weights are BF16")
        if {found.get(key, "bfloat16") for key in DTYPES} != {"bfloat16"} or not any(key in found for key in DTYPES):
            yield wrong("torch_dtype", found, '"bfloat16"')
    if FP4_TO_FP8 in conversions:
        yield from expert_problems(config, found)
    if QUANTIZE in conversions:
        yield from quantization_problems(found, recipe, is_power=is_power)


def expert_problems(config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Problem]:
    """A config that still says that the experts are FP4, or that differs in more than this."""
    if "expert_dtype" in found:
        yield wrong("expert_dtype", found, "nothing: the experts are FP8")
    if without_experts(config) != found.get("quantization_config"):
        yield wrong("quantization_config", found, json.dumps(without_experts(config)))


def without_experts(config: Mapping[str, Any]) -> Any:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return quantization
    return {key: value for key, value in quantization.items() if key != "expert_dtype"}


def quantization_problems(found: Mapping[str, Any], recipe: Recipe, *, is_power: bool) -> Iterator[Problem]:
    said = found.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    block = list(next(iter(recipe.scales.values())).block)
    expected = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
    expected |= {"scale_fmt": "ue8m0"} if is_power else {}
    if any(said.get(key) != value for key, value in expected.items()) or ("scale_fmt" in said) != is_power:
        yield wrong("quantization_config", found, f"{json.dumps(expected)} at least")


def wrong(key: str, found: Mapping[str, Any], expected: str) -> Problem:
    return Problem("wrong-config", f"{CONFIG}: {key}", text_of(found, key), expected, AGAIN)


def text_of(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key]) if key in config else "nothing"
