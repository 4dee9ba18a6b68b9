"""The command line: its help, the settings that follow from flags, and refused flags."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sffn.accounting import ModelShape, count_parameters
from megatron_sffn.checks import optimizers
from megatron_sffn.flags.sffn_flags import sffn_config, transformer_config
from megatron_sffn.patches import cpu
from megatron_sffn.train.arguments import parse
from megatron_sffn.utils import errors
from megatron_sffn.utils.errors import ConfigError
from tests.support.processes import HANGS

# Python 3.13 warns about Megatron's own flags.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1"
)
COMMAND = f"{MODEL} --sffn-block-size 32"
ROPE = "--position-embedding-type rope"
HOST_DEFAULTS = dict(cpu.HOST_FLAGS.values())

Read = Callable[..., Namespace]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Read:
    """`read(flags, ranks)`: the namespace of a command line, read in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as `parse` does with several TP ranks
    monkeypatch.setenv("RANK", "0")

    def run(flags: str = "", ranks: int = 1, *, command: str = COMMAND) -> Namespace:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setattr(sys, "argv", ["pretrain", *command.split(), *flags.split()])
        return parse(HOST_DEFAULTS)

    return run


# --help


def printed_help(flag: str) -> str:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("COLUMNS", "100")
        patch.setattr(sys, "argv", ["pretrain", flag])
        with pytest.raises(SystemExit) as stop:
            parse(HOST_DEFAULTS)
    assert stop.value.code == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def help_text() -> str:
    return printed_help("--help-all")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_our_flags_alone_and_names_the_flag_that_shows_all(
    flag: str, help_text: str
) -> None:
    text = printed_help(flag)
    flags = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
    assert flags == re.findall(r"^  (--sffn-[\w-]+)", help_text, re.MULTILINE)
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE) == ["sparse feed-forward layers"]
    assert "torchrun --nproc-per-node N -m megatron_sffn.pretrain" in text
    assert text.rstrip().endswith("--help-all.")


def test_help_shows_our_flags_first_and_megatrons_after_them(help_text: str) -> None:
    headings = re.findall(r"^(\w.*):$", help_text, re.MULTILINE)
    assert headings[0] == "sparse feed-forward layers"
    assert len(headings) > 30
    flags = re.findall(r"^  (--[\w-]+)", help_text, re.MULTILINE)
    sffn_flags = [flag for flag in flags if flag.startswith("--sffn-")]
    assert flags[: len(sffn_flags)] == sffn_flags
    assert {"--num-layers", "--moe-aux-loss-coeff", "--save", "--data-path"} <= set(flags)
    assert "torchrun --nproc-per-node N -m megatron_sffn.pretrain" in help_text


@pytest.mark.parametrize(
    ("flag", "meaning", "default"),
    [
        ("--sffn-router", "avg-k: score a block by x · mean of its keys", "avg-k"),
        ("--sffn-block-size", "g, cells of a block", "256"),
        ("--sffn-expansion", "E, memory cells over active cells", "16"),
        ("--sffn-active-cells", "k, active cells of a token", "--ffn-hidden-size"),
        ("--sffn-layers", "(i+1) % N == 0, every:N:I for I, I+N", "every:1"),
        ("--sffn-aggregator", "how a block's cell activations become its score", "mean"),
        ("--sffn-shared-blocks", "the same for every token", "0"),
        ("--sffn-init", "sigma-moe: std sqrt(2/(layers·D))", "as the router's paper"),
        (
            "--sffn-gate-network",
            "mlp and attention (over a learned key per block) are ours",
            "linear",
        ),
        ("--sffn-descriptor", "the paper has the mean, the others are ours", "mean"),
        ("--sffn-block-dropout", "probability that a token cannot choose a block", "0.0"),
        ("--sffn-hash-seed", "seed of the map", "42"),
        ("--sffn-backend", "who computes the blocks", "auto"),
    ],
)
def test_help_gives_meaning_and_default(
    help_text: str, flag: str, meaning: str, default: str
) -> None:
    entry = re.search(rf"^  {flag} .*?(?=^  -|^\w)", help_text, re.MULTILINE | re.DOTALL)
    assert entry is not None
    words = " ".join(entry[0].split())
    assert meaning in words
    assert words.endswith(f"(default: {default})")


# What follows from the flags


def test_defaults_are_those_of_the_design(read: Read) -> None:
    command = f"{MODEL} --ffn-hidden-size 512"
    args = read(command=command)
    assert {name: value for name, value in vars(args).items() if name.startswith("sffn_")} == {
        "sffn_router": "avg-k",
        "sffn_block_size": 256,
        "sffn_expansion": 16,
        "sffn_active_cells": None,
        "sffn_layers": "every:1",
        "sffn_shared_blocks": 0,
        "sffn_layers_per_table": 1,
        "sffn_regather": "auto",
        "sffn_node_size": None,
        "sffn_exchange_chunks": 1,
        "sffn_init": None,
        "sffn_lr_mult": None,
        "sffn_wd_mult": None,
        "sffn_aggregator": "mean",
        "sffn_gate": None,
        "sffn_entropy_coeff": 0.0,
        "sffn_block_dropout": 0.0,
        "sffn_descriptor": "mean",
        "sffn_descriptor_cells": None,
        "sffn_descriptor_decay": 0.99,
        "sffn_key_rank": 128,
        "sffn_gate_network": "linear",
        "sffn_gate_hidden_size": None,
        "sffn_gate_activation": "relu",
        "sffn_noise": 1.0,
        "sffn_pkm_heads": 4,
        "sffn_product_key_size": 256,
        "sffn_product_key_norm": False,
        "sffn_trust_checkpoint": False,
        "sffn_record_routing": None,
        "sffn_dataloader": "torch",
        "sffn_validation_data": "first",
        "sffn_verbose": False,
        "sffn_eval_iters": 100,
        "sffn_separate_validation_sets": False,
        "sffn_hash_seed": 42,
        "sffn_hash_shared": False,
        "sffn_hash_balance": None,
        "sffn_hash_ngram": 1,
        "sffn_backend": "auto",
        "sffn_relu": False,
        "sffn_model": "gpt",
        "sffn_group_score": "largest",
        "sffn_l1_coeff": 1e-8,
        "sffn_l1_multiplier": 1.2,
        "sffn_target_blocks": None,
        "sffn_command": command.split(),
    }
    sffn = sffn_config(args)
    assert sffn is not None
    assert (sffn.active_cells, sffn.num_blocks, sffn.num_active_blocks) == (512, 32, 2)


def test_megatrons_moe_flags_are_derived(read: Read) -> None:
    args = read("--sffn-active-cells 96 --sffn-expansion 5 --sffn-layers every:2")
    assert args.num_experts == 5 * 96 // 32
    assert args.moe_router_topk == 96 // 32
    assert args.moe_ffn_hidden_size == 32
    assert args.moe_layer_freq == [0, 1, 0, 1]
    assert args.expert_tensor_parallel_size == 1
    assert args.moe_router_pre_softmax is True


@pytest.mark.parametrize(
    ("flags", "ranks", "pattern", "virtual"),
    [
        ("--sffn-model hybrid --sffn-layers every:2", 1, "*-*E*-*E", None),
        ("--sffn-model hybrid --sffn-layers 3 --pipeline-model-parallel-size 2", 2, "*-*-|*-*E", 1),
        (
            "--sffn-model hybrid --pipeline-model-parallel-size 2 --global-batch-size 2 "
            "--num-virtual-stages-per-pipeline-rank 2",
            2,
            "*E|*E|*E|*E",
            2,
        ),
        (
            "--sffn-model hybrid --pipeline-model-parallel-size 2 "
            "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3",
            2,
            "*E|*E*E*E",
            1,
        ),
        ("--sffn-model hybrid --sffn-router dense", 1, "*-*-*-*-", None),
        ("--sffn-model hybrid --multi-latent-attention --sffn-layers 0", 1, "+E+-+-+-", None),
        ("--hybrid-layer-pattern +E-E", 1, "+E-E", None),
        (f"--hybrid-layer-pattern *E-E/*E/*E {ROPE}", 1, "*E-E/*E/*E", None),
        (f"--sffn-model hybrid --mtp-num-layers 1 {ROPE}", 1, "*E*E*E*E/*E", None),
        ("--hybrid-layer-pattern *E-E --pipeline-model-parallel-size 2", 2, "*E|-E", 1),
    ],
)
def test_a_hybrid_model_has_a_pattern(
    read: Read, flags: str, ranks: int, pattern: str, virtual: int | None
) -> None:
    args = read(flags, ranks)
    assert args.hybrid_layer_pattern == pattern
    layers, *predictions = pattern.replace("|", "").split("/")
    assert args.num_layers == len(layers)
    assert (args.mtp_num_layers or 0) == len(predictions)
    if args.sffn_router != "dense":
        assert args.moe_layer_freq == [int(layer == "E") for layer in layers]
    assert (args.virtual_pipeline_model_parallel_size or 1) == (virtual or 1)
    args.padded_vocab_size = 64
    assert ModelShape.of_args(args, sffn_config(args)).attentions == (
        layers.count("*") + layers.count("+")
    )
    assert args.multi_latent_attention == ("+" in layers)


def test_the_number_of_layers_follows_from_a_pattern(read: Read) -> None:
    command = COMMAND.replace("--num-layers 4", "")
    assert read("--hybrid-layer-pattern *E-*E", command=command).num_layers == 5


def test_megatrons_fused_swiglu_is_off_where_it_would_ignore_a_clamp(read: Read) -> None:
    for flags, is_fused in (("", True), ("--activation-func-clamp-value 7", False)):
        args = read(f"--swiglu {flags}")
        args.bias_swiglu_fusion = True  # as on a GPU
        assert transformer_config(args, sffn_config(args)).bias_activation_fusion is is_fused


def test_the_dense_baseline_has_no_experts(read: Read) -> None:
    args = read("--sffn-router dense --quick-geglu")
    assert sffn_config(args) is None
    assert args.num_experts is None
    assert args.moe_ffn_hidden_size is None
    assert (args.moe_layer_freq, args.moe_router_topk) == (1, 2)
    assert args.moe_router_pre_softmax is False


@pytest.mark.parametrize(
    ("flags", "kind", "coefficient"),
    [
        ("--sffn-router switch", ["aux_loss"], [0.01]),
        ("--sffn-router switch --moe-aux-loss-coeff 0", "none", 0.0),
        ("--sffn-router switch --moe-aux-loss-coeff 0.5", ["aux_loss"], [0.5]),
        ("--sffn-router switch --moe-router-load-balancing-type none", "none", 0.0),
        ("--sffn-router avg-k", "none", 0.0),
        ("--sffn-router avg-k --moe-aux-loss-coeff 0", "none", 0.0),
        ("--sffn-router vanilla-m --moe-router-load-balancing-type none", "none", 0.0),
        ("--sffn-router avg-k --moe-aux-loss-coeff 0.1", ["aux_loss"], [0.1]),
        ("--sffn-router avg-k --moe-router-load-balancing-type aux_loss", ["aux_loss"], [0.01]),
        # A list, in which Megatron's log does not find an "aux_loss".
        ("--moe-router-load-balancing-type seq_aux_loss", ["seq_aux_loss"], [0.01]),
        (
            "--moe-router-load-balancing-type seq_aux_loss aux_loss --moe-aux-loss-coeff 0.5 0",
            ["seq_aux_loss"],
            [0.5],
        ),
        ("--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0", "none", 0.0),
        (
            "--sffn-router switch --moe-router-load-balancing-type aux_loss global_aux_loss "
            "--moe-aux-loss-coeff 0.1 0.2",
            ["aux_loss", "global_aux_loss"],
            [0.1, 0.2],
        ),
        ("--sffn-router rand-hash", "none", 0.0),
        # A string, with which Megatron compares.
        (
            "--sffn-router switch --moe-router-load-balancing-type quantile_balancing "
            "--moe-router-quantile-balancing-ema 0.5 --moe-aux-loss-coeff 0",
            "quantile_balancing",
            0.0,
        ),
    ],
)
def test_load_balancing_flags_are_resolved(
    read: Read, flags: str, kind: Any, coefficient: Any
) -> None:
    args = read(flags)
    assert args.moe_router_load_balancing_type == kind
    assert args.moe_aux_loss_coeff == coefficient


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ("", "alltoall"),  # gloo
        ("--moe-token-dispatcher-type allgather", "allgather"),
        ("--distributed-backend nccl", "allgather"),  # 8 of 128 blocks: both ranks are hit
        ("--distributed-backend nccl --sffn-block-size 256", "alltoall"),  # 1 of 16
        ("--distributed-backend nccl --moe-token-dispatcher-type alltoall", "alltoall"),
        ("--distributed-backend nccl --sffn-exchange-chunks 2", "alltoall"),
        (  # all 8 in one of 2 groups: one rank is hit
            "--distributed-backend nccl --moe-router-num-groups 2 --moe-router-group-topk 1",
            "alltoall",
        ),
        ("--sffn-backend megatron", "allgather"),  # Megatron's default
    ],
)
def test_the_dispatcher_is_chosen(read: Read, flags: str, kind: str) -> None:
    args = read(f"--expert-model-parallel-size 2 {flags}", 2)
    assert args.moe_token_dispatcher_type == kind


def test_every_layout_can_load_the_optimizer_unless_told_otherwise(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read().dist_ckpt_optim_fully_reshardable is True
    with pytest.raises(ConfigError, match=r"needs the Adam of Transformer Engine .*; leave it out"):
        read("--no-dist-ckpt-optim-fully-reshardable")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    args = read("--no-dist-ckpt-optim-fully-reshardable")
    assert args.dist_ckpt_optim_fully_reshardable is False


@pytest.mark.parametrize("router", ["switch", "avg-k"])
def test_blocks_are_chosen_in_fp32(read: Read, router: str) -> None:
    assert read(f"--sffn-router {router} --bf16").moe_router_dtype == "fp32"


@pytest.mark.parametrize(
    ("flags", "active"),
    [
        ("", 4 * 64),
        ("--swiglu", int(4 * 64 * 2 / 3 / 64) * 64),
        ("--ffn-hidden-size 96", 96),
        ("--swiglu --ffn-hidden-size 96", 96),
    ],
)
def test_active_cells_are_the_width_of_the_dense_ffn(read: Read, flags: str, active: int) -> None:
    args = read(flags)
    assert args.ffn_hidden_size == active
    assert args.moe_router_topk * 32 == active


def test_a_flag_wins_over_the_default_of_the_host(read: Read) -> None:
    assert read().transformer_impl == "local"
    assert read().distributed_backend == "gloo"
    args = read("--distributed-backend nccl")
    assert args.distributed_backend == "nccl"
    assert args.transformer_impl == "local"


@pytest.mark.parametrize(
    ("flags", "name", "gated"),
    [
        ("", "gelu", False),
        ("--sffn-relu", "relu", False),
        ("--squared-relu", "squared_relu", False),
        ("--swiglu", "silu", True),
        ("--quick-geglu", "quick_gelu", True),
    ],
)
def test_sparse_layers_have_the_activation_of_the_flag(
    read: Read, flags: str, name: str, gated: bool
) -> None:
    args = read(flags)
    config = transformer_config(args, sffn_config(args))
    assert (config.activation_func.__name__, config.gated_linear_unit) == (name, gated)


@pytest.mark.parametrize("flag", ["--sffn-relu", "--squared-relu"])
def test_only_gelu_is_fused_with_the_bias(read: Read, flag: str) -> None:
    for flags, fused in ((flag, False), ("", True), ("--no-bias-gelu-fusion", False)):
        args = read(flags)
        assert transformer_config(args, sffn_config(args)).bias_activation_fusion is fused


def plain(value: Any) -> Any:
    """A config's value for a golden file; None for a value without a stable text."""
    if isinstance(value, torch.dtype):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {"name": value.name, **dataclasses.asdict(value)}
    return value if isinstance(value, bool | int | float | str | list) else None


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("avg_k", ""),
        ("switch_ep2_bf16", "--sffn-router switch --expert-model-parallel-size 2 --bf16"),
        (
            "vanilla_m_swiglu",
            "--sffn-router vanilla-m --sffn-aggregator max --sffn-block-size 8 --sffn-expansion 4 "
            "--sffn-layers 1,3 --swiglu --disable-bias-linear --normalization RMSNorm",
        ),
    ],
)
def test_the_resolved_config_is_the_golden_one(
    read: Read, golden: Any, name: str, flags: str
) -> None:
    args = read(flags, 2)
    args.padded_vocab_size = 128
    sffn = sffn_config(args)
    assert sffn is not None
    config = transformer_config(args, sffn)
    # Fields that are set by no flag, by no host default and not by us have Megatron's default.
    default = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4)
    changed = {
        field.name: plain(getattr(config, field.name))
        for field in dataclasses.fields(TransformerConfig)
        if getattr(config, field.name) != getattr(default, field.name)
    }
    golden(
        f"config_{name}",
        {
            "sffn": {f.name: plain(getattr(sffn, f.name)) for f in dataclasses.fields(sffn)},
            "transformer": {key: value for key, value in changed.items() if value is not None},
            "parameters": dataclasses.asdict(count_parameters(ModelShape.of_args(args, sffn))),
        },
    )


# What is refused: flags, ranks, and words of the sentence (value and flag, remedy)

PP2 = "--pipeline-model-parallel-size 2"
DELTA_NET = "--hybrid-layer-pattern GE*- --swiglu"
REFUSED = [
    ("--sffn-block-size 48", 1, "--sffn-block-size 48", "--sffn-active-cells 256", "32 or 64"),
    ("--sffn-block-size 512", 1, "--sffn-block-size 512", "--sffn-active-cells 256", "does: 256"),
    ("--sffn-block-size 0", 1, "--sffn-block-size 0", "give a positive number"),
    ("--sffn-block-size -8", 1, "--sffn-block-size -8", "give a positive number"),
    ("--sffn-block-size eight", 1, "--sffn-block-size", "'eight'", "--help"),
    ("--sffn-expansion 0", 1, "--sffn-expansion 0", "give a positive number"),
    ("--sffn-expansion -2", 1, "--sffn-expansion -2", "give a positive number"),
    ("--sffn-active-cells 0", 1, "--sffn-active-cells 0", "give a positive number"),
    ("--sffn-active-cells -64", 1, "--sffn-active-cells -64", "give a positive number"),
    ("--ffn-hidden-size 0", 1, "--ffn-hidden-size 0", "give a positive number"),
    ("--hidden-size -64", 1, "--hidden-size -64", "give a positive number"),
    ("--num-layers 0", 1, "--num-layers 0", "give a positive number"),
    ("--num-attention-heads 0", 1, "--num-attention-heads 0", "give a positive number"),
    ("--expert-model-parallel-size 0", 1, "--expert-model-parallel-size 0", "positive"),
    ("--tensor-model-parallel-size 0", 1, "--tensor-model-parallel-size 0", "positive"),
    ("--sffn-router best", 1, "--sffn-router", "'best'", "avg-k", "--help"),
    ("--sffn-router best:first:1,avg-k", 1, "--sffn-router", "'best'", "avg-k", "--help"),
    ("--sffn-router dense:first:1,avg-k", 1, "has dense layers among its", "--sffn-layers"),
    ("--sffn-router rand-hash:5,avg-k", 1, "names sparse layer 5 of a model with 4", "others"),
    (
        "--sffn-router rand-hash:0,pkm --sffn-block-size 1 --moe-aux-loss-coeff 0.1",
        1,
        "has nothing to act on with --sffn-router rand-hash:0,pkm",
        "leave it out",
    ),
    ("--sffn-aggregator sum", 1, "--sffn-aggregator", "'sum'", "mean-abs", "--help"),
    ("--sffn-gate tanh", 1, "--sffn-gate", "'tanh'", "sigmoid", "--help"),
    ("--sffn-backend cuda", 1, "--sffn-backend", "'cuda'", "auto", "--help"),
    # Refused before the closed form of the traffic chooses the dispatcher.
    (
        "--distributed-backend nccl --expert-model-parallel-size 2 --moe-router-num-groups 0 "
        "--moe-router-group-topk 1",
        2,
        "--moe-router-num-groups 0",
        "128 blocks",
        "use a divisor",
    ),
    ("--sffn-layers-per-table 0", 1, "--sffn-layers-per-table 0", "leave it out"),
    ("--sffn-layers-per-table 3", 1, "the 4 sparse layers", "that does: 2 or 4"),
    (
        "--sffn-layers-per-table 2 --sffn-backend megatron --sffn-router switch",
        1,
        "--sffn-layers-per-table 2 is not available with --sffn-backend megatron",
        "use another --sffn-backend",
    ),
    (
        f"{PP2} --sffn-layers-per-table 2 --hybrid-layer-pattern *E*E",
        2,
        "--sffn-layers-per-table 2 gives layers 1, 3 one table",
        "(layers of each: 2, 2)",
    ),
    (
        f"{PP2} --sffn-layers-per-table 4",
        2,
        "--sffn-layers-per-table 4 gives layers 0, 1, 2, 3 one table",
        "(layers of each: 2, 2)",
        "change it",
    ),
    (
        f"{PP2} --sffn-layers-per-table 2 --account-for-loss-in-pipeline-split",
        2,
        "--sffn-layers-per-table 2 is not available with --account-for-loss-in-pipeline-split",
        "leave one out",
    ),
    ("--sffn-exchange-chunks 0", 2, "--sffn-exchange-chunks 0", "give 1"),
    ("--sffn-exchange-chunks 2", 1, "on one rank", "add --expert-model-parallel-size"),
    (
        "--expert-model-parallel-size 2 --sffn-exchange-chunks 99",
        2,
        "--sffn-exchange-chunks 99",
        "more than the 32 tokens",
        "give a smaller number",
    ),
    (
        "--expert-model-parallel-size 2 --sffn-exchange-chunks 2 "
        "--moe-token-dispatcher-type allgather",
        2,
        "--sffn-exchange-chunks 2",
        "with --moe-token-dispatcher-type allgather",
        "use --moe-token-dispatcher-type alltoall",
    ),
    (
        "--expert-model-parallel-size 2 --sffn-exchange-chunks 2 --sffn-backend megatron",
        2,
        "--sffn-exchange-chunks 2",
        "with --sffn-backend megatron",
        "another --sffn-backend",
    ),
    ("--sffn-rooter avg-k", 1, "--sffn-rooter avg-k", "did you mean --sffn-router?", "--help-all"),
    ("--hiden-size 32", 1, "--hiden-size 32", "did you mean --hidden-size?", "--help-all"),
    ("--sffn-layers 1,4", 1, "--sffn-layers 1,4", "layer 4", "indices from 0 to 3"),
    ("--sffn-layers=-1", 1, "--sffn-layers -1", "indices from 0 to 3"),
    ("--sffn-layers all", 1, "--sffn-layers all", "write for example every:6"),
    ("--sffn-layers every:0", 1, "--sffn-layers every:0", "last:N with N from 1 to 4"),
    ("--sffn-layers every:99", 1, "--sffn-layers every:99", "last:N with N from 1 to 4"),
    ("--sffn-layers every:two", 1, "--sffn-layers every:two", "write for example every:6"),
    ("--sffn-layers 1,,3", 1, "--sffn-layers 1,,3", "write for example every:6"),
    ("--sffn-layers 1,3,1", 1, "--sffn-layers 1,3,1", "name each layer once"),
    ("--expert-model-parallel-size 3", 3, "--expert-model-parallel-size 3", "128 blocks", "change"),
    ("--expert-model-parallel-size 2", 1, "--expert-model-parallel-size 2", "a multiple of 2"),
    (
        "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2",
        2,
        "--expert-model-parallel-size 2 times --pipeline-model-parallel-size 2",
        "start a multiple of 4",
    ),
    ("--tensor-model-parallel-size 2", 2, "--tensor-model-parallel-size 2", "--sequence-parallel"),
    (
        "--sffn-block-size 1 --expert-tensor-parallel-size 2",
        2,
        "--expert-tensor-parallel-size 2 does not divide --sffn-block-size 1",
        "use --expert-model-parallel-size",
    ),
    (
        "--expert-tensor-parallel-size 2 --expert-model-parallel-size 2",
        2,
        "--expert-model-parallel-size 2 times --expert-tensor-parallel-size 2",
        "start a multiple of 4",
    ),
    ("--expert-tensor-parallel-size 0", 1, "--expert-tensor-parallel-size 0", "positive"),
    (
        "--expert-tensor-parallel-size 2 --sffn-backend megatron",
        2,
        "--expert-tensor-parallel-size 2",
        "use another --sffn-backend",
    ),
    (
        "--sffn-backend megatron --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather",
        1,
        "--overlap-param-gather",
        "use another --sffn-backend",
    ),
    ("--moe-token-dispatcher-type flex", 1, "flex", "use alltoall or allgather"),
    (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
        2,
        "--tensor-model-parallel-size 2 times --pipeline-model-parallel-size 2",
        "start a multiple of 4",
    ),
    (
        "--tensor-model-parallel-size 8 --sequence-parallel",
        8,
        "--tensor-model-parallel-size 8 does not divide --num-attention-heads 4",
        "change one of them",
    ),
    (
        "--tensor-model-parallel-size 4 --sequence-parallel --group-query-attention "
        "--num-query-groups 2",
        4,
        "--tensor-model-parallel-size 4 does not divide --num-query-groups 2",
        "change one of them",
    ),
    (
        "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 31",
        2,
        "--tensor-model-parallel-size 2 does not divide --seq-length 31",
        "change one of them",
    ),
    (
        "--pipeline-model-parallel-size 3",
        3,
        "--pipeline-model-parallel-size 3 does not divide --num-layers 4",
        "--decoder-first-pipeline-num-layers",
    ),
    (
        "--global-batch-size 3",
        2,
        "--global-batch-size 3",
        "the 2 data-parallel replicas",
        "a multiple of 2",
    ),
    (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--global-batch-size 3",
        2,
        "the microbatches of a step, 3",
        "a multiple of --pipeline-model-parallel-size 2",
        "change --global-batch-size",
    ),
    ("--use-megatron-fsdp", 1, "--use-megatron-fsdp", "leave it out"),
    ("--num-experts 4", 1, "--num-experts 4", "leave it out"),
    ("--num-experts 4 --sffn-router dense", 1, "--num-experts 4", "--sffn-router dense", "use"),
    ("--moe-ffn-hidden-size 64", 1, "--moe-ffn-hidden-size 64", "leave it out"),
    # Flags that are passed with Megatron's default.
    ("--moe-router-topk 2", 1, "--moe-router-topk 2", "leave it out"),
    ("--moe-layer-freq 1", 1, "--moe-layer-freq 1", "leave it out"),
    ("--moe-router-pre-softmax", 1, "--moe-router-pre-softmax", "leave it out"),
    (
        "--sffn-router rand-hash --moe-aux-loss-coeff 0.1",
        1,
        "--moe-aux-loss-coeff 0.1 has nothing to act on with --sffn-router rand-hash",
        "use --sffn-router avg-k, vanilla-m",
    ),
    (
        "--sffn-router pkm --sffn-block-size 1 --moe-z-loss-coeff 0.1",
        1,
        "--moe-z-loss-coeff 0.1",
        "leave it out",
    ),
    (
        "--moe-input-jitter-eps 0.1",
        1,
        "--moe-input-jitter-eps 0.1",
        "use --sffn-router switch, sigma-moe",
    ),
    (
        "--sffn-router sigma-moe --moe-expert-capacity-factor 1.5",
        1,
        "--moe-expert-capacity-factor 1.5",
        "use --sffn-router switch",
    ),
    (
        "--sffn-router switch --moe-router-load-balancing-type sinkhorn",
        1,
        "--moe-router-load-balancing-type sinkhorn",
        "aux_loss, seq_aux_loss, global_aux_loss",
    ),
    (
        "--moe-router-load-balancing-type aux_loss aux_loss",
        1,
        "--moe-router-load-balancing-type aux_loss aux_loss",
        "at most once",
    ),
    (
        "--moe-router-load-balancing-type quantile_balancing aux_loss",
        1,
        "--moe-router-load-balancing-type quantile_balancing aux_loss",
        "use none or quantile_balancing, or each of",
    ),
    (
        "--moe-router-load-balancing-type quantile_balancing --moe-aux-loss-coeff 0.1",
        1,
        "--moe-aux-loss-coeff 0.1 is for a loss",
        "leave one of them out",
    ),
    (
        "--moe-router-load-balancing-type quantile_balancing --moe-router-enable-expert-bias",
        1,
        "quantile_balancing does not work together with --moe-router-enable-expert-bias",
    ),
    (
        "--sffn-router rand-hash --moe-router-load-balancing-type quantile_balancing",
        1,
        "--moe-router-load-balancing-type quantile_balancing",
        "use --sffn-router avg-k",
    ),
    (
        "--moe-latent-size 16 --sffn-router pkm --sffn-block-size 1",
        1,
        "--moe-latent-size 16 has nothing to act on with --sffn-router pkm",
        "use --sffn-router avg-k",
    ),
    ("--moe-latent-size 16 --sffn-router dense", 1, "--moe-latent-size 16", "leave it out"),
    ("--moe-latent-size 0", 1, "--moe-latent-size 0", "at least 1"),
    (
        "--moe-latent-size 16 --sffn-router switch --sffn-backend megatron",
        1,
        "--moe-latent-size 16 is not available with --sffn-backend megatron",
        "use another --sffn-backend",
    ),
    (
        "--moe-router-quantile-balancing-ema 0.5",
        1,
        "nothing to act on without --moe-router-load-balancing-type quantile_balancing",
    ),
    (
        "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.1",
        1,
        "--moe-aux-loss-coeff 0.1",
        "each of aux_loss, seq_aux_loss",
    ),
    ("--sffn-entropy-coeff -0.1", 1, "--sffn-entropy-coeff -0.1", "a finite number at least 0"),
    ("--sffn-entropy-coeff nan", 1, "--sffn-entropy-coeff nan", "is not a finite number"),
    ("--sffn-noise inf --sffn-router noisy-top-k", 1, "--sffn-noise inf", "a finite number"),
    ("--lr nan", 1, "--lr nan", "is not a finite number"),
    ("--moe-aux-loss-coeff 0.1 nan", 1, "--moe-aux-loss-coeff 0.1 nan", "not a finite number"),
    ("--moe-router-bias-update-rate nan", 1, "bias-update-rate nan", "not a finite number"),
    (
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate -1",
        1,
        "bias-update-rate -1.0",
        "of at least 0; give one",
    ),
    ("--moe-z-loss-coeff -1", 1, "--moe-z-loss-coeff -1.0", "of at least 0; give one"),
    (
        "--sffn-router switch --moe-input-jitter-eps -1",
        1,
        "--moe-input-jitter-eps -1.0",
        "of at least 0; give one",
    ),
    (
        "--sffn-router switch --moe-expert-capacity-factor 0",
        1,
        "--moe-expert-capacity-factor 0.0",
        "leave it out for no limit",
    ),
    (
        "--sffn-router softmax-after --sffn-block-size 256",
        1,
        "always 1 for one chosen block",
        "use --sffn-gate sigmoid or softmax",
    ),
    (  # one chosen block beside a shared one
        "--sffn-router softmax-after --sffn-block-size 128 --sffn-shared-blocks 1",
        1,
        "always 1 for one chosen block",
        "use --sffn-gate sigmoid or softmax",
    ),
    ("--sffn-gate softmax-chosen --sffn-block-size 256", 1, "has no effect", "leave it out"),
    (
        "--sffn-router pkm --sffn-block-size 1 --ffn-hidden-size 4 --sffn-pkm-heads 4",
        1,
        "the softmax over one score is always 1",
        "use fewer heads",
    ),
    ("--sffn-block-dropout 1.5", 1, "--sffn-block-dropout 1.5", "from 0.0 to 1.0"),
    ("--sffn-descriptor-decay 2", 1, "--sffn-descriptor-decay 2.0", "from 0.0 to 1.0"),
    ("--sffn-descriptor-cells 0", 1, "--sffn-descriptor-cells 0", "a number at least 1"),
    ("--sffn-descriptor-cells 4", 1, "--sffn-descriptor-cells 4", "--sffn-descriptor subset"),
    (
        "--sffn-descriptor subset --sffn-descriptor-cells 33",
        1,
        "--sffn-descriptor-cells 33",
        "at most the 32 cells of --sffn-block-size",
    ),
    (
        "--sffn-descriptor learned",
        1,
        "no gradient reaches the weights of --sffn-router avg-k",
        "use --sffn-gate sigmoid or softmax, or a balance loss",
    ),
    ("--sffn-shared-blocks 8", 1, "--sffn-shared-blocks 8", "from 0 to 7", "8 active blocks"),
    ("--sffn-shared-blocks -1", 1, "--sffn-shared-blocks -1", "from 0 to 7"),
    ("--sffn-router top-k-act", 1, "--sffn-block-size 32", "use --sffn-block-size 1"),
    ("--sffn-router pkm", 1, "--sffn-block-size 32", "use --sffn-block-size 1"),
    (
        "--sffn-router pkm --sffn-block-size 1 --sffn-expansion 5",
        1,
        "a square number of cells, not 1280",
        "the nearest --sffn-expansion that gives one: 4 or 9",
    ),
    (
        "--sffn-router pkm --sffn-block-size 1 --sffn-pkm-heads 3",
        1,
        "--sffn-pkm-heads 3 does not divide the 256 active cells",
    ),
    (
        "--sffn-router pkm --sffn-block-size 1 --sffn-product-key-size 7",
        1,
        "--sffn-product-key-size 7",
        "use 6 or 8",
    ),
    (
        "--sffn-router pkm-ffn --sffn-block-size 1 --sffn-expansion 256 --swiglu "
        "--ffn-hidden-size 256",
        1,
        "--swiglu and --quick-geglu need two keys per cell",
        "use GELU",
    ),
    (
        "--sffn-router lorkm --sffn-backend megatron",
        1,
        "--sffn-router lorkm has keys of its own",
        "use another --sffn-backend",
    ),
    (
        "--sffn-router switch --moe-aux-loss-coeff 0.1 0.2",
        1,
        "--moe-aux-loss-coeff 0.1 0.2",
        "leave it out for 0.01",
    ),
    (
        "--sffn-router switch --moe-aux-loss-coeff -1",
        1,
        "--moe-aux-loss-coeff -1.0",
        "leave it out",
    ),
    (
        "--sffn-router rand-hash --moe-router-enable-expert-bias",
        1,
        "--moe-router-enable-expert-bias",
        "use --sffn-router avg-k",
    ),
    (
        "--moe-shared-expert-intermediate-size 64",
        1,
        "--moe-shared-expert-intermediate-size 64",
        "leave it out",
    ),
    ("--glu-linear-offset 1", 1, "--glu-linear-offset 1.0", "without --swiglu or --quick-geglu"),
    (
        "--activation-func-clamp-value 7 --sffn-router dense",
        1,
        "--activation-func-clamp-value 7.0 has nothing to act on without --swiglu",
    ),
    ("--swiglu --activation-func-clamp-value -7", 1, "-7.0 must be greater than 0", "leave it out"),
    *(
        (f"--sffn-router switch --sffn-lr-mult {text}", 1, f"--sffn-lr-mult {text}", rule, "give")
        for text, rule in (
            ("value:2", "has 'value:2', which is not one of keys, values, gates and a factor"),
            ("values", "has 'values', which is not one of"),
            ("values:2,", "has '', which is not one of"),
            ("values:2,values:3", "names values twice"),
            ("keys:x", "has 'x' for keys, which is not a number"),
            ("keys:nan", "has nan for keys, which is not a finite number of at least 0"),
        )
    ),
    (
        "--sffn-router pkm --sffn-block-size 1 --sffn-wd-mult keys:0",
        1,
        "--sffn-wd-mult keys:0 names keys, and --sffn-router pkm has none",
        "leave keys out",
    ),
    ("--sffn-router dense --sffn-lr-mult values:2", 1, "values:2 has nothing to act on", "dense"),
    ("--sffn-wd-mult values:0 --weight-decay 0", 1, "--weight-decay is 0", "leave it out"),
    ("--swiglu --sffn-relu", 1, "--swiglu and --sffn-relu", "leave one"),
    ("--sffn-aggregator max", 1, "--sffn-aggregator max", "--sffn-router avg-k", "leave it out"),
    ("--sffn-hash-shared", 1, "--sffn-hash-shared", "--sffn-router avg-k", "leave it out"),
    (
        "--sffn-router dense --sffn-active-cells 32",
        1,
        "--sffn-active-cells 32",
        "set --ffn-hidden-size 32",
    ),
    ("--multiple-validation-sets", 1, "--multiple-validation-sets needs --full-validation"),
    ("--validation-set-names a b", 1, "--validation-set-names a b", "leave it out"),
    ("--full-validation --sffn-validation-data next", 1, "--sffn-validation-data", "leave one out"),
    ("--full-validation --mock-data", 1, "--full-validation", "--eval-iters"),
    ("--eval-iters -1", 1, "--eval-iters -1", "at least 0"),
    # Megatron's own rules, with and without a message.
    ("--seq-length 64", 1, "max_position_embeddings (32)", "seq_length (64)", "change them"),
    ("--bf16 --fp16", 1, "--bf16", "change them"),
    ("--save x", 1, "--save x needs --save-interval N", "--save-interval 1000"),
    ("--rl-profile", 1, "--rl-profile is for reinforcement learning", "leave it out"),
    ("--mup-width-mult 2 --use-mup", 1, "--mup-width-mult 2.0 has no effect on a GPT"),
    ("--fp16-lm-cross-entropy --fp16", 1, "--fp16-lm-cross-entropy has no effect on a GPT"),
    ("--openai-gelu", 1, "--openai-gelu has no effect on a GPT", "leave it out"),
    (
        "--muon-momentum 0.5",
        1,
        "--muon-momentum 0.5 has nothing to act on without --optimizer muon",
    ),
    ("--num-query-groups 2", 1, "--num-query-groups 2", "without --group-query-attention"),
    ("--sffn-router switch --moe-token-drop-policy position", 1, "--moe-expert-capacity-factor"),
    (
        "--sffn-router switch --moe-router-bias-update-rate 0.1",
        1,
        "--moe-router-enable-expert-bias",
    ),
    ("--recompute-num-layers 1", 1, "without --recompute-granularity full"),
    ("--finetune", 1, "--finetune has nothing to act on without --load"),
    ("--img-h 32", 1, "--img-h 32 is for vision models", "leave it out"),
    ("--train-iters 0", 1, "--train-iters 0 must be at least 1", "--skip-train"),
    ("--log-interval 0", 1, "--log-interval 0 must be at least 1"),
    ("--step-batch-size-schedule 0:8 --train-iters 9", 1, "--train-samples", "instead of"),
    ("--lr-warmup-iters 10 --train-iters 10", 1, "--lr-warmup-iters 10", "--train-iters 10"),
    ("--lr-warmup-samples 9 --train-samples 20 --lr-decay-samples 8", 1, "--lr-decay-samples 8"),
    ("--lr-warmup-fraction 1", 1, "--lr-warmup-fraction 1.0", "less than 1"),
    ("--use-checkpoint-args", 1, "--use-checkpoint-args is not available", "leave it out"),
    ("--no-initialization", 1, "--no-initialization", "add --load DIR"),
    ("--optimizer soap", 1, "--optimizer soap", "tables of blocks", "muon or adam"),
    ("--optimizer adaptive_muon", 1, "--optimizer adaptive_muon", "--optimizer muon"),
    ("--optimizer muon --fp16", 1, "--optimizer muon", "--fp16", "--bf16"),
    ("--optimizer muon --use-distributed-optimizer", 1, "whole weights", "--bf16"),
    ("--optimizer dist_muon", 1, "--optimizer dist_muon", "--bf16"),
    (
        "--optimizer muon --bf16 --use-distributed-optimizer --overlap-param-gather",
        1,
        "--overlap-param-gather",
        "gloo cannot",
    ),
    ("--optimizer muon --muon-momentum 1", 1, "--muon-momentum 1.0 must be", "less than 1"),
    ("--optimizer muon --muon-num-ns-steps 0", 1, "--muon-num-ns-steps 0", "at least 1"),
    ("--optimizer muon --muon-fp32-matmul-prec low", 1, "--muon-fp32-matmul-prec low", "high"),
    ("--optimizer muon --muon-coefficient-type x", 1, "--muon-coefficient-type x", "quintic"),
    ("--optimizer sgd --use-distributed-optimizer", 1, "--optimizer sgd", "leave one out"),
    ("--apply-layernorm-1p", 1, "--apply-layernorm-1p needs Transformer Engine", "leave it out"),
    (
        "--multi-latent-attention --qk-layernorm",
        1,
        "--qk-layernorm normalises the latents of queries",
        "add --q-lora-rank",
    ),
    (
        "--multi-latent-attention --qk-pos-emb-head-dim 5",
        1,
        "--qk-pos-emb-head-dim 5 is odd",
        "give an even number",
    ),
    (
        "--multi-latent-attention --q-lora-rank 5 --sequence-parallel "
        "--tensor-model-parallel-size 2",
        2,
        "--tensor-model-parallel-size 2 does not divide --q-lora-rank 5",
    ),
    (
        "--multi-latent-attention --kv-lora-rank 5 --qk-pos-emb-head-dim 4 --sequence-parallel "
        "--tensor-model-parallel-size 2",
        2,
        "2 does not divide --kv-lora-rank plus --qk-pos-emb-head-dim 4, 9",
    ),
    (
        "--multi-latent-attention --group-query-attention --num-query-groups 2",
        1,
        "Group query attention is mutually exclusive with multi latent attention",
    ),
    (
        "--recompute-granularity selective --recompute-modules layernorm",
        1,
        "--recompute-modules layernorm needs Transformer Engine",
    ),
    ("--init-method-xavier-uniform", 1, "--init-method-xavier-uniform", "--init-method-std"),
    ("--attention-backend local", 1, "--attention-backend local", "--transformer-impl local"),
    ("--rerun-mode report_stats", 1, "--rerun-mode report_stats", "validate_results"),
    ("--fp32-residual-connection --bf16", 1, "needs the package megatron-core[te]"),
    ("--log-straggler", 1, "--log-straggler needs the package nvidia-ml-py"),
    ("--kv-channels 1 --position-embedding-type rope", 1, "--kv-channels 1 leaves 1 channels"),
    ("--rotary-percent 1.5", 1, "--rotary-percent 1.5", "at most 1"),
    ("--adam-beta1 1.5", 1, "--adam-beta1 1.5 must be at least 0 and less than 1"),
    ("--pretrained-checkpoint nowhere", 1, "--pretrained-checkpoint nowhere is not there"),
    ("--non-persistent-save-interval 1", 1, "without --non-persistent-ckpt-type"),
    ("--sffn-descriptor-decay 0.5", 1, "--sffn-descriptor-decay 0.5", "use ema"),
    (
        "--sffn-router switch --sffn-gate-activation gelu",
        1,
        "--sffn-gate-activation gelu",
        "use --sffn-gate-network mlp",
    ),
    (
        "--sffn-router switch --sffn-gate-hidden-size 8",
        1,
        "--sffn-gate-hidden-size 8",
        "use --sffn-gate-network mlp",
    ),
    ("--cuda-graph-modules all", 1, "--cuda-graph-modules all", "attn, mlp, moe"),
    ("--lr 1e-3 --lr-warmup-init 0.25", 1, "--lr-warmup-init 0.25 must be at most --lr 0.001"),
    ("--profile", 1, "--profile asks for NVIDIA's profiler", "--use-pytorch-profiler"),
    ("--moe-router-dtype fp64", 1, "sparse layers score in fp32"),
    ("--loss-scale 8", 1, "--loss-scale 8.0 has nothing to act on without --fp16"),
    ("--lazy-mpu-init", 1, "--lazy-mpu-init is not available"),
    ("--gpu-sniff-test-interval 1", 1, "--gpu-sniff-test-interval 1 needs a GPU"),
    ("--yaml-cfg nowhere", 1, "--yaml-cfg is not available", "give the flags"),
    ("--te-precision-config-file nowhere", 1, "--te-precision-config-file nowhere is no file"),
    ("--disable-pad-vocab-size", 1, "--make-vocab-size-divisible-by 1"),
    ("--pipeline-model-parallel-comm-backend nccl", 1, "needs GPUs"),
    (
        f"--mtp-num-layers 1 {PP2}",
        2,
        "--mtp-num-layers 1 with --pipeline-model-parallel-size 2 needs an output layer of its own",
        "add --untie-embeddings-and-output-weights",
    ),
    (
        "--mtp-num-layers 1 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 2",
        1,
        "--recompute-num-layers 2 is not available with --mtp-num-layers",
        "use 1",
    ),
    ("--num-attention-heads 5", 1, "--hidden-size % --num-attention-heads == 0", "change them"),
    ("--hybrid-layer-pattern *-*-", 1, "has no sparse layer (E)", "router is avg-k", "dense"),
    ("--sffn-router dense --hybrid-layer-pattern *-*E", 1, "has a sparse layer (E)", "is dense"),
    ("--sffn-router dense --hybrid-layer-pattern *-*-/*E", 1, "has a sparse layer (E)", "dense"),
    ("--hybrid-layer-pattern *-*-/*E", 1, "has no sparse layer (E)", "write an E for each"),
    ("--hybrid-layer-pattern *E*", 1, "--num-layers 4 differs from the 3 layers of", "leave it"),
    ("--hybrid-layer-pattern *-*x", 1, "none of Megatron's patterns", "'x'", "*E*E"),
    ("--hybrid-layer-pattern *-DE", 1, "has D, sparse attention", "the layers *, +, M, G, - and E"),
    ("--hybrid-layer-pattern GE*-", 1, "has G, a gated delta net, which computes with", "--swiglu"),
    (f"{DELTA_NET} --linear-num-value-heads 24", 1, "is not a multiple of --linear-num-key-heads"),
    (
        f"{DELTA_NET} --linear-num-key-heads 1 --tensor-model-parallel-size 2",
        2,
        "--linear-num-key-heads 1 cannot be shared",
    ),
    (f"{DELTA_NET} --reset-attention-mask", 1, "has G, whose state passes over", "leave one out"),
    (f"{DELTA_NET} --optimizer muon", 1, "--optimizer muon is not available with the G of", "adam"),
    (f"{DELTA_NET} --mamba-state-dim 8", 1, "without M in --hybrid-layer-pattern", "add that"),
    ("--linear-key-head-dim 8", 1, "nothing to act on without G in --hybrid-layer-pattern"),
    ("--hybrid-layer-pattern *-*E --multi-latent-attention", 1, "has * attention", "write +"),
    ("--hybrid-layer-pattern *-+E", 1, "has * attention", "write + in place of *"),
    ("--hybrid-layer-pattern *-*E/*E/*-", 1, "All MTP patterns must be identical", "*E*E"),
    (
        "--hybrid-layer-pattern *-*E/*E --mtp-num-layers 2",
        1,
        "--mtp-num-layers 2 differs from the 1 predictions (/)",
        "leave it out",
    ),
    (
        "--sffn-model hybrid --mtp-num-layers 1 --sffn-router rand-hash",
        1,
        "--sffn-router rand-hash reads the input ids, which a hybrid model does not pass",
        "use --sffn-model gpt",
    ),
    ("--hybrid-layer-pattern *-*E --sffn-layers every:2", 1, "is said by the E of", "leave it"),
    ("--hybrid-layer-pattern *-|*E", 1, "has 2 stages, no multiple of", "leave out |"),
    (
        f"--hybrid-layer-pattern *-|*|E {PP2}",
        2,
        "has 3 stages, no multiple of --pipeline-model-parallel-size 2",
        "into a multiple",
    ),
    (
        f"--hybrid-layer-pattern *-E --num-layers 3 {PP2}",
        2,
        "has 3 layers, which --pipeline-model-parallel-size 2 does not divide",
        "cut it where",
    ),
    (
        f"--hybrid-layer-pattern *|-|*|E {PP2} --global-batch-size 1",
        2,
        "the interleaved schedule needs the microbatches of a step, 1",
        "change --global-batch-size",
    ),
    ("--sffn-model hybrid --use-rope-scaling", 1, "--use-rope-scaling", "--sffn-model gpt"),
    (
        f"{PP2} --num-virtual-stages-per-pipeline-rank 3",
        2,
        "--num-virtual-stages-per-pipeline-rank 3 does not divide the 2 layers of a pipeline stage",
        "change it",
    ),
    ("--recompute-granularity full", 1, "recompute_method must be", "change them"),
]


@pytest.mark.parametrize(
    ("flags", "ranks", "words"),
    [pytest.param(flags, ranks, words, id=flags) for flags, ranks, *words in REFUSED],
)
def test_a_bad_command_line_is_refused_in_one_sentence(
    read: Read, tmp_path: Path, flags: str, ranks: int, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(flags, ranks)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence
    assert list(tmp_path.iterdir()) == []
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("module", "name", "flags", "sentence"),
    [
        ("mamba_mixer", "HAVE_EINOPS", "ME*-", "has M, which needs einops, .*; pip install einops"),
        ("mamba_mixer", "HAVE_MAMBA_SSM", "ME*-", "has M, which needs (einops and )?mamba-ssm,"),
        (
            "gated_delta_net.common",
            "HAVE_FLA",
            "GE*- --swiglu",
            "has G, which needs flash-linear-attention, and Python cannot import that here; pip",
        ),
    ],
)
def test_recurrent_layers_are_refused_without_their_packages(
    read: Read, monkeypatch: pytest.MonkeyPatch, module: str, name: str, flags: str, sentence: str
) -> None:
    monkeypatch.setattr(f"megatron.core.ssm.{module}.{name}", False)
    with pytest.raises(ConfigError, match=sentence):
        read(f"--hybrid-layer-pattern {flags}", 1)


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--context-parallel-size 2", "use --context-parallel-size 1"),
        ("--transformer-impl transformer_engine", "use --transformer-impl local"),
    ],
)
def test_flags_of_transformer_engine_are_refused_without_it(
    read: Read, monkeypatch: pytest.MonkeyPatch, flag: str, remedy: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{flag} needs Transformer Engine.* {remedy}"):
        read(flag, 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--optimizer muon", None),
        ("--sffn-block-size 1", None),
        ("--optimizer muon --sffn-block-size 1", "normalised momentum"),
        (
            "--optimizer muon --sffn-router pkm --sffn-block-size 1 --sffn-expansion 8 "
            "--sffn-active-cells 32 --muon-scalar-optimizer lion",
            "leaves the values of pkm to lion",
        ),
    ],
)
def test_a_run_says_which_tables_muon_does_not_take_as_matrices(
    read: Read, flags: str, words: str | None
) -> None:
    args = read(flags)
    remark = optimizers.remark(args, sffn_config(args))
    assert remark is None if words is None else words in remark


@pytest.mark.parametrize("flags", ["", "--sffn-router dense"])
def test_muon_is_refused_without_its_package(
    read: Read, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--optimizer muon needs .* \"megatron-sffn\[muon\]\""):
        read(f"--optimizer muon {flags}")


@pytest.mark.parametrize("missing", ["--num-layers", "--hidden-size", "--num-attention-heads"])
def test_a_missing_size_is_refused(read: Read, missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"{missing} is missing; .* for example {missing} 8"):
        read(command=re.sub(rf"{missing} \d+", "", COMMAND))


def test_every_flag_of_megatrons_moe_has_a_class_or_is_refused(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A flag that a later Megatron adds is refused until the package knows what it should do.
    from megatron.training import arguments

    def with_new_flag(parser: Any) -> Any:
        parser = original(parser)
        parser.add_argument("--moe-from-the-future", type=int, default=3)
        return parser

    original = arguments.add_megatron_arguments
    monkeypatch.setattr(arguments, "add_megatron_arguments", with_new_flag)
    assert read().moe_from_the_future == 3
    with pytest.raises(ConfigError, match=r"--moe-from-the-future 3 is not available .* leave"):
        read("--moe-from-the-future 3")


@pytest.mark.parametrize(
    "flags",
    [
        "--cuda-graph-impl local",
        "--cuda-graph-impl transformer_engine",
        "--enable-cuda-graph",
        "--external-cuda-graph",
        "--delay-wgrad-compute",
        "--fine-grained-activation-offloading",
    ],
)
def test_a_flag_that_sparse_layers_cannot_serve_is_refused_by_name(read: Read, flags: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{flags} is not available with --sffn-router avg-k: "):
        read(flags)


def test_a_flag_that_switches_a_feature_off_is_accepted(read: Read) -> None:
    assert read("--cuda-graph-impl none").cuda_graph_impl == "none"


@pytest.mark.parametrize(
    ("flags", "expected"), [("", None), ("--tensor-model-parallel-size 2 --sequence-parallel", "1")]
)
def test_tensor_parallelism_sets_the_number_of_cuda_connections(
    read: Read, monkeypatch: pytest.MonkeyPatch, flags: str, expected: str | None
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    read(flags, ranks=2)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


# The same through the real process

PROCESSES = {
    # The text that names value and rule, and the remedy; then the command.
    "flags": (
        "--sffn-block-size 48 does not divide --sffn-active-cells 256",
        "the nearest that does: 32 or 64",
        f"{MODEL} --sffn-block-size 48",
    ),
    "megatron": (
        "max_position_embeddings (32) must be greater than or equal to seq_length (64)",
        "change them",
        f"{COMMAND} --seq-length 64",
    ),
    "data": (
        "data set nowhere.idx does not exist",
        "give the path of PREFIX.bin",
        f"{COMMAND} --train-iters 1 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 64 "
        "--data-path nowhere --save runs --save-interval 1 --tensorboard-dir events",
    ),
    "two ranks": (
        "--expert-model-parallel-size 3 does not divide the 128 blocks",
        "change one of them so that it does",
        f"{COMMAND} --expert-model-parallel-size 3",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """A command that runs in a folder of its own."""

    process: subprocess.Popen[str]
    folder: Path


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    """Start all commands at the same time."""
    launch = "torch.distributed.run --standalone --nproc-per-node 2 -m"
    world = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    running = {}
    for name, (*_, flags) in PROCESSES.items():
        # On a machine with CUDA the local implementation is not the default.
        command = f"megatron_sffn.pretrain {flags} --transformer-impl local"
        if name == "two ranks":
            command = f"{launch} {command}"
        folder = tmp_path_factory.mktemp("process")
        process = subprocess.Popen(
            [sys.executable, "-m", *command.split()],
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key not in world},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        running[name] = Started(process=process, folder=folder)
    yield running
    for command_run in running.values():
        command_run.process.terminate()  # torchrun passes it on to its ranks
        command_run.process.communicate(timeout=HANGS)


@pytest.mark.parametrize("name", [name for name in PROCESSES if name != "two ranks"])
def test_a_refused_command_prints_one_line_and_writes_nothing(
    started: dict[str, Started], name: str
) -> None:
    run, (rule, remedy, _) = started[name], PROCESSES[name]
    _, stderr = run.process.communicate(timeout=HANGS)
    assert run.process.returncode == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    assert rule in stderr
    assert remedy in stderr
    assert list(run.folder.iterdir()) == []


def test_torchrun_ends_its_report_with_the_error_sentence(started: dict[str, Started]) -> None:
    run, (rule, remedy, _) = started["two ranks"], PROCESSES["two ranks"]
    _, stderr = run.process.communicate(timeout=HANGS)
    assert run.process.returncode != 0
    last, border = stderr.splitlines()[-2:]
    assert last.startswith("  traceback : error: --"), stderr
    assert rule in last
    assert remedy in last
    assert set(border) == {"="}
    assert re.search(r"exitcode  : 2 .*\n.*\n  traceback : error: --", stderr), stderr
    # The rank prints it before the report, and torchrun at the end of the report.
    assert stderr.count(rule) == 2
    assert "To enable traceback" not in stderr
    assert list(run.folder.iterdir()) == []


def complain() -> None:
    raise ConfigError("--x 1 is wrong;\ngive 2")


@pytest.mark.parametrize(("rank", "waits"), [(None, []), ("0", []), ("1", [30.0]), ("7", [30.0])])
def test_only_the_first_rank_of_a_node_prints_the_error_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str | None,
    waits: list[float],
) -> None:
    # torchrun stops waiting ranks; a rank that alone saw the error prints it after the wait.
    waited: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "8")  # on the second node; each node has a torchrun of its own
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is None:
        monkeypatch.delenv("RANK")
    else:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as stop:
        errors.run_command(complain)
    assert stop.value.code == 2
    assert waited == waits
    assert capsys.readouterr().err == "error: --x 1 is wrong; give 2\n"


@pytest.mark.parametrize(("answer", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_without_error_keeps_its_exit_code(answer: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as stop:
        errors.run_command(lambda: answer)
    assert stop.value.code == code
