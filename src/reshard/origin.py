"""Origin: what a manifest keeps of the checkpoint that rank files came from, so that it can be had back as it was."""

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reshard.casting import computed_shape, matrix
from reshard.configs import cast_config
from reshard.coverage import Share
from reshard.errors import Refused
from reshard.header import LENGTH_SIZE, MAX_HEADER_SIZE, is_plain, is_size, is_text, parse_header
from reshard.layout import Form
from reshard.plan import Plan
from reshard.read import CONFIG, INDEX, SUFFIX
from reshard.types import File

LARGEST_HEADERS = 4 * MAX_HEADER_SIZE
"""In bytes, of all headers together. A model of 1,000B parameters has 20 MB."""
LOST = ("dropped", "dequantized", "cast")
"""The uses of tensors that do not come back as they were."""


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
    lost: tuple[Share, ...] | None = None
    """What of it is not in the rank files as it was; None if nobody knows."""
    raw: Mapping[str, Any] | None = None
    """As it stands in the manifest."""
    is_of_ranks: bool = False
    """Whether it is of rank files, be there a manifest or not."""


def origin_of(plan: Plan, before: Origin) -> dict[str, Any]:
    """What a manifest is to keep, as JSON values. Of a source that was rank files itself, what was known of it."""
    config = cast_config(plan, plan.source.config) if plan.source.config is not None else None
    lost = before.lost if before.is_of_ranks else ()
    kept = {
        "lost": None if lost is None else [asdict(share) for share in (*lost, *lost_by(plan))],
        "headers": packed_headers(plan),
        "texts": packed_texts(plan),
    }
    if plan.source.subset:
        kept |= {"headers": {}, "texts": {}}  # the files that there were cannot be had back
    elif before.is_of_ranks:
        kept |= {key: (before.raw or {}).get(key, {}) for key in ("headers", "texts")}
    return {"config": config, "shapes": padded_shapes(plan), **kept}


def lost_by(plan: Plan) -> list[Share]:
    """What of its source a target does not have as it was."""
    return [share for share in plan.coverage if share.use in LOST]


def padded_shapes(plan: Plan) -> dict[str, list[int]]:
    """By its name in the source: the shape of each tensor that was padded, as it is without."""
    found = {}
    for cast in plan.casts:
        if computed_shape(cast) == matrix(cast.result.shape):
            continue
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
    """What a manifest tells; of what is not as we write it nothing, for anyone can write one."""
    origin, recipe = manifest.get("origin"), manifest.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else ""
    unknown = Origin(name if isinstance(name, str) and is_text(name) else "", is_of_ranks=True)
    if not isinstance(origin, dict):
        return unknown
    config, shapes, headers, texts = (origin.get(key) for key in ("config", "shapes", "headers", "texts"))
    if not (config is None or isinstance(config, dict)) or not (isinstance(headers, dict) and isinstance(texts, dict)):
        return unknown
    try:
        require_shapes(shapes)
        forms = forms_of(headers)
        known = {name: unpacked(texts[name], MAX_HEADER_SIZE) for name in (CONFIG, INDEX) if name in texts}
        lost = shares_of(origin["lost"])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, zlib.error, Refused):
        return unknown
    return Origin(unknown.recipe, config, shapes, forms, known, lost, origin, is_of_ranks=True)


def shares_of(lost: Any) -> tuple[Share, ...] | None:
    """Raises what can be wrong with them."""
    if lost is None:
        return None
    shares = tuple(Share(**fields) for fields in lost)
    for share in shares:
        if not all(map(is_text, (share.use, share.what, share.reason))):
            raise ValueError(share)
        if share.use not in LOST or not (is_size(share.tensors) and is_size(share.size)):
            raise ValueError(share)
    return shares


def forms_of(headers: Mapping[str, str]) -> tuple[Form, ...]:
    """Files by their packed headers. Raises what can be wrong with them."""
    forms, left = [], LARGEST_HEADERS
    for name, text in headers.items():
        if not (is_plain(name) and name.endswith(SUFFIX)):
            raise ValueError(name)
        forms.append(form_of(name, text))
        left -= len(forms[-1].header)
        if left < 0:
            raise ValueError(name)
    return tuple(forms)


def require_shapes(shapes: Any) -> None:
    """Shapes by name. Raises what can be wrong with them."""
    for shape in shapes.values():
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(shape)


def form_of(name: str, text: str) -> Form:
    """A file by its packed header. Raises what can be wrong with it."""
    header = unpacked(text, MAX_HEADER_SIZE + LENGTH_SIZE)
    if int.from_bytes(header[:LENGTH_SIZE], "little") != len(header) - LENGTH_SIZE:
        raise ValueError(name)
    entries = json.loads(header[LENGTH_SIZE:])
    ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
    tensors = parse_header(header[LENGTH_SIZE:], 0, len(header) + max(ends, default=0), name)
    return Form(name, header, {tensor.name: tensor for tensor in tensors})
