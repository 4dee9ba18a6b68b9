"""Analyses the routing of a run, for `tools/analyze_routing.py`.

replay.py    records the blocks of the run's validation tokens, for each checkpoint
measures.py  computes load, co-activation, overlap and drift from these records
lines.py     reads `routing.jsonl` as curves
tokens.py    lists the token ids that a block serves
charts.py    plots all of them
report.py    writes one page with the plots
"""
