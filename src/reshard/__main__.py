"""`python -m reshard`."""

from reshard.cli.process import entry

entry()
