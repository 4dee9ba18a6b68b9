"""Parallel layouts that cannot work, each with the flag to change.

Inputs: Megatron's namespace before Megatron validates it, and the sparse layer's config (None for
the dense baseline).

Design notes: Megatron would refuse many of these layouts as well, but in words for its own
developers, or only when the first batch arrives.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace

from megatron_sffn.checks.problem import Problem
from megatron_sffn.flags.megatron_flags import layout_of, num_virtual_stages
from megatron_sffn.flags.names import flag_of
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.layer_pattern import layer_pattern, layers_per_segment, pipeline_segments
from megatron_sffn.nn.routers.groups import check_groups
from megatron_sffn.nn.shared_tables import cut_group

UNKNOWN_STAGES = (
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
"""Flags (dest) with which Megatron alone knows the layers of a pipeline stage."""


def transformer_engine(args: Namespace) -> Iterator[Problem]:
    """Flags that need Transformer Engine where it is not installed."""
    cp_size, engine = args.context_parallel_size, "transformer_engine"
    needed_by = {
        ("--transformer-impl", engine): (
            args.transformer_impl == engine,
            "use --transformer-impl local",
        ),
        ("--context-parallel-size", cp_size): (cp_size > 1, "use --context-parallel-size 1"),
        ("--mla-down-proj-fusion", None): (args.mla_down_proj_fusion, "leave it out"),
        ("--apply-layernorm-1p", None): (args.layernorm_zero_centered_gamma, "leave it out"),
        ("--recompute-modules", "layernorm"): (
            "layernorm" in (args.recompute_modules or []),
            "leave it out",
        ),
    }
    for (flag, value), (is_given, remedy) in needed_by.items():
        if is_given and importlib.util.find_spec(engine) is None:
            yield Problem(
                flag,
                value,
                "needs Transformer Engine, which is not installed",
                f"install megatron-core[te] or {remedy}",
            )
    has_fused_adam = any(map(importlib.util.find_spec, (engine, "amp_C")))
    if not args.dist_ckpt_optim_fully_reshardable and not has_fused_adam:
        yield Problem(
            "--no-dist-ckpt-optim-fully-reshardable",
            None,
            "needs the Adam of Transformer Engine or of NVIDIA's apex, since Megatron does not "
            "load torch's back from that form",
            "leave it out",
        )


def _model_parallel_size(args: Namespace) -> int:
    """Number of ranks that hold one replica of the dense weights."""
    return int(
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )


def model_parallelism(args: Namespace) -> Iterator[Problem]:
    """Parallel sizes that do not divide the number of ranks, heads, layers or tokens."""
    tp_size, pp_size = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    model_parallel_size = _model_parallel_size(args)
    if args.world_size % model_parallel_size:
        yield Problem(
            "--tensor-model-parallel-size",
            tp_size,
            f"times --pipeline-model-parallel-size {pp_size} times --context-parallel-size "
            f"{args.context_parallel_size} does not divide the number of ranks, {args.world_size}",
            f"start a multiple of {model_parallel_size} with torchrun --nproc-per-node",
        )
    gqa, sequence_parallel = args.group_query_attention, args.sequence_parallel
    divided = {
        "--num-attention-heads": args.num_attention_heads,
        "--num-query-groups": args.num_query_groups if gqa else None,
        "--seq-length": args.seq_length if sequence_parallel else None,
    }
    if args.multi_latent_attention and args.transformer_impl == "local":
        # Transformer Engine does not split the products with these widths.
        keys = args.kv_lora_rank + args.qk_pos_emb_head_dim
        divided["--q-lora-rank"] = args.q_lora_rank
        divided[f"--kv-lora-rank plus --qk-pos-emb-head-dim {args.qk_pos_emb_head_dim},"] = keys
    for flag, size in divided.items():
        if size and size % tp_size:
            yield Problem(
                "--tensor-model-parallel-size",
                tp_size,
                f"does not divide {flag} {size}",
                "change one of them so that it does",
            )
    if args.mtp_num_layers and pp_size > 1 and not args.untie_embeddings_and_output_weights:
        yield Problem(
            "--mtp-num-layers",
            args.mtp_num_layers,
            f"with --pipeline-model-parallel-size {pp_size} needs an output layer of its own: "
            "Megatron cannot save one that it shares with the embedding",
            "add --untie-embeddings-and-output-weights",
        )
    has_uneven_stages = (
        args.pipeline_model_parallel_layout
        or args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
        or args.account_for_embedding_in_pipeline_split
        or args.account_for_loss_in_pipeline_split
    )
    has_pattern = args.hybrid_layer_pattern is not None  # `hybrid_model.py` checks its cuts
    if not (has_uneven_stages or has_pattern) and args.num_layers % pp_size:
        yield Problem(
            "--pipeline-model-parallel-size",
            pp_size,
            f"does not divide --num-layers {args.num_layers}",
            "change one of them so that it does, or set --decoder-first-pipeline-num-layers",
        )


def virtual_stages(args: Namespace) -> Iterator[Problem]:
    """Numbers of model chunks that do not divide the layers of a pipeline stage."""
    chunks = num_virtual_stages(args)
    if chunks == 1 or args.hybrid_layer_pattern is not None or args.pipeline_model_parallel_layout:
        return
    stages = replace(layout_of(args), virtual_stages=1).layers_per_chunk(args.num_layers)
    for count in stages:
        if count % chunks:
            yield Problem(
                "--num-virtual-stages-per-pipeline-rank",
                chunks,
                f"does not divide the {count} layers of a pipeline stage",
                "change it, or --num-layers or --pipeline-model-parallel-size",
            )


def batch_size(args: Namespace) -> Iterator[Problem]:
    """Global batches that cannot be cut into microbatches of all replicas."""
    replicas = max(1, args.world_size // _model_parallel_size(args))
    micro_batch, global_batch = args.micro_batch_size, args.global_batch_size
    if micro_batch is None or global_batch is None or args.rampup_batch_size:
        return
    if global_batch % (micro_batch * replicas):
        yield Problem(
            "--global-batch-size",
            global_batch,
            f"is not a multiple of --micro-batch-size {micro_batch} times the {replicas} "
            "data-parallel replicas",
            f"use a multiple of {micro_batch * replicas}",
        )
    pp_size = args.pipeline_model_parallel_size
    is_interleaved = (
        args.num_layers_per_virtual_pipeline_stage
        or args.num_virtual_stages_per_pipeline_rank
        or pipeline_segments(args.hybrid_layer_pattern or "") > pp_size
    )
    num_microbatches = global_batch // (micro_batch * replicas)
    if is_interleaved and pp_size > 1 and num_microbatches % pp_size:
        yield Problem(
            "the interleaved schedule",
            None,
            f"needs the microbatches of a step, {num_microbatches} (--global-batch-size "
            f"{global_batch} / --micro-batch-size {micro_batch} / {replicas} replicas), to be a "
            f"multiple of --pipeline-model-parallel-size {pp_size}",
            "change --global-batch-size",
        )


def expert_parallelism(args: Namespace, sffn: SparseFFNConfig) -> Iterator[Problem]:
    """Expert-parallel sizes that do not divide the blocks, their cells or the number of ranks."""
    ep_size, etp_size = args.expert_model_parallel_size, args.expert_tensor_parallel_size or 1
    tp_size, pp_size = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if sffn.num_blocks % ep_size:
        yield Problem(
            "--expert-model-parallel-size",
            ep_size,
            f"does not divide the {sffn.num_blocks} blocks (--sffn-expansion {sffn.expansion} · "
            f"--sffn-active-cells {sffn.active_cells} / --sffn-block-size {sffn.block_size})",
            "change one of them so that it does",
        )
    if sffn.block_size % etp_size:
        yield Problem(
            "--expert-tensor-parallel-size",
            etp_size,
            f"does not divide --sffn-block-size {sffn.block_size}",
            "leave it out (blocks then stay whole), and use --expert-model-parallel-size to spread "
            "the blocks",
        )
    if args.world_size % (ep_size * etp_size * pp_size):
        factor = f"times --expert-tensor-parallel-size {etp_size} " if etp_size > 1 else ""
        yield Problem(
            "--expert-model-parallel-size",
            ep_size,
            f"{factor}times --pipeline-model-parallel-size {pp_size} does not divide the number of "
            f"ranks, {args.world_size}",
            f"start a multiple of {ep_size * etp_size * pp_size} with torchrun --nproc-per-node",
        )
    if tp_size > 1 and not args.sequence_parallel:
        yield Problem(
            "--tensor-model-parallel-size",
            tp_size,
            "with sparse layers needs sequence parallelism",
            "add --sequence-parallel",
        )


def predictions(args: Namespace, sffn: SparseFFNConfig) -> Iterator[Problem]:
    """Multi-token prediction whose layers would read the ids of other tokens."""
    is_cut = args.sequence_parallel and args.tensor_model_parallel_size > 1
    if not (args.mtp_num_layers and sffn.router.needs_token_ids and is_cut):
        return
    if args.pipeline_model_parallel_size == 1:
        yield Problem(
            "--sffn-router",
            sffn.router.name,
            "with --mtp-num-layers and --sequence-parallel reads wrong ids where the sequence is "
            "cut, since Megatron moves each rank's ids by itself",
            "use --pipeline-model-parallel-size 2 or more, or another router",
        )


def nodes(args: Namespace, sffn: SparseFFNConfig) -> Iterator[Problem]:
    """Sizes of a node that do not fit the expert ranks or the dispatcher."""
    ep_size, etp_size = args.expert_model_parallel_size, args.expert_tensor_parallel_size or 1
    node_size = args.sffn_node_size
    if not node_size:
        return
    if ep_size * etp_size % node_size or node_size % etp_size:
        yield Problem(
            "--sffn-node-size",
            node_size,
            f"does not cut the {ep_size * etp_size} expert ranks (--expert-model-parallel-size "
            f"{ep_size} · --expert-tensor-parallel-size {etp_size}) into whole nodes",
            "give a divisor of them that --expert-tensor-parallel-size divides, or 0",
        )
    if args.moe_token_dispatcher_type == "allgather":
        yield Problem(
            "--sffn-node-size",
            node_size,
            "has nothing to act on with --moe-token-dispatcher-type allgather, which sends every "
            "token to every rank",
            "use alltoall, or leave one out",
        )


def backend(args: Namespace, sffn: SparseFFNConfig) -> Iterator[Problem]:
    """Flags that Megatron's experts do not support, or that only Megatron's experts support."""
    etp_size = args.expert_tensor_parallel_size or 1
    if sffn.backend is not Backend.MEGATRON:
        if args.moe_token_dispatcher_type == "flex":
            yield Problem(
                "--moe-token-dispatcher-type",
                "flex",
                "needs --sffn-backend megatron, sparse layers exchange their rows themselves",
                "use alltoall or allgather, or leave it out",
            )
        return
    if sffn.router.key_width(args.hidden_size) != args.hidden_size:
        yield Problem(
            "--sffn-router",
            sffn.router.name,
            "has keys of its own, which --sffn-backend megatron cannot hold",
            "use another --sffn-backend",
        )
    if etp_size > 1:
        yield Problem(
            "--expert-tensor-parallel-size",
            etp_size,
            "is not available with --sffn-backend megatron, whose dispatcher gathers parts of "
            "different sizes",
            "leave it out, or use another --sffn-backend",
        )
    if args.overlap_param_gather:
        yield Problem(
            "--overlap-param-gather",
            None,
            "is not available with --sffn-backend megatron, whose keys are read before they are "
            "gathered",
            "leave it out, or use another --sffn-backend",
        )


def shared_tables(args: Namespace, sffn: SparseFFNConfig) -> Iterator[Problem]:
    """Layers with one table of keys and values that are not on one pipeline stage."""
    if sffn.layers_per_table == 1:
        return
    for dest in UNKNOWN_STAGES:
        if getattr(args, dest):
            yield Problem(
                "--sffn-layers-per-table",
                sffn.layers_per_table,
                f"is not available with {flag_of(dest)}, with which it is not known here which "
                "layers are on one pipeline stage",
                "leave one out",
            )
    pattern = args.hybrid_layer_pattern
    if pattern is None:
        chunks = layout_of(args).layers_per_chunk(args.num_layers)
    else:
        chunks = layers_per_segment(pattern, args.pipeline_model_parallel_size)
    sparse = layer_pattern(args.sffn_layers, args.num_layers, pattern)
    group = cut_group(sparse, chunks, sffn.layers_per_table)
    if group is not None:
        yield Problem(
            "--sffn-layers-per-table",
            sffn.layers_per_table,
            f"gives layers {', '.join(map(str, group))} one table, but pipeline stages or their "
            f"chunks cut them (layers of each: {', '.join(map(str, chunks))})",
            "change it, --sffn-layers, or the sizes of the pipeline",
        )


def exchange_chunks(args: Namespace, sffn: SparseFFNConfig) -> Iterator[Problem]:
    """Chunks of an exchange that does not happen, or that has fewer tokens."""
    chunks, is_ours = sffn.exchange_chunks, sffn.backend is not Backend.MEGATRON
    if chunks == 1:
        return
    if not is_ours or args.moe_token_dispatcher_type == "allgather":
        exchange = "--moe-token-dispatcher-type allgather" if is_ours else "--sffn-backend megatron"
        yield Problem(
            "--sffn-exchange-chunks",
            chunks,
            f"is not available with {exchange}, which sends all tokens at once",
            "use --moe-token-dispatcher-type alltoall with another --sffn-backend, or leave it out",
        )
    if layout_of(args).expert_ranks == 1:
        yield Problem(
            "--sffn-exchange-chunks",
            chunks,
            "has nothing to act on where all blocks are on one rank",
            "add --expert-model-parallel-size, or leave it out",
        )
    sequence_shards = args.context_parallel_size * (
        args.tensor_model_parallel_size if args.sequence_parallel else 1
    )
    if args.seq_length and args.micro_batch_size:
        tokens = args.seq_length * args.micro_batch_size // sequence_shards
        if chunks > tokens:
            yield Problem(
                "--sffn-exchange-chunks",
                chunks,
                f"is more than the {tokens} tokens of a microbatch on a rank",
                "give a smaller number, 2 to 4 at most",
            )


def router_groups(args: Namespace, sffn: SparseFFNConfig) -> Iterable[Problem]:
    """Groups of group-limited routing that do not divide the blocks."""
    # Before the dispatcher is chosen, which depends on the groups.
    check_groups(args, sffn.num_blocks, sffn.num_active_blocks)
    return ()


CHECKS = (transformer_engine, model_parallelism, virtual_stages, batch_size)
SPARSE_CHECKS = (
    expert_parallelism,
    predictions,
    nodes,
    backend,
    shared_tables,
    exchange_chunks,
    router_groups,
)
"""Checks of models that have sparse layers."""
