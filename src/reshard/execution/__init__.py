"""Stage 4: a plan -> bytes, by threads that read, join or compute, and write."""
