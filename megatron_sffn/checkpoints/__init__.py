"""Checkpoints before and after training: what lies on disk, who can go on from it, how it is cut.

    files.py            one iteration's folder: which, whole or damaged, and its arguments
    code.py             is it data alone, or does it name code that would run as it is loaded?
    continuation.py     may this run load it? the look that training takes before anything starts
    optimizer_state.py  the same for the optimizer's state
    room.py             is there room for the next one?
    saving.py           Megatron's saves wrapped: at any moment one that is whole is named
    rewriting.py        a copy of a checkpoint with some tensors changed, complete or not at all
    regranulation.py    another block size: what becomes of each tensor

Saving and loading are Megatron's.
"""
