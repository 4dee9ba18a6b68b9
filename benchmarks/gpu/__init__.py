"""Accept a GPU with one command: `python -m benchmarks.gpu {check,time,tune}`.

check    checks that training starts and results are correct; lists where the host waits for the GPU
time     times a layer, over a dense FFN and beside the peers
tune     finds the fastest tile sizes of the Triton kernels

Module by module:
    __main__.py    the command line
    plan.py        the sections of each command, their order and their seconds
    supervisor.py  one process per section: its time limit and its restarts
    results.py     results.json, and the printed lines
    worker.py      the process of a section, which runs its cases
    case.py        the parts of a section: cases, and the context that they run in
    clock.py       CUDA events, or the host's clock in a dry run
    problem.py     tokens, tables and routing, drawn on the device
    forms.py       the backends, and the modules with the three products
    sections/      the cases, one file per section

`--dry-run` runs the same program on a machine without a GPU: tiny sizes, Triton's interpreter, the
host's clock. Nothing else differs, so that errors of the program show before it runs on a GPU.
"""
