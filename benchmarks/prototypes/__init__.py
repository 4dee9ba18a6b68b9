"""Kernels that are only estimated and tested in Triton's interpreter; no layer uses them."""
