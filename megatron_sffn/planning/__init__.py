"""Foresees memory, traffic, time, cost and loss of a run on a cluster, for `tools/plan.py`.

cluster.py          cards, nodes and links
workload.py         a model on ranks
tensor_collectives.py  collectives of tensor parallelism
traffic.py          bytes that a rank sends in a step
block_estimates.py  time of the block products over dense ones
step_time.py        seconds of a step
candidates.py       sizes of a layout, and the flags of a run without them
optimizer_time.py   seconds of the optimizer's step, Muon's too
layouts.py          the layouts that a run would accept, and why others are refused
search.py           the layouts of a run by their time
loss.py             the loss that laws foresee for the model and its tokens
fitted_loss.py      the loss by the surface of a report
loss_text.py        foreseen losses as text and as fields
reasons.py          why a layout is faster or slower, in one line
report.py           tables and plots
published.py        published throughput, against which the time is checked
"""
