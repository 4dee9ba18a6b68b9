"""Names of Megatron 0.19's optimizers that lose step counts or learning rates in a checkpoint.

Rank 0 alone writes the number of optimizer steps into a checkpoint, for each of its optimizers:
one for dense weights, one for block weights. Five things go wrong:

- If the first pipeline stage has no sparse layer, its optimizer for block weights has no parameter
  and so no step to write; a resume then fails, or restarts Adam's bias correction.
- The distributed optimizer with torch's Adam (no apex, no Transformer Engine) asserts that a step
  was taken, but none was when its state is built to load into; then it looks for the step, which
  Adam keeps as a tensor, among the loaded tensors; and it gives all parameters one such tensor,
  which each of them increments.
- Adam has no state before its first step, and under fp16 the first steps are skipped until the loss
  scale fits. A checkpoint of these steps lacks the moments that every later resume looks for.
- Parameter groups are paired with those in the checkpoint by their values, and the learning rate is
  one of them: with another `--lr` no pair is found, so that `--override-opt-param-scheduler` and
  `--use-checkpoint-opt-param-scheduler` fail in the case that they are for.
- Groups of equal values count as one, such as keys and values that have the same factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_sffn.patches.registry import Patch, apply

RATES = ("max_lr", "min_lr")
"""Keys of a parameter group that `--lr` and `--min-lr` set."""

GROUP = "sffn_group"
"""Key of a parameter group with its label, if it is of keys, values or gates."""


def install() -> None:
    """Replace the methods; idempotent.

    Raises:
        ConfigError: if a method does not exist.
    """
    for patch in PATCHES:
        apply(patch)


def _with_steps_and_rates(original: Callable[..., None]) -> Callable[..., None]:
    """Load a state in which every optimizer has a step count and every group finds its pair.

    All optimizers have taken equally many steps, so those without a count get that of the others.
    Then every parameter gets a step counter of its own.
    """

    def load_state_dict(self: Any, state_dict: Any) -> None:
        if isinstance(state_dict, list):  # --ckpt-format torch
            states = state_dict
        else:
            is_chained = 0 in state_dict
            states = [state_dict[i] for i in sorted(state_dict)] if is_chained else [state_dict]
        for optimizer, state in zip(self.chained_optimizers, states, strict=False):
            saved_groups = state.get("optimizer", state)["param_groups"]
            _share_rates(optimizer.optimizer.param_groups, saved_groups)
        # Before the first step no count is saved.
        step = max((step for state in states for step in _steps(state)), default=torch.zeros(()))
        for state in states:
            _set_steps(state, step)
        original(self, state_dict)
        for optimizer in self.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                if "momentum_buffer" in state:  # SGD and Muon count no steps
                    state.pop("step", None)
                elif torch.is_tensor(state.get("step")):
                    state["step"] = state["step"].clone()

    return load_state_dict


def _share_rates(run_groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    """Give groups that differ in their learning rates alone the same ones, so that they pair.

    They get the rates of this run, or with `--use-checkpoint-opt-param-scheduler` the saved ones.
    Groups with a label share the factor of the weight decay as well.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys
    from megatron.training import get_args

    def shared_keys(group: dict[str, Any]) -> tuple[str, ...]:
        return (*RATES, "wd_mult") if GROUP in group else RATES

    def identity(group: dict[str, Any]) -> list[Any]:
        shared = shared_keys(group)
        return [group.get(key) for key in param_group_identifier_keys if key not in shared]

    def rates(group: dict[str, Any]) -> list[Any]:
        return [group.get(key) for key in RATES]

    unpaired = list(run_groups)
    # Groups whose rates are equal pair first. Where several differ, as under --decoupled-lr, they
    # pair in order.
    for saved in sorted(saved_groups, key=lambda group: rates(group) not in map(rates, run_groups)):
        candidates = [group for group in unpaired if identity(group) == identity(saved)]
        candidates.sort(key=lambda group: rates(group) != rates(saved))
        if not candidates:
            continue
        run, shared = candidates[0], shared_keys(saved)
        unpaired = [group for group in unpaired if group is not run]
        if all(run.get(key) == saved.get(key) for key in shared):
            continue
        source, target = run, saved
        if get_args().use_checkpoint_opt_param_scheduler:
            source, target = target, source
        target.update({key: source[key] for key in shared})


def _steps(state: dict[str, Any]) -> list[Any]:
    """The step counts in one optimizer's state: of the optimizer, its groups or its parameters."""
    inner = state.get("optimizer", state)
    counts = [group.get("step") for group in inner["param_groups"]]
    for key, value in inner.get("state", {}).items():
        counts.append(value if key == "common_step" else value.get("step"))
    return [step for step in counts if step is not None]


def _set_steps(state: dict[str, Any], step: Any) -> None:
    """Write the step count where this optimizer looks for it."""
    inner = state.get("optimizer", state)
    if "param_state" in state:  # the distributed optimizer
        for group in inner["param_groups"]:
            group["step"] = int(step)
    elif "state" in inner:
        inner["state"].setdefault("common_step", step)


def _with_moments(original: Callable[..., Any]) -> Callable[..., Any]:
    """Save Adam's moments as zeros if it has taken no step."""

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
    """The step counter of a parameter of torch's Adam: a copy of another one's, or 0."""
    if steps:
        return steps[0].clone()
    fused = optimizer.defaults.get("fused")  # its kernel reads the step on the GPU
    return torch.zeros((), device=parameter.device if fused else "cpu")


def _before_the_first_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Allocate the state of torch's Adam, which does so in its first step, before it is read."""

    def state_dict(self: Any) -> Any:
        from megatron.core.optimizer import distrib_optimizer

        optimizer = self.optimizer
        if distrib_optimizer.HAVE_APEX_OR_TE:
            return original(self)
        if optimizer.state:
            for state in optimizer.state.values():
                state.setdefault("step", torch.zeros(()))  # Lion counts none, and reads none
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
    """Load states without `step`, which torch's Adam gets from its parameter group instead."""

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        original(self, model_param, {"step": None, **tensors})

    return set_states


def _with_label(original: tuple[str, ...]) -> tuple[str, ...]:
    """The keys by which groups pair, and the label of a group of keys, values or gates."""
    return (*original, GROUP)


PATCHES = (
    *(
        Patch(
            target=f"megatron.core.optimizer.{module}.param_group_identifier_keys",
            make=_with_label,
            needed_by=f"megatron.core.optimizer.{module}.{user}",
            why="keys and values with equal factors of rate and decay are taken for one group",
            until="Megatron pairs parameter groups by a name",
        )
        for module, user in (
            ("optimizer", "MegatronOptimizer"),
            ("distrib_optimizer", "DistributedOptimizer"),
        )
    ),
    Patch(
        target="megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",
        make=_with_steps_and_rates,
        needed_by="megatron.training.checkpointing.load_checkpoint",
        why="a resume fails with another --lr, or if the first stage has no sparse layer",
        until="Megatron saves one step count, and pairs parameter groups without learning rates",
    ),
    *(
        Patch(
            target=f"megatron.core.optimizer.optimizer.{name}.sharded_state_dict",
            make=_with_moments,
            needed_by="megatron.core.optimizer.optimizer.ChainedOptimizer",
            why="a checkpoint before the first step, which fp16 may skip, lacks Adam's moments",
            until="Megatron allocates the optimizer's state before it saves",
        )
        for name in ("Float16OptimizerWithFloat16Params", "FP32Optimizer")
    ),
    Patch(
        target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict",
        make=_before_the_first_step,
        needed_by="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        why="with torch's Adam a resume fails in an assertion that a step was taken",
        until="Megatron allocates the state of torch's Adam before it loads",
    ),
    Patch(
        target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer."
        "_set_main_param_and_optimizer_states",
        make=_without_step,
        needed_by="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        why="with torch's Adam a resume looks for `step` among the loaded tensors",
        until="Megatron leaves `step` out of the tensors that it sets",
    ),
)
