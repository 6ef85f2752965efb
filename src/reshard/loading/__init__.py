"""Tensors in memory: the tensors of one rank, or lazily sliced ones."""
