"""Summarizes a checkpoint, checks whether a recipe fits, compares two checkpoints. Writes nothing."""
