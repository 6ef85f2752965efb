"""The manifest `reshard.json`: what a target folder holds, what it came from, and a checksum of every range of bytes.

The same source, recipe and layout give the same bytes: no time, path or host is in it, and nothing of how it was made.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xxhash import xxh3_128, xxh3_128_hexdigest

from reshard import __version__
from reshard.books import LARGEST_MANIFEST, MANIFEST
from reshard.errors import refuse
from reshard.header import LENGTH_SIZE, MAX_HEADER_SIZE, is_plain, is_size, is_text
from reshard.journal import Records
from reshard.plan import Plan, describe_layout
from reshard.read import read_object
from reshard.subset_text import is_subset
from reshard.types import File

JOB_KEYS = ("reshard", "recipe", "layout", "source", "subset")
"""What makes a conversion another one, besides the samples of its source."""
LARGEST_RANGE = MAX_HEADER_SIZE + LENGTH_SIZE
"""In bytes: each range is read whole. The first is the header; the others are smaller by far."""
FILE_TYPES = {"name": str, "rank": int, "size": int, "tensors": int, "ranges": str}
SIDE_TYPES = {"name": str, "size": int, "xxh3_128": str}
SAMPLE_SIZE = 64 << 10
"""In bytes, of the data of a source file: so much at its beginning, its middle and its end."""


def describe_plan(plan: Plan) -> dict[str, Any]:
    """What is known before anything is written, as JSON values."""
    return {
        "reshard": __version__,
        "recipe": {"name": plan.recipe.name, "sha256": plan.recipe.text_hash},
        "ranks": plan.layout.ranks,
        "layout": describe_layout(plan.layout),
        **({"subset": plan.source.subset} if plan.source.subset else {}),
        "counts": {plan.recipe.holes[letter].counts: count for letter, count in plan.counts.items()},
        "source": [
            {"name": file.name, "size": file.size, "header_sha256": file.header_hash} for file in plan.source.files
        ],
        "casts": dict(sorted(Counter(cast.operation for cast in plan.casts).items())),
        "coverage": [
            {"use": share.use, "what": share.what, "tensors": share.tensors, "bytes": share.size}
            for share in plan.coverage
        ],
        "files": [
            {"name": file.name, "rank": file.rank, "size": file.size, "tensors": len(file.pieces)}
            for file in plan.files
        ],
    }


def sample_source(plan: Plan) -> list[str]:
    """For each source file a checksum of some of its data. Fine-tuned models have the same headers, not the same data.

    Not in the plan, which knows headers only. Raises OSError.
    """
    return [sample_of(plan.source.folder / file.name, file) for file in plan.source.files]


def sample_of(path: Path, file: File) -> str:
    begin, end = file.header_size, file.size
    with path.open("rb", buffering=0) as opened:
        digest = xxh3_128()
        for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE_SIZE)):
            opened.seek(offset)
            digest.update(opened.read(SAMPLE_SIZE))
    return digest.hexdigest()


def manifest_of(
    plan: Plan,
    samples: Sequence[str],
    side_files: Mapping[str, bytes],
    records: Records,
    known: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> bytes:
    """The content of the manifest. `known` is that of the same job for other ranks into the same folder, or empty;
    `origin` is as `origin_of` gives it.
    """
    manifest = {**describe_plan(plan), "source_samples": list(samples), "origin": origin}
    for index, (file, entry) in enumerate(zip(plan.files, manifest["files"], strict=True)):
        entry["ranges"] = ranges_text(file.header, records[records["file"] == index])
    files = {entry["name"]: entry for entry in [*known.get("files", ()), *manifest["files"]]}
    manifest["files"] = sorted(files.values(), key=lambda entry: entry["rank"])
    manifest["side_files"] = [
        {"name": name, "size": len(content), "xxh3_128": xxh3_128_hexdigest(content)}
        for name, content in side_files.items()
    ]
    return (json.dumps({**manifest, "xxh3_128": own_checksum(manifest)}, indent=1) + "\n").encode()


def own_checksum(manifest: Mapping[str, Any]) -> str:
    """Of a manifest without its checksum: so that nobody takes a damaged one at its word."""
    try:
        return xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    except RecursionError:
        return ""  # ours is two levels deep


def ranges_text(header: bytes, records: Records) -> str:
    """`SIZE HASH SIZE HASH ...`: the ranges of a file from its first byte to its last, each with its xxh3-128.

    One string a file, for a model of 671B parameters has 300,000 ranges. The first is the header.
    """
    ranges = [(len(header), xxh3_128_hexdigest(header))]
    ranges += [(size, digest.hex()) for size, digest in zip(records["size"].tolist(), digests(records), strict=True)]
    return " ".join(f"{size} {digest}" for size, digest in ranges)


def digests(records: Records) -> Iterable[bytes]:
    return (digest.tobytes() for digest in records["digest"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, or an empty one if it has none. Raises Refused if it is not as we wrote it."""
    manifest = read_object(folder / MANIFEST, LARGEST_MANIFEST)
    if manifest is None:
        return {}
    found = manifest.pop("xxh3_128", None)
    if found != own_checksum(manifest) or not is_well_formed(manifest):
        remedy = "verify with --source, or convert into another folder"
        raise refuse("wrong-manifest", str(folder / MANIFEST), "damaged or changed", "what reshard has written", remedy)
    return manifest


def is_well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether all that is read of a manifest later has its type. The checksum is no secret: anyone can write one."""
    files, sides = manifest.get("files"), manifest.get("side_files")
    if not (isinstance(files, list) and isinstance(sides, list) and is_size(manifest.get("ranks"))):
        return False
    if not is_subset(manifest.get("subset", {})):
        return False
    return all(has_types(entry, FILE_TYPES) and is_ranges(entry["ranges"], entry["size"]) for entry in files) and all(
        has_types(entry, SIDE_TYPES) for entry in sides
    )


def has_types(entry: Any, types: Mapping[str, type]) -> bool:
    """Whether an entry has at least these fields: a plain name, sizes and texts."""
    if not isinstance(entry, dict) or not all(type(entry.get(key)) is wanted for key, wanted in types.items()):
        return False
    sizes = [entry[key] for key, wanted in types.items() if wanted is int]
    return all(map(is_size, sizes)) and is_text(entry["name"]) and is_plain(entry["name"])


def is_ranges(text: str, size: int) -> bool:
    """Whether a text is what `ranges_text` writes for a file of that size."""
    words = text.split(" ")
    sizes = [int(word) for word in words[::2] if re.fullmatch(r"[0-9]{1,9}", word)]
    return (
        len(words) == 2 * len(sizes)
        and max(sizes) <= LARGEST_RANGE
        and sum(sizes) == size
        and all(map(re.compile("[0-9a-f]{32}").fullmatch, words[1::2]))
    )


def same_job(manifest: Mapping[str, Any], plan: Plan, samples: Sequence[str]) -> bool:
    """Whether a manifest is of the conversion that is planned, for whichever of its ranks."""
    wanted = describe_plan(plan)
    return manifest.get("source_samples") == list(samples) and all(
        manifest.get(key) == wanted.get(key) for key in JOB_KEYS
    )


def finished_ranks(manifest: Mapping[str, Any], plan: Plan, folder: Path) -> set[int]:
    """The ranks of the plan whose files are there already, by the manifest of the same job and by their size."""
    sizes = {entry["name"]: entry["size"] for entry in manifest.get("files", ())}
    return {
        file.rank
        for file in plan.files
        if sizes.get(file.name) == file.size
        and (folder / file.name).is_file()
        and (folder / file.name).stat().st_size == file.size
    }


def file_names_of(manifest: Mapping[str, Any]) -> set[str]:
    """The names of the rank files that a manifest speaks of."""
    return {entry["name"] for entry in manifest.get("files", ())}
