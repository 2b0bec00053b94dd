"""Find the tables of a model, replace them, and put them back."""
