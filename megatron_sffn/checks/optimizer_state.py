"""Checks whether a run can load the optimizer's state and the learning-rate schedule.

Inputs: the run's validated arguments, and the common state of a checkpoint. Outputs: a sentence for
each reason why it cannot. In each of these cases Megatron 0.19 fails on a missing tensor or in an
assertion. Everything that Megatron can convert passes: any precision under the distributed
optimizer, any layout of ranks.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sffn.flags.names import flag_of, stated, typed
from megatron_sffn.flags.param_groups import lr_factors, wd_factors

RANKS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Flags (dest) that shard the model over ranks."""

ANEW = "add --no-load-optim to start it anew"
"""The remedy that always works."""


def misfits(args: Namespace, common: dict[str, Any]) -> Iterator[str]:
    """The reasons why a run cannot load the optimizer's state.

    Args:
        args: the run's validated arguments.
        common: the checkpoint's common state, with its `args`.

    Yields:
        Sentences with the values, the rule and the remedy.
    """
    saved = common["args"]
    yield from _optimizer(args, saved)
    yield from _tensors(args, saved)
    yield from _groups(args, saved)
    yield from _schedule(args, common)
    yield from _random_states(args, saved)


def _optimizer(args: Namespace, saved: Namespace) -> Iterator[str]:
    """The state exists, and is that of the same optimizer."""
    saved_args = vars(saved)
    if saved_args.get("no_save_optim"):
        yield f"it was saved with --no-save-optim, without the optimizer's state; {ANEW}"
    if saved_args.get("optimizer", args.optimizer) != args.optimizer:
        yield (
            f"--optimizer {args.optimizer} cannot use the state of {saved.optimizer}; use "
            f"--optimizer {saved.optimizer}, or {ANEW}"
        )
    elif args.optimizer == "muon" and saved.muon_scalar_optimizer != args.muon_scalar_optimizer:
        yield (
            f"--muon-scalar-optimizer {args.muon_scalar_optimizer} cannot use the state of "
            f"{saved.muon_scalar_optimizer}; use that, or {ANEW}"
        )


def _tensors(args: Namespace, saved: Namespace) -> Iterator[str]:
    """The state consists of the same tensors."""
    distributed, saved_distributed = map(_is_distributed, (args, saved))
    if distributed != saved_distributed:
        flag = "--use-distributed-optimizer"
        yield (
            f"this run has {stated(flag, distributed)}, but the optimizer's state was saved with "
            f"{stated(flag, saved_distributed)}, in another form; use that, or {ANEW}"
        )
    precision, saved_precision = (_precision(a) for a in (args, saved))
    if not saved_distributed and (precision == "fp32") != (saved_precision == "fp32"):
        yield (
            f"this run is in {precision}, but the optimizer's state is of {saved_precision} and "
            f"has other tensors; use that, or {ANEW} (--use-distributed-optimizer has no such "
            "limit)"
        )
    if not vars(saved).get("use_distributed_optimizer"):
        return  # Muon's whole tensors are saved by their names
    if vars(saved).get("dist_ckpt_optim_fully_reshardable"):
        return
    for dest in RANKS:
        size, saved_size = (vars(a).get(dest) or 1 for a in (args, saved))
        if size != saved_size:
            yield (
                f"{flag_of(dest)} {size} differs from {saved_size} of a checkpoint that was saved "
                "with --no-dist-ckpt-optim-fully-reshardable; use that, save it again without this "
                f"flag, or {ANEW}"
            )


def _is_distributed(args: Namespace) -> bool:
    """True if ranks share the optimizer's state; Megatron has a flag of its own for Muon's."""
    flags = ("use_distributed_optimizer", "use_layer_wise_distributed_optimizer")
    return any(vars(args).get(dest) for dest in flags)


def _random_states(args: Namespace, saved: Namespace) -> Iterator[str]:
    """With a generator for each data-parallel rank, the number of these ranks is the same."""
    if args.no_load_rng:
        return
    per_rank, saved_per_rank = (
        bool(vars(a).get("data_parallel_random_init")) for a in (args, saved)
    )
    if per_rank != saved_per_rank:
        flag = "--data-parallel-random-init"
        yield (
            f"this run has {stated(flag, per_rank)}, but the checkpoint's states of random numbers "
            f"were saved with {stated(flag, saved_per_rank)}; use that, or add --no-load-rng to "
            "start them anew"
        )
    size, saved_size = args.data_parallel_size, vars(saved).get("data_parallel_size")
    if per_rank and size != saved_size:
        yield (
            f"--data-parallel-random-init has random numbers of their own for each data-parallel "
            f"rank, of which there are {size} here and {saved_size} in the checkpoint; add "
            "--no-load-rng to start them anew, or use as many ranks"
        )


def _precision(args: Namespace) -> str:
    """The precision: fp32, or the flag of another one."""
    return next((flag_of(dest) for dest in ("bf16", "fp16") if vars(args).get(dest)), "fp32")


WHOSE = (
    "say whose counts: --override-opt-param-scheduler for this run's, "
    "--use-checkpoint-opt-param-scheduler for the checkpoint's"
)
"""The remedy for rates and schedules that differ."""


def _groups(args: Namespace, saved: Namespace) -> Iterator[str]:
    """The flags name the same groups of weights, and factors that differ have one that counts."""
    factors, saved_factors = _factors(args), _factors(saved)
    differ = f"this run has {_stated_factors(args)}, but the optimizer's state was saved with "
    differ += _stated_factors(saved)
    if factors.keys() != saved_factors.keys():
        yield (
            f"{differ}, for other groups of weights; name the same groups, with a factor of 1 "
            f"where nothing changes, or {ANEW}"
        )
    elif factors != saved_factors and not _says_whose_schedule(args):
        yield f"{differ}; give the same, or {WHOSE}"


def _factors(args: Namespace) -> dict[str, tuple[float, float]]:
    """Group of weights that a flag names -> factors of its learning rate and weight decay."""
    rates, decays = lr_factors(args), wd_factors(args)
    return {group: (rates.get(group, 1), decays.get(group, 1)) for group in rates | decays}


def _stated_factors(args: Namespace) -> str:
    """The flags of the factors as typed."""
    values = {dest: vars(args).get(dest) for dest in ("sffn_lr_mult", "sffn_wd_mult")}
    given = [typed(flag_of(dest), value) for dest, value in values.items() if value is not None]
    return " ".join(given) or "no --sffn-lr-mult or --sffn-wd-mult"


def _says_whose_schedule(args: Namespace) -> bool:
    """True if a flag says whether the schedule of the run or of the checkpoint counts."""
    return bool(args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler)


def _schedule(args: Namespace, common: dict[str, Any]) -> Iterator[str]:
    """The schedule is the same, or a flag says which of the two counts."""
    if _says_whose_schedule(args):
        return
    saved = common.get("opt_param_scheduler") or {}
    batch, old_batch = args.global_batch_size, vars(common["args"]).get("global_batch_size")
    for name, flag, value in _schedule_of(args):
        if name not in saved or saved[name] == value:
            continue
        if (
            name.endswith("_steps")
            and flag.endswith("-iters")
            and saved[name] * batch == (value * old_batch)
        ):
            yield (
                f"--global-batch-size {batch} differs from the checkpoint's {old_batch}, and its "
                f"schedule counts the samples of {flag}; give the same, or {WHOSE}"
            )
        suggestion = ""
        if name == "lr_decay_steps":
            last = _rate(saved, common["args"], saved["num_steps"])
            suggestion = (
                f"for more steps at its last rate add --override-opt-param-scheduler --lr {last:g} "
                "--lr-decay-style constant --lr-warmup-iters 0, or "
            )
        yield (
            f"{flag} makes another schedule than the checkpoint's, {name} {value} instead of "
            f"{saved[name]}; give the same, or {suggestion}{WHOSE}"
        )


def jump_of_the_rate(args: Namespace, common: dict[str, Any]) -> Iterator[str]:
    """A remark if an overridden schedule makes the learning rate jump on resume.

    Args:
        args: the run's validated arguments.
        common: the checkpoint's common state, with its `args`.
    """
    saved = common.get("opt_param_scheduler")
    if not (args.override_opt_param_scheduler and saved):
        return
    steps = saved["num_steps"]
    schedule = {name: value for name, _, value in _schedule_of(args)}
    before, after = _rate(saved, common["args"], steps), _rate(schedule, args, steps)
    if math.isclose(before, after, rel_tol=1e-3):
        return
    yield (
        f"learning rate {before:g} of the checkpoint -> {after:g} where this run's schedule is now "
        "(--override-opt-param-scheduler); to go on at the last rate: "
        f"--lr {before:g} --lr-decay-style constant --lr-warmup-iters 0"
    )


def _rate(schedule: dict[str, Any], args: Namespace, steps: int) -> float:
    """Megatron's learning rate after a number of samples.

    Args:
        schedule: the state of Megatron's scheduler, or the state that follows from `_schedule_of`.
        args: arguments of the run that the schedule belongs to.
        steps: number of samples.
    """
    batch = args.global_batch_size
    annealed = vars(args).get("lr_wsd_decay_iters")
    annealed = vars(args).get("lr_wsd_decay_samples") if annealed is None else annealed * batch
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[]),
        init_lr=vars(args).get("lr_warmup_init", 0.0),
        max_lr=schedule["max_lr"],
        min_lr=schedule["min_lr"],
        lr_warmup_steps=schedule["lr_warmup_steps"],
        lr_decay_steps=schedule["lr_decay_steps"],
        lr_decay_style=schedule["lr_decay_style"],
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=annealed,
        lr_wsd_decay_style=vars(args).get("lr_wsd_decay_style", "exponential"),
    )
    scheduler.num_steps = steps
    return float(scheduler.get_lr({}))


def _schedule_of(args: Namespace) -> Iterator[tuple[str, str, Any]]:
    """The state of Megatron's scheduler for these flags, as name, flag and value."""
    flags = vars(args)
    unit, batch = ("iters", args.global_batch_size) if args.train_iters else ("samples", 1)
    total = flags[f"train_{unit}"]
    if total is None:
        return
    decay_steps = flags[f"lr_decay_{unit}"]
    decay = (total if decay_steps is None else decay_steps) * batch
    yield "max_lr", "--lr", args.lr
    yield "min_lr", "--min-lr", args.min_lr
    yield "lr_decay_style", "--lr-decay-style", args.lr_decay_style
    yield "lr_decay_steps", f"--{'train' if decay_steps is None else 'lr-decay'}-{unit}", decay
    if args.lr_warmup_fraction is not None:
        yield "lr_warmup_steps", "--lr-warmup-fraction", args.lr_warmup_fraction * decay
    else:
        yield "lr_warmup_steps", f"--lr-warmup-{unit}", flags[f"lr_warmup_{unit}"] * batch
    yield "start_wd", "--weight-decay", args.start_weight_decay
    yield "end_wd", "--weight-decay", args.end_weight_decay
    yield "wd_incr_steps", f"--train-{unit}", total * batch
    yield "wd_incr_style", "--weight-decay-incr-style", args.weight_decay_incr_style
