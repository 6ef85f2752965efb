"""Weights that were converted in another way than most of their kind, or padded to another length."""

from collections.abc import Iterator

from reshard.errors import Problem
from reshard.verification.expected import CONVERSION_TEXTS
from reshard.verification.provenance import Provenance
from reshard.verification.target_folder import CONVERT_AGAIN_HINT


def check_mixtures(trace: Provenance) -> Iterator[Problem]:
    """Weights that were converted in another way than most of their kind, and dimensions padded to another length."""
    for conversions in trace.conversions.values():
        usual = max(conversions, key=lambda conversion: len(conversions[conversion]))
        for conversion in conversions.keys() - {usual}:
            for subject in dict.fromkeys(conversions[conversion]):  # a fused tensor once
                yield Problem(
                    "mixture",
                    subject,
                    CONVERSION_TEXTS[conversion],
                    f"{CONVERSION_TEXTS[usual]}, like most others",
                    CONVERT_AGAIN_HINT,
                )
    for (formula, length), found in trace.padded_lengths.items():
        usual_length = max(found, key=lambda padded: len(found[padded]))
        for other in sorted(found.keys() - {usual_length}):
            for subject in found[other]:
                expected = f"{usual_length}, like most others"
                yield Problem("mixture", subject, f"{formula} from {length} to {other}", expected, CONVERT_AGAIN_HINT)
