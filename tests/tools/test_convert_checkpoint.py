"""Another block size: every tensor is converted, training resumes, writes are atomic."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_checkpoint
import pytest
import torch
from megatron.core.dist_checkpointing.validation import (
    save_integrity_manifest,
    verify_integrity_manifest,
)
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_sffn.checkpoints import reblock, rewrite
from megatron_sffn.checkpoints.files import COMMON_STATE, args_in, read_common, read_metadata
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.ops.block_ffn import block_ffn
from megatron_sffn.utils.errors import ConfigError
from tests.support.pretraining import Log
from tests.support.slow import slow

FLAGS = "--num-layers 4 --train-iters 4 --save-interval 2 --split 90,10,0"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
ONE_RANK = (
    "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --expert-model-parallel-size 1"
)
# Few blocks and large weights, so that the sparse layers matter for the loss.
LARGE_WEIGHTS = "--sffn-router switch --sffn-block-size 16 --init-method-std 0.3"
SWITCH = f"{LARGE_WEIGHTS} --swiglu --sffn-layers every:2 --moe-router-enable-expert-bias"
DISTRIBUTED = f"{LARGE_WEIGHTS} --bf16 --use-distributed-optimizer"
RUNS = {  # ranks, model, layout
    "switch": (4, SWITCH, f"{TP2} {PP2} {EP2}"),
    "bf16": (2, DISTRIBUTED, EP2),
    "avg-k": (2, "", EP2),
    "prices": (
        2,
        f"{LARGE_WEIGHTS} --moe-router-load-balancing-type quantile_balancing --moe-latent-size 24",
        EP2,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run of 4 steps with checkpoints at steps 2 and 4."""

    folder: Path
    model: str
    log: Log


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """The runs that `run` has trained so far, by name."""
    return {}


@pytest.fixture
def run(pretrain, runs, tmp_path_factory) -> Callable[[str], Run]:
    """`run(name)`: one of `RUNS`, trained on first use; tests must not change it."""

    def trained(name: str) -> Run:
        if name not in runs:
            num_ranks, model, layout = RUNS[name]
            folder = tmp_path_factory.mktemp("run")
            log = pretrain(num_ranks, f"{FLAGS} {model} {layout} --save {folder}")
            runs[name] = Run(folder=folder, model=model, log=log)
        return runs[name]

    return trained


@pytest.fixture
def copy_run(run, tmp_path: Path) -> Callable[[str], Path]:
    """`copy_run(name)`: a copy of the folder of a run, which a test may change."""
    return lambda name: Path(shutil.copytree(run(name).folder, tmp_path / "copy"))


def convert(load: Path, save: Path, block_size: int, *flags: str) -> Path:
    """Convert iteration 2 without evaluating it; returns the new folder."""
    arguments = f"reblock --load {load} --save {save} --block-size {block_size} --ckpt-step 2"
    convert_checkpoint.main([*arguments.split(), "--no-evaluate", *flags])
    return save / "iter_0000002"


def read_pieces(folder: Path) -> dict[tuple[str, Any], bytes]:
    """Name and offset of every entry in the shards of a checkpoint -> its bytes."""
    pieces = {}
    for index, item in read_metadata(folder).storage_data.items():
        with (folder / item.relative_path).open("rb") as file:
            file.seek(item.offset)
            pieces[index.fqn, index.offset] = file.read(item.length)
    return pieces


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, unsharded, as torch loads them."""
    known = read_metadata(folder).state_dict_metadata.items()
    state = {
        key: torch.empty(saved.size, dtype=saved.properties.dtype)
        for key, saved in known
        if isinstance(saved, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(
        state,
        storage_reader=torch.distributed.checkpoint.FileSystemReader(folder),
        planner=torch.distributed.checkpoint.DefaultLoadPlanner(flatten_sharded_tensors=False),
        no_dist=True,
    )
    return state


def hash_files(folder: Path) -> dict[str, str]:
    """Relative path of every file below a folder -> its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


# Routers without a gate


def test_block_weights_are_copied_byte_by_byte(run, tmp_path: Path, capsys) -> None:
    source = run("avg-k").folder
    source_files = hash_files(source)
    target = convert(source, tmp_path / "new", 32)
    assert hash_files(source) == source_files
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
    ]
    assert (tmp_path / "new" / "latest_checkpointed_iteration.txt").read_text() == "2"
    source_pieces, target_pieces = read_pieces(source / "iter_0000002"), read_pieces(target)
    assert source_pieces.keys() == target_pieces.keys()
    assert {key[0] for key in source_pieces if source_pieces[key] != target_pieces[key]} == {
        COMMON_STATE
    }
    source_common, target_common = read_common(source / "iter_0000002"), read_common(target)
    source_args, target_args = vars(source_common.pop("args")), vars(target_common.pop("args"))
    assert str(source_common) == str(target_common)
    changed = {
        name: target_args[name] for name in source_args if source_args[name] != target_args[name]
    }
    assert changed == {
        "sffn_block_size": 32,
        "num_experts": 16,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 32,
        "sffn_command": [*source_args["sffn_command"], "--sffn-block-size", "32"],
    }
    stdout = capsys.readouterr().out
    assert "block size 8 -> 32: 16 blocks instead of 64, 4 per token instead of 16" in stdout
    assert re.search(r"^  keys, exp_avg_sq +4  the same$", stdout, re.MULTILINE)
    assert "the choice is among other blocks; the loss may change" in stdout


@pytest.mark.parametrize("block_size", [2, slow(64)])
def test_training_resumes_with_other_blocks_on_another_layout(
    run, pretrain, tmp_path: Path, block_size: int
) -> None:
    convert(run("avg-k").folder, tmp_path / "new", block_size)
    load = f"--load {tmp_path}/new --sffn-block-size {block_size}"
    log = pretrain(2, f"{FLAGS} {TP2} {load}")
    losses = run("avg-k").log.values("lm loss")
    assert log.values("lm loss")[0] == pytest.approx(losses[2], abs=0.05)
    assert log.validation_loss == pytest.approx(run("avg-k").log.validation_loss, abs=0.05)


# Routers with a gate


@pytest.mark.parametrize(
    ("name", "layout", "tolerance"),
    [("switch", (2, EP2), 1e-4), slow("switch", (2, PP2), 1e-4), ("bf16", (2, TP2), 5e-3)],
)
def test_a_gated_run_resumes_with_finer_blocks_and_the_same_loss(
    run, pretrain, tmp_path: Path, name: str, layout: tuple[int, str], tolerance: float
) -> None:
    source_run = run(name)
    convert(source_run.folder, tmp_path / "new", 2)
    num_ranks, layout_flags = layout
    load = f"--load {tmp_path}/new --sffn-block-size 2"
    log = pretrain(num_ranks, f"{FLAGS} {source_run.model} {layout_flags} {load}")
    losses = source_run.log.values("lm loss")
    assert log.values("lm loss")[0] == pytest.approx(losses[2], abs=tolerance)
    # Later updates are smaller relative to the larger values than before.
    assert log.validation_loss == pytest.approx(source_run.log.validation_loss, abs=0.05)


@pytest.mark.parametrize("block_size", [slow(32), 64])
def test_a_gated_run_resumes_with_coarser_blocks(
    run, pretrain, tmp_path: Path, block_size: int
) -> None:
    source_run = run("switch")
    convert(source_run.folder, tmp_path / "new", block_size)
    load = f"--load {tmp_path}/new --sffn-block-size {block_size}"
    log = pretrain(2, f"{FLAGS} {SWITCH} {EP2} {load}")
    assert log.validation_loss == pytest.approx(source_run.log.validation_loss, abs=0.1)


@pytest.mark.parametrize("name", ["switch", "bf16"])
def test_splitting_and_merging_blocks_restores_every_bit(run, tmp_path: Path, name: str) -> None:
    source_folder = run(name).folder
    fine_folder = convert(source_folder, tmp_path / "fine", 1)
    restored_folder = convert(tmp_path / "fine", tmp_path / "back", 16)
    source, fine, restored = (
        load_tensors(source_folder / "iter_0000002"),
        load_tensors(fine_folder),
        load_tensors(restored_folder),
    )
    assert source.keys() == fine.keys() == restored.keys()
    assert all(torch.equal(source[key], restored[key]) for key in source)
    changed = {key for key in source if not _equal(source[key], fine[key])}
    assert changed == {key for key in source if re.search(r"router|experts\.values", key)}
    source_args, restored_args = (
        vars(args_in(read_common(source_folder / "iter_0000002"))),
        vars(args_in(read_common(restored_folder))),
    )
    assert source_args.pop("sffn_command") != restored_args.pop("sffn_command")
    assert source_args == restored_args


def _equal(tensor: torch.Tensor, other_tensor: torch.Tensor) -> bool:
    return tensor.shape == other_tensor.shape and torch.equal(tensor, other_tensor)


def test_gates_values_and_their_moments_are_rescaled(run, tmp_path: Path) -> None:
    source = run("switch").folder
    source_tensors, target_tensors = (
        load_tensors(source / "iter_0000002"),
        load_tensors(convert(source, tmp_path / "new", 8)),
    )
    layer, exp_avg, exp_avg_sq = "decoder.layers.1.mlp.", "exp_avg.", "exp_avg_sq."
    for state, key, factor in [
        ("", "router.weight", 1),
        (exp_avg, "router.weight", 1 / 2),
        (exp_avg_sq, "router.weight", 1 / 4),
        ("", "router.balance.expert_bias", 1 / 2),
        ("", "experts.values", 2),
        (exp_avg, "experts.values", 1 / 2),
        (exp_avg_sq, "experts.values", 1 / 4),
        ("", "experts.gate_keys", 1),
        (exp_avg, "experts.keys", 1),
    ]:
        name = f"{f'optimizer.state.{state}' if state else ''}{layer}{key}"
        expected = source_tensors[name] * factor
        if key.startswith("router"):
            expected = expected.repeat_interleave(2, dim=0)
        assert torch.equal(target_tensors[name], expected), name
    coarse_tensors = load_tensors(convert(source, tmp_path / "coarse", 32))
    pairs = source_tensors[f"{layer}router.weight"].unflatten(0, (-1, 2))
    torch.testing.assert_close(coarse_tensors[f"{layer}router.weight"], pairs.mean(dim=1))
    pairs = source_tensors[f"optimizer.state.exp_avg_sq.{layer}router.weight"].unflatten(0, (-1, 2))
    name = f"optimizer.state.exp_avg_sq.{layer}router.weight"
    torch.testing.assert_close(coarse_tensors[name], 2 * pairs.sum(dim=1))
    pairs = source_tensors[f"{layer}router.balance.expert_bias"].unflatten(0, (-1, 2))
    torch.testing.assert_close(
        coarse_tensors[f"{layer}router.balance.expert_bias"], pairs.sum(dim=1)
    )


def test_parts_of_a_block_have_its_price_and_joined_blocks_the_mean(run, tmp_path: Path) -> None:
    # The layers are latent: their projections stay as they are.
    source, name = run("prices").folder, "decoder.layers.1.mlp.router.balance.qb_beta"
    prices = load_tensors(source / "iter_0000002")[name]
    assert prices.abs().max() > 0
    finer_tensors = load_tensors(convert(source, tmp_path / "finer", 8))
    assert torch.equal(finer_tensors[name], prices.repeat_interleave(2))
    projection = "decoder.layers.1.mlp.fc1_latent_proj.weight"
    source_tensors = load_tensors(source / "iter_0000002")
    assert torch.equal(finer_tensors[projection], source_tensors[projection])
    coarser = load_tensors(convert(source, tmp_path / "coarser", 32))[name]
    torch.testing.assert_close(coarser, prices.unflatten(0, (-1, 2)).mean(dim=1))


def test_the_tool_prints_the_loss_before_and_after(run, tmp_path: Path, capsys) -> None:
    source = run("switch").folder
    source_files = hash_files(source)
    arguments = f"reblock --load {source} --save {tmp_path}/new --block-size 4"
    arguments += f" --nproc-per-node 1 -- {ONE_RANK}"
    convert_checkpoint.main(arguments.split())
    line = capsys.readouterr().out.splitlines()[-1]
    numbers = re.fullmatch(r"validation loss  before (\S+)  after (\S+)  \(([+-]\S+)\)", line)
    assert numbers is not None, line
    assert float(numbers[1]) == pytest.approx(run("switch").log.validation_loss, abs=2e-4)
    assert abs(float(numbers[3])) <= 1e-4
    assert hash_files(source) == source_files
    assert len(hash_files(tmp_path / "new")) == 6 + 1


# Plans, without a run

LAYER = "decoder.layers.0.mlp."


GATE_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "switch": lambda scores: scores.softmax(dim=-1),
    "sigma-moe": torch.sigmoid,
    "softmax-after": lambda scores: scores,
}
"""Router -> gates from its scores `[T, B]`; softmax-after then takes a softmax over the top k."""


def plan(
    block_size: int,
    *,
    g: int = 8,
    k: int = 24,
    router: str = "switch",
    layers: str = "0",
    args: dict[str, Any] | None = None,
    **extra_shapes: Any,
) -> tuple[reblock.Reblocking, dict[str, TensorStorageMetadata]]:
    """Plan a new block size for a made-up checkpoint of a layer.

    `args`: further arguments of the checkpoint. `extra_shapes`: tensor -> its shape, or None to
    leave it out.
    """
    cells, width = 2 * k, 4
    shapes: dict[str, Any] = {f"experts.{name}": [cells, width] for name in ("keys", "values")}
    if router in GATE_FUNCTIONS:
        shapes["router.weight"] = [cells // g, width]
    states = ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    shapes = {
        f"{state}decoder.layers.0.mlp.{name}": shapes[name] for state in states for name in shapes
    }
    shapes = {key: shape for key, shape in {**shapes, **extra_shapes}.items() if shape is not None}
    metadata = {key: tensor_metadata(shape) for key, shape in shapes.items()}
    checkpoint_args = Namespace(
        **{"sffn_router": router, "sffn_block_size": g, "sffn_expansion": 2}
        | {"sffn_active_cells": k, "sffn_layers": layers, "sffn_backend": "auto", "seed": 1}
        | {"num_layers": 2, "hidden_size": width, "ffn_hidden_size": k, "swiglu": False}
        | {"quick_geglu": False}
        | (args or {}),
    )
    return reblock.plan_reblocking(Metadata(metadata), checkpoint_args, block_size), metadata


def tensor_metadata(shape: list[int]) -> TensorStorageMetadata:
    """Metadata of an unsharded tensor."""
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=torch.Size(shape))
    return TensorStorageMetadata(TensorProperties(), torch.Size(shape), [chunk])


def test_each_layer_is_cut_by_the_rules_of_its_router() -> None:
    layer = "decoder.layers.1.mlp."
    reblocking, metadata = plan(
        4,
        router="switch:0,avg-k",
        layers="every:1",
        **{"decoder.layers.0.mlp.router.weight": [6, 4]},
        **{f"{layer}experts.{name}": [48, 4] for name in ("keys", "values")},
    )
    assert reblocking.account.total() == len(metadata)
    assert {key.rpartition("decoder")[2] for key in reblocking.changes} == {
        ".layers.0.mlp.router.weight",
        ".layers.0.mlp.experts.values",
    }
    assert [text.partition(":")[0] for text in reblocking.consequences] == ["avg-k", "switch"]


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("router", GATE_FUNCTIONS)
@pytest.mark.parametrize("parts", [2, 3, 24])
def test_finer_blocks_compute_the_same_function(
    parts: int, router: str, router_dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    reblocking, metadata = plan(24 // parts, g=24, k=48, router=router)
    tables = {key: torch.randn(metadata[key].size, dtype=torch.float64) for key in metadata}
    x = torch.randn(50, 4, dtype=torch.float64)
    outputs = []
    for g, finer in ((24, False), (24 // parts, True)):
        if finer:
            tables.update(
                {key: reblocking.changes[key].piece(tables[key]) for key in reblocking.changes}
            )
        gate = tables[f"{LAYER}router.weight"]
        scores = GATE_FUNCTIONS[router]((x @ gate.T).to(router_dtype)).double()
        gates, ids = scores.topk(48 // g)
        if router == "softmax-after":
            gates = gates.softmax(dim=-1)
        keys, values = (tables[f"{LAYER}experts.{name}"] for name in ("keys", "values"))
        blocks = [table.view(-1, g, 4) for table in (keys, values)]
        outputs.append(block_ffn(x, *blocks, ids, gates, activation="gelu"))
    assert outputs[0].abs().mean() > 0.1
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_splitting_into_three_and_merging_restores_the_weights() -> None:
    torch.manual_seed(1)
    fine, metadata = plan(8, g=24)
    coarse, _ = plan(24, g=8)
    for key in fine.changes:
        table = torch.randn(metadata[key].size)
        restored = coarse.changes[key].piece(fine.changes[key].piece(table))
        torch.testing.assert_close(restored, table, rtol=1e-6, atol=0)


def test_shared_blocks_keep_their_cells() -> None:
    config = SparseFFNConfig(
        router=ROUTERS["switch"](), active_cells=24, block_size=8, expansion=2, shared_blocks=1
    )
    reblocked = reblock._other_blocks(config, 2)
    assert (reblocked.shared_blocks, reblocked.shared_cells) == (4, 8)
    with pytest.raises(ConfigError, match=r"does not divide the 8 cells of .* 1 shared blocks"):
        reblock._other_blocks(config, 12)


def test_layers_with_one_table_need_the_table_of_the_first_alone() -> None:
    second = {"decoder.layers.1.mlp.router.weight": [6, 4]}
    args = {"sffn_layers_per_table": 2}
    plan(4, layers="0,1", args=args, **second)
    with pytest.raises(ConfigError, match=r"layers.1.mlp.router.weight is missing"):
        plan(4, layers="0,1", args=args)
    with pytest.raises(ConfigError, match=r"layers.1.mlp.experts.keys is missing"):
        plan(4, layers="0,1", **second)
    extra = {"decoder.layers.1.mlp.experts.keys": [48, 4]}
    with pytest.raises(ConfigError, match=r"layers.1.mlp.experts.keys is not one that"):
        plan(4, layers="0,1", args=args, **second, **extra)


def test_a_balanced_hash_map_is_bound_to_its_block_size() -> None:
    config = SparseFFNConfig(
        router=ROUTERS["rand-hash"](balance="text"), active_cells=24, block_size=8
    )
    with pytest.raises(ConfigError, match=r"--block-size 4 does not fit .* the map of --sffn-hash"):
        reblock._check(config, reblock._other_blocks(config, 4), 24)


def test_every_tensor_is_accounted_for() -> None:
    for router in ("switch", "sigma-moe", "avg-k", "vanilla-m", "rand-hash"):
        reblocking, metadata = plan(4, router=router)
        assert reblocking.account.total() == len(metadata)
        assert bool(reblocking.changes) == (router in GATE_FUNCTIONS)
        (consequence,) = reblocking.consequences
        assert consequence.startswith(f"{router}: ")
    assert "the loss jumps" in consequence


@pytest.mark.parametrize(
    ("extra_shapes", "sentence"),
    [
        ({f"{LAYER}experts.scales": [48, 4]}, "experts.scales is not one that this tool knows"),
        ({f"{LAYER}router.bias": [6]}, "router.bias is not one that this tool knows"),
        (
            {f"optimizer.state.third.{LAYER}experts.keys": [48, 4]},
            "optimizer.state.third.decoder.layers.0.mlp.experts.keys is not one that",
        ),
        ({"decoder.layers.1.mlp.experts.keys": [48, 4]}, "is not one that this tool knows"),
        ({"decoder.layers.mlp.experts.keys": [48, 4]}, "is not one that this tool knows"),
        ({f"{LAYER}experts.values": [40, 4]}, "has shape [40, 4] instead of the [48, 4]"),
        ({f"{LAYER}router.weight": [12, 4]}, "has shape [12, 4] instead of the [6, 4]"),
        ({f"{LAYER}experts.keys": None}, "mlp.experts.keys is missing in the checkpoint"),
        ({f"{LAYER}router.weight": None}, "mlp.router.weight is missing in the checkpoint"),
        (
            {"chained_0.optimizer.distributed.dp_group_idx_0.bucket_idx_0.param": [100]},
            "saved with --no-dist-ckpt-optim-fully-reshardable",
        ),
    ],
)
def test_unknown_tensors_and_wrong_shapes_are_refused(
    extra_shapes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        plan(4, **extra_shapes)


def test_gate_tensors_are_refused_for_a_router_without_a_gate() -> None:
    with pytest.raises(ConfigError, match=r"router.weight is not one that this tool knows"):
        plan(4, router="avg-k", **{f"{LAYER}router.weight": [6, 4]})
    plan(4, router="avg-k", **{"chained_0.optimizer.distributed.bucket_idx_0.param": [100]})


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"block_size": 8}, "--block-size 8 is that of the checkpoint"),
        ({"block_size": 5}, "--sffn-block-size 5 does not divide --sffn-active-cells 24"),
        ({"block_size": 0}, "--sffn-block-size 0 must be at least 1"),
        (
            {"block_size": 32, "g": 48, "k": 96},
            "--block-size 32 neither divides the checkpoint's 48 nor is a multiple of it",
        ),
        ({"block_size": 4, "router": "dense"}, "--sffn-router dense has no blocks"),
        (
            {"block_size": 2, "g": 8, "k": 64, "router": "peer"},
            "--block-size 2 does not fit the checkpoint's 8: router.subkeys of --sffn-router peer "
            "has shape [4, 2, 4, 128], and [4, 2, 8, 128] with the other blocks",
        ),
    ],
)
def test_impossible_block_sizes_are_refused(numbers: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        plan(**numbers)


def test_remoe_keeps_the_coefficient_of_its_loss_and_the_gate_of_each_part() -> None:
    coefficient = f"{LAYER}router.balance.l1_coefficient"
    reblocking, _ = plan(4, router="remoe", **{f"{LAYER}router.weight": [6, 4], coefficient: [1]})
    assert coefficient not in reblocking.changes
    assert f"{LAYER}experts.values" not in reblocking.changes
    rows = torch.randn(6, 4)
    repeated = reblocking.changes[f"{LAYER}router.weight"].piece(rows)
    assert torch.equal(repeated, rows.repeat_interleave(2, dim=0))
    assert "the layer computes the same" in reblocking.consequences[0]


def test_a_router_without_a_gate_accepts_every_divisor() -> None:
    reblocking, _ = plan(32, g=48, k=96, router="avg-k")
    assert reblocking.after.num_active_blocks == 3


def test_values_beyond_the_range_of_their_dtype_are_refused() -> None:
    reblocking, _ = plan(4)
    change = reblocking.changes[f"{LAYER}experts.values"]
    infinite = torch.tensor([float("inf"), 2.0], dtype=torch.float16)
    assert change.piece(infinite).tolist() == [float("inf"), 4.0]
    with pytest.raises(ConfigError, match=r"4e\+04 times 2 is beyond the range of torch.float16"):
        change.piece(torch.tensor([40000.0], dtype=torch.float16))


# Atomic writes


@pytest.mark.parametrize("function", ["_copy_others", "_changed", "sync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_conversion_leaves_no_file(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    source, save = run("switch").folder, tmp_path / "deep" / "new"
    monkeypatch.setattr(rewrite, function, fail)
    with pytest.raises((ConfigError, KeyboardInterrupt)) as error_info:
        convert(source, save, 4)
    if isinstance(error, OSError):
        assert "cannot be written ([Errno 28] No space left on device)" in str(error_info.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    convert(source, save, 4)


def test_a_killed_run_leaves_no_checkpoint_and_the_next_one_cleans_up(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, save = run("switch").folder, tmp_path / "new"
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(rewrite, "_copy_others", lambda *_: os._exit(9))
        convert(source, save, 4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    (partial,) = save.iterdir()
    assert re.fullmatch(r"\.iter_0000002\.\w+\.partial", partial.name)
    convert(source, save, 4)
    assert sorted(path.name for path in save.iterdir())[0] == "iter_0000002"
    assert not partial.exists()


def test_a_folder_with_other_iterations_can_be_the_target(copy_run, run, tmp_path: Path) -> None:
    folder = copy_run("avg-k")
    shutil.rmtree(folder / "iter_0000002")
    convert(run("avg-k").folder, folder, 4)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (folder / "summary.json").exists()
    with pytest.raises(ConfigError, match="iter_0000002 exists; give another --save"):
        convert(run("avg-k").folder, folder, 4)


def test_other_files_of_a_checkpoint_are_copied(copy_run, tmp_path: Path) -> None:
    source = copy_run("avg-k")
    (source / "iter_0000002" / "note.txt").write_text("mine")
    (source / "iter_0000002" / "modelopt_state").mkdir()
    (source / "iter_0000002" / "modelopt_state" / "data").write_text("theirs")
    save_integrity_manifest(str(source / "iter_0000002"))
    target = convert(source, tmp_path / "new", 4)
    assert (target / "note.txt").read_text() == "mine"
    assert (target / "modelopt_state" / "data").read_text() == "theirs"
    verify_integrity_manifest(str(target))


def test_a_disk_that_is_too_small_is_refused(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=1000))
    with pytest.raises(ConfigError, match=r"has 0.0 GB free, but the checkpoint has 0.0 GB"):
        convert(run("avg-k").folder, tmp_path / "new", 4)
    assert list(tmp_path.iterdir()) == []


# Bad input


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    arguments = f"reblock --load {tmp_path} --save {tmp_path}/new --block-size 4"
    with pytest.raises(ConfigError, match=r"has no latest_checkpointed_iteration.txt; give"):
        convert_checkpoint.main(arguments.split())
    with pytest.raises(ConfigError, match="--ckpt-step 2 is not there"):
        convert(tmp_path, tmp_path / "new", 4)


def test_a_damaged_checkpoint_is_refused(copy_run, tmp_path: Path) -> None:
    folder = copy_run("avg-k")
    (folder / "iter_0000002" / "__0_0.distcp").unlink()
    with pytest.raises(ConfigError, match=r"__0_0.distcp is missing; use --ckpt-step 4"):
        convert(folder, tmp_path / "new", 4)
    (folder / "iter_0000002" / "mp_rank_00").mkdir()
    with pytest.raises(ConfigError, match="is not an iteration in the torch_dist format"):
        convert(folder, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_in_an_older_format_is_refused(copy_run, tmp_path: Path) -> None:
    folder = copy_run("avg-k")
    replace_args(folder, seed=2)
    with pytest.raises(ConfigError, match=r"common.pt beside the shards, as before Megatron 0.19"):
        convert(folder, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()


def test_an_unknown_tensor_in_a_real_checkpoint_is_refused(copy_run, tmp_path: Path) -> None:
    folder = copy_run("avg-k")
    metadata = read_metadata(folder / "iter_0000002")
    metadata.state_dict_metadata["decoder.layers.3.mlp.router.temperature"] = tensor_metadata([1])
    (folder / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=r"layers.3.mlp.router.temperature is not one"):
        convert(folder, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()


def replace_args(folder: Path, **changes: Any) -> None:
    """Change the arguments that iteration 2 holds; the value ... removes one."""
    common = read_common(folder / "iter_0000002")
    args = {**vars(common["args"]), **changes}
    common["args"] = Namespace(**{name: value for name, value in args.items() if value is not ...})
    torch.save(common, folder / "iter_0000002" / "common.pt")


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        ({"sffn_router": ...}, "--no-evaluate", "was saved by plain Megatron and has no sparse"),
        ({"sffn_backend": "megatron"}, "--no-evaluate", "saved with --sffn-backend megatron"),
        ({"sffn_router": "dense"}, "--no-evaluate", "dense has no blocks to cut anew"),
        ({"sffn_command": ...}, "", "does not hold the command line of its run"),
        ({"sffn_command": ["--bf16"]}, "", "names no data, as imports do not, so it cannot be"),
        ({}, "--nproc-per-node 0", "--nproc-per-node 0 must be at least 1"),
        ({}, "--nproc-per-node 1 -- --sffn-gate often", "invalid choice: 'often'"),
    ],
)
def test_checkpoints_that_cannot_be_converted_or_evaluated_are_refused(
    copy_run, tmp_path: Path, changes: dict[str, Any], flags: str, sentence: str
) -> None:
    folder = copy_run("avg-k")
    if changes:
        replace_args(folder, **changes)
    arguments = f"reblock --load {folder} --save {tmp_path}/new --block-size 4 --ckpt-step 2"
    with pytest.raises(ConfigError, match=sentence):
        convert_checkpoint.main(f"{arguments} {flags}".split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["reblock", "regranulate"])
def test_the_help_of_reblock_shows_an_example_also_under_its_former_name(
    capsys, command: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        convert_checkpoint.main([command, "--help"])
    stdout = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "example: from blocks of 64 cells to blocks of 16" in stdout
    assert io.StringIO(stdout).readline().startswith("usage: convert_checkpoint.py reblock")
