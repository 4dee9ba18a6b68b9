"""Configurations of examples/configs: built at full size on fake ranks, trained at toy size."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import megatron.core.tokenizers.text  # noqa: F401  (once, not in every rank: it takes seconds)
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.training.models.dist_utils import build_virtual_pipeline_stages
from megatron.training.models.gpt import GPTModelBuilder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sffn.accounting import ModelShape, count_parameters
from megatron_sffn.flags.sffn_flags import sffn_config
from megatron_sffn.pretrain import main
from megatron_sffn.train.first_rank import parse_as_first_rank
from megatron_sffn.train.run import model_config
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.pretraining import Log
from tests.support.ranks import fork
from tests.support.slow import slow
from tools.accounting import costs_of

FOLDER = ROOT / "examples" / "configs"
UNIFIED, SIGMA, SMALL, LARGE = (
    "unified_sffn.sh",
    "sigma_moe.sh",
    "modern_1b.sh",
    "modern_30b.sh",
)

ONE_CELL = ("lorkm", "pkm-ffn", "pkm")
ROUTERS = ("avg-k", "vanilla-m", "switch", "rand-hash", *ONE_CELL)
GRID_ARGUMENTS = [
    (router, str(g), str(expansion))
    for router in ROUTERS
    for g in ((1,) if router in ONE_CELL else (4096, 2048, 1024, 256, 64, 1))
    for expansion in (4, 16)
]
PAPER_ARGUMENTS = {
    UNIFIED: [("dense",), *GRID_ARGUMENTS],
    SIGMA: [
        (model, router)
        for model in ("wt-s", "wt-s-star", "wt-m", "enwik8")
        for router in ("sigma-moe", "dense")
    ],
}
"""Script -> the arguments of each of its configurations."""

GPU_BYTES = {(LARGE, 8): 141e9}
"""Bytes of a GPU, where it does not have 80 GB."""

SETTINGS = ("DATA", "SAVE", "NNODES", "GPUS_PER_NODE", "NODE_RANK", "TOY", "RUN")
CLEAN_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in SETTINGS}
"""The environment without the variables that the scripts read."""

pytestmark = [
    # Megatron itself causes both warnings.
    pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning:megatron"),
]


def command(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with `printf` in place of torchrun: it prints one flag per line."""
    return subprocess.run(
        [FOLDER / script, *arguments],
        env={**CLEAN_ENVIRONMENT, "RUN": "printf %s\\n", **environment},
        capture_output=True,
        text=True,
    )


def arguments_of(script: str, *arguments: str, ranks: int = 1) -> Namespace:
    """The parsed arguments of a configuration on the first rank of `ranks` GPUs."""
    flags = command(script, *arguments, NNODES=str(max(1, ranks // 8))).stdout.splitlines()
    return parse_as_first_rank(flags, ranks, device="cuda")[0]


@contextmanager
def fake_rank(rank: int, args: Namespace) -> Iterator[None]:
    """Megatron's process groups of one rank of the full world; no other rank exists."""
    store = FakeStore()
    torch.distributed.init_process_group("fake", store, rank=rank, world_size=args.world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def parameters_on_rank(rank: int, args: Namespace) -> Counter[str]:
    """Parameters of a rank, built without storage, by the parallelism that shards them."""
    config, count = model_config(args, sffn_config(args)), Counter()
    config.transformer.perform_initialization = False
    with fake_rank(rank, args), FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the command's own filters count here
        chunks = build_virtual_pipeline_stages(
            GPTModelBuilder(config).build_model,
            ProcessGroupCollection.use_mpu_process_groups(),
            args.virtual_pipeline_model_parallel_size,
        )
    for chunk in chunks:
        for parameter in chunk.parameters():
            is_expert = not getattr(parameter, "allreduce", True)
            is_sharded = getattr(parameter, "tensor_model_parallel", False)
            count["expert" if is_expert else "tensor" if is_sharded else "all"] += parameter.numel()
    return count


def parameters_of_all_ranks(args: Namespace) -> int:
    """Parameters of the model, from those of the first and last rank of every stage."""
    stages, total = args.pipeline_model_parallel_size, 0
    ranks_per_stage = args.world_size // stages
    for first_rank in range(0, args.world_size, ranks_per_stage):
        count = parameters_on_rank(first_rank, args)
        assert (
            ranks_per_stage == 1
            or parameters_on_rank(first_rank + ranks_per_stage - 1, args) == count
        )
        total += count["expert"] * args.expert_model_parallel_size
        total += count["tensor"] * args.tensor_model_parallel_size + count["all"]
    return total


def count_and_check(args: Namespace) -> dict[str, int]:
    """Total and active parameters in closed form; the built model must have the total."""
    parameters = count_parameters(ModelShape.of_args(args, sffn_config(args)))
    assert parameters_of_all_ranks(args) == parameters.total
    return {"total": parameters.total, "active": parameters.active}


@pytest.mark.parametrize("script", PAPER_ARGUMENTS)
def test_parameters_of_the_papers_models_match_the_golden_file(golden, script: str) -> None:
    counts = {
        " ".join(arguments): count_and_check(arguments_of(script, *arguments))
        for arguments in PAPER_ARGUMENTS[script]
    }
    golden(f"parameters_{script.removesuffix('.sh')}", counts)


@pytest.mark.parametrize("script", [SMALL, LARGE])
def test_parameters_of_the_modern_models_are_the_same_on_every_layout(golden, script: str) -> None:
    counts = [count_and_check(arguments_of(script, ranks=ranks)) for ranks in (8, 64, 1024)]
    assert counts[1:] == counts[:-1]
    golden(f"parameters_{script.removesuffix('.sh')}", counts[0])


@pytest.mark.parametrize("ranks", [8, 64, 1024])
@pytest.mark.parametrize("script", [SMALL, LARGE])
def test_every_layout_fits_the_memory_of_its_gpus(script: str, ranks: int) -> None:
    args = arguments_of(script, ranks=ranks)
    sffn = sffn_config(args)
    costs = costs_of(args, sffn, ModelShape.of_args(args, sffn), cuda=True)
    peak_bytes = costs.weights + costs.gradients + costs.optimizer + costs.activations
    # The rest is for temporary buffers of kernels, and for ranks that receive more tokens.
    assert peak_bytes < 0.75 * GPU_BYTES.get((script, ranks), 80e9), peak_bytes
    # Every replica has at least as many microbatches in a step as there are stages.
    num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    assert num_microbatches >= args.pipeline_model_parallel_size


PAPER_PARAMETERS = {
    ("wt-s", "sigma-moe"): (47.26, 0.01),
    ("wt-s-star", "sigma-moe"): (237.0, 0.01),
    ("wt-m", "sigma-moe"): (262.46, 0.01),
    ("enwik8", "sigma-moe"): (41.24, 0.01),
    # The authors chose the widths for equal parameters, which match to 20 thousand.
    ("wt-s", "dense"): (47.26, 0.01),
    ("wt-m", "dense"): (262.46, 0.02),
    ("enwik8", "dense"): (41.24, 0.01),
}
"""Millions of parameters in the paper, and our tolerance; the paper has no dense wt-s-star."""


@pytest.mark.parametrize(("model", "router"), PAPER_PARAMETERS)
def test_sigma_moe_models_have_the_papers_parameters_after_known_corrections(
    model: str, router: str
) -> None:
    args = arguments_of(SIGMA, model, router)
    total = count_parameters(ModelShape.of_args(args, sffn_config(args))).total
    attention_width = args.num_attention_heads * args.kv_channels
    vocabulary = 204 if model == "enwik8" else 8000
    missing = args.num_layers * (args.hidden_size + 2) * attention_width  # relative positions
    missing += vocabulary  # the bias of the logits
    missing -= 2 * args.hidden_size * (args.padded_vocab_size - vocabulary)
    if router == "dense":
        missing += args.num_layers * (args.ffn_hidden_size + args.hidden_size)  # the FFN's biases
    millions, tolerance = PAPER_PARAMETERS[model, router]
    assert abs((total + missing) / 1e6 - millions) <= tolerance, total + missing
    # Without the corrections the numbers differ.
    assert abs(total / 1e6 - millions) > 1


@pytest.mark.parametrize("model", ["wt-s", "wt-s-star", "wt-m", "enwik8"])
def test_sigma_moe_baselines_have_the_papers_losses(model: str) -> None:
    switch = arguments_of(SIGMA, model, "switch")
    # The authors' loss is a mean over tokens and experts; ours, B · Σ P F, is B² times as large.
    assert (switch.moe_router_topk, switch.moe_ffn_hidden_size) == (1, 512)
    (coefficient,) = switch.moe_aux_loss_coeff
    assert switch.moe_router_load_balancing_type == ["global_aux_loss"]
    assert coefficient * switch.num_experts**2 == pytest.approx(0.01)
    assert switch.sffn_entropy_coeff == switch.sffn_block_dropout == 0
    sigma, base = (arguments_of(SIGMA, model, router) for router in ("sigma-moe", "s-base"))
    assert (base.num_experts, base.moe_router_topk) == (sigma.num_experts, 4)
    assert base.sffn_block_dropout == sigma.sffn_block_dropout
    assert base.sffn_entropy_coeff == {"wt-s": 1e-4}.get(model, sigma.sffn_entropy_coeff)
    # Equal parameters, except for the gate's rows.
    totals = [
        count_parameters(ModelShape.of_args(args, sffn_config(args))).total
        for args in (sigma, base, switch)
    ]
    assert totals[0] == totals[1] == pytest.approx(totals[2], rel=0.003)
    toy = command(SIGMA, model, "switch", TOY="1").stdout.splitlines()
    assert parse_as_first_rank(toy, 2, device="cpu")[0].moe_router_topk == 1


def test_the_grid_is_trained_on_60_billion_tokens() -> None:
    args = arguments_of(UNIFIED, "avg-k", "64", "16")
    tokens = args.global_batch_size * args.seq_length
    assert args.train_iters == round(60e9 / tokens)
    assert [i for i, sparse in enumerate(args.moe_layer_freq) if sparse] == [5, 11, 17, 23]


def test_flags_at_the_end_override_those_of_the_script() -> None:
    args = arguments_of(UNIFIED, "avg-k", "64", "16", "--lr", "1e-3", "--num-layers", "12")
    assert (args.lr, args.num_layers, args.seq_length) == (1e-3, 12, 2048)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (UNIFIED, ()),
        (UNIFIED, ("avg-k",)),
        (UNIFIED, ("avg-k", "--seed", "3")),
        (SIGMA, ()),
        (SIGMA, ("wt-l", "sigma-moe")),
        (SIGMA, ("wt-s", "pkm")),
    ],
)
def test_an_unknown_configuration_is_refused(script: str, arguments: tuple[str, ...]) -> None:
    process = command(script, *arguments)
    assert (process.returncode, process.stdout) == (2, "")
    assert re.fullmatch(rf"error: '{' '.join(arguments)}' does not begin with .*\n", process.stderr)


def test_the_run_refuses_sizes_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="--sffn-block-size 48 does not divide"):
        arguments_of(UNIFIED, "avg-k", "48", "16")


def test_all_scripts_share_the_code_that_starts_a_run() -> None:
    launch_code = {path.read_text().partition("\nLAUNCH=(")[2] for path in FOLDER.glob("*.sh")}
    assert len(launch_code) == 1 and launch_code != {""}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train(flags: list[str], folder: Path) -> Log:
    """Run the entry point on 2 ranks in a folder; returns the log of the last rank."""
    port = free_port()

    def body(rank: int, results: Path) -> str:
        warnings.simplefilter("ignore")  # the command's own filters count here
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.chdir(folder)
        output = os.open(results / f"log{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["pretrain", *flags]
        main()
        sys.stdout.flush()
        return (results / f"log{rank}").read_text()

    return Log(text=fork(2, body)[-1])


def assert_trained(log: Log) -> None:
    losses = log.values("lm loss")
    assert len(losses) == 5
    # An untrained model of 1,024 ids has this loss.
    assert losses[0] == pytest.approx(math.log(1024), abs=0.5)
    assert losses[-1] < losses[0] - 0.03


TOY_CONFIGURATIONS = [
    slow(UNIFIED, ("dense",)),
    *(
        slow(UNIFIED, (router, "1" if router in ONE_CELL else "256", "16"))
        for router in ROUTERS
        if router != "avg-k"
    ),
    (UNIFIED, ("avg-k", "256", "16")),
    (SIGMA, PAPER_ARGUMENTS[SIGMA][0]),
    *(slow(SIGMA, arguments) for arguments in PAPER_ARGUMENTS[SIGMA][1:]),
    (SMALL, ()),
    slow(LARGE, ()),
]
"""Every configuration, except that the grid has only one per router."""


@pytest.mark.parametrize(("script", "arguments"), TOY_CONFIGURATIONS)
def test_every_configuration_trains_five_steps_at_toy_size(
    script: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    flags = command(script, *arguments, TOY="1").stdout.splitlines()
    assert_trained(train(flags, tmp_path))


@pytest.mark.slow
def test_the_script_alone_trains_five_steps(tmp_path: Path) -> None:
    process = subprocess.run(
        [FOLDER / SMALL],
        cwd=tmp_path,
        env={
            **CLEAN_ENVIRONMENT,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TOY": "1",
            "MASTER_PORT": str(free_port()),
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert_trained(Log(text=process.stdout))
