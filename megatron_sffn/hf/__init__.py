"""Hugging Face folders: export of checkpoints, import of models, and the class of our own shapes.

`import megatron_sffn.hf` tells transformers about the class, so that `AutoModelForCausalLM` loads
an export of any router without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from megatron_sffn.hf.modeling_sparse_ffn import SparseFFNGPTConfig, SparseFFNGPTForCausalLM

AutoConfig.register(SparseFFNGPTConfig.model_type, SparseFFNGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(SparseFFNGPTConfig, SparseFFNGPTForCausalLM, exist_ok=True)
