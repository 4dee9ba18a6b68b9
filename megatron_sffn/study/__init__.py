"""Studies: many runs that answer a question.

runs.py             reads the results of finished runs
compare.py          their table, and the settings in which they differ: `tools/compare.py`
scalars.py          losses of a run from TensorBoard's events
learning_rates.py   the best learning rate of each setting
running/            trains the runs of a study: `tools/sweep.py`
reporting/          figures, tables and the text of what they show: `tools/report.py`
"""
