"""Checks whether training can start on this machine, and says what to do if it cannot.

    __main__.py   `python -m megatron_sffn.doctor`: runs the checks and prints the table
    findings.py   a line of the table; runs a probe in another process
    packages.py   checks Python, torch, Megatron and the optional packages
    machine.py    checks disks, limits and memory
    probes.py     imports and kernels that run in another process, because they may crash
    smoke.py      an all-reduce over two ranks, and two steps of a small sparse model

Design notes: this process imports nothing heavy, and each check catches its own errors, so that a
broken package is a line of the table and does not end the command.
"""
