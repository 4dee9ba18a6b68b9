"""Train: the doctor's smoke test, equal losses of all backends, reproducible bits, and resume.

Inputs: this machine, through `megatron_sffn.pretrain`. Outputs: the losses of every step.

Design notes: runs are small, and several at a time share one GPU, because start-up is most of a
run. `python -m benchmarks.gpu.sections.train` stores the losses of a CPU in `CURVE`; if that file
exists, a GPU's losses are compared with them.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import forms
from benchmarks.gpu.case import Case, Context, Failure, NotHere
from megatron_sffn.utils.errors import ConfigError, reason_in, run_command

CURVE = Path(__file__).parents[1] / "cpu_losses.json"
"""File with the losses per router of a training on a CPU, at the sizes for a GPU."""

FLAGS = (
    "--num-layers 2 --num-attention-heads 4 --position-embedding-type rope --disable-bias-linear "
    "--normalization RMSNorm --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 64 "
    "--mock-data --lr 1e-3 --log-interval 1 --eval-iters 1 --num-workers 0 --eval-interval 1000000 "
    "--no-create-attention-mask-in-dataloader"
)
GPU_SIZES = (
    "--hidden-size 256 --ffn-hidden-size 1024 --seq-length 256 --max-position-embeddings 256 "
    "--vocab-size 1024 --micro-batch-size 8 --global-batch-size 8 "
    "--sffn-block-size 64 --sffn-expansion 4"
)
DRY_SIZES = (
    "--hidden-size 32 --ffn-hidden-size 32 --seq-length 16 --max-position-embeddings 16 "
    "--vocab-size 64 --micro-batch-size 1 --global-batch-size 1 "
    "--sffn-block-size 16 --sffn-expansion 2"
)
ROUTERS = ("switch", "avg-k")
TOLERANCE = 1e-2
"""Largest difference between the losses of two backends, or of a GPU and a CPU, at any step."""

AT_A_TIME = 4
"""Runs that share a GPU at a time."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run.

    Args:
        router: name.
        backend: name.
        steps: steps of the learning-rate schedule.
        stop: the step after which it stops; equal to `steps` to train to the end.
        folder: folder of its checkpoints; a run resumes from those that exist.
        bf16: True for bf16, False for fp32.
    """

    router: str
    backend: str
    steps: int
    stop: int
    folder: Path
    bf16: bool

    def flags(self, sizes: str) -> list[str]:
        """The flags of the command line."""
        words = f"{FLAGS} {sizes} --sffn-router {self.router} --sffn-backend {self.backend} "
        words += f"--train-iters {self.steps} --save-interval 1000000 --save {self.folder} "
        words += "--bf16 " * self.bf16
        if self.stop < self.steps:
            words += f"--exit-interval {self.stop} "
        if (self.folder / "latest_checkpointed_iteration.txt").exists():
            words += f"--load {self.folder}"
        return words.split()


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a run.

    Args:
        steps: number of a step -> its loss as printed, 7 digits.
        validation: the loss after the last step, every bit of it; None if the run stopped early.
    """

    steps: Mapping[int, str]
    validation: float | None


def cases(context: Context) -> list[Case]:
    """The cases, most valuable first."""
    all_cases = [Case(name="resume and repeat", run=lambda: repeat(context))]
    for router in ROUTERS[: context.choose(len(ROUTERS), 1)]:
        run = functools.partial(compare, router, context)
        all_cases.append(Case(name=f"backends agree: {router}", run=run))
    if not context.dry:  # tests/test_doctor.py runs it without a GPU
        all_cases.append(Case(name="doctor's smoke test", run=smoke))
    return all_cases


def smoke() -> dict[str, Any]:
    """Run the training of `megatron_sffn.doctor`."""
    from megatron_sffn.doctor.findings import WRONG
    from megatron_sffn.doctor.smoke import smoke as doctor

    finding = doctor("smoke")
    if finding.state == WRONG:
        raise Failure(finding.found)
    return {"found": finding.found}


def repeat(context: Context) -> dict[str, Any]:
    """Train once, and again in two halves, the second of which resumes from a checkpoint."""
    steps = context.choose(20, 4)

    def run(folder: str, stop: int) -> Losses:
        path = context.scratch / folder
        planned = Run(
            router="switch",
            backend="auto",
            steps=steps,
            stop=stop,
            folder=path,
            bf16=True,
        )
        return train(planned, context)

    with ThreadPoolExecutor(2) as pool:
        uninterrupted, first_half = pool.map(run, ("whole", "parts"), (steps, steps // 2))
    check_steps("the whole run", uninterrupted, 1, steps)
    check_steps("the first part", first_half, 1, steps // 2)
    if uninterrupted.validation is None:
        raise Failure("the whole run left no validation loss in its summary.json")
    if first_half.steps != {step: uninterrupted.steps[step] for step in first_half.steps}:
        raise Failure(
            f"the same run twice has other losses: {first_half.steps} and {uninterrupted.steps}"
        )
    resumed = run("parts", steps)
    # A run that did not resume from the checkpoint would have printed the first steps again.
    check_steps("the resumed part", resumed, steps // 2 + 1, steps)
    joined_steps = {**first_half.steps, **resumed.steps}
    # Megatron's line of the second step after a start has the mean of the first two losses.
    mean = steps // 2 + 2
    differ = [
        n
        for n in uninterrupted.steps
        if n != mean and joined_steps.get(n) != uninterrupted.steps[n]
    ]
    if differ or resumed.validation != uninterrupted.validation:
        raise Failure(
            f"a resumed run differs at steps {differ}: validation {resumed.validation}, not "
            f"{uninterrupted.validation}"
        )
    return {"losses": list(uninterrupted.steps.values()), "validation": uninterrupted.validation}


def check_steps(name: str, losses: Losses, first: int, last: int) -> None:
    """Raise `Failure` unless a run printed the losses of these steps."""
    if list(losses.steps) != list(range(first, last + 1)):
        raise Failure(f"{name} printed losses of steps {[*losses.steps]}, not of {first} to {last}")


def compare(router: str, context: Context) -> dict[str, Any]:
    """Check that every backend trains to the same losses, and to those of a CPU if stored."""
    steps = context.choose(20, 2)
    names = [name for name in forms.backends(oracle=True) if name != "auto"]
    if context.dry:  # two backends are enough, one of them in Triton's interpreter
        fast_names = [name for name in names if name not in (forms.ORACLE, "torch")]
        names = [*fast_names[:1], *filter(forms.is_interpreted, fast_names)]
    reasons: dict[str, str] = {}

    def run(name: str) -> Losses | None:
        planned = Run(
            router=router,
            backend=name,
            steps=steps,
            stop=steps,
            folder=context.scratch / f"{router}-{name}",
            bf16=not (context.dry and forms.is_interpreted(name)),
        )
        try:
            return train(planned, context)
        except NotHere as reason:
            reasons[name] = str(reason)
            return None
        finally:
            shutil.rmtree(planned.folder, ignore_errors=True)

    with ThreadPoolExecutor(context.choose(AT_A_TIME, 2)) as pool:
        losses_of_run = dict(zip(names, pool.map(run, names), strict=True))
    losses = {
        name: [float(loss) for loss in run.steps.values()]
        for name, run in losses_of_run.items()
        if run
    }
    if CURVE.exists() and not context.dry:
        losses["stored CPU"] = json.loads(CURVE.read_text(encoding="utf-8"))[router]
    if len(losses) < 2:
        raise Failure(
            f"{', '.join(losses) or 'no backend'} alone trains, others are refused: {reasons}"
        )
    check_equal(losses, steps)
    return {"losses": losses, "refused": reasons}


def check_equal(losses: Mapping[str, Sequence[float]], steps: int) -> None:
    """Raise `Failure` unless all runs have equal losses at every step, within the tolerance."""
    (first_name, expected), *other_curves = losses.items()
    for name, curve in losses.items():
        if len(curve) != steps:
            raise Failure(f"{name} printed {len(curve)} losses of {steps} steps")
    for name, curve in other_curves:
        largest = max(abs(a - b) for a, b in zip(curve, expected, strict=True))
        if not largest < TOLERANCE:
            raise Failure(f"losses of {name} and {first_name} differ by {largest:.1e}: {curve}")


def train(run: Run, context: Context) -> Losses:
    """Train in a process of its own.

    Raises:
        NotHere: if the command line is refused.
        Failure: if the run fails.
    """
    sizes = context.choose(GPU_SIZES, DRY_SIZES)
    command = [sys.executable, "-m", "megatron_sffn.pretrain", *run.flags(sizes)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    output = result.stdout + result.stderr
    if result.returncode:
        print(" ".join(command), output[-6000:], sep="\n", flush=True)
        kind = NotHere if result.returncode == 2 else Failure
        raise kind(f"{run.router} with {run.backend}: {reason_in(result.stderr or output)}"[:250])
    summary = run.folder / "summary.json"
    matches = re.findall(r"iteration\s+(\d+)/.*?lm loss: (\S+)", output)
    validation = None
    if run.stop == run.steps and summary.exists():
        validation = json.loads(summary.read_text(encoding="utf-8"))["validation_loss"]
    return Losses(steps={int(step): loss for step, loss in matches}, validation=validation)


def store_curve() -> None:
    """Train on a CPU at the sizes for a GPU, and store the losses.

    Raises:
        ConfigError: on a machine with CUDA, whose losses would be compared with themselves.
    """
    if torch.cuda.is_available():
        raise ConfigError(
            "cpu_losses.json is for a CPU, and this machine has CUDA; use one without"
        )
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        context = Context(dry=False, out=scratch, scratch=scratch, deadline=float("inf"))
        for router in ROUTERS:
            run = Run(
                router=router,
                backend="torch",
                steps=20,
                stop=20,
                folder=scratch / router,
                bf16=True,
            )
            losses = train(run, context)
            curves[router] = [float(loss) for loss in losses.steps.values()]
    CURVE.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(store_curve)
