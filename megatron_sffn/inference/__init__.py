"""A trained checkpoint in use: text is generated, and its loss on any text is measured.

`model.py` makes the model of a checkpoint on this layout, `generate.py` generates with a KV cache,
`evaluate.py` computes perplexity and bits per byte, `lm_eval.py` is the adapter of
lm-evaluation-harness.
"""
