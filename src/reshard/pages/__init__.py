"""Pages in HTML of a plan, of the contents of a checkpoint and of a difference: one file each, for a browser."""
