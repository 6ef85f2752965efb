"""The command line: one module for each command, or for commands that share their output."""
