"""CP and Tucker of the folded table."""
