"""The target folder: whether it can be written to, the files beside the tensors, the manifest."""
