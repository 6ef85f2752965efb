"""Stage 5, independent of stages 2 to 4: what a target should hold, and whether it does."""
