"""The steps that led from the names in a checkpoint's files to those of a recipe: done again, and told to a person."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from reshard.text import format_count
from reshard.types import Tensor

HEAD = "lm_head."
"""The beginning of names that stand beside `model.`, not under it."""

LONGEST_OLD, LONGEST_NEW, MOST_STEPS = 1_000, 16, 16
"""Limits of a renaming, in characters and steps: anyone can write a manifest, and each step is done for all names."""


class RenamingStep(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """One step of a renaming. It is done for all names before the next step."""

    old: Annotated[str, msgspec.Meta(max_length=LONGEST_OLD)]
    """Taken off, with its last dot. Empty: nothing is taken off, and names that begin with `new` or HEAD stay."""
    new: Annotated[str, msgspec.Meta(max_length=LONGEST_NEW)] = ""
    """Put in front in its place, with its last dot."""
    inside: bool = False
    """Whether `old` is taken out wherever it stands in a name; else it is taken off in front only."""

    def rename(self, name: str) -> str:
        """Renames one name; a name that the step does not concern stays."""
        if self.inside:
            return ".".join(take_out(name.split("."), self.old[:-1]))
        if not self.old:
            return name if name.startswith((self.new, HEAD)) else self.new + name
        return self.new + name[len(self.old) :] if name.startswith(self.old) else name


Renaming = tuple[RenamingStep, ...]
"""Empty where the names in the files are those of the recipe."""

StoredRenaming = Annotated[list[RenamingStep], msgspec.Meta(max_length=MOST_STEPS)]
"""As the manifest has it."""


def take_out(components: Sequence[str], component: str) -> Iterator[str]:
    """Takes a component out of a name, but never the last one: that names the tensor itself."""
    yield from (part for part in components[:-1] if part != component)
    yield components[-1]


def rename_all(names: Iterable[str], renaming: Renaming) -> list[str]:
    """Renames names, in their order."""
    found = list(names)
    for step in renaming:
        found = [step.rename(name) for name in found]
    return found


def rename_tensors(tensors: Mapping[str, Tensor], renaming: Renaming) -> dict[str, Tensor]:
    """Renames tensors, in their order. Of two that get the same name one is lost: the caller has made sure of it."""
    names = rename_all(tensors, renaming)
    return {name: tensor._replace(name=name) for name, tensor in zip(names, tensors.values(), strict=True)}


def is_storable(renaming: Renaming) -> bool:
    """Whether a manifest with this renaming can be read again."""
    return len(renaming) <= MOST_STEPS and all(len(step.old) <= LONGEST_OLD for step in renaming)


def store_renaming(renaming: Renaming) -> Any:
    """Makes JSON values of a renaming."""
    return msgspec.to_builtins(list(renaming))


def format_renaming(names: Iterable[str], renaming: Renaming) -> str:
    """Tells what a renaming does to these names: `all 291 names: "module." in front was taken off`."""
    before, parts = list(names), []
    for step in renaming:
        after = [step.rename(name) for name in before]
        changed = sum(old != new for old, new in zip(before, after, strict=True))
        parts.append(f"{format_part(changed, len(before))}: {format_step(step)}")
        before = after
    return "; then ".join(parts)


def format_part(count: int, total: int) -> str:
    """`all 291 names`, or `290 of 291 names`."""
    names = format_count(total, "names")
    return f"all {names}" if count == total else f"{count:,} of {names}"


def format_step(step: RenamingStep) -> str:
    """Tells what a step does to the names that it concerns."""
    if step.inside:
        return f"`{step.old}` was taken out"
    if not step.old:
        return f"`{step.new}` was put in front"
    return f"`{step.old}` in front {f'became `{step.new}`' if step.new else 'was taken off'}"
