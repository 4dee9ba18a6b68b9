"""Megatron's flags that have no effect on pretraining here, each refused rather than ignored.

Inputs: Megatron's parser and namespace before validation. Outputs: the first such flag that was
given another value than its default.

Design notes: `python -m tests.flag_sweep` tries every flag; what it finds without effect is here,
or in `tests/flag_values.py` with the reason why it shows on other machines only.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from megatron_sffn.errors import ConfigError
from megatron_sffn.megatron_flags import typed

GROUPS = {
    "rl": "reinforcement learning",
    "biencoder": "retrieval models",
    "vision": "vision models",
    "inference": "generating text",
    "sft": "fine-tuning on dialogues",
}
"""Groups of flags in Megatron's help -> the programs that they are for."""

ACTING = ("data_sharding",)
"""Flags (dest) of these groups that act on pretraining, too."""


def idle_flags(parser: ArgumentParser) -> dict[str, tuple[str, object, str]]:
    """Flags of the groups.

    Returns:
        dest -> the flag, its default, and what it is for.
    """
    return {
        action.dest: (max(action.option_strings, key=len), action.default, GROUPS[group.title])
        for group in parser._action_groups
        if group.title in GROUPS
        for action in group._group_actions
        if action.dest not in ACTING
    }


def check_idle_flags(args: Namespace, idle: dict[str, tuple[str, object, str]]) -> None:
    """None of them was given.

    Args:
        args: not validated yet.
        idle: of `idle_flags`.

    Raises:
        ConfigError: for the first that was.
    """
    for dest, (flag, default, program) in idle.items():
        value = getattr(args, dest)
        if value != default:
            raise ConfigError(
                f"{typed(flag, value)} is for {program}, and has no effect on pretraining; leave "
                "it out"
            )
