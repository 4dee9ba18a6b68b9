"""Whole training steps: what a sparse model costs over the dense one of the same active cells.

Enters: sizes. Leaves: a table of milliseconds per step and ratios over dense, ours beside
Megatron's own dispatcher and experts (`--sffn-backend megatron`: same router, same B, K and g), and
the growth of a step with the memory (E) and with the tokens, as a picture if one is asked for.

Choices
- Real runs: `megatron_sffn.pretrain` on one rank with Megatron's mock data, which costs nothing to
  read; forward, backward, optimizer and all of Megatron's loop count.
- Runs take turns, `--rounds` times; of each the median step counts, of the rounds the fastest,
  since other work on a machine only ever adds time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sffn.errors import ConfigError, run_command

COMMON = (
    "--sffn-router switch --num-attention-heads 4 --position-embedding-type rope "
    "--normalization RMSNorm --disable-bias-linear --seq-length 256 --max-position-embeddings 256 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 4096 --lr 1e-3 --num-workers 0 "
    "--no-create-attention-mask-in-dataloader --eval-iters 0 --eval-interval 1000000 "
    "--save-interval 1000000 --log-interval 1000000"
)
"""Flags of every run, beside its sizes; `--sffn-router dense` comes later and then counts."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a run is.

    Args:
        backend: `ours`, `megatron` or `dense`.
        block_size: g; 0 for dense.
        expansion: E; 1 for dense.
        tokens: of a step.
    """

    backend: str
    block_size: int = 0
    expansion: int = 1
    tokens: int

    def flags(self) -> str:
        """Of the feed-forward layer and the batch."""
        batch = f"--micro-batch-size {self.tokens // 256} --global-batch-size {self.tokens // 256}"
        if self.backend == "dense":
            return f"{batch} --sffn-router dense"
        backend = "auto" if self.backend == "ours" else self.backend
        return (
            f"{batch} --sffn-block-size {self.block_size} --sffn-expansion {self.expansion} "
            f"--sffn-backend {backend}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, then print the tables."""
    args = _parse(argv)
    tokens, largest = args.tokens, max(args.expansions)
    compared = [
        Step(backend=backend, block_size=g, expansion=args.expansion, tokens=tokens)
        for g in args.block_sizes
        for backend in ("ours", "megatron")
    ]
    grown = [
        Step(backend="ours", block_size=g, expansion=e, tokens=t)
        for g in args.block_sizes
        for e, t in [*((e, tokens) for e in args.expansions), (largest, 2 * tokens)]
    ]
    units = [Step(backend="dense", tokens=t) for t in (tokens, 2 * tokens)]
    steps = list(dict.fromkeys([*units, *compared, *grown]))
    took: dict[Step, float] = {}
    for turn in range(args.rounds):
        for number, step in enumerate(steps, start=1):
            print(f"round {turn + 1}, {number}/{len(steps)} {step}", file=sys.stderr, flush=True)
            took[step] = min(_milliseconds(step, args), took.get(step, float("inf")))
    print(_comparison(took, args))
    print(_growth(took, args))
    if args.plot:
        _plot(took, args)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.steps", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    add = parser.add_argument
    add("--block-sizes", type=int, nargs="+", default=[1024, 256, 64, 16], help="g")
    add("--expansion", type=int, default=16, help="E of the comparison with Megatron")
    add("--expansions", type=int, nargs="+", default=[4, 16, 64], help="E of the growth")
    add("--tokens", type=int, default=2048, help="of a step, in sequences of 256")
    add("--num-layers", type=int, default=4, help="all of them sparse")
    add("--hidden-size", type=int, default=256, help="D; 4 D active cells")
    add("--train-iters", type=int, default=8, help="steps of a run")
    add("--rounds", type=int, default=2, help="runs of each")
    add("--plot", type=Path, help="PNG file of the growth")
    args = parser.parse_args(argv)
    if args.tokens < 256 or args.tokens % 256:
        raise ConfigError(f"--tokens {args.tokens} is not a multiple of 256; give whole sequences")
    for g in args.block_sizes:
        if g < 1 or 4 * args.hidden_size % g:
            raise ConfigError(
                f"--block-sizes {g} does not divide the {4 * args.hidden_size} active cells of "
                f"--hidden-size {args.hidden_size}; choose a divisor"
            )
    return args


def _milliseconds(step: Step, args: argparse.Namespace) -> float:
    """The median step of a run."""
    sizes = (
        f"--num-layers {args.num_layers} --hidden-size {args.hidden_size} "
        f"--ffn-hidden-size {4 * args.hidden_size} --train-iters {args.train_iters}"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "megatron_sffn.pretrain"]
        command += f"{COMMON} {sizes} {step.flags()} --save {folder}".split()
        run = subprocess.run(
            command,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            last = (run.stderr.strip() or run.stdout.strip()).splitlines()[-1]
            raise ConfigError(f"{step} did not train ({last}); try its flags alone: {command}")
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return 1000 * step.tokens / float(summary["tokens_per_second"])


def _comparison(took: dict[Step, float], args: argparse.Namespace) -> str:
    dense = took[Step(backend="dense", tokens=args.tokens)]
    lines = [
        f"a step of {args.tokens} tokens: {args.num_layers} layers, D = {args.hidden_size}, "
        f"k = {4 * args.hidden_size}, E = {args.expansion}; dense {dense:.0f} ms",
        f"{'g':>5} {'K':>4} {'B':>5} {'ours /dense':>12} {'Megatron /dense':>16} "
        f"{'Megatron /ours':>15}",
    ]
    for g in args.block_sizes:
        ours, theirs = (
            took[Step(backend=name, block_size=g, expansion=args.expansion, tokens=args.tokens)]
            for name in ("ours", "megatron")
        )
        active = 4 * args.hidden_size // g
        lines.append(
            f"{g:>5} {active:>4} {active * args.expansion:>5} {ours / dense:>12.2f} "
            f"{theirs / dense:>16.2f} {theirs / ours:>15.2f}"
        )
    return "\n".join(lines)


def _growth(took: dict[Step, float], args: argparse.Namespace) -> str:
    unit = {t: took[Step(backend="dense", tokens=t)] for t in (args.tokens, 2 * args.tokens)}
    places = [*((e, args.tokens) for e in args.expansions)]
    places += [(max(args.expansions), 2 * args.tokens)]
    heads = [f"E={e}" if t == args.tokens else f"E={e}, {t} tokens" for e, t in places]
    lines = ["", "ours over dense of as many tokens, as the memory grows"]
    lines.append(f"{'g':>5} " + " ".join(f"{head:>16}" for head in heads))
    for g in args.block_sizes:
        ratios = [
            took[Step(backend="ours", block_size=g, expansion=e, tokens=t)] / unit[t]
            for e, t in places
        ]
        lines.append(f"{g:>5} " + " ".join(f"{ratio:>16.2f}" for ratio in ratios))
    return "\n".join(lines)


def _plot(took: dict[Step, float], args: argparse.Namespace) -> None:
    """Step time over E, a line for each block size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    dense = took[Step(backend="dense", tokens=args.tokens)]
    for g in args.block_sizes:
        times = [
            took[Step(backend="ours", block_size=g, expansion=e, tokens=args.tokens)] / dense
            for e in args.expansions
        ]
        axes.plot(args.expansions, times, marker="o", label=f"g = {g}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="E, memory cells over active cells", ylabel="time of a step over dense")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend()
    figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    run_command(main)
