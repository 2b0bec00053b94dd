"""Transform coding: coefficients in one basis of the loss, each component at its own width."""
