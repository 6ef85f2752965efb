"""Finds rank files that have each other's names: by the experts in them, or by what their headers say."""

from collections.abc import Iterator, Mapping, Sequence

from reshard.errors import Problem
from reshard.verification.expected import InvertedRecipe
from reshard.verification.expected_ranks import ExpectedRanks
from reshard.verification.target_folder import TargetFolder, TargetHeader

NAMES_BACK_HINT = "give the files their names back"


def find_swapped_files(
    files: Sequence[TargetHeader], known: InvertedRecipe, wanted: Mapping[str, ExpectedRanks]
) -> dict[int, int]:
    """By rank of a file whose names are exactly the tensors (experts) assigned to another rank: this other rank."""
    assigned: dict[int, set[str]] = {}
    for name, (ranks, optional) in wanted.items():
        if len(ranks) == 1 and not optional:
            assigned.setdefault(next(iter(ranks)), set()).add(name)
    every, found = set[str]().union(*assigned.values()), dict[int, int]()
    for file in files:
        places = [place for tensor in file.tensors if (place := known.locate(tensor.name))]
        names = {name for place in places for name in (place.weight, place.scale)} & every
        if fitting := [rank for rank in assigned if rank != file.number and names == assigned[rank]]:
            found[file.number] = fitting[0]
    return found


def find_described_files(files: Sequence[TargetHeader], folder: TargetFolder) -> dict[int, int]:
    """By rank of a file whose header names another rank of this target: this other rank."""
    return {
        file.number: int(rank)
        for file in files
        if isinstance(rank := file.said.get("rank"), str)
        and file.said.get("ranks") == str(folder.ranks)
        and rank in map(str, folder.names)
        and rank != str(file.number)
    }


def check_swapped_files(folder: TargetFolder, swapped: Mapping[int, int]) -> Iterator[Problem]:
    """A file under the name of another is not compared: nearly every tensor would differ."""
    for number, rank in swapped.items():
        found = f"the header of {folder.names[rank]}"
        yield Problem("swapped-file", folder.names[number], found, "its own", NAMES_BACK_HINT)


def check_described_ranks(files: Sequence[TargetHeader], folder: TargetFolder) -> Iterator[Problem]:
    """Files whose header names another number of ranks."""
    for file in files:
        rank, ranks = file.said.get("rank"), file.said.get("ranks")
        if isinstance(rank, str) and isinstance(ranks, str) and ranks != str(folder.ranks):
            found = f"rank {rank} of {ranks}, as its header says"
            yield Problem(
                "wrong-ranks", file.file.name, found, f"rank {file.number} of {folder.ranks}", NAMES_BACK_HINT
            )
