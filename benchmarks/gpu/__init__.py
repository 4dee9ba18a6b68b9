"""The acceptance of a GPU in one command: `python -m benchmarks.gpu {check,time,tune}`.

check    does it start, is it right, where does it wait for the device
time     how fast is it, over a dense FFN and beside the peers
tune     which tiles of the Triton kernels are the fastest

Module by module:
    __main__.py    the command line
    plan.py        which sections a command has, their order and their seconds
    supervisor.py  one process per section: its limit, its restarts, its end
    results.py     results.json, and what is printed
    worker.py      the process of a section: its cases, one after the other
    case.py        what a section is made of: cases, and the context that they run in
    clock.py       CUDA events, or the host's clock in a dry run
    problem.py     tokens, tables and routing, drawn on the device
    forms.py       who can compute: backends, and the modules that have the three products
    sections/      what is done, one file per section

`--dry-run` runs the same program on a machine without a GPU: tiny sizes, Triton's interpreter, the
host's clock. Nothing else differs, so that the first second on a GPU is not the first run.
"""
