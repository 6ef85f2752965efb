"""Origin: what a manifest keeps of the checkpoint that rank files came from, so that it can be had back as it was."""

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard.casting import computed_shape
from reshard.configs import cast_config
from reshard.errors import Refused
from reshard.header import LENGTH_SIZE, MAX_HEADER_SIZE, parse_header
from reshard.layout import Form
from reshard.plan import Plan
from reshard.read import CONFIG, INDEX
from reshard.types import File

LARGEST_TEXT = 1 << 30
"""In bytes, of a config or an index."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Nothing of it is known of what the old script has written."""

    recipe: str = ""
    """The name of the recipe."""
    config: Mapping[str, Any] | None = None
    """The model's `config.json`, as the casts have left it."""
    shapes: Mapping[str, list[int]] | None = None
    """By name: the shape of what was padded, as it was."""
    forms: tuple[Form, ...] = ()
    """The files of the checkpoint."""
    texts: Mapping[str, bytes] | None = None
    """Its config and its index, letter by letter."""
    raw: Mapping[str, Any] | None = None
    """As it stands in the manifest."""
    is_of_ranks: bool = False
    """Whether it is of rank files, be there a manifest or not."""


def origin_of(plan: Plan, before: Origin) -> dict[str, Any]:
    """What a manifest is to keep, as JSON values. Of a source that was rank files itself, what was known of it."""
    config = cast_config(plan, plan.source.config) if plan.source.config is not None else None
    kept = {"headers": packed_headers(plan), "texts": packed_texts(plan)}
    if plan.source.subset:
        kept = {key: {} for key in kept}  # the files that there were cannot be had back
    elif before.is_of_ranks:
        kept = {key: (before.raw or {}).get(key, {}) for key in kept}
    return {"config": config, "shapes": padded_shapes(plan), **kept}


def padded_shapes(plan: Plan) -> dict[str, list[int]]:
    """By its name in the source: the shape of each tensor that was padded, as it is without."""
    found = {}
    for cast in plan.casts:
        shape = [*cast.result.shape[:-2], *computed_shape(cast)][-len(cast.result.shape) :]
        if tuple(shape) != cast.result.shape:
            found[cast.result.name] = shape
    return found


def packed_headers(plan: Plan) -> dict[str, str]:
    """The header of each file of the source: by zlib, in base 64."""
    return {file.name: packed_header(plan.source.folder / file.name, file) for file in plan.source.files}


def packed_header(path: Path, file: File) -> str:
    with path.open("rb", buffering=0) as opened:
        return packed(opened.read(file.header_size))


def packed_texts(plan: Plan) -> dict[str, str]:
    """The config and the index of the source, letter by letter."""
    paths = [plan.source.folder / name for name in (CONFIG, INDEX)]
    return {path.name: packed(path.read_bytes()) for path in paths if path.is_file()}


def packed(content: bytes) -> str:
    return b64encode(zlib.compress(content, 6)).decode()


def unpacked(text: str, most: int) -> bytes:
    """Raises what can be wrong with it."""
    return zlib.decompressobj().decompress(b64decode(text), most)


def read_origin(manifest: Mapping[str, Any]) -> Origin:
    """What a manifest tells; nothing if it is not as we write it, for anyone can write one."""
    origin, recipe = manifest.get("origin"), manifest.get("recipe")
    if not isinstance(origin, dict) or not isinstance(recipe, dict):
        return Origin(is_of_ranks=True)
    config, shapes, headers, texts = (origin.get(key) for key in ("config", "shapes", "headers", "texts"))
    if not (config is None or isinstance(config, dict)) or not (isinstance(headers, dict) and isinstance(texts, dict)):
        return Origin(is_of_ranks=True)
    try:
        require_shapes(shapes)
        forms = tuple(form_of(name, text) for name, text in headers.items())
        known = {name: unpacked(texts[name], LARGEST_TEXT) for name in (CONFIG, INDEX) if name in texts}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, zlib.error, Refused):
        return Origin(is_of_ranks=True)
    return Origin(str(recipe.get("name", "")), config, shapes, forms, known, origin, is_of_ranks=True)


def require_shapes(shapes: Any) -> None:
    """Shapes by name. Raises what can be wrong with them."""
    for shape in shapes.values():
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(shape)


def form_of(name: str, text: str) -> Form:
    """A file by its packed header. Raises what can be wrong with it."""
    header = unpacked(text, MAX_HEADER_SIZE + LENGTH_SIZE)
    entries = json.loads(header[LENGTH_SIZE:])
    ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
    tensors = parse_header(header[LENGTH_SIZE:], 0, len(header) + max(ends, default=0), name)
    return Form(Path(name).name, header, {tensor.name: tensor for tensor in tensors})
