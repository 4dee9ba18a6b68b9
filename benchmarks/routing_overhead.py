"""Times the cost of routing statistics in a step: `python -m benchmarks.routing_overhead`.

Inputs: the sizes of a layer. Outputs: per block size and router, the time to count a microbatch and
to write a line of `routing.jsonl`, as shares of the layer's forward and backward pass.

Design notes:
- The layer alone is 100 %. In a model the share of a step is smaller.
- A share of 1 % is smaller than the noise of steps. So counting is timed by itself, on the
  `Routing` of the step before it, in turns with steps with and without counting.
- The fastest turn counts, because other load on a machine only adds time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import Platform, adapt, one_rank
from megatron_sffn.utils.errors import ConfigError, run_command

LINES_EVERY = 100
"""Steps between log lines: Megatron's default of --log-interval."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with the arguments of the command line."""
    args = parse_arguments(argv)
    adapt()
    platform = Platform.here()
    import torch

    with one_rank(platform), tempfile.TemporaryDirectory() as folder:
        print(
            f"{platform.device}, threads: {torch.get_num_threads()}, torch {torch.__version__}\n"
            f"T = {args.tokens}, D = {args.hidden_size}, k = {args.active_cells}, "
            f"E = {args.expansion}, fp32; a layer's forward and backward are 100 %\n\n"
            f"   g     B     K      router  step, ms  counting  with / without  "
            f"a line in {LINES_EVERY} steps"
        )
        for block_size in args.block_sizes:
            for router in args.routers:
                print(row(args, block_size, router, Path(folder)), flush=True)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing_overhead",
        description="Cost of routing statistics, as a share of a sparse layer's step.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tokens", type=int, default=2048, help="T of a microbatch (default: 2048)")
    add("--hidden-size", type=int, default=256, help="D (default: 256)")
    add("--active-cells", type=int, default=1024, help="k (default: 1024)")
    add("--expansion", type=int, default=8, help="E (default: 8)")
    add("--block-sizes", type=int, nargs="+", default=[64, 1], help="g (default: 64 1)")
    add("--routers", nargs="+", default=["avg-k", "switch"], help="(default: avg-k switch)")
    add("--repeats", type=int, default=15, help="turns; the fastest counts (default: 15)")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats} is less than 1; give at least 1")
    return args


def row(args: Namespace, block_size: int, router: str, folder: Path) -> str:
    """A line of the table."""
    import torch

    from megatron_sffn.nn.config import SparseFFNConfig
    from megatron_sffn.nn.layer import SparseFFN
    from megatron_sffn.nn.routers import ROUTERS
    from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
    from megatron_sffn.train.routing_metrics import RoutingMetrics

    sffn = SparseFFNConfig(
        router=ROUTERS[router](),
        active_cells=args.active_cells,
        block_size=block_size,
        expansion=args.expansion,
    )
    config = SparseFFNTransformerConfig(
        num_layers=1,
        hidden_size=args.hidden_size,
        num_attention_heads=1,
        add_bias_linear=False,
        moe_router_load_balancing_type="aux_loss" if router == "switch" else "none",
        moe_aux_loss_coeff=0.01,
        sffn=sffn,
    )
    layer = SparseFFN(config, layer_number=1)
    device = torch.cuda.current_device()
    x, dy = torch.randn(2, args.tokens, 1, args.hidden_size).to(device)
    routings: list[Any] = []
    layer.router.register_forward_hook(lambda module, inputs, routing: routings.append(routing))

    def step() -> None:
        routings.clear()
        layer(x.detach().requires_grad_())[0].backward(dy)

    def step_without() -> None:
        counter = layer.trained
        layer.trained = torch.nn.Identity()  # type: ignore[assignment]
        step()
        layer.trained = counter

    log = RoutingMetrics(log_arguments(sffn.num_blocks), folder)

    def line() -> None:
        log.args.curr_iteration += 1
        log.after_step([layer], 1)

    seconds = alternate(
        {
            "with": step,
            "counting": lambda: layer.trained(routings[-1]),
            "without": step_without,
            "line": line,
        },
        args.repeats,
    )
    unit = seconds["without"]
    return (
        f"{block_size:4} {sffn.num_blocks:5} {sffn.num_active_blocks:5} {router:>11}  "
        f"{unit * 1e3:8.1f}  {seconds['counting'] / unit:8.2%}  {seconds['with'] / unit:14.3f}  "
        f"{seconds['line'] / unit / LINES_EVERY:{len(f'a line in {LINES_EVERY} steps')}.3%}"
    )


def log_arguments(num_blocks: int) -> Namespace:
    """The arguments of Megatron that the log reads, for a line after each step."""
    return Namespace(
        curr_iteration=0,
        num_experts=num_blocks,
        num_layers=1,
        mtp_num_layers=None,
        hybrid_layer_pattern=None,
        data_parallel_size=1,
        log_interval=1,
        train_iters=None,
        exit_interval=None,
        save=None,
        save_interval=None,
        skip_train=False,
    )


def alternate(contenders: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The fewest seconds of each contender, timed in turns, so that other load affects them all."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 2):
        for name, run in contenders.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            # The first two turns are a warm-up.
            if repeat > 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: min(turns) for name, turns in seconds.items()}


if __name__ == "__main__":
    # Set before torch is imported: on a shared machine several threads only add noise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_command(main)
