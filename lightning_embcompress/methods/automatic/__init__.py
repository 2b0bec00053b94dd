"""The best of several methods for every table."""
