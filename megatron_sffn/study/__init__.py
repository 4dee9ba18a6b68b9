"""Compares runs, for `tools/compare.py`.

runs.py      reads the results of finished runs
compare.py   their table, and the settings in which they differ
"""
