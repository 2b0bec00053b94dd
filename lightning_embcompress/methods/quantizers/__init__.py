"""Integers and codes in place of numbers: quantizers, packed storage, and products with packed factors."""
