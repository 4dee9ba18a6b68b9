"""Flags of evaluations that contradict each other or are out of range."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron_sffn.checks.problem import Problem


def evaluation(args: Namespace) -> Iterator[Problem]:
    """Evaluations that have no end, no data, or no time at which they run."""
    if args.multiple_validation_sets and not args.full_validation:
        yield Problem(
            "--multiple-validation-sets",
            None,
            "needs --full-validation, since Megatron counts no batches of a single set",
            "add it",
        )
    if args.full_validation and args.sffn_validation_data == "next":
        yield Problem(
            "--sffn-validation-data",
            "next",
            "has nothing to act on with --full-validation, which reads all of the validation set",
            "leave one out",
        )
    if args.full_validation and args.mock_data:
        yield Problem(
            "--full-validation",
            None,
            "has no end with --mock-data",
            "give --eval-iters instead, or data",
        )
    if args.eval_iters < 0:
        yield Problem(
            "--eval-iters", args.eval_iters, "must be at least 0", "0 leaves evaluations out"
        )
    if args.eval_interval is not None and args.eval_interval < 1:
        yield Problem(
            "--eval-interval",
            args.eval_interval,
            "must be at least 1",
            "leave it out to evaluate after training alone",
        )


CHECKS = (evaluation,)
