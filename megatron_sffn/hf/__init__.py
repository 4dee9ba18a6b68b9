"""Hugging Face folders: export of checkpoints, import of models, and the class of our own shapes.

`import megatron_sffn.hf` tells transformers about the class, so that `AutoModelForCausalLM` loads
an export of any router without `trust_remote_code`.
"""
