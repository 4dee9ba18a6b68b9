"""Another block size: every tensor accounted for, training that goes on, nothing half-written."""

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

FLAGS = "--num-layers 4 --train-iters 4 --save-interval 2 --split 90,10,0"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
ONE_RANK = (
    "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --expert-model-parallel-size 1"
)
# Few blocks and large weights, so that the sparse layers count in the loss.
LOUD = "--sffn-router switch --sffn-block-size 16 --init-method-std 0.3"
SWITCH = f"{LOUD} --swiglu --sffn-layers every:2 --moe-router-enable-expert-bias"
DISTRIBUTED = f"{LOUD} --bf16 --use-distributed-optimizer"
RUNS = {  # ranks, model, layout
    "switch": (4, SWITCH, f"{TP2} {PP2} {EP2}"),
    "bf16": (2, DISTRIBUTED, EP2),
    "avg-k": (2, "", EP2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run of 4 steps, with checkpoints of 2 and 4."""

    folder: Path
    model: str
    log: Log


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """What `run` has made so far."""
    return {}


@pytest.fixture
def run(pretrain, runs, tmp_path_factory) -> Callable[[str], Run]:
    """`run(name)`: one of `RUNS`, trained when it is first asked for; not to be changed."""

    def get(name: str) -> Run:
        if name not in runs:
            ranks, model, layout = RUNS[name]
            folder = tmp_path_factory.mktemp("run")
            log = pretrain(ranks, f"{FLAGS} {model} {layout} --save {folder}")
            runs[name] = Run(folder=folder, model=model, log=log)
        return runs[name]

    return get


@pytest.fixture
def copy(run, tmp_path: Path) -> Callable[[str], Path]:
    """`copy(name)`: the folder of a run, to be changed."""
    return lambda name: Path(shutil.copytree(run(name).folder, tmp_path / "copy"))


def convert(load: Path, save: Path, block_size: int, *flags: str) -> Path:
    """Convert iteration 2 without evaluating it; returns the new folder."""
    arguments = f"reblock --load {load} --save {save} --block-size {block_size} --ckpt-step 2"
    convert_checkpoint.main([*arguments.split(), "--no-evaluate", *flags])
    return save / "iter_0000002"


def pieces(folder: Path) -> dict[tuple[str, Any], bytes]:
    """Everything in the shards of a checkpoint, as it lies there."""
    found = {}
    for index, item in read_metadata(folder).storage_data.items():
        with (folder / item.relative_path).open("rb") as file:
            file.seek(item.offset)
            found[index.fqn, index.offset] = file.read(item.length)
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, whole, as torch puts them together."""
    known = read_metadata(folder).state_dict_metadata.items()
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in known
        if isinstance(entry, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(
        state,
        storage_reader=torch.distributed.checkpoint.FileSystemReader(folder),
        planner=torch.distributed.checkpoint.DefaultLoadPlanner(flatten_sharded_tensors=False),
        no_dist=True,
    )
    return state


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hashed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


# The same memory


def test_tables_are_copied_byte_by_byte(run, tmp_path: Path, capsys) -> None:
    source = run("avg-k").folder
    untouched = contents(source)
    target = convert(source, tmp_path / "new", 32)
    assert contents(source) == untouched
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
    ]
    assert (tmp_path / "new" / "latest_checkpointed_iteration.txt").read_text() == "2"
    old, new = pieces(source / "iter_0000002"), pieces(target)
    assert old.keys() == new.keys()
    assert {key[0] for key in old if old[key] != new[key]} == {COMMON_STATE}
    before, after = read_common(source / "iter_0000002"), read_common(target)
    args, new_args = vars(before.pop("args")), vars(after.pop("args"))
    assert str(before) == str(after)
    changed = {name: new_args[name] for name in args if args[name] != new_args[name]}
    assert changed == {
        "sffn_block_size": 32,
        "num_experts": 16,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 32,
        "sffn_command": [*args["sffn_command"], "--sffn-block-size", "32"],
    }
    printed = capsys.readouterr().out
    assert "block size 8 -> 32: 16 blocks instead of 64, 4 per token instead of 16" in printed
    assert re.search(r"^  keys, exp_avg_sq +4  the same$", printed, re.MULTILINE)
    assert "the choice is among other blocks; the loss may change" in printed


@pytest.mark.parametrize("block_size", [2, 64])
def test_training_goes_on_in_other_blocks_on_another_layout(
    run, pretrain, tmp_path: Path, block_size: int
) -> None:
    convert(run("avg-k").folder, tmp_path / "new", block_size)
    load = f"--load {tmp_path}/new --sffn-block-size {block_size}"
    log = pretrain(2, f"{FLAGS} {TP2} {load}")
    losses = run("avg-k").log.values("lm loss")
    assert log.values("lm loss")[0] == pytest.approx(losses[2], abs=0.05)
    assert log.validation_loss == pytest.approx(run("avg-k").log.validation_loss, abs=0.05)


# Switch


@pytest.mark.parametrize(
    ("name", "layout", "tolerance"),
    [("switch", (2, EP2), 1e-4), ("switch", (2, PP2), 1e-4), ("bf16", (2, TP2), 5e-3)],
)
def test_finer_blocks_of_a_gate_are_the_same_function(
    run, pretrain, tmp_path: Path, name: str, layout: tuple[int, str], tolerance: float
) -> None:
    source = run(name)
    convert(source.folder, tmp_path / "new", 2)
    ranks, cut = layout
    load = f"--load {tmp_path}/new --sffn-block-size 2"
    log = pretrain(ranks, f"{FLAGS} {source.model} {cut} {load}")
    losses = source.log.values("lm loss")
    assert log.values("lm loss")[0] == pytest.approx(losses[2], abs=tolerance)
    # From there on the values move less, relatively: the gate and the keys as before.
    assert log.validation_loss == pytest.approx(source.log.validation_loss, abs=0.05)


@pytest.mark.parametrize("block_size", [32, 64])
def test_coarser_blocks_of_a_gate_can_be_trained(
    run, pretrain, tmp_path: Path, block_size: int
) -> None:
    source = run("switch")
    convert(source.folder, tmp_path / "new", block_size)
    load = f"--load {tmp_path}/new --sffn-block-size {block_size}"
    log = pretrain(2, f"{FLAGS} {SWITCH} {EP2} {load}")
    assert log.validation_loss == pytest.approx(source.log.validation_loss, abs=0.1)


@pytest.mark.parametrize("name", ["switch", "bf16"])
def test_there_and_back_restores_every_bit(run, tmp_path: Path, name: str) -> None:
    source = run(name).folder
    fine = convert(source, tmp_path / "fine", 1)
    back = convert(tmp_path / "fine", tmp_path / "back", 16)
    old, between, new = tensors(source / "iter_0000002"), tensors(fine), tensors(back)
    assert old.keys() == between.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    touched = {key for key in old if not _equal(old[key], between[key])}
    assert touched == {key for key in old if re.search(r"router|experts\.values", key)}
    before, after = (
        vars(args_in(read_common(source / "iter_0000002"))),
        vars(args_in(read_common(back))),
    )
    assert before.pop("sffn_command") != after.pop("sffn_command")
    assert before == after


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def test_what_becomes_of_a_gate_and_its_values(run, tmp_path: Path) -> None:
    source = run("switch").folder
    old, new = tensors(source / "iter_0000002"), tensors(convert(source, tmp_path / "new", 8))
    layer, first, second = "decoder.layers.1.mlp.", "exp_avg.", "exp_avg_sq."
    for state, key, factor in [
        ("", "router.weight", 1),
        (first, "router.weight", 1 / 2),
        (second, "router.weight", 1 / 4),
        ("", "router.balance.expert_bias", 1 / 2),
        ("", "experts.values", 2),
        (first, "experts.values", 1 / 2),
        (second, "experts.values", 1 / 4),
        ("", "experts.gate_keys", 1),
        (first, "experts.keys", 1),
    ]:
        name = f"{f'optimizer.state.{state}' if state else ''}{layer}{key}"
        expected = old[name] * factor
        if key.startswith("router"):
            expected = expected.repeat_interleave(2, dim=0)
        assert torch.equal(new[name], expected), name
    joined = tensors(convert(source, tmp_path / "coarse", 32))
    pairs = old[f"{layer}router.weight"].unflatten(0, (-1, 2))
    torch.testing.assert_close(joined[f"{layer}router.weight"], pairs.mean(dim=1))
    pairs = old[f"optimizer.state.exp_avg_sq.{layer}router.weight"].unflatten(0, (-1, 2))
    name = f"optimizer.state.exp_avg_sq.{layer}router.weight"
    torch.testing.assert_close(joined[name], 2 * pairs.sum(dim=1))
    pairs = old[f"{layer}router.balance.expert_bias"].unflatten(0, (-1, 2))
    torch.testing.assert_close(joined[f"{layer}router.balance.expert_bias"], pairs.sum(dim=1))


def test_the_loss_before_and_after(run, tmp_path: Path, capsys) -> None:
    source = run("switch").folder
    untouched = contents(source)
    arguments = f"reblock --load {source} --save {tmp_path}/new --block-size 4"
    arguments += f" --nproc-per-node 1 -- {ONE_RANK}"
    convert_checkpoint.main(arguments.split())
    line = capsys.readouterr().out.splitlines()[-1]
    numbers = re.fullmatch(r"validation loss  before (\S+)  after (\S+)  \(([+-]\S+)\)", line)
    assert numbers is not None, line
    assert float(numbers[1]) == pytest.approx(run("switch").log.validation_loss, abs=2e-4)
    assert abs(float(numbers[3])) <= 1e-4
    assert contents(source) == untouched
    assert len(contents(tmp_path / "new")) == 6 + 1


# Plans, without a run

LAYER = "decoder.layers.0.mlp."


GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "switch": lambda scores: scores.softmax(dim=-1),
    "sigma-moe": torch.sigmoid,
    "softmax-after": lambda scores: scores,
}
"""Router -> what its scores `[T, B]` become; softmax-after then renormalises over the chosen."""


def plan(
    block_size: int, *, g: int = 8, k: int = 24, router: str = "switch", **extra: Any
) -> tuple[reblock.Reblocking, dict[str, TensorStorageMetadata]]:
    """Another block size for a made-up checkpoint of a layer; `extra`: tensor -> shape or None."""
    cells, width = 2 * k, 4
    shapes: dict[str, Any] = {f"experts.{name}": [cells, width] for name in ("keys", "values")}
    if router in GATES:
        shapes["router.weight"] = [cells // g, width]
    states = ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    shapes = {
        f"{state}decoder.layers.0.mlp.{name}": shapes[name] for state in states for name in shapes
    }
    shapes = {key: shape for key, shape in {**shapes, **extra}.items() if shape is not None}
    known = {key: entry(shape) for key, shape in shapes.items()}
    saved = Namespace(
        **{"sffn_router": router, "sffn_block_size": g, "sffn_expansion": 2},
        **{"sffn_active_cells": k, "sffn_layers": "0", "sffn_backend": "auto", "seed": 1},
        **{"num_layers": 2, "hidden_size": width, "ffn_hidden_size": k, "swiglu": False},
    )
    return reblock.plan_reblocking(Metadata(known), saved, block_size), known


def entry(shape: list[int]) -> TensorStorageMetadata:
    """A tensor in one piece."""
    whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=torch.Size(shape))
    return TensorStorageMetadata(TensorProperties(), torch.Size(shape), [whole])


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("router", GATES)
@pytest.mark.parametrize("parts", [2, 3, 24])
def test_finer_blocks_compute_the_same_function(
    parts: int, router: str, router_dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    done, known = plan(24 // parts, g=24, k=48, router=router)
    tables = {key: torch.randn(known[key].size, dtype=torch.float64) for key in known}
    x = torch.randn(50, 4, dtype=torch.float64)
    outputs = []
    for g, change in ((24, False), (24 // parts, True)):
        if change:
            tables.update({key: done.changes[key].piece(tables[key]) for key in done.changes})
        gate = tables[f"{LAYER}router.weight"]
        scores = GATES[router]((x @ gate.T).to(router_dtype)).double()
        gates, ids = scores.topk(48 // g)
        if router == "softmax-after":
            gates = gates.softmax(dim=-1)
        keys, values = (tables[f"{LAYER}experts.{name}"] for name in ("keys", "values"))
        blocks = [table.view(-1, g, 4) for table in (keys, values)]
        outputs.append(block_ffn(x, *blocks, ids, gates, activation="gelu"))
    assert outputs[0].abs().mean() > 0.1
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_three_parts_there_and_back() -> None:
    torch.manual_seed(1)
    fine, known = plan(8, g=24)
    back, _ = plan(24, g=8)
    for key in fine.changes:
        table = torch.randn(known[key].size)
        again = back.changes[key].piece(fine.changes[key].piece(table))
        torch.testing.assert_close(again, table, rtol=1e-6, atol=0)


def test_shared_blocks_keep_their_cells() -> None:
    before = SparseFFNConfig(
        router=ROUTERS["switch"](), active_cells=24, block_size=8, expansion=2, shared_blocks=1
    )
    after = reblock._other_blocks(before, 2)
    assert (after.shared_blocks, after.shared_cells) == (4, 8)
    with pytest.raises(ConfigError, match=r"does not divide the 8 cells of .* 1 shared blocks"):
        reblock._other_blocks(before, 12)


def test_every_tensor_is_accounted_for() -> None:
    for router in ("switch", "sigma-moe", "avg-k", "vanilla-m", "rand-hash"):
        done, known = plan(4, router=router)
        assert done.account.total() == len(known)
        assert bool(done.changes) == (router in GATES)
        assert done.consequence.startswith(f"{router}: ")
    assert "the loss jumps" in done.consequence


@pytest.mark.parametrize(
    ("extra", "sentence"),
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
def test_what_is_not_understood_is_refused(extra: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        plan(4, **extra)


def test_other_tensors_of_a_gate_are_not_those_of_a_memory_alone() -> None:
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
    ],
)
def test_a_block_size_that_cannot_be(numbers: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        plan(**numbers)


def test_a_memory_without_a_gate_takes_any_divisor() -> None:
    done, _ = plan(32, g=48, k=96, router="avg-k")
    assert done.after.num_active_blocks == 3


def test_values_beyond_the_range_of_their_dtype_are_refused() -> None:
    done, _ = plan(4)
    change = done.changes[f"{LAYER}experts.values"]
    infinite = torch.tensor([float("inf"), 2.0], dtype=torch.float16)
    assert change.piece(infinite).tolist() == [float("inf"), 4.0]
    with pytest.raises(ConfigError, match=r"4e\+04 times 2 is beyond the range of torch.float16"):
        change.piece(torch.tensor([40000.0], dtype=torch.float16))


# Complete, or not at all


@pytest.mark.parametrize("place", ["_copy_others", "_changed", "sync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_what_failed(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    source, save = run("switch").folder, tmp_path / "deep" / "new"
    monkeypatch.setattr(rewrite, place, fail)
    with pytest.raises((ConfigError, KeyboardInterrupt)) as caught:
        convert(source, save, 4)
    if isinstance(error, OSError):
        assert "cannot be written ([Errno 28] No space left on device)" in str(caught.value)
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


def test_a_folder_with_other_iterations(copy, run, tmp_path: Path) -> None:
    folder = copy("avg-k")
    shutil.rmtree(folder / "iter_0000002")
    convert(run("avg-k").folder, folder, 4)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (folder / "summary.json").exists()
    with pytest.raises(ConfigError, match="iter_0000002 exists; give another --save"):
        convert(run("avg-k").folder, folder, 4)


def test_what_lies_beside_the_shards_is_kept(copy, tmp_path: Path) -> None:
    source = copy("avg-k")
    (source / "iter_0000002" / "note.txt").write_text("mine")
    (source / "iter_0000002" / "modelopt_state").mkdir()
    (source / "iter_0000002" / "modelopt_state" / "data").write_text("theirs")
    save_integrity_manifest(str(source / "iter_0000002"))
    target = convert(source, tmp_path / "new", 4)
    assert (target / "note.txt").read_text() == "mine"
    assert (target / "modelopt_state" / "data").read_text() == "theirs"
    verify_integrity_manifest(str(target))


def test_a_disk_that_is_too_small(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=1000))
    with pytest.raises(ConfigError, match=r"has 0.0 GB free, but the checkpoint has 0.0 GB"):
        convert(run("avg-k").folder, tmp_path / "new", 4)
    assert list(tmp_path.iterdir()) == []


# Bad input


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    arguments = f"reblock --load {tmp_path} --save {tmp_path}/new --block-size 4"
    with pytest.raises(ConfigError, match=r"has no latest_checkpointed_iteration.txt; give"):
        convert_checkpoint.main(arguments.split())
    with pytest.raises(ConfigError, match="--ckpt-step 2 is not there"):
        convert(tmp_path, tmp_path / "new", 4)


def test_a_damaged_checkpoint(copy, tmp_path: Path) -> None:
    folder = copy("avg-k")
    (folder / "iter_0000002" / "__0_0.distcp").unlink()
    with pytest.raises(ConfigError, match=r"__0_0.distcp is missing; use --ckpt-step 4"):
        convert(folder, tmp_path / "new", 4)
    (folder / "iter_0000002" / "mp_rank_00").mkdir()
    with pytest.raises(ConfigError, match="is not an iteration in the torch_dist format"):
        convert(folder, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_in_an_older_form_is_refused(copy, tmp_path: Path) -> None:
    folder = copy("avg-k")
    with_args(folder, seed=2)
    with pytest.raises(ConfigError, match=r"common.pt beside the shards, as before Megatron 0.19"):
        convert(folder, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()


def test_an_unknown_tensor_in_a_real_checkpoint(copy, tmp_path: Path) -> None:
    folder = copy("avg-k")
    metadata = read_metadata(folder / "iter_0000002")
    metadata.state_dict_metadata["decoder.layers.3.mlp.router.temperature"] = entry([1])
    (folder / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=r"layers.3.mlp.router.temperature is not one"):
        convert(folder, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()


def with_args(folder: Path, **changes: Any) -> None:
    """Save other arguments in iteration 2; ... removes one."""
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
        ({}, "--nproc-per-node 0", "--nproc-per-node 0 must be at least 1"),
        ({}, "-- --sffn-gate often", "invalid choice: 'often'"),
    ],
)
def test_what_cannot_be_converted_or_evaluated(
    copy, tmp_path: Path, changes: dict[str, Any], flags: str, sentence: str
) -> None:
    folder = copy("avg-k")
    if changes:
        with_args(folder, **changes)
    arguments = f"reblock --load {folder} --save {tmp_path}/new --block-size 4 --ckpt-step 2"
    with pytest.raises(ConfigError, match=sentence):
        convert_checkpoint.main(f"{arguments} {flags}".split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["reblock", "regranulate"])
def test_the_help_of_reblock_teaches_also_under_its_former_name(capsys, command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        convert_checkpoint.main([command, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "example: from blocks of 64 cells to blocks of 16" in printed
    assert io.StringIO(printed).readline().startswith("usage: convert_checkpoint.py reblock")
