"""`s_tb = x_t · w_b`: the router's scores of all blocks, in fp32 at least."""

from megatron_sffn.ops.scores.op import scores, tensor_core_dtype

__all__ = ["scores", "tensor_core_dtype"]
