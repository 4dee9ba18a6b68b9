"""Why sparse layers do not have a feature of Megatron's: the reason that its refusal gives.

Inputs: a flag (dest) that is refused with sparse layers. Outputs: a clause, or None for a flag of
which nothing is said yet, such as one of a later Megatron.

Design notes: two flags were tried with their refusal switched off, on two CPU ranks of Megatron
0.19.2. With `--use-torch-fsdp2 --ckpt-format torch_dcp` three steps had the losses and gradient
norms of DDP to all printed digits. The checkpoint did not load (`ChainedOptimizer.state_dict` has
no argument `is_loading`), and in the format torch_dist none was written; so it is for a dense
model, too. Under `--overlap-moe-expert-parallel-comm` the schedule calls `route`, `dispatch` and
the other steps of Megatron's layer one by one, and a sparse layer's router needs the keys as well.
"""

from __future__ import annotations

import re

BENCHMARK = "it replaces scores by random numbers, for a benchmark of Megatron's router"
CUDA_GRAPHS = "a sparse layer waits on the host for the number of rows that it receives"
EXCHANGE = "sparse layers have an exchange of their own, which sends a token once to each rank"
EXPERTS = "Megatron's experts do it, and --sffn-backend computes blocks in their place"
FSDP2 = (
    "its runs cannot be resumed, since Megatron 0.19 fails to save the state of the optimizer as "
    "torch_dist, and to load it from torch_dcp"
)
LAYERS = "it replaces the layers of the model, and so the sparse ones"
MEGATRON_FSDP = (
    "its checkpoints are fsdp_dtensor, which this package cannot read, and it needs GPUs"
)
MASKS = "it is about Megatron's map of tokens and experts, and sparse layers carry ids of blocks"
OFFLOADING = "it moves activations of Megatron's experts, and does not know those of sparse layers"
SCHEDULE = "Megatron's schedule calls the steps of its own expert layer one by one"
SHARED = "shared blocks are computed beside the exchange anyway"
TABLES = "the blocks of a layer are two tables, keys and values, which --sffn-backend computes"
TRACE = "routing.jsonl in the run's folder has how every layer routes"
UPCYCLING = "megatron-sffn import --upcycle makes a sparse checkpoint from a dense one"
WEIGHT_GRADIENTS = (
    "a sparse layer's backward pass has no separate step for the gradients of weights"
)

ABSENT = {
    r"moe_(enable_deepep|(deepep|hybridep|ncclep|flex)_\w+|permute_fusion\w*)": EXCHANGE,
    r"moe_expert_rank_capacity_factor": EXCHANGE,
    r"moe_grouped_gemm|moe_single_grouped_\w+|moe_mlp_glu_interleave_size": TABLES,
    r"moe_apply_probs_on_input": EXPERTS,
    r"moe_paged_stash\w*|fine_grained_activation_offloading": OFFLOADING,
    r"moe_pad_\w+|moe_router_padding_\w+|moe_router_fusion|moe_enable_routing_replay": MASKS,
    r"moe_router_force_\w+": BENCHMARK,
    r"moe_routing_trace_\w+|save_tokens_per_expert_interval": TRACE,
    r"moe_shared_expert_overlap": SHARED,
    r"moe_shared_expert_gate": "shared blocks are added without a gate",
    r"moe_shared_expert_glu_interleave_size": "shared blocks have their gate keys first",
    r"moe_use_upcycling|moe_upcycling_granularity": UPCYCLING,
    r"\w*cuda_graph\w*": CUDA_GRAPHS,
    r"overlap_moe_expert_parallel_comm": SCHEDULE,
    r"delay_wgrad_compute|overlap_dispatch_backward_with_experts_wgrad": WEIGHT_GRADIENTS,
    r"use_megatron_fsdp": MEGATRON_FSDP,
    r"use_torch_fsdp2": FSDP2,
    r"spec|heterogeneous_layers_\w+": LAYERS,
}
"""Pattern of flags (dest) -> why sparse layers do not have what they switch on."""


def reason_of_absence(dest: str) -> str | None:
    """Why sparse layers do not have the feature of a flag; None where nobody has said it."""
    return next((reason for flags, reason in ABSENT.items() if re.fullmatch(flags, dest)), None)
