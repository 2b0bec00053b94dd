"""Low-rank factorization, plain and weighted."""
