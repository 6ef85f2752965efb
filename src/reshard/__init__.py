"""reshard: any published large-model checkpoint into the files that each accelerator rank loads."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

FUNCTIONS = {"load": ("reshard.loading.load", "load"), "open": ("reshard.loading.lazy", "open_tensors")}
"""What the package offers under its own name, and where it is."""


def __getattr__(name: str) -> Any:
    """Imports a function when it is first asked for: `import reshard` alone does not need numpy."""
    if name not in FUNCTIONS:
        raise AttributeError(f"module 'reshard' has no attribute {name!r}")
    module, function = FUNCTIONS[name]
    return getattr(import_module(module), function)
