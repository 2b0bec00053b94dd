"""How factors are found: pure functions of tensors."""
