"""Blocks of a table in one basis of the loss, with ranks by marginal gain."""
