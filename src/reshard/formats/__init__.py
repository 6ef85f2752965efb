"""Formats on disk: bytes <-> values. Knows no recipe."""
