from reshard.api import convert as convert
from reshard.api import diff as diff
from reshard.api import plan as plan
from reshard.api import verify as verify
from reshard.errors import Problem as Problem
from reshard.errors import Refused as Refused
from reshard.inspection.contents import inspect_path
from reshard.loading.lazy import open_tensors
from reshard.loading.load import load as load

__version__: str
__all__ = ["Problem", "Refused", "convert", "diff", "inspect", "load", "open", "plan", "verify"]

inspect = inspect_path
open = open_tensors  # noqa: A001
