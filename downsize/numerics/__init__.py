"""Tensors in, tensors out: the mathematics, which knows nothing of networks, files or runtimes."""
