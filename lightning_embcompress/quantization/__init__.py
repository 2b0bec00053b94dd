"""Few bits while training and after."""
