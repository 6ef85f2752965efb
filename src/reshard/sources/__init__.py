"""Stage 1 and 2: a path -> a checkpoint whose every tensor is under one rule of its recipe. From headers alone."""
