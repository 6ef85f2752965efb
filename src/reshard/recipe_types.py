"""The nouns of a recipe: frozen values, no file is opened. Imports only the standard library."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A numbered place in a recipe's names, such as the `i` of `model.layers.{i}.input_layernorm.weight`."""

    name: str
    """One letter, without braces."""
    counts: str
    """The things that it numbers, in the plural: `layers`."""
    size: str = ""
    """Formula over the config for the number of members."""
    within: str = ""
    """Another placeholder, P. Each member of P belongs to exactly one of the placeholders within P."""
    some_of: str = ""
    """Another placeholder, P. Each member of this placeholder is also a member of P."""
    picked_by: str = ""
    """With `within` or `some_of`: the config key of a list with one value for each member of P."""
    picked: tuple[int | str, ...] = ()
    """With `picked_by`: the values in the list that make a member of P a member of this placeholder."""
    listed: str = ""
    """With `some_of`: the config key of a list of the members."""
    listed_from: int = 0
    """With `listed`: the number that the list has for member 0."""
    every: str = ""
    """With `within` or `some_of`: a formula for N. Where the config lacks the list of `picked_by`, the last of each N
    members of P is a member of this placeholder."""
    first: str = ""
    """With `every`: a formula for the number of members of P that are members before these are counted."""
    others: str = ""
    """With `picked_by`: members of P that are not picked may be members too; what becomes of them in the engines."""
    after: str = ""
    """Another placeholder, A. The numbers of this placeholder begin after the last number of A."""
    marker: str = ""
    """With `after`: a tensor name that only members of this placeholder have, not members of A."""
    like: str = ""
    """With `after`: names of placeholders, one letter each. Their rules hold for members of this one as well."""
    optional: str = ""
    """Reason why tensors numbered by this placeholder are left out unless asked for; empty if they never are."""
    only: str = ""
    """`if KEY`: there are members only if the config key is true. Rules with it have that condition, or their own."""
    rows_of: str = ""
    """Name of a tensor whose first dimension is the number of members, in elements."""


@dataclass(frozen=True, slots=True)
class Split:
    """How a tensor is split over the ranks, parsed from the text of a recipe."""

    text: str
    """As the recipe writes it, such as `rows` or `rows padded to N` (recipes/splits.py); of a `drop`, the reason."""
    dimension: int | None = None
    """The dimension that is cut, from 0 on; None if every tensor stays whole."""
    placeholder: str = ""
    """Of `by LETTER`: each member of this placeholder, such as an expert, is assigned to one rank."""
    heads_key: str = ""
    """Of `rows of KEY`: the config key with the number of heads in the rows. A head is never cut."""
    is_padded: bool = False
    """Whether rows of zeros are appended, so that every rank has the same number of rows."""
    multiple: int = 0
    """Of `rows padded to N`: the rows become a multiple of it, which the ranks must divide; 0 for other splits."""
    is_packed: bool = False
    """Whether the rows are two tensors stacked, such as gate and up. Each half is cut by itself."""
    step: int = 0
    """Of `dimension D in blocks of N`: a part is a multiple of this length, and the last ones may be shorter; 0 for
    splits into equal parts."""
    is_first: bool = False
    """Whether rank 0 has the whole tensor, and each other rank zeros in its place."""

    @property
    def is_replicated(self) -> bool:
        """Whether every rank gets the whole tensor."""
        return self.dimension is None and not self.placeholder

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a recipe: maps a name on the left (original files) to a name on the right (rank files)."""

    relation: str
    """`same`, `flatten`, `dequantize` or `drop`; `concat` or `stack` if the right tensor is fused of several left
    ones."""
    left: str
    """Name pattern of the original tensors, with placeholders."""
    right: str
    """Name pattern in the rank files; empty for a `drop`."""
    split: Split
    """How the ranks share the tensors. Of a `drop` it cuts nothing, and its text is the reason."""
    shape: str = ""
    """Dtype, unless it is a float, and shape in elements of the left tensor: `I64 [vocab_size, 2 * heads]`."""
    only: str = ""
    """Condition for the tensor to exist. `if KEY`, `unless KEY`: the config key decides. `if {m}`: the model has
    members of that placeholder. `maybe`: it may be missing; `maybe if KEY`: it may be missing where the config key is
    true or absent."""
    optional: str = ""
    """Reason why the tensor is left out unless its placeholder is asked for; empty if it never is."""
    code_dtype: str = ""
    """Dtype of its parameter in the inference code, unless that is quantized; empty if the recipe does not say."""


@dataclass(frozen=True, slots=True)
class BlockScale:
    """How a group of weights is scaled: one scale for each block of a weight's elements."""

    left: str
    """The word that replaces `weight` in the left name of the scale."""
    right: str
    """The word that replaces `weight` in the right name of the scale."""
    block: tuple[int, int]
    """Rows and columns, in elements, that share one scale."""
    packed: bool = False
    """Whether the weights are FP4 packed in I8, two elements a byte. `block` counts elements, not bytes."""
    fp8_block: tuple[int, int] = (1, 1)
    """With `packed`: rows and columns, in elements, that share one scale after the cast to FP8."""
    stays: bool = False
    """Whether these weights are never cast, because the model's code reads no other dtype."""


class Constant(NamedTuple):
    """Tensors that only the right side has, all of one value."""

    right: str
    """Name pattern in the rank files, with one placeholder or none."""
    dtype: str
    """Of the tensors."""
    shape: tuple[int, ...]
    """In elements."""
    value: float
    """Of every element."""
    scale: str = ""
    """The placeholder of block scales without which it does not exist; empty if it always does."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The mapping between two layouts of one model family, read from a TOML file."""

    name: str
    """The name for `--recipe`."""
    about: str
    """One sentence about the recipe."""
    left: str
    """The layout of the original files, in words."""
    right: str
    """The layout of the rank files, or of whole files under other names, in words."""
    files: str
    """Pattern of the names of rank files, with `{rank}` and `{ranks}`; or the name of the one file that has all."""
    carry: tuple[str, ...]
    """Patterns of the side files to copy."""
    model_types: tuple[str, ...]
    """Values of `model_type` in the config that choose this recipe."""
    architectures: tuple[str, ...]
    """Values of `architectures` in the config that choose this recipe."""
    ranks_divide: tuple[str, ...]
    """Formulas over the config; the number of ranks must divide each value."""
    placeholders: Mapping[str, Placeholder]
    """The numbered placeholders, by name."""
    scales: Mapping[str, BlockScale]
    """The block scales, by the name of the placeholder for the weight or its scale."""
    sizes: Mapping[str, str]
    """Formulas over config keys for the sizes that shapes name, in elements."""
    padded: tuple[str, ...]
    """Config keys that padding may raise, with zeros in the weights, so that each rank gets whole blocks."""
    run: Mapping[str, Any]
    """The run configuration of the right side's code. By key: a formula over the config; a list of a formula and the
    default that is left out; or a list of one formula whose missing value is written as null."""
    run_needs: tuple[tuple[Any, ...], ...]
    """Conditions of that code. Each row: a formula over the config, then its allowed values; a value that begins with
    `=` is a formula. If the config gives another value, no run configuration is written."""
    describes: bool
    """Whether the metadata of each rank file names its rank, the number of ranks and the recipe."""
    checked: str
    """The models and code that the recipe was checked against, in words."""
    rules: tuple[Rule, ...]
    """The rows, in the order of the file."""
    constants: tuple[Constant, ...]
    """The tensors that are made of nothing, in every rank file."""
    engine: str
    """The engine that the right side is for, as `--for` names it; empty if the recipe is found without it."""
    whole_only: str
    """Reason why there are no rank files; empty if there are some."""
    by_name: bool
    """Whether it is used only where its name is given, for a family has another recipe that is the usual one."""
    origin: str
    """The file that the recipe was read from."""
    text_hash: str
    """SHA-256 of that file, in hexadecimal."""
