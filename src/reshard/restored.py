"""What a checkpoint that comes back from rank files lacks of the one that it was; its JSON files letter by letter."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from reshard.coverage import reason_of
from reshard.origin import Origin
from reshard.plan import Plan
from reshard.read import CONFIG, INDEX
from reshard.types import WHOLE

NOW = {"dropped": "not restored", "dequantized": "not as it was", "cast": "not as it was"}


def as_they_were(plan: Plan, made: Mapping[str, bytes], origin: Origin) -> dict[str, bytes]:
    """The JSON files that are made for a target, letter by letter as they once were where these say the same."""
    texts = origin.texts or {}
    found = {
        name: texts[name] if says_same(name, texts.get(name), content) else content for name, content in made.items()
    }
    if INDEX not in texts and origin.forms and is_restored(plan, origin):
        found.pop(INDEX, None)
    return found


def says_same(name: str, text: bytes | None, made: bytes) -> bool:
    """Whether a config has the same keys and values, or an index the same tensors in the same files."""
    if text is None or name not in (CONFIG, INDEX):
        return False
    try:
        one, other = json.loads(text), json.loads(made)
    except (ValueError, RecursionError):
        return False
    return bool(one == other if name == CONFIG else map_of(one) == map_of(other))


def map_of(index: Any) -> Any:
    return index.get("weight_map") if isinstance(index, dict) else None


def is_restored(plan: Plan, origin: Origin) -> bool:
    """Whether the target is just the checkpoint that the source once was."""
    return plan.layout.to == WHOLE and [file.header for file in plan.files] == [form.header for form in origin.forms]


def lost_lines(plan: Plan, origin: Origin) -> Iterator[str]:
    """What a target in the layout of the source does not have as the model had it, for a person."""
    if plan.layout.to != WHOLE or not origin.is_of_ranks:
        return
    for share in origin.lost or ():
        reason = f": {share.reason}" if share.reason else ""
        size = f"{share.tensors:,} tensors, {share.size:,} bytes"
        yield f"{NOW[share.use]}: {size}: {share.what}, {share.use} when converted{reason}"
    if origin.lost is None:
        if dropped := dropped_by_recipe(plan):
            yield f"without a manifest nobody knows whether the model had these, dropped when converted: {dropped}"
        for rule in plan.recipe.rules:
            if rule.relation == "dequantize":
                yield f"not as it was: {rule.left}, dequantized when converted, by the recipe"


def dropped_by_recipe(plan: Plan) -> str:
    """What the recipe leaves out, and the rank files have not."""
    recipe = plan.recipe
    present = {recipe.holes[letter].counts for letter, count in plan.counts.items() if count}
    reasons = [reason_of(rule, recipe)[0] for rule in recipe.rules if rule.relation == "drop" or rule.optional]
    return ", ".join(dict.fromkeys(reason for reason in reasons if reason not in present))
