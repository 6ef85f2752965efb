"""Writes the content of the manifest `reshard.json`: the job, checksums, and facts about the original checkpoint."""

import json
import zlib
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

from xxhash import xxh3_128, xxh3_128_hexdigest

from reshard import __version__
from reshard.casts.shapes import compute_unpadded_shape, flatten_to_matrix, unpack_weight_shape
from reshard.execution.records import Records
from reshard.formats.huggingface import CONFIG, INDEX
from reshard.formats.manifest import LOST, compute_manifest_checksum
from reshard.formats.part_manifests import find_file
from reshard.formats.renaming import store_renaming
from reshard.formats.tensor_uses import TensorUse
from reshard.paths import AnyPath
from reshard.planning.plan import Plan, describe_layout
from reshard.planning.proofs import find_reason
from reshard.recipe_types import Recipe
from reshard.storage.opened import map_paths, measure_path, open_regular_file
from reshard.target.config_files import cast_config
from reshard.text import format_count, format_list
from reshard.types import File

COMPRESSION = 3
"""Of zlib, for headers: level 6 takes 2.5 times as long and saves 4 %."""

SAMPLE_SIZE = 64 << 10
"""Size of each of three samples of a source file's data (beginning, middle, end), in bytes."""


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Describes a plan as JSON values: the part of a manifest that is known before anything is written."""
    return {
        "reshard": __version__,
        "recipe": describe_made_with(plan.recipe),
        "ranks": plan.layout.ranks,
        "layout": describe_layout(plan.layout),
        **({"subset": plan.source.subset} if plan.source.subset else {}),
        "counts": {plan.recipe.placeholders[name].counts: count for name, count in plan.counts.items()},
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


def describe_made_with(recipe: Recipe) -> dict[str, Any]:
    """Describes the recipe of a conversion as JSON values; its engine too, if it is for one, and whether it must be
    named.
    """
    engine: dict[str, Any] = {"engine": recipe.engine} if recipe.engine else {}
    named = {"by_name": True} if recipe.by_name else {}
    return {"name": recipe.name, "sha256": recipe.text_hash, **engine, **named}


def read_source_facts(plan: Plan) -> tuple[list[str], dict[str, str]]:
    """Reads from each source file a checksum of samples of its data, in the order of the files; and its compressed
    header, by file name (only if `keeps_headers`).

    Fine-tuned models have the same headers but other data, and a plan knows headers only. Raises OSError.
    """
    keeps = keeps_headers(plan)

    def read(file: File) -> tuple[str, str]:
        with open_regular_file(plan.source.folder / file.name) as opened:
            return pack_bytes(opened.read(file.header_size)) if keeps else "", sample_data(opened, file)

    found = map_paths(read, plan.source.folder, plan.source.files)
    headers = {file.name: header for file, (header, _) in zip(plan.source.files, found, strict=True) if keeps}
    return [sample for _, sample in found], headers


def keeps_headers(plan: Plan) -> bool:
    """Whether the source files can be restored from the target: not for a subset, not for rank files, not for stacked
    experts, and not for tensors in boxes.
    """
    is_boxed = plan.source.boxes is not None
    return not (plan.source.subset or plan.origin.is_of_ranks or plan.origin.is_altered or is_boxed)


def sample_data(opened: BinaryIO, file: File) -> str:
    """Computes the xxh3-128 of SAMPLE_SIZE bytes at the beginning, in the middle and at the end of a file's data."""
    begin, end = file.header_size, file.size
    digest = xxh3_128()
    for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE_SIZE)):
        opened.seek(offset)
        digest.update(opened.read(SAMPLE_SIZE))
    return digest.hexdigest()


def write_manifest(
    plan: Plan,
    samples: Sequence[str],
    side_sizes: Mapping[str, int],
    side_checksums: Mapping[str, str],
    records: Records,
    known: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> bytes:
    """Writes the content of the manifest, as JSON. `known` is the manifest of the same job for other ranks in the same
    folder, or empty; `origin` is the result of `describe_origin`.
    """
    manifest = {**describe_plan(plan), "source_samples": list(samples), "origin": origin}
    for index, (file, entry) in enumerate(zip(plan.files, manifest["files"], strict=True)):
        entry["ranges"] = write_ranges(file.header, records[records["file"] == index])
    files = {entry["name"]: entry for entry in [*known.get("files", ()), *manifest["files"]]}
    manifest["files"] = sorted(files.values(), key=lambda entry: entry["rank"])
    manifest["side_files"] = [
        {"name": name, "size": size, "xxh3_128": side_checksums[name]} for name, size in side_sizes.items()
    ]
    return (json.dumps({**manifest, "xxh3_128": compute_manifest_checksum(manifest)}, indent=1) + "\n").encode()


def write_ranges(header: bytes, records: Records) -> str:
    """Writes the byte ranges of a file, from its first byte to its last: `SIZE HASH SIZE HASH ...`.

    SIZE is in bytes, HASH is the xxh3-128 of the range in hexadecimal. The first range is the header. One string for
    each file: a model of 671B parameters has 300,000 ranges.
    """
    ranges = [(len(header), xxh3_128_hexdigest(header))]
    ranges += [
        (size, digest.hex()) for size, digest in zip(records["size"].tolist(), list_digests(records), strict=True)
    ]
    return " ".join(f"{size} {digest}" for size, digest in ranges)


def list_digests(records: Records) -> Iterable[bytes]:
    """Lists the digests of journal records, 16 bytes each."""
    return (digest.tobytes() for digest in records["digest"])


def describe_conversion_job(plan: Plan, samples: Sequence[str]) -> dict[str, Any]:
    """Describes a planned conversion as its manifest will, so that the two can be compared."""
    return {**describe_plan(plan), "source_samples": list(samples)}


def identify_conversion(plan: Plan, samples: Sequence[str]) -> str:
    """Computes the fingerprint of a conversion: equal where plan, recipe, program and source are, on any machine."""
    return xxh3_128_hexdigest(json.dumps(describe_conversion_job(plan, samples), sort_keys=True).encode())


def find_finished_ranks(
    manifest: Mapping[str, Any], plan: Plan, folder: AnyPath, shares: Sequence[str] = ()
) -> set[int]:
    """Finds the ranks of the plan whose files are finished: listed in the manifest of the same job, with their size."""
    sizes = {entry["name"]: entry["size"] for entry in manifest.get("files", ())}
    known = [(file, find_file(folder, file.name, shares)) for file in plan.files if sizes.get(file.name) == file.size]
    return {file.rank for file, path in known if path.is_file() and measure_path(path) == file.size}


def describe_origin(plan: Plan, headers: Mapping[str, str]) -> dict[str, Any]:
    """Describes the original checkpoint for the manifest, as JSON values. For rank files: their own original."""
    before, config = plan.origin, plan.source.config
    lost = before.lost if before.is_of_ranks else ()
    texts = {} if plan.source.subset else pack_texts(plan)
    renamed = store_renaming(before.renaming) if headers else []
    if before.is_of_ranks and not plan.source.subset:
        raw = before.raw or {}
        headers, texts, renamed = raw.get("headers", {}), raw.get("texts", {}), raw.get("renamed", [])
    return {
        "config": cast_config(plan, config) if config is not None else None,
        "shapes": list_padded_shapes(plan),
        "lost": None if lost is None else [asdict(share) for share in (*lost, *list_lost(plan))],
        "headers": headers,
        "texts": texts,
        **({"renamed": renamed} if renamed else {}),
    }


def list_lost(plan: Plan) -> list[TensorUse]:
    """Lists the source tensors that cannot be restored from the target: dropped or cast."""
    return [share for share in plan.coverage if share.use in LOST]


def list_padded_shapes(plan: Plan) -> dict[str, list[int]]:
    """Lists the original shape of each padded tensor, in elements, by its name in the source."""
    found = {}
    for cast in plan.casts:
        if compute_unpadded_shape(cast) == flatten_to_matrix(cast.result.shape):
            continue
        dimensions = len(cast.result.shape)
        # Only matrices and vectors have block scales, whose shapes count blocks.
        shape = [*(unpack_weight_shape(cast) if dimensions > 2 else compute_unpadded_shape(cast)[-dimensions:])]
        if tuple(shape) != cast.result.shape:
            found[cast.result.name] = shape
    return found


def pack_texts(plan: Plan) -> dict[str, str]:
    """Compresses the exact texts of config and index of the source, by file name."""
    paths = [plan.side_folder / CONFIG, *([plan.source.folder / INDEX] if keeps_headers(plan) else [])]
    return {path.name: pack_bytes(path.read_bytes()) for path in paths if path.is_file()}


def pack_bytes(content: bytes) -> str:
    """Compresses bytes with zlib, as base64 text."""
    return b64encode(zlib.compress(content, COMPRESSION)).decode()


NOW = {"dropped": "not restored", "dequantized": "not as it was", "cast": "not as it was"}


def describe_lost(plan: Plan) -> Iterator[str]:
    """Describes, for people, the tensors that a target in the original layout lacks or has with other values."""
    origin = plan.origin
    if not plan.keeps_names or not origin.is_of_ranks:
        return
    groups: dict[tuple[str, str], list[TensorUse]] = {}
    for share in origin.lost or ():
        groups.setdefault((share.use, share.reason), []).append(share)
    for group in groups.values():
        yield describe_shares(group, are_all=covers_all_tensors(plan, group))
    if origin.lost is None:
        if dropped := list_dropped(plan):
            yield f"without a manifest nobody knows whether the model had these, dropped when converted: {dropped}"
        for rule in plan.recipe.rules:
            if rule.relation == "dequantize":
                yield f"not as it was: {rule.left}, dequantized when converted, by the recipe"


def describe_shares(group: Sequence[TensorUse], *, are_all: bool) -> str:
    """Describes, in a line, what became of tensors of several rows for one reason."""
    use, reason = group[0].use, f": {group[0].reason}" if group[0].reason else ""
    tensors = format_count(sum(share.tensors for share in group), "tensors")
    size = f"{sum(share.size for share in group):,} bytes"
    if are_all:
        return f"{NOW[use]}: all {tensors}, {size}, {use} when converted{reason}"
    rows = format_list((share.what for share in group), 3)
    return f"{NOW[use]}: {tensors}, {size}: {rows}, {use} when converted{reason}"


def covers_all_tensors(plan: Plan, group: Sequence[TensorUse]) -> bool:
    """Whether every tensor of a plan is of these shares of the original."""
    counts = Counter[str]()
    for share in plan.coverage:
        counts[share.what] += share.tensors
    counts.subtract({share.what: share.tensors for share in group})
    return len(group) > 1 and max(counts.values()) <= 0


def list_dropped(plan: Plan) -> str:
    """Lists what the recipe leaves out and the rank files do not have, as text."""
    recipe = plan.recipe
    present = {recipe.placeholders[name].counts for name, count in plan.counts.items() if count}
    reasons = [find_reason(rule, recipe)[0] for rule in recipe.rules if rule.relation == "drop" or rule.optional]
    return ", ".join(dict.fromkeys(reason for reason in reasons if reason not in present))
