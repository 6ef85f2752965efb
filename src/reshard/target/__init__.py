"""The target folder: checks that it can be written, makes the side files and the manifest."""
