"""The manifest `reshard.json`: what a target folder holds and what it came from. The same job gives the same bytes."""

import json
from collections.abc import Iterable
from typing import Any

from reshard import __version__
from reshard.plan import Plan, Share

MANIFEST = "reshard.json"


def manifest_of(plan: Plan, side_files: Iterable[str]) -> dict[str, Any]:
    """As JSON values. No time, path or host is in it, so that it depends on source, recipe and layout alone."""
    return {
        "reshard": __version__,
        "recipe": {"name": plan.recipe.name, "sha256": plan.recipe.text_hash},
        "ranks": plan.layout.ranks,
        "counts": {plan.recipe.holes[letter].counts: count for letter, count in plan.counts.items()},
        "source": [
            {"name": file.name, "size": file.size, "header_sha256": file.header_hash} for file in plan.source.files
        ],
        "files": [
            {"name": file.name, "rank": file.rank, "size": file.size, "tensors": len(file.pieces)}
            for file in plan.files
        ],
        "side_files": list(side_files),
        "coverage": [share_of(share) for share in plan.coverage],
    }


def share_of(share: Share) -> dict[str, Any]:
    return {"use": share.use, "rule": share.rule.left, "tensors": share.tensors, "bytes": share.size}


def manifest_bytes(plan: Plan, side_files: Iterable[str]) -> bytes:
    """The content of the file."""
    return (json.dumps(manifest_of(plan, side_files), indent=1, ensure_ascii=False) + "\n").encode()
