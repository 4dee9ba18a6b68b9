"""`y_t = Σ_{i in I(t)} gate_ti · f(x_t K_iᵀ) V_i`: the feed-forward layer of the active blocks.

`op.py` is the public function, `choose_backend.py` decides the backend, and `autograd.py` composes
a backend's three products into forward and backward passes. The backends are `torch_backend`,
`grouped`, `masked`, `bags`, `quack`, `cpu` (with `products.cpp`) and `triton`; `naive` is the
oracle.
"""

from megatron_sffn.ops.block_ffn.op import block_ffn, block_ffn_pairs, sort_stably
from megatron_sffn.ops.block_ffn.pairs import Pairs, pairs_of_ids

__all__ = ["Pairs", "block_ffn", "block_ffn_pairs", "pairs_of_ids", "sort_stably"]
