"""The operations of a sparse layer, as functions of tensors.

Each op is a folder: `naive.py` the oracle, fast forms in plain torch and in C++ (`compiled.py`
builds it), `op.py` the choice between them. The ops know nothing of Megatron.
"""

from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn import block_ffn
from megatron_sffn.ops.route_topk import route_topk

__all__ = ["Activation", "block_ffn", "route_topk"]
