"""Assigns files, tensors or byte ranges to shares, evenly by their bytes."""

from collections.abc import Sequence


def assign_to_shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Assigns files, by their sizes in bytes, to shares: neighbours together, and about as many bytes to each. Returns
    the indices of the files of each share. A share has none only where there are fewer files than shares.
    """
    shares, begin, left = [], 0, sum(sizes)
    for after in reversed(range(count)):
        size, end = 0, begin
        # One more file, if that comes closer to an even part. Each of the shares after this one needs a file too.
        while end < len(sizes) and (
            end == begin or ((2 * size + sizes[end]) * (after + 1) <= 2 * left and len(sizes) - end > after)
        ):
            size += sizes[end]
            end += 1
        shares.append([*range(begin, end)])
        begin, left = end, left - size
    return shares
