"""Decides how each weight group is converted: kept, relabelled as FP4, cast, rounded or padded; makes the casts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from reshard.casts.rounding import FLOAT_DTYPES
from reshard.casts.shapes import ROWS_TOGETHER, TRANSPOSED, count_blocks, flatten_to_matrix
from reshard.errors import Problem, refuse
from reshard.formats.safetensors import BITS
from reshard.planning.nvfp4 import WORDS, make_nvfp4_tensors
from reshard.recipe_types import BlockScale, Recipe, Rule
from reshard.recipes.formulas import compute_shape, count_heads, parse_shape
from reshard.recipes.patterns import WEIGHT
from reshard.sources.block_scales import CAST_TO_FP8, WeightGroup, dequantizes, find_logical_shape, find_target_block
from reshard.types import NVFP4, PACKED, WHOLE, Cast, Layout, Packed, Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """A weight group after casts and padding: the whole tensors that the target is cut from."""

    kind: WeightGroup
    """The group in the source."""
    weights: Sequence[Tensor]
    """Source tensors, or results of casts."""
    scales: Sequence[Tensor]
    """One for each weight; empty if the target has no block scales."""
    scale_names: Sequence[str]
    """Names of the scales in the target."""
    block: tuple[int, int]
    """Rows and columns, in elements, that share one scale; (1, 1) without scales."""
    factors: Sequence[Tensor] = ()
    """Of NVFP4: one for each weight."""
    factor_names: Sequence[str] = ()
    """Names of the factors in the target."""
    heads: int | None = 0
    """Number of heads that the split counts: 0 if it counts none, None if the config lacks the number."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The facts that decide how weight groups are converted."""

    recipe: Recipe
    layout: Layout
    padded: Mapping[str, Any] | None
    """The config with raised values; None without padding."""
    files: int
    """Number of files and joins of the source: casts are numbered from here on."""
    config: Mapping[str, Any]
    """The config, with raised values if padded; empty without a config."""
    packed: Sequence[Packed] = ()
    """How the weights lie whose file is PACKED or beyond. Empty where only shapes are tried: they are as BF16."""


def transform_weights(kind: WeightGroup, terms: Terms, casts: list[Cast]) -> Outcome:
    """Casts and pads a weight group, as the layout asks. Appends the needed casts. Raises Refused if a dimension in the
    middle would have to be padded.
    """
    outcome = replace(cast_weights(kind, terms, casts), heads=count_heads(kind.rule, terms.config))
    shape = find_padded_shape(kind.rule, outcome.weights[0], terms)
    if shape == outcome.weights[0].shape:
        return outcome
    before, cut = outcome.weights[0].shape, kind.rule.split.dimension or 0
    is_wide = before[-1:] != shape[-1:] and 0 < cut < len(shape) - 1
    if is_wide or before[1:-1] != shape[1:-1]:
        expected = "padding of the first or last dimension, of the last only if none between is cut"
        found = f"{list(before)} to {list(shape)}"
        raise refuse("wrong-padding", kind.rule.left, found, expected, "no --pad, or fewer ranks")
    return pad_outcome(outcome, shape, terms, casts)


def cast_weights(kind: WeightGroup, terms: Terms, casts: list[Cast]) -> Outcome:
    """Casts a weight group, as the layout asks; relabels packed FP4 from I8 to F4 in rank files."""
    layout, scaling = terms.layout, kind.scaling
    if terms.packed and kind.weights[0].file >= PACKED:
        return make_nvfp4_group(kind, terms, casts) if layout.cast == NVFP4 else unpack_group(kind, terms, casts)
    if layout.cast == "bf16" and is_rounded(kind):
        return round_group(kind, terms, casts)
    if scaling is None or scaling.stays:
        block = scaling.block if scaling and kind.scales else (1, 1)
        return Outcome(kind, kind.weights, kind.scales, kind.scale_names, block)
    if kind.scales and dequantizes(kind.rule, layout):
        return dequantize_group(kind, scaling, terms, casts)
    if kind.scales and scaling.packed and layout.expert_dtype == "fp8":
        return cast_group_to_fp8(kind, scaling, terms, casts)
    if not kind.scales and layout.cast in CAST_TO_FP8 and not dequantizes(kind.rule, layout):
        return quantize_group(kind, scaling, terms, casts)
    if scaling.packed and kind.weights[0].dtype == "I8" and layout.to != WHOLE:
        shape = find_logical_shape(kind.weights[0], scaling)
        weights = [tensor._replace(dtype="F4", shape=shape) for tensor in kind.weights]
        return Outcome(kind, weights, kind.scales, kind.scale_names, scaling.block)
    return Outcome(kind, kind.weights, kind.scales, kind.scale_names, scaling.block if kind.scales else (1, 1))


def add_casts(
    operation: str,
    inputs: Sequence[tuple[Tensor, Tensor | None]],
    blocks: tuple[tuple[int, int], tuple[int, int]],
    result: tuple[str, tuple[int, ...]],
    terms: Terms,
    casts: list[Cast],
    *,
    is_scale: bool = False,
) -> list[Tensor]:
    """Adds a cast for each pair of weight and scale, all with one operation; returns their results.

    `blocks` are the old and the new block, in elements; `result` is the dtype and shape of each result.
    """
    dtype, shape = result
    size, first = prod(shape) * BITS[dtype] // 8, terms.files + len(casts)
    names = [(scale if is_scale and scale else weight).name for weight, scale in inputs]
    results = [Tensor(name, dtype, shape, first + place, 0, size) for place, name in enumerate(names)]
    casts.extend(
        Cast(operation, weight, scale, blocks[0], tensor, blocks[1], is_scale)
        for (weight, scale), tensor in zip(inputs, results, strict=True)
    )
    return results


def unpack_group(kind: WeightGroup, terms: Terms, casts: list[Cast]) -> Outcome:
    """Dequantizes weights that lie packed to BF16. Those that a block of scales describes are cast like any other."""
    weights = []
    for weight in kind.weights:
        packed = terms.packed[weight.file - PACKED]
        result = weight._replace(file=terms.files + len(casts))
        block = (find_block_rows(packed), packed.group)
        casts.append(Cast("dequantize", packed.codes, packed.scales, block, result, packed=packed))
        weights.append(result)
    return Outcome(kind, weights, [], [], (1, 1))


def make_nvfp4_group(kind: WeightGroup, terms: Terms, casts: list[Cast]) -> Outcome:
    """Makes NVFP4 of weights of MXFP4: the same codes, other scales, and factors."""
    packed = [terms.packed[weight.file - PACKED] for weight in kind.weights]
    codes, scales, factors = make_nvfp4_tensors(kind.weights, packed, terms.files, casts)
    names = [[name.removesuffix(WEIGHT) + word for name in kind.names] for word in WORDS]
    return Outcome(replace(kind, names=names[0]), codes, scales, names[1], (1, 1), factors, names[2])


def find_block_rows(packed: Packed) -> int:
    """Finds how many rows of a packed weight share a scale, or are best dequantized together."""
    if packed.packing in TRANSPOSED:
        return ROWS_TOGETHER
    return max(1, flatten_to_matrix(packed.result.shape)[0] // max(1, flatten_to_matrix(packed.scales.shape)[0]))


def is_rounded(kind: WeightGroup) -> bool:
    """Whether a cast to BF16 rounds a weight group: floats without a scale, but for those of a parameter that the
    inference code has in another dtype, and for what the recipe drops.
    """
    is_free = not (kind.scales or (kind.scaling and kind.scaling.stays)) and kind.rule.relation != "drop"
    return is_free and kind.weights[0].dtype in FLOAT_DTYPES and kind.rule.code_dtype in ("", "BF16")


def round_group(kind: WeightGroup, terms: Terms, casts: list[Cast]) -> Outcome:
    """Rounds weights without scales to BF16."""
    inputs: list[tuple[Tensor, Tensor | None]] = [(weight, None) for weight in kind.weights]
    result = "BF16", kind.weights[0].shape
    return Outcome(kind, add_casts("round", inputs, ((1, 1), (1, 1)), result, terms, casts), [], [], (1, 1))


def dequantize_group(kind: WeightGroup, scaling: BlockScale, terms: Terms, casts: list[Cast]) -> Outcome:
    """Dequantizes a weight group to BF16, without scales."""
    inputs = list(zip(kind.weights, kind.scales, strict=True))
    shape = find_logical_shape(kind.weights[0], scaling)
    weights = add_casts("dequantize", inputs, (scaling.block, (1, 1)), ("BF16", shape), terms, casts)
    return Outcome(kind, weights, [], [], (1, 1))


def cast_group_to_fp8(kind: WeightGroup, scaling: BlockScale, terms: Terms, casts: list[Cast]) -> Outcome:
    """Casts packed FP4 weights to FP8, with E8M0 scales of the FP8 block."""
    inputs, blocks = list(zip(kind.weights, kind.scales, strict=True)), (scaling.block, scaling.fp8_block)
    shape = find_logical_shape(kind.weights[0], scaling)
    weights = add_casts("fp4-to-fp8", inputs, blocks, ("F8_E4M3", shape), terms, casts)
    result = "F8_E8M0", count_blocks(shape, scaling.fp8_block)
    scales = add_casts("fp4-to-fp8-scale", inputs, blocks, result, terms, casts, is_scale=True)
    return Outcome(kind, weights, scales, kind.scale_names, scaling.fp8_block)


def quantize_group(kind: WeightGroup, scaling: BlockScale, terms: Terms, casts: list[Cast]) -> Outcome:
    """Quantizes BF16 weights to FP8, with F32 scales. The scales get the names that the recipe gives them."""
    inputs: list[tuple[Tensor, Tensor | None]] = [(weight, None) for weight in kind.weights]
    shape, power = kind.weights[0].shape, "-ue8m0" if terms.layout.cast == "fp8-ue8m0" else ""
    blocks = scaling.block, scaling.block
    weights = add_casts(f"quantize{power}", inputs, blocks, ("F8_E4M3", shape), terms, casts)
    result = "F32", count_blocks(shape, scaling.block)
    scales = add_casts(f"quantize{power}-scale", inputs, blocks, result, terms, casts, is_scale=True)
    for scale in scales:
        place = scale.file - terms.files
        named = scale._replace(name=scale.name.removesuffix(WEIGHT) + scaling.left)
        casts[place] = casts[place]._replace(result=named)
    scales = [casts[scale.file - terms.files].result for scale in scales]
    word = scaling.left if terms.layout.to == WHOLE else scaling.right
    names = [name.removesuffix(WEIGHT) + word for name in kind.names]
    return Outcome(kind, weights, scales, names, scaling.block)


def find_padded_shape(rule: Rule, weight: Tensor, terms: Terms) -> tuple[int, ...]:
    """Finds the shape of a weight after padding, in elements: by the raised config, or equal rows for each rank, or
    a multiple of rows, or as many rows again for each other rank.
    """
    shape = weight.shape
    if terms.padded and rule.shape and rule.relation != "drop":
        raised = compute_shape(rule.shape, terms.padded, terms.recipe.sizes)
        shape = tuple(known or length for known, length in zip(raised, shape, strict=True))
    if rule.split.is_padded and terms.layout.to != WHOLE and shape:
        if rule.split.is_first:
            return (shape[0] * terms.layout.ranks, *shape[1:])
        multiple = rule.split.multiple or terms.layout.ranks
        shape = (-(-shape[0] // multiple) * multiple, *shape[1:])
    return shape


def pad_outcome(outcome: Outcome, shape: tuple[int, ...], terms: Terms, casts: list[Cast]) -> Outcome:
    """Pads weights to `shape`, in elements, with zeros behind the last rows and columns; their scales with ones."""
    weights = [*pad_tensors(outcome.weights, shape, terms, casts)]
    scales = [*pad_tensors(outcome.scales, count_blocks(shape, outcome.block), terms, casts, is_scale=True)]
    return replace(outcome, weights=weights, scales=scales)


def pad_tensors(
    tensors: Sequence[Tensor], shape: tuple[int, ...], terms: Terms, casts: list[Cast], *, is_scale: bool = False
) -> Iterator[Tensor]:
    """Pads tensors to `shape`, in elements. Adds a cast for each tensor; results of casts have their cast changed."""
    for tensor in tensors:
        size = prod(shape) * BITS[tensor.dtype] // 8
        place = tensor.file - terms.files
        if place >= 0:
            result = tensor._replace(shape=shape, size=size)
            casts[place] = casts[place]._replace(result=result)
        else:
            result = Tensor(tensor.name, tensor.dtype, shape, terms.files + len(casts), 0, size)
            casts.append(Cast("pad", store_as_bytes(tensor), None, (1, 1), store_as_bytes(result), (1, 1), is_scale))
        yield result


def store_as_bytes(tensor: Tensor) -> Tensor:
    """Relabels F4 as I8, two values in a byte, so that padding works on whole bytes."""
    if tensor.dtype != "F4":
        return tensor
    return tensor._replace(dtype="I8", shape=(*tensor.shape[:-1], tensor.shape[-1] // 2))


MOST = 64
"""Padding raises no config value to more than MOST times its value."""


def raise_config(
    config: Mapping[str, Any] | None, kinds: Sequence[WeightGroup], recipe: Recipe, layout: Layout
) -> Mapping[str, Any]:
    """Raises each config key that the recipe allows to the least value that suits the ranks. Raises Refused without a
    config, or if no value suits.
    """
    if config is None:
        raise refuse(
            "no-config",
            "--pad",
            "no config.json",
            "one: padding raises its values",
            "copy it to the source, or name its folder with --config",
        )
    raised = dict(config)
    for key in recipe.padded:
        value = config.get(key)
        lengths = find_cut_lengths(kinds, recipe, layout, raised, key)
        if type(value) is not int or value < 1 or not lengths:
            continue
        wanted = next(
            (
                more
                for more in range(value, MOST * value + 1)
                if suits_ranks(lengths, recipe, layout, {**raised, key: more})
            ),
            None,
        )
        if wanted is None:
            expected = f"a value up to {MOST * value:,} whose blocks {layout.ranks} ranks can share"
            raise refuse("not-divisible", key, str(value), expected, "fewer ranks")
        raised[key] = wanted
    return raised


def suits_ranks(lengths: Iterable[tuple[str, int]], recipe: Recipe, layout: Layout, config: Mapping[str, Any]) -> bool:
    """Whether each rank gets whole blocks of each length. `lengths` are formulas over the config, each with its block
    in elements.
    """
    sizes = [(compute_shape(f"[{length}]", config, recipe.sizes)[0], block) for length, block in lengths]
    return all(size is not None and size % (layout.ranks * block) == 0 for size, block in sizes)


def find_cut_lengths(
    kinds: Sequence[WeightGroup], recipe: Recipe, layout: Layout, config: Mapping[str, Any], key: str
) -> set[tuple[str, int]]:
    """Finds the formulas of the lengths that are cut and depend on a config key, each with its block in elements."""
    found = set()
    for kind in kinds:
        dimension = kind.rule.split.dimension
        formulas = parse_shape(kind.rule.shape)[1] if kind.rule.shape else []
        if dimension is None or len(formulas) <= dimension:
            continue
        block = find_target_block(kind, layout)
        length = compute_shape(kind.rule.shape, config, recipe.sizes)[dimension]
        without = compute_shape(kind.rule.shape, {**config, key: None}, recipe.sizes)[dimension]
        if length is not None and without is None:
            found.add((formulas[dimension], block[dimension] if dimension < len(block) else 1))
    return found


def is_paddable(kind: WeightGroup, recipe: Recipe, layout: Layout, config: Mapping[str, Any]) -> bool:
    """Whether padding can raise the length along which a weight group is cut."""
    return any(find_cut_lengths([kind], recipe, layout, config, key) for key in recipe.padded)


def check_padding(outcomes: Sequence[Outcome]) -> Iterator[Problem]:
    """Reports packed tensors that padding would change: rows added at the end would all belong to the second half."""
    for outcome in outcomes:
        before, after = outcome.kind.weights[0].shape[:1], outcome.weights[0].shape[:1]
        if outcome.kind.rule.split.is_packed and before != after:
            found = f"{before[0]:,} packed rows padded to {after[0]:,}"
            yield Problem(
                "wrong-option", outcome.kind.rule.left, found, "halves that are as they were", "without --pad"
            )


def grows_in_halves(kind: WeightGroup, recipe: Recipe, layout: Layout, config: Mapping[str, Any]) -> bool:
    """Whether padding would add rows to a packed tensor, all of them to its second half."""
    return kind.rule.split.is_packed and is_paddable(kind, recipe, layout, config)
