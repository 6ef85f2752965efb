"""The uses of source tensors, as plans and manifests tell them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorUse:
    """How the source tensors of one rule are used, or why they are left out. All shares cover the whole source."""

    use: str
    """`once`, `replicated` (to every rank), `shared` (by some ranks), `dequantized`, `cast`, `padded`, `empty`, or
    `dropped`."""
    what: str
    """The left name of the rule; or the name of a group left out as a whole, such as `MTP layers`."""
    reason: str
    """The reason why the tensors are dropped; empty for all other uses."""
    tensors: int
    """Number of source tensors."""
    size: int
    """In bytes of the source."""
