"""The operations of a sparse layer, as functions of tensors; none imports Megatron.

Each op is a folder. `naive.py` is the oracle, a few lines of plain torch. `op.py` is the public
function: it checks the arguments and calls the oracle or a fast form. For `block_ffn`, the one file
that picks the form is `block_ffn/choose_backend.py`. `backends.py` has the names that all ops
share, `device.py` asks what hardware a tensor is on, `compiled.py` builds the C++ files and
`triton_launch.py` starts the Triton kernels.

Letters in shapes: T tokens, D hidden size, M cells, B blocks, G cells per block, K active blocks
per token, R rows on this rank after the dispatch, P (row, block) pairs. N is G, or 2G for the keys
of a gated activation. In Triton kernels the prefix of a name says what it is: `i_` an index, `o_`
offsets, `m_` a mask, `p_` pointers, `b_` a tile that has been loaded; constants are in capitals.
"""

from megatron_sffn.ops.activation import Activation, ClampedActivation
from megatron_sffn.ops.block_ffn import block_ffn
from megatron_sffn.ops.route_topk import route_topk

__all__ = ["Activation", "ClampedActivation", "block_ffn", "route_topk"]
