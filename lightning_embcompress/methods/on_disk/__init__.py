"""Tables whose rows stay in a file, and are read from there when they are asked for."""
