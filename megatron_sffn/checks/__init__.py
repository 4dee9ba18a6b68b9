"""Everything that is refused before a run starts; docs/checks.md lists it with a sentence of each.

problem.py         `Problem`, and `run_checks`, which raises an error for the first one
flags.py           flags that are missing, out of range, or without effect with the router
idle_flags.py      Megatron's flags that would be ignored
megatron_rules.py  rules of Megatron's; its own errors as sentences
hybrid_model.py    patterns of hybrid models that Megatron would misread
optimizers.py      optimizers that cannot train every weight, and Muon's limits
parallelism.py     sizes that do not divide what they cut
evaluation.py      flags of evaluations
data.py            tokenizer, data sets and splits
data_source.py     what the flags of the data name, read once
resume.py          the checkpoint of `--load`: same model, and an optimizer state that fits
pickles.py         code in that checkpoint
disk.py            disk space for the next checkpoint
"""
