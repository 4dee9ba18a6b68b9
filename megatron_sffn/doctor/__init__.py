"""Whether training can start on this machine, and what to do where it cannot.

    __main__.py   `python -m megatron_sffn.doctor`: the table
    findings.py   one line of it, and what is asked of another process
    packages.py   Python, torch, Megatron, and the packages that are optional
    machine.py    GPUs, compiler, disks, limits, memory
    probes.py     what runs in a process of its own, because it may fail in any way
    smoke.py      two ranks, a sum over them, and two steps of a small sparse model

Choice: nothing heavy is imported here, and each check is guarded on its own, so that a broken
package is a line of the table and not the end of it.
"""
