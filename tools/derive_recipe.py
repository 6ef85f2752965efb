"""Derives a recipe for a checkpoint from the parallel plan that transformers publishes for its model.

    python tools/derive_recipe.py SOURCE [-o FILE]

Prints the recipe as TOML, or writes it to FILE, which must not exist yet. Needs torch and transformers
(`pip install 'reshard[transformers]'`). It stands outside the package: it calls private functions of transformers.
Exit codes: 0 derived, 2 refused.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reshard.errors import Problem, Refused, refuse, require_none
from reshard.formats.huggingface import CONFIG, list_safetensors_files
from reshard.formats.manifest import read_manifest_unchecked
from reshard.inspection.recipe_fit import check_fit
from reshard.numbered_names import split_name
from reshard.recipes.recipe import list_packaged_recipes, parse_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.rank_names import find_foreign_recipe, find_rank_names
from reshard.text import escape
from reshard.types import Checkpoint, Tensor

REFUSED = 2

ROWS = ("colwise", "colwise_gather_output", "colwise_rep", "local_colwise", "embedding_rowwise")

COLUMNS = ("rowwise", "rowwise_split_input", "rowwise_rep", "local_rowwise", "embedding_colwise")

PACKED_ROWS = ("packed_colwise", "moe_tp_gate_up_colwise")

PACKED_COLUMNS = ("packed_rowwise", "moe_tp_down_rowwise")

BY_EXPERT = "grouped_gemm"

WHOLE = (
    "replicate", "replicated_with_grad_allreduce", "sequence_parallel", "all_reduce", "mla_kv_a_proj", "gather",
    "local_params", "moe_tp_experts", "moe_identity_expert", "ep_router", "ep_dispatch_experts",
)  # fmt: skip
"""What these do at run time cuts no parameter."""

HEADS = "num_key_value_heads"

QUANTIZED = re.compile(r"_(blocks|scales)$")
"""The two tensors in which MXFP4 keeps a parameter."""


class Model(NamedTuple):
    """What transformers knows of a model."""

    about: str
    plan: Mapping[str, str]
    """By the pattern of a module's or a parameter's name, with `*` for each number: what is done with it."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the parameters in memory."""
    renamed: Callable[[str], str]
    """From the name of a tensor in a checkpoint to that of the parameter of which it becomes all or part."""
    ignored: Sequence[str]
    """Patterns of names that it leaves out."""


def build_model(folder: Path) -> Model:
    """The model of a folder's config, without its weights. Runs no code from the folder. Raises Refused."""
    try:
        import torch  # noqa: PLC0415 - of all commands this one alone needs them, and they take seconds to load
        import transformers  # noqa: PLC0415
        from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415
    except ImportError as error:
        found, remedy = f"no {error.name}", "pip install 'reshard[transformers]'"
        raise refuse("no-library", "derive_recipe", found, "transformers and torch", remedy) from None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        renamed = find_renaming(model)
    except Exception as error:  # noqa: BLE001 - the config is a stranger's, and each class checks it in its own way
        expected = f"a causal language model that transformers {transformers.__version__} knows"
        raise refuse("unknown-model", str(folder), f"{type(error).__name__}: {error}", expected, BY_HAND) from None
    plan = {**model.tp_plan, **model.ep_plan}
    if not plan:
        raise refuse("no-plan", type(model).__name__, "no plan for tensor or expert parallelism", "one", BY_HAND)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    about = f"{type(model).__name__}, by the plan of transformers {transformers.__version__}"
    return Model(about, plan, shapes, renamed, model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001


def find_renaming(model: Any) -> Callable[[str], str]:
    """How transformers renames the tensors of a checkpoint, as it does when it loads the model."""
    from transformers import conversion_mapping, core_model_loading  # noqa: PLC0415

    steps = conversion_mapping.get_model_conversion_mapping(model)
    converters = [step for step in steps if isinstance(step, core_model_loading.WeightConverter)]
    renamings: list[Any] = [step for step in steps if step not in converters]
    prefix, state = model.base_model_prefix, dict(model.state_dict())

    def renamed(name: str) -> str:
        found, _ = core_model_loading.rename_source_key(name, renamings, converters, prefix, state)
        return found if found in state else QUANTIZED.sub("", found)

    return renamed


class Kept(NamedTuple):
    """Tensors of a checkpoint whose names differ in their numbers only, and what is to become of them."""

    key: str
    members: Sequence[tuple[str, ...]]
    split: str
    """`by` alone for what is dealt; for what is dropped, the reason."""
    shape: str = ""
    is_scaled: bool = False
    is_dropped: bool = False

    def numbers(self, place: int) -> frozenset[str]:
        """All that stand in a numbered place."""
        return frozenset(member[place] for member in self.members)


def group_tensors(
    checkpoint: Checkpoint, model: Model, config: Mapping[str, Any], problems: list[Problem]
) -> Iterator[Kept]:
    """The tensors of a checkpoint by their keys; appends what cannot be derived to the problems."""
    groups: dict[str, list[tuple[Tensor, tuple[str, ...]]]] = {}
    for tensor in checkpoint.tensors.values():
        key, numbers = split_name(tensor.name)
        groups.setdefault(key, []).append((tensor, numbers))
    for key, found in groups.items():
        if key.endswith(SCALE) and key.removesuffix(SCALE) + WEIGHT in groups:
            continue  # it goes with its weight
        members = [numbers for _, numbers in found]
        unknown = [tensor for tensor, _ in found if model.renamed(tensor.name) not in model.shapes]
        if len(unknown) == len(found) and all(is_ignored(tensor.name, model) for tensor in unknown):
            yield Kept(key, members, "transformers leaves it out", is_dropped=True)
        elif unknown:
            expected = "a tensor of the model that transformers makes of config.json"
            problems.extend(
                Problem("no-parameter", tensor.name, "no parameter", expected, BY_HAND) for tensor in unknown
            )
        else:
            is_scaled = key.endswith(WEIGHT) and key.removesuffix(WEIGHT) + SCALE in groups
            split = choose_split(found[0][0], model, config, problems)
            yield Kept(key, members, split, choose_shape(found[0][0], split, config), is_scaled)


def is_ignored(name: str, model: Model) -> bool:
    return any(re.search(pattern, name) for pattern in model.ignored)


def choose_shape(tensor: Tensor, split: str, config: Mapping[str, Any]) -> str:
    """The shape of a table of the vocabulary, so that it can be padded; empty for all else."""
    is_table = split == "rows" and len(tensor.shape) == 2 and not split_name(tensor.name)[1]  # layers have others
    return "[vocab_size, ?]" if is_table and tensor.shape[0] == config.get("vocab_size") else ""


def choose_split(tensor: Tensor, model: Model, config: Mapping[str, Any], problems: list[Problem]) -> str:
    """How a tensor is split, by what the plan does with its parameter; appends to the problems what no split says."""
    parameter = model.renamed(tensor.name)
    verb, whole = find_style(parameter, model.plan), model.shapes[parameter]
    split = translate_style(verb, tensor.shape, whole)
    if not split:
        found = f"{verb} of {list(whole)} {parameter}, of which this is {list(tensor.shape)}"
        problems.append(Problem("no-split", tensor.name, found, "what a split of a recipe can say", BY_HAND))
    # A head is not cut, and of few heads each is held by several ranks.
    is_heads = split == "rows" and re.search(r"\.[kv]_proj\.\w+$", parameter) and type(config.get(HEADS)) is int
    return f"rows of {HEADS}" if is_heads else split


def translate_style(verb: str, shape: tuple[int, ...], whole: tuple[int, ...]) -> str:
    """How a tensor is split by what is done with the parameter of shape `whole`, of which it is all or a part; empty if
    no split says it.
    """
    is_one_of_many = len(whole) > len(shape) and whole[len(whole) - len(shape) :] == shape
    is_half = bool(shape) and len(whole) >= len(shape) and 2 * shape[0] == whole[-len(shape)]
    if verb == BY_EXPERT:
        return "by" if len(whole) > len(shape) else "rows"
    if not verb or verb in WHOLE:
        return "replicate"
    if len(shape) not in (1, 2) or not (shape == whole or is_one_of_many or is_half):
        return ""
    if verb in PACKED_ROWS:
        return "rows" if is_half else "packed rows"
    if verb in ROWS and not is_half:
        return "rows"
    if verb in COLUMNS or (verb in PACKED_COLUMNS and is_one_of_many):
        return "columns" if len(shape) == 2 else "replicate"
    return ""


def find_style(parameter: str, plan: Mapping[str, str]) -> str:
    """What a plan does with a parameter, by its own name or else by that of its module; empty if nothing."""
    for name in (parameter, parameter.rpartition(".")[0]):
        for pattern, verb in plan.items():
            if re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), name):
                return verb
    return ""


BY_HAND = "write a recipe by hand: docs/recipes.md"

WEIGHT, SCALE = ".weight", ".weight_scale_inv"

ATTENTION = re.compile(r"\.(self_)?att(n|ention)\.")

SIZES = {"layers": ("num_hidden_layers",), "experts": ("num_experts", "num_local_experts", "n_routed_experts")}
"""What a config calls how many there are."""

LETTERS = "dsabcfghjklmnoqrtuvwxyz"
"""Names of placeholders, in the order in which they are taken: `i` is for layers, `e` for experts, `p` for scales."""

FILES = "model-rank{rank}-of-{ranks}.safetensors"

SIDE_FILES = ("config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt", "chat_template*")


Letters = Mapping[tuple[str, frozenset[str]], str]
"""By the text of names up to a number, and all numbers that stand there: the letter of a placeholder."""


def write_recipe(kept: Sequence[Kept], about: str, config: Mapping[str, Any]) -> str:
    """The recipe as TOML, its columns aligned."""
    letters = assign_letters(kept)
    rows = [[quote(cell) for cell in format_row(kind, letters)] for kind in kept]
    widths = [max(len(row[column]) for row in rows) + 1 for column in range(4)]
    lines = []
    for *cells, last in rows:
        padded = [f"{cell},".ljust(width) for cell, width in zip(cells, widths, strict=False)]
        lines.append(f"[{' '.join([*padded, last])}],")
    head = [*format_head(kept, about, config), *format_placeholders(letters, config)]
    return "\n".join([*head, "", "rules = [", *lines, "]", ""])


def assign_letters(kept: Iterable[Kept]) -> Letters:
    """A letter for each numbered place; where some names have but some of its numbers, another for each such choice.

    The first letter of a place is that of all its numbers. Raises Refused if the alphabet is too short.
    """
    choices: dict[str, dict[frozenset[str], None]] = {}
    for kind in kept:
        for place, prefix in enumerate(list_prefixes(kind.key)):
            choices.setdefault(prefix, {})[kind.numbers(place)] = None
    usual, free = {"layers": "i", "experts": "e"}, iter(LETTERS)
    letters: dict[tuple[str, frozenset[str]], str] = {}
    for prefix, found in choices.items():
        whole = frozenset[str]().union(*found)
        for numbers in dict.fromkeys([whole, *found]):
            own = usual.pop(name_counted(prefix), "") if numbers == whole else ""
            letters[prefix, numbers] = own or next(free, "")
    if "" in letters.values():
        expected = f"at most {len(LETTERS)}, one for each letter"
        raise refuse("no-split", "names with numbers", f"{len(letters):,} kinds of layers", expected, BY_HAND)
    return letters


def list_prefixes(key: str) -> list[str]:
    """`layers.#.experts.#.w` -> `layers.#`, `layers.#.experts.#`."""
    return [key[: found.end()] for found in re.finditer(r"(?<!\\)#", key)]


def name_counted(prefix: str) -> str:
    """`layers.#.experts.#` -> `experts`."""
    return prefix.removesuffix(".#").rpartition(".")[2]


def format_row(kind: Kept, letters: Letters) -> list[str]:
    name, done, letter = "", 0, ""
    for place, prefix in enumerate(list_prefixes(kind.key)):
        letter = letters[prefix, kind.numbers(place)]
        name += f"{kind.key[done : len(prefix) - 1]}{{{letter}}}"
        done = len(prefix)
    name += kind.key[done:]
    name = name.removesuffix(WEIGHT) + ".{p}" if kind.is_scaled else name
    if kind.is_dropped:
        return ["drop", name, "", kind.split]
    split = f"by {letter}" if kind.split == "by" else kind.split
    return ["same", name, name, split, *([kind.shape] if kind.shape else [])]


def format_head(kept: Sequence[Kept], about: str, config: Mapping[str, Any]) -> Iterator[str]:
    name = str(config.get("model_type", "derived"))
    yield f"name         = {quote(name.replace('_', '-') + '-derived')}"  # not to be taken for a packaged one
    yield f"about        = {quote(about)}"
    yield f"checked      = {quote('nothing yet: derived')}"
    yield 'left         = "huggingface"'
    yield 'right        = "tensor-parallel"'
    yield f"files        = {quote(FILES)}"
    yield f"carry        = [{', '.join(map(quote, SIDE_FILES))}]"
    yield "describes    = true"
    if "num_attention_heads" in config and any(kind.split == "rows" and ATTENTION.search(kind.key) for kind in kept):
        yield f"ranks_divide = [{quote('num_attention_heads')}]"
    if any(kind.shape for kind in kept):
        yield f"padded       = [{quote('vocab_size')}]"
    if any(kind.is_scaled for kind in kept):
        block = (config.get("quantization_config") or {}).get("weight_block_size") or 128
        yield ""
        yield f"scales.p = {{ left = {quote(SCALE[1:])}, right = {quote(SCALE[1:])}, block = {json.dumps(block)} }}"


def format_placeholders(letters: Letters, config: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    whole: dict[str, str] = {}
    for (prefix, numbers), letter in letters.items():
        word = name_counted(prefix)
        if prefix in whole:
            fields = [f"counts = {quote(f'some {word}, {letter}')}", f"some_of = {quote(whole[prefix])}"]
        else:
            whole[prefix] = letter
            size = next((key for key in SIZES.get(word, ()) if config.get(key) == len(numbers)), "")
            fields = [f"counts = {quote(word)}", *([f"size = {quote(size)}"] if size else [])]
        yield f"placeholders.{letter} = {{ {', '.join(fields)} }}"


def quote(text: str) -> str:
    """A string of TOML."""
    return json.dumps(text, ensure_ascii=False)


LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
"""How configs say how many layers there are."""


def derive_recipe(folder: Path) -> str:
    """A recipe for a checkpoint, by transformers' plans: that for expert parallelism where there is one, else that for
    tensor parallelism. Raises Refused with everything that cannot be derived.
    """
    require_source(folder)
    checkpoint = read_checkpoint(folder)
    if checkpoint.config is None:
        raise refuse("no-config", str(folder / CONFIG), "no such file", "the config of the model", "copy it there")
    require_layers(checkpoint, checkpoint.config)
    model = build_model(folder)
    problems: list[Problem] = []
    kept = list(group_tensors(checkpoint, model, checkpoint.config, problems))
    require_none(problems)
    text = write_recipe(kept, model.about, checkpoint.config)
    check_fit(checkpoint, parse_recipe(text, "the derived recipe"))
    return text


def require_source(folder: Path) -> None:
    """It is a folder, and no rank files lie in it. Raises Refused."""
    if folder.is_file():
        raise refuse("no-source", str(folder), "a file", "the folder of a checkpoint", f"name {folder.parent}")
    recipes = list_packaged_recipes()
    if folder.is_dir() and (
        find_foreign_recipe(read_manifest_unchecked(folder), recipes)
        or find_rank_names(folder, list_safetensors_files(folder), recipes)
    ):
        expected, remedy = "a Hugging Face checkpoint", "name what they were cut from"
        raise refuse("rank-files", str(folder), "rank files", expected, remedy)


def require_layers(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """There are not more layers than tensors: to make a billion of them, even without weights, would take for ever."""
    most, tables = len(checkpoint.tensors), [config]
    while tables:
        table = tables.pop()
        for key in LAYER_KEYS:
            if isinstance(layers := table.get(key), int) and layers > most:
                raise refuse("contradiction", CONFIG, f"{key} of {layers:,}", f"at most {most:,}: as many as tensors")
        tables.extend(value for value in table.values() if isinstance(value, dict))


def main(arguments: Sequence[str] | None = None) -> int:
    """Derives a recipe as the command line says, and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("source", type=Path, help="the folder of a Hugging Face checkpoint")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the recipe there; default: print it")
    options = parser.parse_args(arguments)
    try:
        text = derive_recipe(options.source)
        if options.output is not None:
            with options.output.open("x", encoding="utf-8") as file:
                file.write(text)
        else:
            print("\n".join(map(escape, text.rstrip("\n").split("\n"))))
    except Refused as refused:
        print(f"derive_recipe: refused\n{refused}", file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(f"derive_recipe: refused\n{escape(str(error.filename or ''))}: {error.strerror}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
