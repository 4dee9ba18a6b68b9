"""What a run's routing looks like: `tools/analyze_routing.py`.

replay.py    the validation tokens of a run once more, through each of its checkpoints
measures.py  what the blocks of those tokens say: numbers
lines.py     what `routing.jsonl` says: curves
charts.py    pictures of both
tokens.py    which token ids a block serves, as a table
report.py    all of it on one page
"""
