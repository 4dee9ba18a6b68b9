"""Scaling laws: the published ones, our fitted loss surface, and what a loss is worth in compute.

laws.py             published laws, in our letters g, E and k
forecast.py         what these laws foresee for a model that is not trained yet
surface.py          a loss surface over size, tokens and granularity, fitted to runs
surface_record.py   a surface as plain numbers
speedup.py          effective speedup over a baseline

It knows numbers only: no files, no torch, no Megatron.
"""
