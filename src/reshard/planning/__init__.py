"""Stage 3: checkpoint, recipe and layout -> a plan of every byte, proven. Opens no file but by `sources`."""
