"""TensorGPT: a tensor train for the vector of every token."""
