"""The sparse feed-forward layer: route, dispatch, compute, combine.

Nothing in this package reads flags or files or keeps process-wide state: a layer is built from a
config and runs in any process.
"""
