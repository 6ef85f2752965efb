"""Sums up what two checkpoints differ in, by layer and by module. Knows names only, and no recipe."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from reshard.inspection.value_distance import RangeDistance
from reshard.inspection.value_sums import (
    OverallDistance,
    Unusual,
    add_sums,
    add_unusual,
    compute_overall_rank,
    measure_overall,
)
from reshard.numbered_names import split_name


@dataclass(frozen=True, slots=True)
class GroupDifference:
    """The tensors of one layer, or those of one name in all layers, and how far they are apart."""

    name: str
    """Such as `model.layers.3` or `model.layers.#.mlp.up_proj.weight`; empty for what is in no layer."""
    tensors: int
    """The number of tensors on either side."""
    different: int
    """Of those: with other values."""
    unpaired: int
    """Of those: of another dtype or shape, or on one side only."""
    nans: tuple[int, int]
    """The number of NaNs on each side, among the elements that differ."""
    infinite: int
    """The number of elements that are infinite on a side, and NaN on neither, among these."""
    overall: OverallDistance
    """Of all tensors with other values together; tensors that are equal do not count."""

    @property
    def is_same(self) -> bool:
        """Whether there is no difference in this group."""
        return not (self.different or self.unpaired)

    @property
    def unusual(self) -> Unusual:
        """The NaNs and infinities."""
        return Unusual(self.nans, self.infinite)


def group_differences(
    name_group: Callable[[str], str], compared: Mapping[str, RangeDistance], unpaired: Iterable[str]
) -> tuple[GroupDifference, ...]:
    """Groups all tensors by `name_group`, the most different group first, equal ones in their order at the end."""
    groups: dict[str, list[RangeDistance]] = {}
    for name, found in compared.items():
        groups.setdefault(name_group(name), []).append(found)
    lacking: dict[str, int] = {}
    for name in unpaired:
        group = name_group(name)
        groups.setdefault(group, [])
        lacking[group] = lacking.get(group, 0) + 1
    return tuple(
        sorted(
            (summarize_group(name, found, lacking.get(name, 0)) for name, found in groups.items()),
            key=lambda group: (
                not group.is_same,
                group.unusual.is_any,
                compute_overall_rank(group.overall),
                group.unpaired,
            ),
            reverse=True,
        )
    )


def summarize_group(name: str, found: Iterable[RangeDistance], unpaired: int) -> GroupDifference:
    every = list(found)
    apart = [measures.apart for measures in every if measures.apart]
    nans, infinite = add_unusual(distance.unusual for distance in apart)
    overall = measure_overall(add_sums(measures.sums for measures in every if measures.apart))
    return GroupDifference(name, len(every) + unpaired, len(apart), unpaired, nans, infinite, overall)


def name_module(name: str) -> str:
    """A name with `#` for each number."""
    return split_name(name)[0]
