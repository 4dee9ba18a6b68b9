"""Where the hardware questions are asked: one file for each kind of host that needs help.

A CUDA machine needs none, so it has no file here.
"""
