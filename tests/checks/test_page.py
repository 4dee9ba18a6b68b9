"""docs/checks.md lists every check with an error sentence that the check really gives."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest

from megatron_sffn.checks import (
    data,
    disk,
    evaluation,
    flags,
    hybrid_model,
    idle_flags,
    megatron_rules,
    optimizers,
    parallelism,
    pickles,
    resume,
)
from megatron_sffn.checks.problem import Problem, run_checks
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.patches import cpu
from megatron_sffn.train.arguments import parse
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.preprocess_runs import VOCAB, namespace, write_dataset

# Python 3.13 warns about Megatron's own flags.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

PAGE = ROOT / "docs" / "checks.md"
MODULES = (
    flags,
    idle_flags,
    megatron_rules,
    hybrid_model,
    optimizers,
    parallelism,
    evaluation,
    data,
    resume,
    pickles,
    disk,
)
"""In the order of the page, which is the order in which a run executes them."""

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1 --sffn-block-size 32"
)
EP2 = "--expert-model-parallel-size 2"

COMMAND_LINES = {
    "yaml_file": "--yaml-cfg run.yaml",
    "flags_of_other_routers": "--sffn-router switch --sffn-aggregator max",
    "sizes": "--num-layers 0",
    "activations": "--swiglu --sffn-relu",
    "finite_numbers": "--lr nan",
    "dense_width": "--sffn-router dense --sffn-active-cells 32",
    "moe_flags": "--num-experts 4",
    "balance_losses": "--moe-router-load-balancing-type sinkhorn",
    "flags_without_effect": "--num-query-groups 2",
    "unavailable_features": "--lazy-mpu-init",
    "schedules": "--lr-warmup-iters 10 --train-iters 10",
    "monitoring": "--log-straggler",
    "checkpoint_flags": "--save runs/mine",
    "optimizer": "--optimizer sgd --use-distributed-optimizer",
    "muon": "--optimizer muon --fp16",
    "factors": "--sffn-lr-mult values:-1",
    "groups": "--sffn-lr-mult gates:2",
    "model": "--rotary-percent 1.5",
    "transformer_engine": "--context-parallel-size 2",
    "model_parallelism": "--pipeline-model-parallel-size 3",
    "virtual_stages": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3",
    "batch_size": "--global-batch-size 3",
    "predictions": "--sffn-router rand-hash --mtp-num-layers 1 --position-embedding-type rope "
    "--tensor-model-parallel-size 2 --sequence-parallel",
    "pattern": "--hybrid-layer-pattern *-*-",
    "flags_beside_pattern": "--hybrid-layer-pattern *-*E --sffn-layers every:2",
    "pipeline_cuts": "--num-layers 3 --hybrid-layer-pattern *-E --pipeline-model-parallel-size 2",
    "recurrent_layers": "--hybrid-layer-pattern GE*- --swiglu --linear-num-key-heads 3",
    "expert_parallelism": "--expert-model-parallel-size 3",
    "nodes": f"{EP2} --sffn-node-size 3",
    "backend": "--sffn-router lorkm --sffn-backend megatron",
    "shared_tables": "--pipeline-model-parallel-size 2 --sffn-layers-per-table 4",
    "exchange_chunks": f"{EP2} --sffn-exchange-chunks 99",
    "router_groups": "--moe-router-num-groups 3 --moe-router-group-topk 1",
    "evaluation": "--eval-iters -1",
}
"""Check -> flags that it refuses."""
RANKS = {
    "transformer_engine": 2,
    "model_parallelism": 3,
    "virtual_stages": 2,
    "pipeline_cuts": 2,
    "batch_size": 2,
    "predictions": 2,
    "nodes": 2,
}
RANKS |= {"expert_parallelism": 3, "exchange_chunks": 2, "shared_tables": 2}


def is_check(value: object) -> bool:
    if not inspect.isfunction(value) or value.__name__.startswith("_"):
        return False
    return value.__annotations__.get("return") in ("Iterator[Problem]", "Iterable[Problem]")


def checks_of(module: ModuleType) -> list[Callable[..., Iterable[Problem]]]:
    """The checks that a module defines, in its order."""
    functions = [value for value in vars(module).values() if is_check(value)]
    return [function for function in functions if function.__module__ == module.__name__]


def refused_command(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WORLD_SIZE", str(RANKS.get(name, 1)))
    monkeypatch.setattr(sys, "argv", ["pretrain", *MODEL.split(), *COMMAND_LINES[name].split()])
    with pytest.raises(ConfigError) as refusal:
        parse(dict(cpu.HOST_FLAGS.values()))
    return str(refusal.value)


def refused_data(name: str, folder: Path) -> str:
    def dataset(name: str, *documents: list[int]) -> str:
        return write_dataset(folder / name, documents, numpy.uint16)

    run = "--seq-length 2 --micro-batch-size 1 --train-iters 1 --eval-iters 0"
    good = dataset("text", *[[1, 2, 3]] * 10)
    paths = {"data_path": [good], "split": "98,1,1"}
    changes: dict[str, Any] = {
        "data_flags": {"dataloader_type": "external"},
        "dali": {"sffn_dataloader": "dali"},
        "vocabulary": {"padded_vocab_size": VOCAB - 1},
        "split_flag": {**paths, "split": "1,1,1,1"},
        "validation_sets": {**paths, "data_path": ["9", good, "1", good], "full_validation": True},
        "missing_splits": {**paths, "split": "100,0,0", "eval_iters": 5},
        "token_ids": {**paths, "data_path": [dataset("other", [1, 1000])]},
        "split_sizes": paths,
        "dataset_config": {
            **paths,
            "split": "1,0,0",
            "dataloader_defer_npy_index_mmap": True,
        },
    }[name]
    with pytest.raises(ConfigError) as refusal:
        data.check_data(Namespace(**{**vars(namespace(run)), **changes}))
    return str(refusal.value).replace(str(folder), "data")


def refused_checkpoint(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = Path("runs/mine/iter_0000004")
    args = {"sffn_router": "dense", "position_embedding_type": "rope", "load": "runs/mine"}
    sffn = None
    run: dict[str, Any] = {}
    saved: dict[str, Any] = {"sffn_router": "dense"}
    if name == "step_without_load":
        run = {"load": None, "ckpt_step": 3}
    elif name == "plain_megatron":
        saved = {"num_experts": 8}
    elif name == "other_model":
        run, saved["num_layers"] = {"num_layers": 4}, 2
    elif name == "attention_span":
        run, saved["rotary_base"] = {"finetune": False, "rotary_base": 500}, 10000
    elif name == "block_size":
        router = ROUTERS["switch"]()
        sffn = SparseFFNConfig(active_cells=128, router=router, block_size=16, backend="megatron")
        saved["sffn_block_size"] = 8
    elif name == "embedding_rows":
        tokenizer = SimpleNamespace(vocab_size=257)
        monkeypatch.setattr(resume, "load_tokenizer", lambda args: tokenizer)
        run = {"padded_vocab_size": None}
        saved |= {"padded_vocab_size": 256, "make_vocab_size_divisible_by": 64}
        saved |= {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 250}
        saved["tensor_model_parallel_size"] = 1
    elif name == "optimizer_state":
        run = {"no_load_optim": False, "finetune": False, "optimizer": "sgd"}
        saved["optimizer"] = "adam"
    run_args = Namespace(**{**args, **run})
    checkpoint = resume.Checkpoint(folder=folder, common={"args": Namespace(**saved)})
    inputs = [run_args] if name == "step_without_load" else [run_args, sffn, checkpoint]
    with pytest.raises(ConfigError) as refusal:
        run_checks([getattr(resume, name)], *inputs)
    return str(refusal.value)


def refused_pickle(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(pickles, "foreign_code", lambda folder: [("__0_0.distcp", "posix.system")])
    with pytest.raises(ConfigError) as refusal:
        pickles.check_data_only(Path("runs/got/iter_0001000"))
    return str(refusal.value)


def refused_save(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 10_000)
    monkeypatch.setattr(disk, "is_host", lambda: True)
    run = namespace("--seq-length 2 --micro-batch-size 1 --train-iters 1 --eval-iters 0")
    changes = {"save": "runs/mine", "async_save": name == "asynchronous_saves"}
    with pytest.raises(ConfigError) as refusal:
        disk.check_saves(Namespace(**{**vars(run), **changes}), None)
    return str(refusal.value)


def refused_training(check: Callable[[Namespace], Iterable[Problem]]) -> str:
    run = namespace("--seq-length 2 --micro-batch-size 1 --train-iters 1 --eval-iters 0")
    with pytest.raises(ConfigError) as refusal:
        run_checks([check], Namespace(**{**vars(run), "lr": None}))
    return str(refusal.value)


def rows(module: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """The table of a module's checks, as the page has it."""
    lines = []
    for check in checks_of(module):
        name = check.__name__
        if module is data:
            sentence = refused_data(name, folder)
        elif module is resume:
            sentence = refused_checkpoint(name, monkeypatch)
        elif module is pickles:
            sentence = refused_pickle(monkeypatch)
        elif module is disk:
            sentence = refused_save(name, monkeypatch)
        elif check in optimizers.TRAINING_CHECKS:
            sentence = refused_training(check)
        else:
            sentence = refused_command(name, monkeypatch)
        refused = inspect.getdoc(check).splitlines()[0]
        lines.append(f"| `{name}` | {refused} | `{sentence}` |")
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One rank in an empty folder, without the packages that examples need."""
    absent = {"transformer_engine", "amp_C", "pynvml", "nvidia.dali"}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in absent else find_spec(name)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_page_lists_every_check_with_its_error_sentence(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = f"megatron_sffn/checks/{module.__name__.rpartition('.')[2]}.py"
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    section = next(section for section in sections if f"`{path}`" in section)
    listed = [line for line in section.splitlines() if line.startswith("| `")]
    assert "\n".join(listed) == rows(module, monkeypatch, tmp_path)


def test_the_page_has_every_module_with_checks() -> None:
    helpers = {"__init__", "problem", "data_source", "model_flags", "optimizer_state"}
    names = {path.stem for path in (ROOT / "megatron_sffn" / "checks").glob("*.py")} - helpers
    assert names == {module.__name__.rpartition(".")[2] for module in MODULES}
    listed = re.findall(r"`megatron_sffn/checks/(\w+)\.py`", PAGE.read_text())
    assert [name for name in listed if name not in helpers] == [
        module.__name__.rpartition(".")[2] for module in MODULES
    ]


def test_every_check_is_run() -> None:
    run_separately = {flags.yaml_file, resume.step_without_load}
    for module in MODULES:
        run = {*module.CHECKS}
        for name in ("SPARSE_CHECKS", "TRAINING_CHECKS", "DATA_SET_CHECKS"):
            run |= {*vars(module).get(name, ())}
        assert set(checks_of(module)) - run_separately == run


def test_a_problem_is_one_sentence() -> None:
    problem = Problem("--lr", 2.0, "is too large", "lower it")
    assert str(problem) == "--lr 2.0 is too large; lower it"
    with_lead = Problem("--swiglu", True, ", but not there", "use that", lead="this run has ")
    assert str(with_lead) == "this run has --swiglu, but not there; use that"


def test_the_first_problem_ends_the_checks() -> None:
    def failing_check(limit: int) -> Iterable[Problem]:
        yield Problem("--lr", 2, f"is more than {limit}", "lower it")
        raise AssertionError

    with pytest.raises(ConfigError, match=r"^--lr 2 is more than 1; lower it$"):
        run_checks([lambda limit: (), failing_check], 1)
