"""Checks of a checkpoint before a run resumes: damage, another model, another optimizer state."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sffn.checkpoints.files import (
    COMMON_STATE,
    args_in,
    folder_to_load,
    iterations,
    read_common,
    read_metadata,
    read_whole,
)
from megatron_sffn.checks.resume import check_checkpoint
from megatron_sffn.flags.sffn_flags import sffn_config
from megatron_sffn.patches import cpu
from megatron_sffn.train.arguments import parse
from megatron_sffn.utils.errors import ConfigError
from tests.support.pretraining import MODEL

# Python 3.13 warns about Megatron's own flags.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")


FLAGS = "--train-iters 4 --save-interval 2 --split 90,10,0 --vocab-size 250"
ROUTERS = {"avg-k": "", "switch": "--sffn-router switch --swiglu"}
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
ETP2 = "--expert-tensor-parallel-size 2"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Router -> folder of a run, filled by `load`."""
    return {}


@pytest.fixture
def load(pretrain, originals, tmp_path: Path, tmp_path_factory) -> Callable[..., Path]:
    """`load(router, **changes)`: a copy of a run's folder, with other arguments in iteration 4."""

    def copy(router: str = "avg-k", **changes: Any) -> Path:
        if router not in originals:
            folder = tmp_path_factory.mktemp(router)
            pretrain(2, f"{FLAGS} {EP2} {ROUTERS[router]} --save {folder}")
            originals[router] = folder
        folder = tmp_path / "copy"
        shutil.copytree(originals[router], folder)
        if changes:
            change_args(folder / "iter_0000004", **changes)
        return folder

    return copy


def change_args(folder: Path, **changes: Any) -> None:
    """Save other arguments, in the file that Megatron prefers to the object among the shards."""
    common = read_common(folder)
    args = {**vars(common["args"]), **changes}
    common["args"] = Namespace(**{name: value for name, value in args.items() if value is not ...})
    torch.save(common, folder / "common.pt")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`check(load, flags, ranks)` checks the checkpoint for a run with these flags."""

    def run(load: Path | None, flags: str = "", ranks: int = 2, *, model: str = "") -> None:
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "RANK": "0", "WORLD_SIZE": str(ranks)}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        command = f"{MODEL} {FLAGS} {model} {flags}".split()
        command += [] if load is None else ["--load", str(load)]
        monkeypatch.setattr(sys, "argv", ["pretrain", *command])
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron warns about flags that it switches
            args = parse(dict(cpu.HOST_FLAGS.values()))
        check_checkpoint(args, sffn_config(args))

    return run


def refused(*phrases: str) -> Any:
    """`pytest.raises` for one sentence that holds these phrases in this order."""
    return pytest.raises(ConfigError, match="(?s)" + ".*".join(map(re.escape, phrases)))


# Which iteration


def test_a_run_without_checkpoints_starts_from_scratch(check, tmp_path: Path) -> None:
    check(None)
    check(tmp_path / "absent")
    (tmp_path / "iter_0000001").mkdir()  # a save that was killed before the first one ended
    check(tmp_path)
    assert folder_to_load(tmp_path, None) is None


def test_the_tracker_names_the_iteration_unless_a_flag_does(load) -> None:
    folder = load()
    assert iterations(folder) == [2, 4]
    assert folder_to_load(folder, None) == folder / "iter_0000004"
    assert folder_to_load(folder, 2) == folder / "iter_0000002"


@pytest.mark.parametrize("step", [3, 0])
def test_a_missing_iteration_is_refused(check, load, step: int) -> None:
    with refused(f"--ckpt-step {step} is not there", "2, 4); use one of these"):
        check(load(), f"--ckpt-step {step}")


def test_an_iteration_without_a_checkpoint_is_refused(check, tmp_path: Path) -> None:
    with refused("--ckpt-step 3 has nothing to act on without --load"):
        check(None, "--ckpt-step 3")
    with refused("--ckpt-step 3 is not there", "none); check --load"):
        check(tmp_path, "--ckpt-step 3")


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("7", ("names iter_0000007, which is not there", "2, 4", "use --ckpt-step 4")),
        ("release", ("names release, which is not there", "use --ckpt-step 4")),
        ("", ("says '', which is not the number of an iteration", "2, 4", "write the one")),
        ("-1", ("says '-1'",)),
        ("4\n5", ("says '4\\n5'",)),
        ("\0\xff", ("which is not the number",)),
    ],
)
def test_a_tracker_without_a_valid_iteration_is_refused(
    check, load, text: str, phrases: tuple[str, ...]
) -> None:
    folder = load()
    (folder / "latest_checkpointed_iteration.txt").write_bytes(text.encode("latin1"))
    with refused(*phrases):
        check(folder)


def test_a_release_is_loaded_and_a_flag_for_another_iteration_is_refused(check, load) -> None:
    folder = load(use_distributed_optimizer=True)  # its optimizer's state is not loaded
    (folder / "iter_0000004").rename(folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    check(folder)
    with refused("--ckpt-step 2 would be ignored", "says release"):
        check(folder, "--ckpt-step 2")


# Damage


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def garble_common(folder: Path) -> None:
    stored = read_metadata(folder).storage_data.items()
    item = next(item for key, item in stored if key.fqn == COMMON_STATE)
    with open(folder / item.relative_path, "r+b") as file:
        file.seek(item.offset)
        file.write(bytes(item.length))


DAMAGE = {
    "missing shard": (remove("__1_0.distcp"), "__1_0.distcp is missing"),
    "cut shard": (cut("__0_0.distcp"), "__0_0.distcp is truncated, it has "),
    "missing metadata": (remove(".metadata"), ".metadata is missing"),
    "cut metadata": (cut(".metadata"), ".metadata cannot be read"),
    "foreign metadata": (
        lambda folder: (folder / ".metadata").write_bytes(b"N."),
        ".metadata cannot be read",
    ),
    "save not ended": (remove("metadata.json"), "metadata.json is missing"),
    "cut json": (cut("metadata.json"), "metadata.json cannot be read"),
    "other backend": (
        lambda folder: (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "metadata.json does not say torch_dist",
    ),
    "garbled common state": (garble_common, ".distcp has no common state that can be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_with_the_last_whole_iteration(check, load, name: str) -> None:
    folder, (damage, sentence) = load(), DAMAGE[name]
    check(folder)
    damage(folder / "iter_0000004")
    with refused(f"{folder}/iter_0000004 is damaged", sentence, "use --ckpt-step 2, the last"):
        check(folder)
    check(folder, "--ckpt-step 2")
    damage(folder / "iter_0000002")
    with refused(sentence, "no other iteration there is whole: use another --load"):
        check(folder)


def test_files_are_not_read_beyond_their_size(load) -> None:
    folder = load() / "iter_0000004"
    stored = read_metadata(folder).storage_data.items()
    for key, item in stored:
        if key.fqn != COMMON_STATE:
            with open(folder / item.relative_path, "r+b") as file:
                file.seek(item.offset)
                file.write(bytes(item.length))
    read_whole(folder)


def test_other_formats_are_left_to_megatron(check, load) -> None:
    folder = load()
    (folder / "iter_0000004" / "metadata.json").unlink()
    check(folder, "--auto-detect-ckpt-format")
    (folder / "iter_0000004" / "mp_rank_00").mkdir()
    check(folder)


# Another model


@pytest.mark.parametrize(
    ("flags", "run_flag", "saved_flag"),
    [
        ("--num-layers 4", "--num-layers 4", "--num-layers 2"),
        ("--hidden-size 64 --sffn-active-cells 128", "--hidden-size 64", "--hidden-size 32"),
        ("--num-attention-heads 4", "--num-attention-heads 4", "--num-attention-heads 2"),
        (
            "--group-query-attention --num-query-groups 1",
            "--num-query-groups 1",
            "--num-query-groups 2",
        ),
        ("--kv-channels 8", "--kv-channels 8", "--kv-channels 16"),
        ("--normalization RMSNorm", "--normalization RMSNorm", "--normalization LayerNorm"),
        (
            "--position-embedding-type learned_absolute",
            "--position-embedding-type learned_absolute",
            "--position-embedding-type rope",
        ),
        (
            "--untie-embeddings-and-output-weights",
            "--untie-embeddings-and-output-weights",
            "no --untie-embeddings-and-output-weights",
        ),
        ("--add-qkv-bias", "--add-qkv-bias", "no --add-qkv-bias"),
        ("--qk-layernorm", "--qk-layernorm", "no --qk-layernorm"),
        ("--swiglu --sffn-active-cells 128", "--swiglu", "GELU"),
        ("--sffn-relu", "--sffn-relu", "GELU"),
        ("--sffn-router switch", "--sffn-router switch", "--sffn-router avg-k"),
        ("--sffn-router dense", "--sffn-router dense", "--sffn-router avg-k"),
        (
            "--sffn-active-cells 64 --sffn-expansion 8",
            "--sffn-active-cells 64",
            "--sffn-active-cells 128",
        ),
        ("--sffn-expansion 8", "--sffn-expansion 8", "--sffn-expansion 4"),
        ("--sffn-layers 1", "--sffn-layers 1", "--sffn-layers every:1"),
        (
            "--sffn-model hybrid --sffn-layers 1",
            "--hybrid-layer-pattern *-*E",
            "--sffn-model gpt --num-layers 2 --sffn-layers every:1",
        ),
        ("--sffn-gate softmax", "--sffn-gate softmax", "--sffn-gate none"),
        ("--sffn-backend megatron", "--sffn-backend megatron", "--sffn-backend auto"),
        ("--norm-epsilon 0.1", "--norm-epsilon 0.1", "--norm-epsilon 1e-05"),
        ("--softmax-type off-by-one", "--softmax-type off-by-one", "--softmax-type vanilla"),
        ("--qk-l2-norm", "--qk-l2-norm", "no --qk-l2-norm"),
        ("--attention-output-gate", "--attention-output-gate", "no --attention-output-gate"),
        ("--no-position-embedding", "--no-position-embedding", "no --no-position-embedding"),
    ],
)
def test_another_model_is_refused(check, load, flags: str, run_flag: str, saved_flag: str) -> None:
    folder = load()
    sentence = f"this run has {run_flag}, but the checkpoint {folder}/iter_0000004 was saved with "
    with refused(sentence + saved_flag, "use that, or load another checkpoint"):
        check(folder, flags, 1)


@pytest.mark.parametrize(
    ("changes", "model", "sentence"),
    [
        (
            {"sffn_router": "rand-hash"},
            "--sffn-router rand-hash --sffn-hash-seed 7",
            "this run has --sffn-hash-seed 7",
        ),
        (
            {"sffn_router": "rand-hash"},
            "--sffn-router rand-hash --sffn-hash-shared",
            "this run has --sffn-hash-shared, but",
        ),
        (
            {"sffn_router": "rand-hash"},
            "--sffn-router rand-hash --sffn-hash-balance text",
            "this run has --sffn-hash-balance text, but",
        ),
        (
            {"sffn_router": "rand-hash", "sffn_hash_balance": "text"},
            "--sffn-router rand-hash",
            "this run has no --sffn-hash-balance, but",
        ),
        ({"add_bias_linear": True}, "", "this run has --disable-bias-linear, but"),
        (
            {"sffn_layers": "1", "ffn_hidden_size": 64, "sffn_active_cells": 128},
            "--sffn-layers 1",
            "this run has --ffn-hidden-size 128, but",
        ),
        (
            {"sffn_router": "switch", "moe_router_enable_expert_bias": True},
            "--sffn-router switch",
            "this run has no --moe-router-enable-expert-bias, but",
        ),
        ({"moe_latent_size": 16}, "", "this run has no --moe-latent-size, but"),
        ({"sffn_layers_per_table": 2}, "", "this run has --sffn-layers-per-table 1, but"),
        (
            {"moe_router_load_balancing_type": "quantile_balancing"},
            "",
            "this run has no --moe-router-load-balancing-type quantile_balancing, but",
        ),
        (
            {"position_embedding_type": "learned_absolute", "max_position_embeddings": 128},
            "--position-embedding-type learned_absolute",
            "this run has --max-position-embeddings 64, but",
        ),
    ],
)
def test_another_model_is_refused_for_every_saved_router(
    check, load, changes: dict[str, Any], model: str, sentence: str
) -> None:
    with refused(sentence):
        check(load(**changes), model=model)


@pytest.mark.parametrize(
    ("flags", "run_flag", "saved_flag"),
    [
        ("--rotary-base 500", "--rotary-base 500", "--rotary-base 10000"),
        ("--rotary-percent 0.5", "--rotary-percent 0.5", "--rotary-percent 1.0"),
        ("--window-size 8,0", "--window-size 8,0", "no --window-size"),
    ],
)
def test_another_attention_span_needs_finetune(check, load, flags, run_flag, saved_flag) -> None:
    folder = load()
    with refused(f"this run has {run_flag}, but the checkpoint was saved with {saved_flag}"):
        check(folder, flags, 1)
    check(folder, f"{flags} --finetune", 1)


def test_the_same_layers_in_another_notation_pass(check, load, capsys) -> None:
    check(load(), "--sffn-layers 0,1 --sffn-active-cells 128", 1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ""),
        (2, TP2),
        (2, PP2),
        (4, f"{TP2} {PP2} {EP2}"),
        (4, f"{TP2} {EP2} {ETP2}"),
        (8, f"{PP2} --expert-model-parallel-size 4"),
        (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1 --num-layers 4"),
        (2, "--bf16 --no-load-optim"),
        (2, "--make-vocab-size-divisible-by 16"),
    ],
)
def test_another_layout_passes(check, load, capsys, ranks: int, layout: str) -> None:
    layers = 4 if "--num-layers 4" in layout else 2
    check(load(num_layers=layers, moe_layer_freq=[1] * layers), layout, ranks)
    assert capsys.readouterr().out == ""


def test_another_block_size_of_the_same_memory_prints_a_note(check, load, capsys) -> None:
    folder = load()
    check(folder, "--sffn-block-size 16")
    note = "block size 8 of the checkpoint -> 16: same memory, other blocks\n"
    assert capsys.readouterr().out == note
    change_args(folder / "iter_0000004", sffn_router="rand-hash")
    check(folder, "--sffn-block-size 16 --sffn-router rand-hash")
    assert capsys.readouterr().out.endswith("; the hash draws them anew, so the loss jumps\n")


def test_another_block_size_of_a_gate_needs_the_tool(check, load) -> None:
    folder = load("switch")
    check(folder, model=ROUTERS["switch"])
    tool = f"tools/convert_checkpoint.py reblock --load {folder} --save DIR --block-size 16"
    with refused("--sffn-block-size 16 differs from the checkpoint's 8", "every block", tool):
        check(folder, "--sffn-block-size 16", model=ROUTERS["switch"])


@pytest.mark.parametrize(("descriptor", "gate"), [("ema", "none"), ("learned", "sigmoid")])
def test_descriptors_that_are_stored_are_bound_to_their_block_size(
    check, load, descriptor: str, gate: str
) -> None:
    folder = load(sffn_descriptor=descriptor, sffn_gate=gate)
    flags = f"--sffn-block-size 16 --sffn-descriptor {descriptor} --sffn-gate {gate}"
    with refused("--sffn-block-size 16 differs", "escriptor", "use that"):
        check(folder, flags)


def test_a_balanced_map_is_bound_to_its_block_size_and_not_to_its_data_set(
    check, load, capsys
) -> None:
    folder = load(sffn_router="rand-hash", sffn_hash_balance="text")
    model = "--sffn-router rand-hash --sffn-hash-balance moved/text"
    check(folder, model=model)
    assert capsys.readouterr().out == ""
    with refused(
        "--sffn-block-size 16 differs",
        "the map of --sffn-hash-balance is of blocks of 8",
        "use that",
    ):
        check(folder, "--sffn-block-size 16", model=model)


def test_another_block_size_of_megatrons_experts_is_refused(check, load) -> None:
    with refused("--sffn-block-size 16 differs", "stores one by one; use that"):
        check(load(sffn_backend="megatron"), "--sffn-backend megatron --sffn-block-size 16")


def test_another_vocabulary_is_refused(check, load) -> None:
    with refused(
        "the tokenizer's 257 ids make 320 rows of the embedding",
        "which has 256",
        "--tokenizer-type NullTokenizer --vocab-size 250",
    ):
        check(load(), "--vocab-size 257")


def test_a_checkpoint_of_plain_megatron_is_for_dense_runs(check, load, capsys) -> None:
    folder = load(sffn_router=..., sffn_relu=..., sffn_block_size=..., num_experts=None)
    with refused("was saved by plain Megatron, with dense layers", "use --sffn-router dense"):
        check(folder)
    check(folder, "--sffn-router dense", 1)
    assert "saved by plain Megatron" in capsys.readouterr().out
    with refused("this run has --hidden-size 64"):
        check(folder, "--sffn-router dense --hidden-size 64", 1)
    change_args(folder / "iter_0000004", num_experts=8)
    with refused("with 8 experts of Megatron", "leave out --load"):
        check(folder, "--sffn-router dense", 1)


def test_a_flag_that_is_newer_than_the_checkpoint_has_its_default(check, load) -> None:
    folder = load(sffn_gate=..., qk_layernorm=...)
    check(folder)
    with refused("this run has --sffn-gate sigmoid", "with --sffn-gate none"):
        check(folder, "--sffn-gate sigmoid")


# The optimizer's state


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        ({}, "--optimizer sgd", "--optimizer sgd cannot use the state of adam"),
        ({}, "--use-distributed-optimizer", "this run has --use-distributed-optimizer, but"),
        (
            {"use_distributed_optimizer": True},
            "",
            "this run has no --use-distributed-optimizer, but",
        ),
        ({}, "--bf16", "this run is in --bf16, but the optimizer's state is of fp32"),
        ({"fp16": True}, "", "this run is in fp32, but the optimizer's state is of --fp16"),
        (
            {"optimizer": "muon", "muon_scalar_optimizer": "lion"},
            "--optimizer muon",
            "--muon-scalar-optimizer adam cannot use the state of lion",
        ),
        (
            {"optimizer": "muon", "use_layer_wise_distributed_optimizer": True, "bf16": True},
            "--optimizer muon --bf16",
            "this run has no --use-distributed-optimizer, but",
        ),
        ({"no_save_optim": True}, "", "it was saved with --no-save-optim"),
        (
            {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": False},
            f"--use-distributed-optimizer {TP2} --expert-model-parallel-size 1",
            "--tensor-model-parallel-size 2 differs from 1",
        ),
        (
            {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": False},
            "--use-distributed-optimizer --expert-model-parallel-size 1",
            "--expert-model-parallel-size 1 differs from 2",
        ),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_refused_but_not_the_weights(
    check, load, changes: dict[str, Any], flags: str, sentence: str
) -> None:
    folder = load(**changes)
    with refused(sentence, "--no-load-optim"):
        check(folder, flags, model=EP2)
    for weights_only in ("--no-load-optim", "--finetune", "--skip-train"):
        check(folder, f"{flags} {weights_only}", model=EP2)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"use_distributed_optimizer": True}, f"--use-distributed-optimizer --bf16 {TP2}"),
        (
            {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": False},
            f"--use-distributed-optimizer {EP2}",
        ),
        ({"bf16": True}, "--fp16"),
        (
            {"optimizer": "muon", "use_layer_wise_distributed_optimizer": True, "bf16": True},
            f"--optimizer muon --use-distributed-optimizer --bf16 {TP2}",
        ),
    ],
)
def test_an_optimizer_state_that_fits_passes(
    check, load, changes: dict[str, Any], flags: str
) -> None:
    check(load(**changes), flags, 4)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--train-iters 8", "--train-iters makes another schedule"),
        ("--lr 1e-3", "--lr makes another schedule"),
        ("--lr-decay-iters 2", "--lr-decay-iters makes another schedule"),
        ("--lr-warmup-iters 1", "--lr-warmup-iters makes another schedule"),
        ("--global-batch-size 4", "--global-batch-size 4 differs from the checkpoint's 8, and"),
        ("--weight-decay 0.1", "--weight-decay makes another schedule"),
    ],
)
def test_another_schedule_needs_an_override_flag(check, load, flags: str, sentence: str) -> None:
    folder = load()
    with refused(sentence, "--override-opt-param-scheduler"):
        check(folder, flags)
    for override in ("--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"):
        check(folder, f"{flags} {override}")


VALUES = "--sffn-lr-mult values:4"


def test_factors_of_rates_may_change_with_an_override_flag_for_the_same_groups(
    check, load, capsys
) -> None:
    folder = load(sffn_lr_mult="values:2")
    with refused(f"this run has {VALUES}, but", "--sffn-lr-mult values:2", "--override-opt-param"):
        check(folder, VALUES)
    override = "--override-opt-param-scheduler"
    check(folder, f"{VALUES} {override}")
    check(folder, "--sffn-lr-mult values:2")
    for other in ("", f"{VALUES},keys:2", f"{VALUES} --sffn-wd-mult keys:0"):
        with refused("for other groups of weights; name the same groups", "--no-load-optim"):
            check(folder, f"{other} {override}")
        check(folder, f"{other} --no-load-optim")


# The command


def test_the_command_refuses_before_anything_starts(pretrain, load, tmp_path: Path) -> None:
    folder = load()
    with pytest.raises(
        AssertionError, match="ConfigError: this run has --sffn-expansion 8"
    ) as refusal:
        pretrain(1, f"{FLAGS} --sffn-expansion 8 --load {folder} --save {tmp_path}/new")
    assert "megatron is initialized" not in str(refusal.value)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_holds_the_command_of_its_run(load, text: str) -> None:
    args = args_in(read_common(load() / "iter_0000004"))
    assert args.sffn_command[:2] == ["--num-layers", "2"]
    assert text in args.sffn_command
    json.dumps(args.sffn_command)


def test_a_jump_of_the_learning_rate_prints_a_note(check, load, capsys) -> None:
    folder = load()
    with refused("for more steps at its last rate add --override-opt-param-scheduler --lr 0.003"):
        check(folder, "--train-iters 8")
    check(folder, "--lr 1e-3 --override-opt-param-scheduler")
    assert "learning rate 0.003 of the checkpoint -> 0.001 where" in capsys.readouterr().out
    check(folder, "--train-iters 8 --override-opt-param-scheduler")
    assert "learning rate" not in capsys.readouterr().out


def test_random_numbers_of_each_rank_need_as_many_ranks(check, load) -> None:
    flag = "--data-parallel-random-init"
    folder = load(data_parallel_random_init=True, data_parallel_size=1)
    with refused("of which there are 2 here and 1 in the checkpoint; add --no-load-rng"):
        check(folder, flag, 2)
    with refused("this run has no --data-parallel-random-init, but"):
        check(folder, "", 1)
    check(folder, flag, 1)
    check(folder, f"{flag} --no-load-rng", 2)
