"""What lies in a target: its tensor files and headers, its index and config."""

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
    """The tensor files that a target folder has, or should have."""

    names: Mapping[int, str]
    """By the rank; or by a number, where files are not by rank."""
    ranks: int
    """1 where files are not by rank."""
    is_whole: bool
    """Whether these are not rank files, but tensors in one piece under the names of the source."""
    extra: Sequence[str]
    """The names of others beside rank files."""


class Found(NamedTuple):
    """One file of the target, as it stands."""

    number: int
    """Its rank, or its number."""
    file: File
    tensors: Sequence[Tensor]


def require_folder(target: Path) -> None:
    """Raises Refused if there is none, or if the conversion that writes it has not ended."""
    if not target.is_dir():
        found = "a file" if target.exists() else "no such folder"
        raise refuse("empty-target", str(target), found, "a folder that was converted into", "is the path right?")
    require_finished(target)


def look_at(target: Path, recipe: Recipe) -> Folder:
    """What files a folder should have. How many ranks there are is told by the names of most; where no file is named as
    a rank file is, they are whole. Raises Refused if there is none at all.
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
    """The headers of the files that can be read, and what is wrong with the others."""
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
"""How a config names the dtype of its weights."""


def beside_problems(
    target: Path,
    files: Sequence[Found],
    config: Mapping[str, Any] | None,
    forms: Collection[str],
    recipe: Recipe,
    *,
    is_power: bool,
) -> Iterator[Problem]:
    """What the index and the config of a target say wrongly; `config` is that of the source."""
    for check in (index_problems(target, files), config_problems(target, config, forms, recipe, is_power=is_power)):
        try:
            yield from check
        except Refused as refused:
            yield from refused.problems


def index_problems(target: Path, files: Sequence[Found]) -> Iterator[Problem]:
    """Where the index does not name the file that a tensor is in. A single file needs none."""
    index = read_object(target / INDEX)
    if index is None:
        if len(files) > 1:
            yield Problem("missing-file", INDEX, "no such file", f"one, for {len(files)} files", AGAIN)
        return
    named = index.get("weight_map")
    named = named if isinstance(named, dict) else {}
    held = {tensor.name: file.file.name for file in files for tensor in file.tensors}
    for name in sorted(held.keys() | named.keys()):
        if named.get(name) != held.get(name):
            found = f"in {named[name]}" if name in named else "not named"
            expected = f"in {held[name]}" if name in held else "not named: it is in no file"
            yield Problem("wrong-index", f"{INDEX}: {name}", found, expected, AGAIN)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(tensor.size for file in files for tensor in file.tensors)
    if total is not None and total != size:
        yield Problem("wrong-index", f"{INDEX}: total_size", json.dumps(total), f"{size}", AGAIN)


def config_problems(
    target: Path, config: Mapping[str, Any] | None, forms: Collection[str], recipe: Recipe, *, is_power: bool
) -> Iterator[Problem]:
    """Where the config is not that of the source, or does not say what the weights are now."""
    if config is None:
        return
    found = read_object(target / CONFIG)
    if found is None:
        yield Problem("missing-file", CONFIG, "no such file", "that of the source", AGAIN)
        return
    # How weights are held is looked at below, if that has changed.
    changed = {"quantization_config", "expert_dtype", *DTYPES} if set(forms) & {DEQUANTIZE, QUANTIZE} else set()
    changed |= {"quantization_config", "expert_dtype"} if FP4_TO_FP8 in forms else set()
    for key in sorted((config.keys() | found.keys()) - changed):
        if key in DTYPES and found.get(key) == "bfloat16":
            continue
        if found.get(key) != config.get(key):
            yield wrong(key, found, text_of(config, key))
    if DEQUANTIZE in forms:
        for key in ("quantization_config", "expert_dtype"):
            if key in found:
                yield wrong(key, found, "nothing: the weights are BF16")
        if {found.get(key, "bfloat16") for key in DTYPES} != {"bfloat16"} or not any(key in found for key in DTYPES):
            yield wrong("torch_dtype", found, '"bfloat16"')
    if FP4_TO_FP8 in forms:
        yield from expert_problems(config, found)
    if QUANTIZE in forms:
        yield from quantization_problems(found, recipe, is_power=is_power)


def expert_problems(config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Problem]:
    """A config that still says that the experts are FP4, or that says more than that they are not."""
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
