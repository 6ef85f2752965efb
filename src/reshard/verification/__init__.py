"""Proves a target: compares its bytes with the source, or with its manifest. Shares no code with the planner."""
