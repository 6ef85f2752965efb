"""Derive: a checkpoint and the plan that transformers publishes for its model's class -> a recipe, as TOML text.

The only module that needs transformers and torch. A plan speaks of the modules that transformers has in memory, where
the experts of a layer are one tensor; transformers' own renaming leads there from the names in the checkpoint.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from reshard.draft import OWN, SCALE, WEIGHT, Kept, recipe_text
from reshard.errors import Problem, refuse, require_none
from reshard.inspect import manifest_at
from reshard.match import match
from reshard.names import split_name
from reshard.ranks import foreign_recipe, ranks_at
from reshard.read import CONFIG, read_checkpoint
from reshard.recipe import packaged_recipes, parse_recipe
from reshard.types import Checkpoint, Layout, Tensor
from reshard.units import config_problems, kinds_of, pairing_problems

ROWS = ("colwise", "colwise_gather_output", "colwise_rep", "local_colwise", "embedding_rowwise")
COLUMNS = ("rowwise", "rowwise_split_input", "rowwise_rep", "local_rowwise", "embedding_colwise")
PACKED_ROWS = ("packed_colwise", "moe_tp_gate_up_colwise")
PACKED_COLUMNS = ("packed_rowwise", "moe_tp_down_rowwise")
DEALT = "grouped_gemm"
WHOLE = (
    "replicate", "replicated_with_grad_allreduce", "sequence_parallel", "all_reduce", "mla_kv_a_proj", "gather",
    "local_params", "moe_tp_experts", "moe_identity_expert", "ep_router", "ep_dispatch_experts",
)  # fmt: skip
"""What these do at run time cuts no parameter."""
HEADS = "num_key_value_heads"
QUANTIZED = re.compile(r"_(blocks|scales)$")
"""The two tensors in which MXFP4 keeps a parameter."""
LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
"""How configs say how many layers there are."""


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


def derive_recipe(folder: Path) -> str:
    """A recipe for a checkpoint, by transformers' plans: that for expert parallelism where there is one, else that for
    tensor parallelism. Raises Refused with everything that cannot be derived.
    """
    require_source(folder)
    checkpoint = read_checkpoint(folder)
    if checkpoint.config is None:
        raise refuse("no-config", str(folder / CONFIG), "no such file", "the config of the model", "copy it there")
    require_layers(checkpoint, checkpoint.config)
    model = model_of(folder)
    problems: list[Problem] = []
    kept = list(kept_of(checkpoint, model, checkpoint.config, problems))
    require_none(problems)
    text = recipe_text(kept, model.about, checkpoint.config)
    require_fit(checkpoint, text)
    return text


def require_source(folder: Path) -> None:
    """It is a folder, and no rank files lie in it. Raises Refused."""
    if folder.is_file():
        raise refuse("no-source", str(folder), "a file", "the folder of a checkpoint", f"name {folder.parent}")
    recipes = packaged_recipes()
    if folder.is_dir() and (foreign_recipe(manifest_at(folder), recipes) or ranks_at(folder, recipes)):
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


def require_fit(checkpoint: Checkpoint, text: str) -> None:
    """The derived recipe covers the checkpoint that it was derived from. Raises Refused."""
    recipe, layout = parse_recipe(text, "the derived recipe"), Layout(1)
    matched = match(checkpoint, recipe)
    kinds = kinds_of(matched, recipe, layout)
    problems = pairing_problems(matched, kinds, recipe, layout), config_problems(kinds, recipe, checkpoint.config)
    require_none(chain(*problems))


def model_of(folder: Path) -> Model:
    """The model of a folder's config, without its weights. Runs no code from the folder. Raises Refused."""
    try:
        import torch  # noqa: PLC0415 - of all commands this one alone needs them, and they take seconds to load
        import transformers  # noqa: PLC0415
        from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415
    except ImportError as error:
        found, remedy = f"no {error.name}", "pip install 'reshard[transformers]'"
        raise refuse("no-library", "recipes derive", found, "transformers and torch", remedy) from None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        renamed = renaming_of(model)
    except Exception as error:  # noqa: BLE001 - the config is a stranger's, and each class checks it in its own way
        expected = f"a causal language model that transformers {transformers.__version__} knows"
        raise refuse("unknown-model", str(folder), f"{type(error).__name__}: {error}", expected, OWN) from None
    plan = {**model.tp_plan, **model.ep_plan}
    if not plan:
        raise refuse("no-plan", type(model).__name__, "no plan for tensor or expert parallelism", "one", OWN)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    about = f"{type(model).__name__}, by the plan of transformers {transformers.__version__}"
    return Model(about, plan, shapes, renamed, model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001


def renaming_of(model: Any) -> Callable[[str], str]:
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


def kept_of(checkpoint: Checkpoint, model: Model, config: Mapping[str, Any], problems: list[Problem]) -> Iterator[Kept]:
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
            problems.extend(Problem("no-parameter", tensor.name, "no parameter", expected, OWN) for tensor in unknown)
        else:
            is_scaled = key.endswith(WEIGHT) and key.removesuffix(WEIGHT) + SCALE in groups
            split = split_of(found[0][0], model, config, problems)
            yield Kept(key, members, split, shape_of(found[0][0], split, config), is_scaled)


def is_ignored(name: str, model: Model) -> bool:
    return any(re.search(pattern, name) for pattern in model.ignored)


def shape_of(tensor: Tensor, split: str, config: Mapping[str, Any]) -> str:
    """The shape of a table of the vocabulary, so that it can be padded; empty for all else."""
    is_table = split == "rows" and len(tensor.shape) == 2 and not split_name(tensor.name)[1]  # layers have others
    return "[vocab_size, ?]" if is_table and tensor.shape[0] == config.get("vocab_size") else ""


def split_of(tensor: Tensor, model: Model, config: Mapping[str, Any], problems: list[Problem]) -> str:
    """How a tensor is split, by what the plan does with its parameter; appends to the problems what no split says."""
    parameter = model.renamed(tensor.name)
    verb, whole = verb_of(parameter, model.plan), model.shapes[parameter]
    split = split_by(verb, tensor.shape, whole)
    if not split:
        found = f"{verb} of {list(whole)} {parameter}, of which this is {list(tensor.shape)}"
        problems.append(Problem("no-split", tensor.name, found, "what a split of a recipe can say", OWN))
    # A head is not cut, and of few heads each is held by several ranks.
    is_heads = split == "rows" and re.search(r"\.[kv]_proj\.\w+$", parameter) and type(config.get(HEADS)) is int
    return f"rows of {HEADS}" if is_heads else split


def split_by(verb: str, shape: tuple[int, ...], whole: tuple[int, ...]) -> str:
    """How a tensor is split by what is done with the parameter of shape `whole`, of which it is all or a part; empty if
    no split says it.
    """
    is_one_of_many = len(whole) > len(shape) and whole[len(whole) - len(shape) :] == shape
    is_half = bool(shape) and len(whole) >= len(shape) and 2 * shape[0] == whole[-len(shape)]
    if verb == DEALT:
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


def verb_of(parameter: str, plan: Mapping[str, str]) -> str:
    """What a plan does with a parameter, by its own name or else by that of its module; empty if nothing."""
    for name in (parameter, parameter.rpartition(".")[0]):
        for pattern, verb in plan.items():
            if re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), name):
                return verb
    return ""
