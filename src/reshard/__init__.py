"""reshard: any published large-model checkpoint into the files that each accelerator rank loads."""

__version__ = "0.1.0"
