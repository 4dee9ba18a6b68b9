"""Layouts of ranks that cannot work, each refused with the flag to change.

Enters: Megatron's namespace before validation, and the layer's numbers. Leaves: nothing, or one
sentence before any process group exists. Much of this Megatron would notice too, but in words for
its own developers, or only when the first batch arrives.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Iterator

from megatron_sffn.flags.megatron_flags import layout_of
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.routers.groups import check_groups
from megatron_sffn.utils.errors import ConfigError


def check_layout(args: Namespace, sffn: SparseFFNConfig | None) -> None:
    """The ranks can be cut as the flags say.

    Args:
        args: not validated yet.
        sffn: the sparse layer; None for the dense baseline.

    Raises:
        ConfigError: if they cannot.
    """
    problems = [_engine(args), _model(args), _batch(args)]
    if sffn is not None:
        problems += [_blocks(args, sffn), _ranks(args), _backend(args, sffn), _chunks(args, sffn)]
    for sentence in (sentence for each in problems for sentence in each):
        raise ConfigError(sentence)
    if sffn is not None:
        # Before the way of exchange is chosen, which depends on them.
        check_groups(args, sffn.num_blocks, sffn.num_active_blocks)


def _engine(args: Namespace) -> Iterator[str]:
    """What needs Transformer Engine."""
    context = args.context_parallel_size
    for text, remedy, needed in (
        (
            "--transformer-impl transformer_engine",
            "use --transformer-impl local",
            args.transformer_impl == "transformer_engine",
        ),
        (f"--context-parallel-size {context}", "use --context-parallel-size 1", context > 1),
        ("--apply-layernorm-1p", "leave it out", args.layernorm_zero_centered_gamma),
        (
            "--recompute-modules layernorm",
            "leave it out",
            "layernorm" in (args.recompute_modules or []),
        ),
    ):
        if needed and importlib.util.find_spec("transformer_engine") is None:
            yield (
                f"{text} needs Transformer Engine, which is not installed; install "
                f"megatron-core[te] or {remedy}"
            )
    fused = any(map(importlib.util.find_spec, ("transformer_engine", "amp_C")))
    if not args.dist_ckpt_optim_fully_reshardable and not fused:
        yield (
            "--no-dist-ckpt-optim-fully-reshardable needs the Adam of Transformer Engine or of "
            "NVIDIA's apex, since Megatron does not load torch's back from that form; leave it out"
        )


def _model_ranks(args: Namespace) -> int:
    """Ranks that hold one replica of the dense weights."""
    return int(
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )


def _model(args: Namespace) -> Iterator[str]:
    """The model's sizes over tensor- and pipeline-parallel ranks."""
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    model_ranks = _model_ranks(args)
    if args.world_size % model_ranks:
        yield (
            f"--tensor-model-parallel-size {tensor} times --pipeline-model-parallel-size {pipeline}"
            f" times --context-parallel-size {args.context_parallel_size} does not divide the "
            f"number of ranks, {args.world_size}; start a multiple of {model_ranks} with torchrun "
            "--nproc-per-node"
        )
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    for flag, value, needed in (
        ("--num-attention-heads", args.num_attention_heads, True),
        ("--num-query-groups", groups, args.group_query_attention),
        ("--seq-length", args.seq_length, args.sequence_parallel and args.seq_length),
    ):
        if needed and value % tensor:
            yield (
                f"--tensor-model-parallel-size {tensor} does not divide {flag} {value}; change one "
                "of them so that it does"
            )
    uneven = (
        args.pipeline_model_parallel_layout,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.account_for_embedding_in_pipeline_split,
        args.account_for_loss_in_pipeline_split,
    )
    if not any(uneven) and args.num_layers % pipeline:
        yield (
            f"--pipeline-model-parallel-size {pipeline} does not divide --num-layers "
            f"{args.num_layers}; change one of them so that it does, or set "
            "--decoder-first-pipeline-num-layers"
        )


def _batch(args: Namespace) -> Iterator[str]:
    """Microbatches over data-parallel ranks and the interleaved schedule."""
    replicas = max(1, args.world_size // _model_ranks(args))
    micro, whole = args.micro_batch_size, args.global_batch_size
    if micro is None or whole is None or args.rampup_batch_size:
        return
    if whole % (micro * replicas):
        yield (
            f"--global-batch-size {whole} is not a multiple of --micro-batch-size {micro} times "
            f"the {replicas} data-parallel replicas; use a multiple of {micro * replicas}"
        )
    interleaved = (
        args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank
    )
    pipeline, count = args.pipeline_model_parallel_size, whole // (micro * replicas)
    if interleaved and pipeline > 1 and count % pipeline:
        yield (
            f"the interleaved schedule needs the microbatches of a step, {count} "
            f"(--global-batch-size {whole} / --micro-batch-size {micro} / {replicas} replicas), to "
            f"be a multiple of --pipeline-model-parallel-size {pipeline}; change "
            "--global-batch-size"
        )


def _blocks(args: Namespace, sffn: SparseFFNConfig) -> Iterator[str]:
    """Blocks and their cells over expert ranks."""
    expert, slices = args.expert_model_parallel_size, args.expert_tensor_parallel_size or 1
    if sffn.num_blocks % expert:
        yield (
            f"--expert-model-parallel-size {expert} does not divide the {sffn.num_blocks} blocks "
            f"(--sffn-expansion {sffn.expansion} · --sffn-active-cells {sffn.active_cells} / "
            f"--sffn-block-size {sffn.block_size}); change one of them so that it does"
        )
    node = args.sffn_node_size or 0
    if node and (expert * slices % node or node % slices):
        yield (
            f"--sffn-node-size {node} does not cut the {expert * slices} expert ranks "
            f"(--expert-model-parallel-size {expert} · --expert-tensor-parallel-size {slices}) "
            "into whole nodes; give a divisor of them that --expert-tensor-parallel-size divides, "
            "or 0"
        )
    if node and args.moe_token_dispatcher_type == "allgather":
        yield (
            f"--sffn-node-size {node} has nothing to act on with --moe-token-dispatcher-type "
            "allgather, which sends every token to every rank; use alltoall, or leave one out"
        )
    if sffn.block_size % slices:
        yield (
            f"--expert-tensor-parallel-size {slices} does not divide --sffn-block-size "
            f"{sffn.block_size}; leave it out (blocks then stay whole), and use "
            "--expert-model-parallel-size to spread the blocks"
        )


def _ranks(args: Namespace) -> Iterator[str]:
    """The grid of expert ranks within the world."""
    expert, slices = args.expert_model_parallel_size, args.expert_tensor_parallel_size or 1
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.world_size % (expert * slices * pipeline):
        cut = f" times --expert-tensor-parallel-size {slices}" if slices > 1 else ""
        yield (
            f"--expert-model-parallel-size {expert}{cut} times --pipeline-model-parallel-size "
            f"{pipeline} does not divide the number of ranks, {args.world_size}; start a multiple "
            f"of {expert * slices * pipeline} with torchrun --nproc-per-node"
        )
    if tensor > 1 and not args.sequence_parallel:
        yield (
            f"--tensor-model-parallel-size {tensor} with sparse layers needs sequence parallelism; "
            "add --sequence-parallel"
        )


def _backend(args: Namespace, sffn: SparseFFNConfig) -> Iterator[str]:
    """What one of the two kinds of layer lacks."""
    slices, kind = args.expert_tensor_parallel_size or 1, args.moe_token_dispatcher_type
    if sffn.backend is not Backend.MEGATRON:
        if kind == "flex":
            yield (
                "--moe-token-dispatcher-type flex needs --sffn-backend megatron, sparse layers "
                "exchange their rows themselves; use alltoall or allgather, or leave it out"
            )
        return
    if sffn.router.key_width(args.hidden_size) != args.hidden_size:
        yield (
            f"--sffn-router {sffn.router.name} has keys of its own, which --sffn-backend megatron "
            "cannot hold; use another --sffn-backend"
        )
    if slices > 1:
        yield (
            f"--expert-tensor-parallel-size {slices} is not available with --sffn-backend "
            "megatron, whose dispatcher gathers parts of different sizes; leave it out, or use "
            "another --sffn-backend"
        )
    if args.overlap_param_gather:
        yield (
            "--overlap-param-gather is not available with --sffn-backend megatron, whose keys are "
            "read before they are gathered; leave it out, or use another --sffn-backend"
        )


def _chunks(args: Namespace, sffn: SparseFFNConfig) -> Iterator[str]:
    """Chunks of an exchange, where there is one and it can be cut."""
    chunks = sffn.exchange_chunks
    if chunks == 1:
        return
    if sffn.backend is Backend.MEGATRON or args.moe_token_dispatcher_type == "allgather":
        other = (
            "--moe-token-dispatcher-type allgather"
            if sffn.backend is not Backend.MEGATRON
            else "--sffn-backend megatron"
        )
        yield (
            f"--sffn-exchange-chunks {chunks} is not available with {other}, which sends all "
            "tokens at once; use --moe-token-dispatcher-type alltoall with another --sffn-backend, "
            "or leave it out"
        )
    if layout_of(args).expert_ranks == 1:
        yield (
            f"--sffn-exchange-chunks {chunks} has nothing to act on where all blocks are on one "
            "rank; add --expert-model-parallel-size, or leave it out"
        )
    parts = args.context_parallel_size * (
        args.tensor_model_parallel_size if args.sequence_parallel else 1
    )
    if args.seq_length and args.micro_batch_size:
        tokens = args.seq_length * args.micro_batch_size // parts
        if chunks > tokens:
            yield (
                f"--sffn-exchange-chunks {chunks} is more than the {tokens} tokens of a microbatch "
                "on a rank; give a smaller number, 2 to 4 at most"
            )
