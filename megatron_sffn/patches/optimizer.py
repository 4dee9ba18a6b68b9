"""Megatron's optimizers in a checkpoint: steps and learning rates, where Megatron 0.19 loses them.

Enters: Megatron's optimizer classes. Leaves: five of their methods replaced, on every machine.

A checkpoint's number of optimizer steps is written by the first rank alone, for each of its
optimizers: one for dense weights, one for tables. Four things go wrong there:

- If the first pipeline stage has no sparse layer, its optimizer for tables has no parameter and so
  no step to write; loading then fails, or starts Adam's bias correction anew.
- The distributed optimizer with torch's Adam (no apex, no Transformer Engine) asserts that a step
  was taken, which none was when it is asked for the shapes to load into; then looks for the step,
  which Adam keeps as a tensor, among the tensors that were loaded; and gives all parameters one
  such tensor, which each of them increments.
- Adam has no state before its first step, and under fp16 the first steps are skipped until the loss
  scale fits. A checkpoint of them lacks the moments, which every later start looks for.
- Groups of parameters are paired with those in the checkpoint by their values, the learning rate
  among them: with another `--lr` no pair is found, and `--override-opt-param-scheduler` and
  `--use-checkpoint-opt-param-scheduler` fail on what they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_sffn.patches.registry import Adaptation, apply_once

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
        *(
            Adaptation(
                target=f"megatron.core.optimizer.optimizer.{name}.sharded_state_dict",
                make=_with_moments,
                needed_by="megatron.core.optimizer.optimizer.ChainedOptimizer",
            )
            for name in ("Float16OptimizerWithFloat16Params", "FP32Optimizer")
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
        if isinstance(state_dict, list):  # of --ckpt-format torch
            states = state_dict
        else:
            chained = 0 in state_dict
            states = [state_dict[i] for i in sorted(state_dict)] if chained else [state_dict]
        for optimizer, state in zip(self.chained_optimizers, states, strict=False):
            saved = state.get("optimizer", state)["param_groups"]
            _share_rates(optimizer.optimizer.param_groups, saved)
        # Before the first step there is none to save.
        step = max((step for state in states for step in _steps(state)), default=torch.zeros(()))
        for state in states:
            _set_steps(state, step)
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

    def rates(group: dict[str, Any]) -> list[Any]:
        return [group.get(key) for key in RATES]

    unpaired = list(groups)
    for theirs in sorted(saved, key=lambda group: rates(group) not in map(rates, groups)):
        # First those with the same rates; several that differ, as under --decoupled-lr, in order.
        alike = [group for group in unpaired if rest(group) == rest(theirs)]
        alike.sort(key=lambda group: rates(group) != rates(theirs))
        if not alike:
            continue
        ours = alike[0]
        unpaired = [group for group in unpaired if group is not ours]
        if rates(ours) == rates(theirs):
            continue
        source, target = ours, theirs
        if get_args().use_checkpoint_opt_param_scheduler:
            source, target = target, source
        target.update({key: source[key] for key in RATES})


def _steps(state: dict[str, Any]) -> list[Any]:
    """The steps that one optimizer's state names: of all, a group, or (`torch`) a parameter."""
    inner = state.get("optimizer", state)
    named = [group.get("step") for group in inner["param_groups"]]
    for key, value in inner.get("state", {}).items():
        named.append(value if key == "common_step" else value.get("step"))
    return [step for step in named if step is not None]


def _set_steps(state: dict[str, Any], step: Any) -> None:
    """Write the step where this optimizer looks for it."""
    inner = state.get("optimizer", state)
    if "param_state" in state:  # the distributed optimizer
        for group in inner["param_groups"]:
            group["step"] = int(step)
    elif "state" in inner:
        inner["state"].setdefault("common_step", step)


def _with_moments(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adam's moments are saved as zeros where it has taken no step."""

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = self.optimizer
        if optimizer is not None and self.init_state_fn is not None:
            steps = [state["step"] for state in optimizer.state.values() if "step" in state]
            self.init_state_fn(optimizer, self.config)
            if isinstance(optimizer, torch.optim.Adam):
                for parameter, state in optimizer.state.items():
                    state.setdefault("step", _step_of(optimizer, parameter, steps))
        return original(self, *args, **kwargs)

    return sharded_state_dict


def _step_of(optimizer: torch.optim.Adam, parameter: torch.Tensor, steps: list[Any]) -> Any:
    """The step counter of a parameter of torch's Adam: that of the others, or 0."""
    if steps:
        return steps[0].clone()
    fused = optimizer.defaults.get("fused")  # its kernel reads the step on the GPU
    return torch.zeros((), device=parameter.device if fused else "cpu")


def _also_before_the_first_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's Adam allocates its state in its first step; here it is asked for before that."""

    def state_dict(self: Any) -> Any:
        from megatron.core.optimizer import distrib_optimizer

        optimizer = self.optimizer
        if distrib_optimizer.HAVE_APEX_OR_TE or optimizer.state:
            return original(self)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": _step_of(optimizer, parameter, []),
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
