"""`python -m reshard`."""

from reshard.process import entry

entry()
