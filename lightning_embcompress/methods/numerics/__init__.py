"""Numerical routines that methods share: Gram products, the metric of the loss, allocation of ranks and rates."""
