"""`transformers serve` for exports with `modeling_sparse_ffn.py`: `python serve.py MODEL [flags]`.

`serve` looks a model's class up in transformers itself, so the class is put there first.
"""

import sys

import transformers
from transformers.cli.transformers import main

from megatron_sffn.hf.modeling_sparse_ffn import SparseFFNGPTForCausalLM

transformers.SparseFFNGPTForCausalLM = SparseFFNGPTForCausalLM
sys.argv.insert(1, "serve")
sys.exit(main())
