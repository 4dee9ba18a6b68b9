"""The sparse feed-forward layer: route, dispatch, compute, combine.

No flags, no files and no process-wide state: everything here is made from a config and runs in any
process.
"""
