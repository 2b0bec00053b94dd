"""The commands `embcompress` and `lightning run`."""
