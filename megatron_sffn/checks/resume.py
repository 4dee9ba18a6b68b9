"""Checks that a run can resume from a checkpoint: same model, and an optimizer state that fits.

Inputs: the run's validated arguments, and the checkpoint that `--load` names. Outputs: notes on
stdout about differences that do no harm.

Design notes: Megatron would notice most mismatches as well, but minutes later and as a missing
tensor. Flags are compared, not the shapes that follow from them, so that the sentence can name the
flag. Every other parallel layout passes, since Megatron reshards the tensors.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_sffn.checkpoints.files import (
    TRACKER,
    args_in,
    folder_to_load,
    is_torch_dist,
    read_whole,
)
from megatron_sffn.checks.optimizer_state import jump_of_the_rate, misfits
from megatron_sffn.checks.pickles import check_data_only
from megatron_sffn.checks.problem import Problem, run_checks
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.flags.megatron_flags import ACTIVATIONS
from megatron_sffn.flags.names import flag_of, stated
from megatron_sffn.flags.sffn_flags import saved_config
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.layer_pattern import hybrid_layers, hybrid_pattern, layer_pattern
from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING
from megatron_sffn.patches.unpickling import trust

FLAGS_WITH_VALUE = (
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "position_embedding_type",
    "no_rope_freq",
    "softmax_type",
    "experimental_attention_variant",
    "mtp_num_layers",
    "moe_latent_size",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "mamba_state_dim",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_num_heads",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "mup_embedding_mult",
    "mup_output_mult",
    "mup_attn_scale_power",
)
"""Flags (dest) with a value that define the model."""

SWITCHES = (
    "untie_embeddings_and_output_weights",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "multi_latent_attention",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "add_position_embedding",
    "rotary_interleaved",
    "mtp_use_repeated_layer",
    "use_mup",
    "moe_router_enable_expert_bias",
)
"""Flags (dest) without a value that define the model."""

INVERTED = ("add_bias_linear", "add_position_embedding")
"""Switches (dest) that are True where the flag is not given."""

ATTENTION_SPAN = (
    "rotary_base",
    "rotary_percent",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "window_size",
    "window_attn_skip_freq",
)
"""Flags (dest) that set how far attention looks; `--finetune` may change them."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The iteration that a run loads.

    Args:
        folder: folder of the iteration.
        common: everything in it but the shards.
    """

    folder: Path
    common: dict[str, Any]

    @property
    def is_plain_megatron(self) -> bool:
        """True if it was saved without the `--sffn` flags."""
        return "sffn_router" not in vars(args_in(self.common))

    @property
    def args(self) -> Namespace:
        """The arguments of the run that saved it."""
        saved = args_in(self.common)
        if self.is_plain_megatron:
            saved = Namespace(**vars(saved), sffn_router="dense", sffn_relu=False)
        return saved


def check_checkpoint(args: Namespace, sffn: SparseFFNConfig | None) -> None:
    """Look at the checkpoint that `--load` names, before anything starts.

    Args:
        args: Megatron's validated namespace.
        sffn: the sparse layer; None for the dense baseline.

    Raises:
        ConfigError: if it names code, is damaged, is of another model, or its optimizer's state
            does not fit.
    """
    if args.sffn_trust_checkpoint:
        trust()
    run_checks([step_without_load], args)
    folder = checkpoint_to_load(args)
    if folder is None:
        return
    if args.rank == 0:
        check_data_only(folder)
    detect = args.auto_detect_ckpt_format
    if args.ckpt_format != "torch_dist" or not is_torch_dist(folder, detect=detect):
        return
    checkpoint = Checkpoint(folder=folder, common=read_whole(folder))
    run_checks(CHECKS, args, sffn, checkpoint)
    if args.rank == 0:
        for note in _notes(args, sffn, checkpoint):
            print(note, flush=True)


def step_without_load(args: Namespace) -> Iterator[Problem]:
    """An iteration to load without a folder to load it from."""
    if args.load is None and args.ckpt_step is not None:
        rule = "has nothing to act on without --load"
        yield Problem("--ckpt-step", args.ckpt_step, rule, "add --load DIR")


def checkpoint_to_load(args: Namespace) -> Path | None:
    """The iteration that Megatron will load; None if it starts from scratch or looks elsewhere."""
    if args.enable_msc or args.non_persistent_ckpt_type:
        return None
    load, pretrained = args.load, args.pretrained_checkpoint
    if pretrained is not None and (load is None or not (Path(load) / TRACKER).is_file()):
        load = pretrained
    return None if load is None else folder_to_load(Path(load), args.ckpt_step)


def _loads_optimizer_state(args: Namespace, folder: Path) -> bool:
    """True if Megatron loads the optimizer's state as well as the weights."""
    is_new = args.no_load_optim or args.finetune or folder.name == "release"
    return not is_new and args.load is not None and folder.parent == Path(args.load)


# The model


def plain_megatron(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """Checkpoints of plain Megatron, if they or the run have sparse layers or experts."""
    experts = vars(args_in(checkpoint.common)).get("num_experts")
    if checkpoint.is_plain_megatron and not (sffn is None and experts is None):
        layers = "dense layers" if experts is None else f"{experts} experts of Megatron"
        remedy = "leave out --load" if experts is not None else "use --sffn-router dense"
        yield Problem(
            "checkpoint",
            checkpoint.folder,
            f"was saved by plain Megatron, with {layers} and no --sffn flags",
            f"{remedy}, or load a checkpoint that megatron_sffn.pretrain saved",
        )


def other_model(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """Flags of the model that differ from those of the checkpoint."""
    for flag, saved_flag in _model_differences(args, checkpoint.args, sffn):
        yield Problem(
            flag,
            None,
            f", but the checkpoint {checkpoint.folder} was saved with {saved_flag}",
            "use that, or load another checkpoint",
            lead="this run has ",
        )


def _model_differences(
    args: Namespace, saved: Namespace, sffn: SparseFFNConfig | None
) -> Iterator[tuple[str, str]]:
    """Flags of the model in this run and in the checkpoint, where they differ."""
    texts = [_with_value(dest) for dest in (*FLAGS_WITH_VALUE, "sffn_router")]
    texts += [_switch(dest) for dest in SWITCHES]
    texts += [_activation, _prices]
    if args.position_embedding_type == "learned_absolute":
        texts.append(_with_value("max_position_embeddings"))
    yield from _differences(texts, args, saved)
    yield from _layer_differences(args, saved)
    width = [_with_value("ffn_hidden_size")]
    if sffn is None:
        yield from _differences(width, args, saved)
        return
    saved_sffn = _saved_layer(saved)
    if Symbols.MLP in _layers(args):
        yield from _differences(width, args, saved)
    for name in ("active_cells", "expansion", "shared_blocks", "layers_per_table"):
        flag, value, saved_value = (
            flag_of(f"sffn_{name}"),
            getattr(sffn, name),
            getattr(saved_sffn, name),
        )
        if value != saved_value:
            yield f"{flag} {value}", f"{flag} {saved_value}"
    yield from _router_differences(sffn, saved_sffn, training_only=False)
    if (sffn.backend is Backend.MEGATRON) != (saved_sffn.backend is Backend.MEGATRON):
        # Megatron's experts are stored one by one, ours as tables.
        yield f"--sffn-backend {sffn.backend}", f"--sffn-backend {saved_sffn.backend}"


def _layer_differences(args: Namespace, saved: Namespace) -> Iterator[tuple[str, str]]:
    """Flags of the layers that differ.

    A hybrid model can load the GPT with the same layers, but not its multi-token prediction.
    """
    is_hybrid, was_hybrid = (vars(a).get("hybrid_layer_pattern") is not None for a in (args, saved))
    loads = was_hybrid or not vars(args).get("mtp_num_layers") if is_hybrid else not was_hybrid
    if _layers(args) == _layers(saved) and loads:
        return
    flag = _with_value("sffn_layers")
    if is_hybrid or was_hybrid:
        flag = _layer_flags
    elif args.num_layers != saved.num_layers:
        flag = _with_value("num_layers")
    yield from _differences([flag], args, saved)


def _layers(args: Namespace) -> str:
    """The layers of a GPT or a hybrid model, by the symbols of a hybrid model."""
    pattern = vars(args).get("hybrid_layer_pattern")
    if pattern is not None:
        return hybrid_layers(pattern)
    sparse = [0] * args.num_layers
    if args.sffn_router != "dense":
        sparse = layer_pattern(args.sffn_layers, args.num_layers)
    latent = bool(vars(args).get("multi_latent_attention"))
    return hybrid_pattern(sparse, [args.num_layers], latent=latent)


def _layer_flags(args: Namespace) -> str:
    """The flags that say what the layers are."""
    if vars(args).get("hybrid_layer_pattern") is not None:
        return stated("--hybrid-layer-pattern", args.hybrid_layer_pattern)
    return f"--sffn-model gpt --num-layers {args.num_layers} --sffn-layers {args.sffn_layers}"


def _saved_layer(saved: Namespace) -> SparseFFNConfig:
    """The sparse layer of a checkpoint that has one."""
    sffn = saved_config(saved)
    assert sffn is not None, saved.sffn_router
    return sffn


def _router_differences(
    sffn: SparseFFNConfig, saved_sffn: SparseFFNConfig, *, training_only: bool
) -> Iterator[tuple[str, str]]:
    """The routers' flags that differ: those of the model, or those that act in training only."""
    # The routers' names are compared before.
    for router, saved_router in zip(sffn.routers, saved_sffn.routers, strict=True):
        for field in dataclasses.fields(router):
            value, saved_value = (getattr(config, field.name) for config in (router, saved_router))
            differs = value != saved_value
            if field.metadata["value_in_checkpoint"]:
                differs = (value is None) is not (saved_value is None)
            if differs and field.metadata["training_only"] is training_only:
                flag = field.metadata["flag"]
                yield stated(flag, value), stated(flag, saved_value)


Text = Callable[[Namespace], str | None]
"""A flag of the model as the user would type it; None if the arguments do not have it."""


def _differences(texts: list[Text], args: Namespace, saved: Namespace) -> Iterator[tuple[str, str]]:
    """Flags that this run and the checkpoint both have, where they differ."""
    for text in texts:
        flag, saved_flag = text(args), text(saved)
        if flag is not None and saved_flag is not None and flag != saved_flag:
            yield flag, saved_flag


def _with_value(dest: str) -> Text:
    """A flag and its value, or its absence."""

    def text(args: Namespace) -> str | None:
        value = vars(args).get(dest)
        if dest == "num_query_groups" and not vars(args).get("group_query_attention"):
            value = vars(args).get("num_attention_heads")
        return stated(flag_of(dest), value) if dest in vars(args) else None

    return text


def _switch(dest: str) -> Text:
    """A flag without a value, or its absence."""

    def text(args: Namespace) -> str | None:
        if dest not in vars(args):
            return None
        return stated(flag_of(dest), bool(vars(args)[dest]) is not (dest in INVERTED))

    return text


def _activation(args: Namespace) -> str:
    """The flag of the activation."""
    flags = [flag_of(dest) for dest in ACTIVATIONS if vars(args).get(dest)]
    return " ".join(flags) or "GELU (none of --swiglu, --squared-relu, --sffn-relu)"


def _prices(args: Namespace) -> str:
    """The flag of quantile balancing, whose prices act on every choice of a trained model."""
    is_on = vars(args).get("moe_router_load_balancing_type") == QUANTILE_BALANCING
    return f"{'' if is_on else 'no '}--moe-router-load-balancing-type {QUANTILE_BALANCING}"


# Settings that may differ, within limits


def attention_span(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """Another reach of attention than the checkpoint's, without `--finetune`."""
    if args.finetune:
        return
    texts = list(map(_with_value, ATTENTION_SPAN))
    for flag, saved_flag in _differences(texts, args, checkpoint.args):
        yield Problem(
            flag,
            None,
            f", but the checkpoint was saved with {saved_flag}",
            "use that, or add --finetune to train its weights on with another reach of attention "
            f"(checkpoint {checkpoint.folder})",
            lead="this run has ",
        )


def block_size(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """Another block size than the checkpoint's, if the checkpoint stores weights per block."""
    if sffn is None or sffn.block_size == checkpoint.args.sffn_block_size:
        return
    change = f"differs from the checkpoint's {checkpoint.args.sffn_block_size}"
    if sffn.backend is Backend.MEGATRON:
        yield Problem(
            "--sffn-block-size",
            sffn.block_size,
            f"{change}, whose experts Megatron stores one by one",
            f"use that (checkpoint {checkpoint.folder})",
        )
        return
    saved_sffn = _saved_layer(checkpoint.args)
    width = sffn.router_width(args.hidden_size)
    reasons = [router.bound_to_blocks(saved_sffn, sffn, width) for router in sffn.routers]
    for reason in filter(None, reasons):
        yield Problem(
            "--sffn-block-size",
            sffn.block_size,
            f"{change}: {reason}",
            f"use that (checkpoint {checkpoint.folder})",
        )
    gated = [
        router.name
        for router in sffn.routers
        if router.per_block_weights or router.splitting_divides_gates
    ]
    if gated:
        yield Problem(
            "--sffn-block-size",
            sffn.block_size,
            f"{change}, and --sffn-router {gated[0]} has a gate of every block",
            "use that, or cut them anew with tools/convert_checkpoint.py reblock --load "
            f"{args.load} --save DIR --block-size {sffn.block_size} (checkpoint "
            f"{checkpoint.folder})",
        )


def embedding_rows(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """Tokenizers whose vocabulary, padded as in the checkpoint, has another number of rows."""
    saved = checkpoint.args
    rows, divisor = (
        vars(saved).get(name) for name in ("padded_vocab_size", "make_vocab_size_divisible_by")
    )
    if rows is None or divisor is None or args.padded_vocab_size is not None:
        return
    ids = load_tokenizer(args).vocab_size
    padded = calculate_padded_vocab_size(ids, divisor, saved.tensor_model_parallel_size, False)
    if padded != rows:
        model = f" --tokenizer-model {saved.tokenizer_model}" if saved.tokenizer_model else ""
        size = f" --vocab-size {saved.vocab_size}" if saved.vocab_size else ""
        yield Problem(
            f"the tokenizer's {ids} ids",
            None,
            f"make {padded} rows of the embedding, padded as in the checkpoint, which has {rows}",
            f"use the tokenizer it was trained with: --tokenizer-type {saved.tokenizer_type}{model}"
            f"{size} (checkpoint {checkpoint.folder})",
        )


def optimizer_state(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """An optimizer, precision, schedule or random state that does not fit the checkpoint's."""
    if not _loads_optimizer_state(args, checkpoint.folder):
        return
    for sentence in misfits(args, {**checkpoint.common, "args": checkpoint.args}):
        subject, _, remedy = sentence.partition("; ")
        flag, _, rule = subject.partition(" ")
        yield Problem(flag, None, rule, f"{remedy} (checkpoint {checkpoint.folder})")


CHECKS = (
    plain_megatron,
    other_model,
    attention_span,
    block_size,
    embedding_rows,
    optimizer_state,
)


def _notes(args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint) -> Iterator[str]:
    """Differences that do no harm, for the log."""
    saved = checkpoint.args
    if sffn is not None:
        saved_sffn = _saved_layer(saved)
        if sffn.block_size != saved_sffn.block_size:
            jump = "; the hash draws them anew, so the loss jumps"
            yield (
                f"block size {saved_sffn.block_size} of the checkpoint -> {sffn.block_size}: same "
                f"memory, other blocks{jump if sffn.token_keys else ''}"
            )
        for flag, saved_flag in _router_differences(sffn, saved_sffn, training_only=True):
            yield f"{saved_flag} of the checkpoint -> {flag}: the model is the same"
    if checkpoint.is_plain_megatron:
        yield "the checkpoint was saved by plain Megatron: it has no --sffn flags to compare"
    if _loads_optimizer_state(args, checkpoint.folder):
        yield from jump_of_the_rate(args, {**checkpoint.common, "args": saved})
