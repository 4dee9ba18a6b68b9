"""`s_tb = x_t · w_b`: scores of blocks, in fp32 at least."""

from megatron_sffn.ops.scores.op import scores, tensor_core_dtype

__all__ = ["scores", "tensor_core_dtype"]
