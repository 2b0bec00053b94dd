"""What `embcompress bench` measures: tables of any size, beside dense ones, other packages and the machine."""
