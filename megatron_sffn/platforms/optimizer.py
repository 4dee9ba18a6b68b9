"""Megatron's optimizers in a checkpoint: steps and learning rates, where Megatron 0.19 loses them.

Enters: Megatron's optimizer classes. Leaves: three of their methods replaced, on every machine.

A checkpoint's number of optimizer steps is written by the first rank alone, for each of its
optimizers: one for dense weights, one for tables. Three things go wrong there:

- If the first pipeline stage has no sparse layer, its optimizer for tables has no parameter and so
  no step to write; loading then fails, or starts Adam's bias correction anew.
- The distributed optimizer with torch's Adam (no apex, no Transformer Engine) asserts that a step
  was taken, which none was when it is asked for the shapes to load into; then looks for the step,
  which Adam keeps as a tensor, among the tensors that were loaded; and gives all parameters one
  such tensor, which each of them increments.
- Groups of parameters are paired with those in the checkpoint by their values, the learning rate
  among them: with another `--lr` no pair is found, and `--override-opt-param-scheduler` and
  `--use-checkpoint-opt-param-scheduler` fail on what they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_sffn.platforms.adaptation import Adaptation, apply_once

RATES = ("max_lr", "min_lr")
"""Of a group of parameters: what `--lr` and `--min-lr` say."""


def install() -> None:
    """Replace the methods; called again, do nothing.

    Raises:
        ConfigError: if a method no longer exists.
    """
    apply_once(adaptations())


def adaptations() -> tuple[Adaptation, ...]:
    """Every name that is replaced, with the Megatron code that needs it."""
    return (
        Adaptation(
            target="megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",
            make=_with_steps_and_rates,
            needed_by="megatron.training.checkpointing.load_checkpoint",
        ),
        Adaptation(
            target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict",
            make=_also_before_the_first_step,
            needed_by="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        ),
        Adaptation(
            target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer."
            "_set_main_param_and_optimizer_states",
            make=_without_step,
            needed_by="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        ),
    )


def _with_steps_and_rates(original: Callable[..., None]) -> Callable[..., None]:
    """All optimizers have taken equally many steps: those without the number get it from others.

    And every parameter gets a counter of its own, and every group one rate, here and there.
    """

    def load_state_dict(self: Any, state_dict: Any) -> None:
        chained = 0 in state_dict
        states = [state_dict[i] for i in sorted(state_dict)] if chained else [state_dict]
        for optimizer, state in zip(self.chained_optimizers, states, strict=False):
            saved = state.get("optimizer", state)["param_groups"]
            _share_rates(optimizer.optimizer.param_groups, saved)
        steps = [step for state in states for step in _steps(state)]
        for state in states if steps else []:
            _set_steps(state, max(steps))
        original(self, state_dict)
        for optimizer in self.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                if torch.is_tensor(state.get("step")):
                    state["step"] = state["step"].clone()

    return load_state_dict


def _share_rates(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Give pairs of groups that differ in the learning rate alone this run's, or the saved one."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys
    from megatron.training import get_args

    def rest(group: dict[str, Any]) -> list[Any]:
        return [group.get(key) for key in param_group_identifier_keys if key not in RATES]

    for there in saved:
        alike = [group for group in groups if rest(group) == rest(there)]
        if len(alike) != 1 or all(alike[0].get(key) == there.get(key) for key in RATES):
            continue
        source, target = alike[0], there
        if get_args().use_checkpoint_opt_param_scheduler:
            source, target = target, source
        target.update({key: source[key] for key in RATES})


def _steps(state: dict[str, Any]) -> list[Any]:
    """The steps that one optimizer's state names: per optimizer, or per group of parameters."""
    inner = state.get("optimizer", state)
    named = [group.get("step") for group in inner["param_groups"]]
    named.append(inner.get("state", {}).get("common_step"))
    return [step for step in named if step is not None]


def _set_steps(state: dict[str, Any], step: Any) -> None:
    """Write the step where this optimizer looks for it."""
    inner = state.get("optimizer", state)
    if "param_state" in state:  # the distributed optimizer
        for group in inner["param_groups"]:
            group["step"] = int(step)
    elif "state" in inner:
        inner["state"].setdefault("common_step", step)


def _also_before_the_first_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's Adam allocates its state in its first step; here it is asked for before that."""

    def state_dict(self: Any) -> Any:
        from megatron.core.optimizer import distrib_optimizer

        optimizer = self.optimizer
        if distrib_optimizer.HAVE_APEX_OR_TE or optimizer.state:
            return original(self)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        fused = optimizer.defaults.get("fused")  # its kernel reads the step on the GPU
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if fused else "cpu"),
                **{key: torch.zeros_like(parameter) for key in self.optimizer_state_keys},
            }
        if parameters:
            return original(self)
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "step": 0}
            for group in optimizer.state_dict()["param_groups"]
        ]
        scaler = {"grad_scaler": self.grad_scaler.state_dict()} if self.grad_scaler else {}
        return {"optimizer": {"param_groups": groups}, **scaler}

    return state_dict


def _without_step(original: Callable[..., None]) -> Callable[..., None]:
    """The step of torch's Adam is set from its group; it is not among the loaded tensors."""

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        original(self, model_param, {"step": None, **tensors})

    return set_states
