"""Stage 3: makes a proven plan of every byte from checkpoint, recipe and layout. Opens no file."""
