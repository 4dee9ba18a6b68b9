"""Compares runs, for `tools/compare.py`, and reports on studies, for `tools/report.py`.

runs.py            reads the results of finished runs
compare.py         their table, and the settings in which they differ

results.py         the finished runs of a study, and their losses over time
learning_rates.py  the best learning rate of each setting
points.py          settings at their best learning rate, over seeds
orderings.py       which of two settings is better, beyond the spread of seeds
gaps.py            what was not run
gains.py           effective speedup of each setting over the dense model
scale.py           the fitted loss surface of each router, and published laws
findings.py        all of these of one study
conclusions.py     the text with which a report begins
drawing.py         style of figures, and how they become files
figures.py         the figures; training_figures.py, scale_figure.py: some of them
tables.py          tables in Markdown and LaTeX
report.py          the page and its files
"""
