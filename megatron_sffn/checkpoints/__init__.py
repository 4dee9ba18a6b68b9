"""Checkpoints before and after training; saving and loading itself is Megatron's.

    files.py            the folder of an iteration: which one to load, whether it is damaged
    pickle_scan.py      whether a checkpoint is data alone, or names code that would run on load
    disk_space.py       whether the next checkpoint fits the disk
    save.py             wraps Megatron's saves, so that a loadable checkpoint always exists
    rewrite.py          an atomic copy of a checkpoint with some tensors changed
    reblock.py          another block size: how each tensor of the checkpoint changes

Whether a run may load a checkpoint is checked by `megatron_sffn.checks.resume`.
"""
