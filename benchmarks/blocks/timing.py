"""Time modules in turns, and leave out those that would take too long.

Inputs: modules from `[T, D]` to `[T, D]` of one `Problem`. Outputs: per turn, the seconds of a
forward pass and of a forward and backward pass; or the reason why a module has none.

Design notes:
- Contenders take turns (A B C A B C ...), so that other load on the machine affects all of them.
- Peers copy tokens, which takes time in proportion to the number of (token, block) pairs. So the
  time of a step at the next block size is predicted from the last one, and the step is skipped if
  it would exceed the budget.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor, nn

from benchmarks.blocks.problem import Problem

FORWARD, BOTH = "forward", "forward + backward"
PASSES = (FORWARD, BOTH)
CONTENDER_SECONDS = 20.0
"""Seconds after which a contender stops at one size, but not before `FEWEST_TURNS`."""
FEWEST_TURNS = 3
STEPS_ON_GPU = 10
"""Passes in a row per turn: the host then launches kernels ahead of the device, as in training."""
COPIES = 6
"""Copies of all rows per block, `[T·K, D]` each, in a peer's step at its peak."""


@dataclass
class Budget:
    """The limit of one step of a peer, for the block sizes of one expansion.

    Args:
        seconds: the longest step that is allowed.
        last: contender -> pairs and seconds of its last step.
    """

    seconds: float
    last: dict[str, tuple[int, float]] = field(default_factory=dict)

    def refusal(self, name: str, problem: Problem) -> str | None:
        """The reason not to start a step of a peer; None if it can be tried."""
        pairs = problem.block_ids.numel()
        if COPIES * pairs * problem.x.shape[1] * problem.x.itemsize > free_memory(problem.x):
            return "its copies of tokens would need more memory than is free"
        last_pairs, seconds = self.last.get(name, (pairs, 0.0))
        if seconds * pairs / last_pairs > self.seconds:
            return self.too_long
        return None

    def note(self, name: str, problem: Problem, seconds: float) -> str | None:
        """Record a step; return the reason not to repeat it, None if it can be timed."""
        self.last[name] = problem.block_ids.numel(), seconds
        return self.too_long if seconds > self.seconds else None

    @property
    def too_long(self) -> str:
        """The reason of a step that exceeds the budget."""
        return f"a step would take longer than --budget {self.seconds:g} (seconds)"


def free_memory(tensor: Tensor) -> int:
    """Bytes that can be allocated on a tensor's device."""
    if tensor.is_cuda:
        return torch.cuda.mem_get_info(tensor.device)[0]
    return int(psutil.virtual_memory().available)


def step(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Run forward and backward; return the output and the gradient of the input."""
    x = x.detach().requires_grad_()
    y: Tensor = module(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def seconds_of(module: nn.Module, problem: Problem, timed: str, steps: int = 1) -> float:
    """Seconds of a pass, averaged over a few in a row; gradients are newly allocated in each."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        if timed == FORWARD:
            with torch.no_grad():
                module(problem.x)
        else:
            step(module, problem.x, problem.dy)
            module.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def alternate(
    modules: Mapping[str, nn.Module], problem: Problem, repeats: int
) -> dict[tuple[str, str], list[float]]:
    """Time the passes of all modules in turns, after one turn to warm up.

    Returns:
        Contender and pass -> seconds of each turn: `repeats` turns, or fewer if they are slow.
    """
    steps = STEPS_ON_GPU if problem.x.is_cuda else 1
    seconds: dict[tuple[str, str], list[float]] = {
        (name, timed): [] for name in modules for timed in PASSES
    }
    for turn in range(repeats + 1):
        for name, module in modules.items():
            total_seconds = sum(sum(seconds[name, timed]) for timed in PASSES) * steps
            if total_seconds > CONTENDER_SECONDS and turn > FEWEST_TURNS:
                continue
            for timed in PASSES:
                pass_seconds = seconds_of(module, problem, timed, steps)
                if turn:
                    seconds[name, timed].append(pass_seconds)
    return seconds
