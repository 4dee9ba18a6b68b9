"""Scaling laws: the published ones, our fitted loss surface, and what a loss is worth in compute.

laws.py      published laws, in our letters g, E and k
surface.py   a loss surface over size, tokens and granularity, fitted to runs
speedup.py   effective speedup over a baseline

It knows numbers only: no files, no torch, no Megatron.
"""
