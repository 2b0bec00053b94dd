"""TensorLy's CP and Tucker decompositions of the folded table."""
