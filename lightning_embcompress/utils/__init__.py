"""Files, progress, random state, storage of tensors, and dividing work over processes."""
