"""Foresees memory, traffic, time and cost of a run on a cluster, for `tools/plan.py`.

cluster.py          cards, nodes and links
workload.py         a model on ranks
traffic.py          bytes that a rank sends in a step
block_estimates.py  time of the block products over dense ones
step_time.py        seconds of a step
layouts.py          all layouts of a run on a number of GPUs
search.py           the layouts of a run by their time
reasons.py          why a layout is faster or slower, in one line
report.py           tables and plots
published.py        published throughput, against which the time is checked
"""
