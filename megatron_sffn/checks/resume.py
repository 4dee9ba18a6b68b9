"""Whether a run can go on from a checkpoint: its model is the same, and its optimizer's state fits.

Enters: the run's validated arguments, and those in the checkpoint that `--load` names. Leaves:
nothing, a printed remark on what changes without harm, or one sentence before any process group or
file exists. Most of this Megatron would notice, too: after minutes, as a missing key of a tensor.

Choice: what a flag says is compared, not the shapes that follow from it, so that the sentence can
name the flag. Any other layout of ranks passes; Megatron cuts the tensors anew.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_sffn.checkpoints.files import (
    TRACKER,
    args_in,
    folder_to_load,
    is_torch_dist,
    read_whole,
)
from megatron_sffn.checkpoints.optimizer_state import jump_of_the_rate, misfits
from megatron_sffn.checkpoints.pickle_scan import check_data_only
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.flags.megatron_flags import ACTIVATIONS
from megatron_sffn.flags.names import flag_of, stated
from megatron_sffn.flags.sffn_flags import saved_config
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.layer_spec import layer_pattern
from megatron_sffn.patches.unpickling import trust
from megatron_sffn.utils.errors import ConfigError

NUMBERS = (
    "num_layers",
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
    "moe_router_num_groups",
    "moe_router_group_topk",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "mup_embedding_mult",
    "mup_output_mult",
    "mup_attn_scale_power",
)
"""Flags (dest) with a value that make the model another one."""

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
"""The same, of flags without a value."""

REACH = (
    "rotary_base",
    "rotary_percent",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "window_size",
    "window_attn_skip_freq",
)
"""Flags (dest) that say how far attention looks; `--finetune` may change them."""


def check_checkpoint(args: Namespace, sffn: SparseFFNConfig | None) -> None:
    """Look at the checkpoint that `--load` names.

    Args:
        args: Megatron's validated namespace.
        sffn: the sparse layer; None for the dense baseline.

    Raises:
        ConfigError: if it names code, is damaged, of another model, or its optimizer's state does
            not fit.
    """
    if args.sffn_trust_checkpoint:
        trust()
    folder = _folder(args)
    if folder is not None and args.rank == 0:
        check_data_only(folder)
    if folder is None or not _is_ours(args, folder):
        return
    common = read_whole(folder)
    saved = _ours(folder, args_in(common), sffn)
    for ours, theirs in _differences(args, saved, sffn):
        raise ConfigError(
            f"this run has {ours}, but the checkpoint {folder} was saved with {theirs}; use that, "
            "or load another checkpoint"
        )
    problems = [_reach(args, saved), _blocks(args, saved, sffn), _vocabulary(args, saved, folder)]
    if _loads_state(args, folder):
        problems.append(misfits(args, {**common, "args": saved}))
    for sentence in (sentence for each in problems for sentence in each):
        raise ConfigError(f"{sentence} (checkpoint {folder})")
    if args.rank == 0:
        remarks = list(_remarks(args, saved, sffn))
        if _loads_state(args, folder):
            remarks += jump_of_the_rate(args, {**common, "args": saved})
        for remark in remarks:
            print(remark, flush=True)


def _folder(args: Namespace) -> Path | None:
    """What Megatron will load; None where it starts from scratch, or looks elsewhere."""
    if args.load is None and args.ckpt_step is not None:
        raise ConfigError(
            f"--ckpt-step {args.ckpt_step} has nothing to act on without --load; add --load DIR"
        )
    if args.enable_msc or args.non_persistent_ckpt_type:
        return None
    load = args.load
    pretrained = args.pretrained_checkpoint
    if pretrained is not None and (load is None or not (Path(load) / TRACKER).is_file()):
        load = pretrained
    return None if load is None else folder_to_load(Path(load), args.ckpt_step)


def _is_ours(args: Namespace, folder: Path) -> bool:
    """Whether it is in the format that this module reads."""
    detect = args.auto_detect_ckpt_format
    return args.ckpt_format == "torch_dist" and is_torch_dist(folder, detect=detect)


def _loads_state(args: Namespace, folder: Path) -> bool:
    """Whether Megatron loads more than the weights."""
    anew = args.no_load_optim or args.finetune or folder.name == "release"
    return not anew and args.load is not None and folder.parent == Path(args.load)


def _ours(folder: Path, saved: Namespace, sffn: SparseFFNConfig | None) -> Namespace:
    """The arguments in a checkpoint, with our flags also if plain Megatron saved it.

    Raises:
        ConfigError: if it did, and there is a sparse layer on either side.
    """
    if "sffn_router" in vars(saved):
        return saved
    experts = vars(saved).get("num_experts")
    if sffn is not None or experts is not None:
        what = "dense layers" if experts is None else f"{experts} experts of Megatron"
        remedy = "leave out --load" if experts is not None else "use --sffn-router dense"
        raise ConfigError(
            f"checkpoint {folder} was saved by plain Megatron, with {what} and no --sffn flags; "
            f"{remedy}, or load a checkpoint that megatron_sffn.pretrain saved"
        )
    return Namespace(**vars(saved), sffn_router="dense", sffn_relu=False)


# The model


def _differences(
    args: Namespace, saved: Namespace, sffn: SparseFFNConfig | None
) -> Iterator[tuple[str, str]]:
    """What the flags say about the model, here and there, where it differs."""
    texts = [_with_value(dest) for dest in (*NUMBERS, "sffn_router")]
    texts += [_without_value(dest) for dest in SWITCHES]
    texts.append(_activation)
    if args.position_embedding_type == "learned_absolute":
        texts.append(_with_value("max_position_embeddings"))
    yield from _pairs(texts, args, saved)
    if sffn is None:
        yield from _pairs([_with_value("ffn_hidden_size")], args, saved)
        return
    old = saved_config(saved)
    assert old is not None, saved.sffn_router
    pattern, old_pattern = (layer_pattern(a.sffn_layers, a.num_layers) for a in (args, saved))
    if pattern != old_pattern:
        yield f"--sffn-layers {args.sffn_layers}", f"--sffn-layers {saved.sffn_layers}"
    if 0 in pattern:
        yield from _pairs([_with_value("ffn_hidden_size")], args, saved)
    numbers = {
        "--sffn-active-cells": "active_cells",
        "--sffn-expansion": "expansion",
        "--sffn-shared-blocks": "shared_blocks",
    }
    for flag, name in numbers.items():
        here, there = getattr(sffn, name), getattr(old, name)
        if here != there:
            yield f"{flag} {here}", f"{flag} {there}"
    yield from _router_differences(sffn, old, training_only=False)
    if (sffn.backend is Backend.MEGATRON) != (old.backend is Backend.MEGATRON):
        # Megatron's experts are stored one by one, ours as tables.
        yield f"--sffn-backend {sffn.backend}", f"--sffn-backend {old.backend}"


def _router_differences(
    sffn: SparseFFNConfig, old: SparseFFNConfig, *, training_only: bool
) -> Iterator[tuple[str, str]]:
    """The router's flags that differ: those of the model, or those of its training alone."""
    for item in dataclasses.fields(sffn.router):
        here, there = getattr(sffn.router, item.name), getattr(old.router, item.name)
        if here != there and item.metadata["training_only"] is training_only:
            flag = item.metadata["flag"]
            yield stated(flag, here), stated(flag, there)


Text = Callable[[Namespace], str | None]
"""What a namespace says about one property of the model; None if nothing."""


def _pairs(texts: list[Text], args: Namespace, saved: Namespace) -> Iterator[tuple[str, str]]:
    """Properties that are known on both sides and differ."""
    for text in texts:
        here, there = text(args), text(saved)
        if here is not None and there is not None and here != there:
            yield here, there


def _with_value(dest: str) -> Text:
    """A flag and its value, or its absence."""

    def text(args: Namespace) -> str | None:
        value = vars(args).get(dest)
        if dest == "num_query_groups" and not vars(args).get("group_query_attention"):
            value = vars(args).get("num_attention_heads")
        return stated(flag_of(dest), value) if dest in vars(args) else None

    return text


def _without_value(dest: str) -> Text:
    """A flag without a value, or its absence."""

    def text(args: Namespace) -> str | None:
        if dest not in vars(args):
            return None
        is_inverted = dest in ("add_bias_linear", "add_position_embedding")
        return stated(flag_of(dest), bool(vars(args)[dest]) is not is_inverted)

    return text


def _activation(args: Namespace) -> str:
    """The flag of the activation."""
    chosen = [flag_of(dest) for dest in ACTIVATIONS if vars(args).get(dest)]
    return " ".join(chosen) or "GELU (none of --swiglu, --squared-relu, --sffn-relu)"


# What may change, within limits


def _reach(args: Namespace, saved: Namespace) -> Iterator[str]:
    """How far attention looks, which a longer context changes."""
    if args.finetune:
        return
    for ours, theirs in _pairs(list(map(_with_value, REACH)), args, saved):
        yield (
            f"this run has {ours}, but the checkpoint was saved with {theirs}; use that, or add "
            "--finetune to train its weights on with another reach of attention"
        )


def _blocks(args: Namespace, saved: Namespace, sffn: SparseFFNConfig | None) -> Iterator[str]:
    """The block size, where something in the checkpoint depends on it."""
    if sffn is None or sffn.block_size == saved.sffn_block_size:
        return
    change = (
        f"--sffn-block-size {sffn.block_size} differs from the checkpoint's {saved.sffn_block_size}"
    )
    if sffn.backend is Backend.MEGATRON:
        yield f"{change}, whose experts Megatron stores one by one; use that"
    elif sffn.router.per_block_weights or sffn.router.softmax_over_blocks:
        yield (
            f"{change}, and --sffn-router {args.sffn_router} has a gate of every block; use "
            "that, or cut them anew with tools/convert_checkpoint.py reblock --load "
            f"{args.load} --save DIR --block-size {sffn.block_size}"
        )


def _vocabulary(args: Namespace, saved: Namespace, folder: Path) -> Iterator[str]:
    """The rows of the embedding, padded as the checkpoint's were."""
    known = vars(saved)
    rows, divisor = known.get("padded_vocab_size"), known.get("make_vocab_size_divisible_by")
    if rows is None or divisor is None or args.padded_vocab_size is not None:
        return
    size = load_tokenizer(args).vocab_size
    padded = calculate_padded_vocab_size(size, divisor, saved.tensor_model_parallel_size, False)
    if padded != rows:
        yield (
            f"the tokenizer's {size} ids make {padded} rows of the embedding, padded as in the "
            f"checkpoint, which has {rows}; use the tokenizer it was trained with: "
            f"--tokenizer-type {saved.tokenizer_type}"
            + (f" --tokenizer-model {saved.tokenizer_model}" if saved.tokenizer_model else "")
            + (f" --vocab-size {saved.vocab_size}" if saved.vocab_size else "")
        )


def _remarks(args: Namespace, saved: Namespace, sffn: SparseFFNConfig | None) -> Iterator[str]:
    """What changes without harm, for the log."""
    if sffn is not None and sffn.block_size != saved.sffn_block_size:
        hashed = "; the hash draws them anew, so the loss jumps"
        yield (
            f"block size {saved.sffn_block_size} of the checkpoint -> {sffn.block_size}: same "
            f"memory, other blocks{hashed if sffn.router.needs_token_ids else ''}"
        )
    if sffn is not None:
        old = saved_config(saved)
        assert old is not None, saved.sffn_router
        for here, there in _router_differences(sffn, old, training_only=True):
            yield f"{there} of the checkpoint -> {here}: the model is the same"
    if saved.sffn_router == "dense" and "sffn_block_size" not in vars(saved):
        yield "the checkpoint was saved by plain Megatron: it has no --sffn flags to compare"
