"""Product quantization of rows."""
