"""`y_t = Σ_{i in I(t)} gate_ti · f(x_t K_iᵀ) V_i`: the feed-forward of the chosen blocks."""

from megatron_sffn.ops.block_ffn.op import block_ffn, block_ffn_pairs, sort_stably
from megatron_sffn.ops.block_ffn.pairs import Pairs, pairs_of_ids

__all__ = ["Pairs", "block_ffn", "block_ffn_pairs", "pairs_of_ids", "sort_stably"]
