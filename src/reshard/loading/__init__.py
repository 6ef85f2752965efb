"""Loads one rank's tensors into memory, or opens a checkpoint as lazily sliced tensors: numpy or torch."""
