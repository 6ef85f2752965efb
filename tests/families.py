"""For scripts outside the suite, which put only this folder on their path: the module lies in `support/`."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))
del sys.modules[__name__]
sys.modules[__name__] = import_module(__name__)
