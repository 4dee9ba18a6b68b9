"""Reports on the results of a study, for `tools/report.py`.

results.py         the finished runs of a study, and their losses over time
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
page.py            the page and its files
"""
