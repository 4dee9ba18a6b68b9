"""Compares foreseen steps with runs of this machine: `python -m benchmarks.plan_check`.

Inputs: numbers of ranks, and steps of a run. Outputs: a table of the time of a step, measured and
foreseen, for dense and sparse models in several layouts.

Design notes:
- The cores of this machine stand in for GPUs, and the loopback of gloo for the links.
- No number is fitted to a run. The rates of a rank are measured apart from them, on as many busy
  ranks as the run has: a product of the model's size, a copy, an all-reduce of the gradients' size,
  and the time of the blocks' products over a dense layer's.
- Runs are real: `megatron_sffn.pretrain` with Megatron's mock data; the median step counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import Platform, adapt, facts
from benchmarks.trainings import tokens_per_second
from megatron_sffn.utils.errors import ConfigError, run_command
from megatron_sffn.utils.text_table import text_table

HIDDEN, SEQUENCE, MICRO_BATCH, BATCH, BLOCK_SIZE, EXPANSION = 256, 256, 4, 16, 64, 4
"""D, and with k = 4 D: tokens of a sequence, sequences of a microbatch and of a step, g, E."""

MODEL = (
    f"--num-layers 4 --hidden-size {HIDDEN} --ffn-hidden-size {4 * HIDDEN} --vocab-size 4096 "
    f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --num-attention-heads 4 "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --lr 1e-3 "
    f"--micro-batch-size {MICRO_BATCH} --global-batch-size {BATCH}"
)
DATA = (
    "--mock-data --tokenizer-type NullTokenizer --num-workers 0 --eval-iters 0 "
    "--no-create-attention-mask-in-dataloader --eval-interval 1000000 --save-interval 1000000"
)
ROUTERS = {
    "dense": "--sffn-router dense",
    "Avg-K": f"--sffn-router avg-k --sffn-block-size {BLOCK_SIZE} --sffn-expansion {EXPANSION}",
}
AVG_K = ROUTERS["Avg-K"]
VARIANTS = {
    "hybrid": f"{AVG_K} --sffn-model hybrid",
    "MLA": f"{AVG_K} --multi-latent-attention --q-lora-rank 96 --kv-lora-rank 64 --qk-head-dim 48 "
    "--qk-pos-emb-head-dim 16 --v-head-dim 64",
    "MTP": f"{AVG_K} --mtp-num-layers 1 --untie-embeddings-and-output-weights",
    "Muon": f"{AVG_K} --optimizer muon",
}
"""Other models, and another optimizer, that run in one layout of each number of ranks."""
SIZES = {"TP": "--tensor-model-parallel-size", "PP": "--pipeline-model-parallel-size"}
SIZES["EP"] = "--expert-model-parallel-size"
LAYOUTS: dict[int, tuple[tuple[int, int, int], ...]] = {
    1: ((1, 1, 1),),
    2: ((1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 1)),
    4: ((1, 1, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)),
}
"""Ranks -> TP, PP and EP of the runs."""
VARIANT_LAYOUTS = {1: (1, 1, 1), 2: (1, 2, 1)}
"""Ranks -> TP, PP and EP of the runs of `VARIANTS`."""
TURNS = 15


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one rank reaches while all ranks are busy.

    Args:
        flops: FLOP/s of a product.
        memory: bytes per second that a copy reads and writes.
        link: bytes per second that a rank sends in an all-reduce; 1e12 for one rank.
    """

    flops: float
    memory: float
    link: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    Args:
        model: key of `ROUTERS` or `VARIANTS`.
        ranks: number of ranks.
        sizes: TP, PP and EP.
    """

    model: str
    ranks: int
    sizes: tuple[int, int, int]

    @property
    def flags(self) -> list[str]:
        """The flags of the model and its layout."""
        words = f"{MODEL} {(ROUTERS | VARIANTS)[self.model]}".split()
        for flag, size in zip(SIZES.values(), self.sizes, strict=True):
            words += [flag, str(size)]
        return words + (["--sequence-parallel"] if self.sizes[0] > 1 else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the machine and all runs, then print the table."""
    args = parse_arguments(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # hide GPUs before anything initialises CUDA
    adapt()
    ratio = block_ratio()
    lines = [("model", "ranks", *SIZES, "measured ms", "foreseen ms", "error")]
    errors = []
    for ranks in args.ranks:
        rates = rates_of(ranks)
        print(
            f"{ranks} ranks: {rates.flops / 1e9:.0f} GFLOP/s, {rates.memory / 1e9:.1f} GB/s of "
            f"memory, {rates.link / 1e9:.2f} GB/s to others; blocks {ratio:.2f} of dense",
            file=sys.stderr,
        )
        for case in cases_of(ranks):
            measured, foreseen = milliseconds(case, args.train_iters), plan(case, rates, ratio)
            errors.append(foreseen / measured - 1)
            times = (f"{measured:.0f}", f"{foreseen:.0f}", f"{errors[-1]:+.0%}")
            lines.append((case.model, str(ranks), *map(str, case.sizes), *times))
            print(*lines[-1], file=sys.stderr, flush=True)
    print(text_table(lines))
    mean = statistics.fmean(map(abs, errors))
    machine = facts(Platform.here(), None)
    print(f"\nmean of the absolute errors: {mean:.0%}; {machine['device']}, {machine['commit']}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        ConfigError: if a value cannot work.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_check",
        description="Time of a training step on the cores of this machine, beside what "
        "megatron-sffn plan foresees from the rates of one core.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=list(LAYOUTS), help="(default: 1 2 4)")
    add("--train-iters", type=int, default=12, help="steps of a run (default: 12)")
    args = parser.parse_args(argv)
    for ranks in args.ranks:
        if ranks not in LAYOUTS:
            raise ConfigError(f"--ranks {ranks} has no layouts here; choose of 1, 2, 4")
    if args.train_iters < 1:
        raise ConfigError(f"--train-iters {args.train_iters} is less than 1; give at least 1")
    return args


def cases_of(ranks: int) -> list[Case]:
    """The runs of a number of ranks; dense models have no expert parallelism."""
    cases = [
        Case(model=model, ranks=ranks, sizes=sizes)
        for sizes in LAYOUTS[ranks]
        for model in ROUTERS
        if model != "dense" or sizes[2] == 1
    ]
    return cases + [
        Case(model=model, ranks=ranks, sizes=sizes)
        for model in VARIANTS
        if (sizes := VARIANT_LAYOUTS.get(ranks)) is not None
    ]


def block_ratio() -> float:
    """Time of the blocks' products over those of a dense layer, forward and backward, alone."""
    import torch

    from benchmarks.blocks.layers import BlockFFN, Dense
    from benchmarks.blocks.problem import Problem
    from benchmarks.blocks.timing import BOTH, alternate
    from megatron_sffn.ops.activation import Activation

    torch.set_num_threads(1)
    problem = Problem.draw(
        tokens=MICRO_BATCH * SEQUENCE,
        hidden_size=HIDDEN,
        active_cells=4 * HIDDEN,
        block_size=BLOCK_SIZE,
        expansion=EXPANSION,
        activation=Activation.GELU,
        dtype=torch.float32,
        gated=False,
        device=torch.cuda.current_device(),
    )
    modules = {"dense": Dense(problem), "blocks": BlockFFN(problem, "auto")}
    seconds = alternate(modules, problem, TURNS)
    blocks, dense = (statistics.median(seconds[name, BOTH]) for name in ("blocks", "dense"))
    return blocks / dense


def rates_of(ranks: int) -> Rates:
    """The rates of a rank while so many ranks are busy."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_measure, (ranks, folder), nprocs=ranks)
        return Rates(**json.loads((Path(folder) / "rates.json").read_text()))


def _measure(rank: int, ranks: int, folder: str) -> None:
    """Measure the rates of a rank, in a process of its own; the first one writes them."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    x, keys = torch.randn(MICRO_BATCH * SEQUENCE, HIDDEN), torch.randn(4 * HIDDEN, HIDDEN)
    large, copy, gradients = torch.randn(2**23), torch.empty(2**23), torch.randn(2**21)

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(TURNS):
            distributed.barrier()
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    flops = 2 * x.numel() * len(keys) / seconds(lambda: x @ keys.T)
    memory = 2 * large.nbytes / seconds(lambda: copy.copy_(large))
    sent = 2 * (ranks - 1) / ranks * gradients.nbytes
    link = sent / seconds(lambda: distributed.all_reduce(gradients)) if ranks > 1 else 1e12
    if rank == 0:
        rates = {"flops": flops, "memory": memory, "link": link}
        (Path(folder) / "rates.json").write_text(json.dumps(rates))
    distributed.destroy_process_group()


def milliseconds(case: Case, train_iters: int) -> float:
    """The median step of a run.

    Raises:
        ConfigError: if the run fails.
    """
    flags = [*case.flags, *DATA.split(), "--train-iters", str(train_iters)]
    return 1000 * BATCH * SEQUENCE / tokens_per_second(case, flags, ranks=case.ranks)


def plan(case: Case, rates: Rates, ratio: float) -> float:
    """The milliseconds of a step that the planner foresees."""
    from megatron_sffn.planning.candidates import parse_base
    from megatron_sffn.planning.cluster import (
        GB,
        LINK_EFFICIENCY,
        MEMORY_EFFICIENCY,
        Card,
        Cluster,
    )
    from megatron_sffn.planning.search import search

    link = rates.link / LINK_EFFICIENCY
    card = Card(
        peak_flops=rates.flops,
        memory=64 * GB,
        memory_bandwidth=rates.memory / MEMORY_EFFICIENCY,
        node_bandwidth=link,
        network_bandwidth=link,
    )
    cluster = Cluster(
        gpus=case.ranks, gpus_per_node=case.ranks, card=card, efficiency=1.0, block_ratio=ratio
    )
    base = parse_base([*case.flags, "--expert-tensor-parallel-size", "1"])
    return 1000 * search(base, cluster).best.time.total


if __name__ == "__main__":
    run_command(main)
