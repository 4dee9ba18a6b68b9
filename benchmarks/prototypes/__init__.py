"""Kernels that are tried on paper and in Triton's interpreter, and that no layer uses."""
