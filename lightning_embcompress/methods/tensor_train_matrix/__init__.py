"""Tensor-train matrices of a whole table."""
