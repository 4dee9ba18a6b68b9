"""Records the evaluations of a run: the step, the data sets, and their losses.

Inputs: Megatron's calls of its evaluation, and the loss of each evaluated microbatch. Outputs: the
losses for `summary.json`, and `validation.jsonl` in the run's folder, with a line for each
evaluation of the validation set. On resume, the lines up to the loaded step are kept.

Design notes: the hook that Megatron calls after a data set gets neither the step nor the data set.
So its function `evaluate_and_print_results`, which gets both, is wrapped.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.patches import run_hooks
from megatron_sffn.patches.registry import apply
from megatron_sffn.utils.atomic_files import read_records, replace_records


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One pass over the validation sets, or over the test set.

    Args:
        iteration: steps that the model was trained.
        is_test: True if the test set is evaluated.
        num_sets: data sets that are read, one after the other.
        losses: for each data set, the mean over its tokens.
    """

    iteration: int
    is_test: bool
    num_sets: int = 1
    losses: list[float] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """True after all data sets have been read."""
        return len(self.losses) == self.num_sets

    @property
    def loss(self) -> float:
        """Mean over the data sets."""
        return sum(self.losses) / len(self.losses)


class Evaluations:
    """Evaluations of one run.

    Args:
        args: Megatron's namespace.
        folder: the run's folder.
    """

    def __init__(self, args: Namespace, folder: Path) -> None:
        self.args = args
        self.path = folder / "validation.jsonl"
        self.current: Evaluation
        self.finished: list[Evaluation] = []
        self._loss = torch.zeros(2, dtype=torch.float64)

    def install(self) -> None:
        """Wrap Megatron's function."""
        apply(run_hooks.EVALUATE, self._with_context)

    def _with_context(self, original: Callable[..., None]) -> Callable[..., None]:
        """Note the step and the data set; give Megatron batch counts in the form that it reads."""

        def evaluate(
            prefix: str,
            forward_step: Any,
            iterators: Any,
            model: Any,
            iteration: int,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            is_test, run, names = "test set" in prefix, self.args, self.args.validation_set_names
            if run.full_validation:
                # Megatron zips the lists of data sets, of batch counts and of names.
                iterators = [iterators] if is_test else iterators
                run.eval_iters = [run.sffn_eval_iters] if is_test else run.sffn_validation_batches
                run.validation_set_names = None if is_test else names
            self.begin(iteration, is_test=is_test)
            original(prefix, forward_step, iterators, model, iteration, *args, **kwargs)
            run.validation_set_names = names

        return evaluate

    def begin(self, iteration: int, *, is_test: bool) -> None:
        """Called on every rank before an evaluation.

        Args:
            iteration: steps that the model was trained.
            is_test: True if the test set is evaluated.
        """
        several = self.args.full_validation and not is_test
        num_sets = len(self.args.sffn_validation_batches) if several else 1
        self.current = Evaluation(iteration=iteration, is_test=is_test, num_sets=num_sets)
        self._loss.zero_()

    def add(self, loss_and_tokens: Tensor) -> None:
        """Add an evaluated microbatch's summed loss and number of tokens, `[2]`."""
        self._loss += loss_and_tokens.detach().double().cpu()

    def end_set(self) -> Evaluation:
        """Called on every rank when a data set was read; returns the current evaluation."""
        # Ranks of a TP group hold equal sums, and ranks of other stages zeros. So the all-reduce
        # multiplies loss and tokens by the same number, and their quotient is right.
        total = self._loss.clone().to(torch.cuda.current_device())
        torch.distributed.all_reduce(total)
        self._loss.zero_()
        loss, tokens = total.tolist()
        self.current.losses.append(loss / max(tokens, 1))
        if self.current.is_finished:
            self._finish(self.current)
        return self.current

    def _finish(self, evaluation: Evaluation) -> None:
        """Keep the evaluation, and write its line on rank 0."""
        is_first = not self.validations
        self.finished.append(evaluation)
        if evaluation.is_test or torch.distributed.get_rank() != 0:
            return
        record: dict[str, Any] = {"iteration": evaluation.iteration, "loss": evaluation.loss}
        if evaluation.num_sets > 1:
            record["losses"] = dict(zip(self._names(evaluation), evaluation.losses, strict=True))
        # Before the first line of this process, later steps in the file are those of a process that
        # died, or of another run.
        keeps_all = self.args.skip_train or not is_first

        def keep(old_record: dict[str, Any]) -> bool:
            iteration = old_record["iteration"]
            is_known = keeps_all or iteration <= self.args.iteration
            return bool(is_known and iteration != evaluation.iteration)

        replace_records(self.path, keep, [record])

    def _names(self, evaluation: Evaluation) -> list[str]:
        """Names of the data sets, as in Megatron's log."""
        names: list[str] | None = self.args.validation_set_names
        return names or [str(number) for number in range(evaluation.num_sets)]

    @property
    def validations(self) -> list[Evaluation]:
        """The finished evaluations of the validation set in this process."""
        return [evaluation for evaluation in self.finished if not evaluation.is_test]

    def summary(self) -> dict[str, Any]:
        """Losses for `summary.json`."""
        tests = [evaluation.loss for evaluation in self.finished if evaluation.is_test]
        last = self.validations[-1] if self.validations else None
        loss_of_set = None
        if last is not None and last.num_sets > 1:
            loss_of_set = dict(zip(self._names(last), last.losses, strict=True))
        curve = [[line["iteration"], line["loss"]] for line in read_records(self.path)]
        return {
            "validation_loss": last.loss if last else None,
            "validation_losses": loss_of_set,
            "test_loss": tests[-1] if tests else None,
            "validation_curve": curve,
        }
