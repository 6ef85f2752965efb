"""reshard turns any layout of a large model's weights into any other: Hugging Face files, one file a rank, and back.

    import reshard

    reshard.convert("DeepSeek-V3", "DeepSeek-V3-mp16", mp=16)
    reshard.verify("DeepSeek-V3-mp16", "DeepSeek-V3")

Each function is imported when it is first asked for: `import reshard` alone needs neither numpy nor torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

__all__ = ["Problem", "Refused", "convert", "diff", "inspect", "load", "open", "plan", "repair", "verify"]

PLACES = {
    "Problem": ("reshard.errors", "Problem"),
    "Refused": ("reshard.errors", "Refused"),
    "convert": ("reshard.api", "convert"),
    "diff": ("reshard.api", "diff"),
    "inspect": ("reshard.inspection.contents", "inspect_path"),
    "load": ("reshard.loading.load", "load"),
    "open": ("reshard.loading.lazy", "open_tensors"),
    "plan": ("reshard.api", "plan"),
    "repair": ("reshard.target.repair", "repair"),
    "verify": ("reshard.api", "verify"),
}
"""By public name: the module and the name in it."""


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for. Its refusals name keyword arguments, not options."""
    if name not in PLACES:
        raise AttributeError(f"module 'reshard' has no attribute {name!r}")
    module, own_name = PLACES[name]
    found = getattr(import_module(module), own_name)
    if not isinstance(found, type):
        found = import_module("reshard.errors").refuse_in_python(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
