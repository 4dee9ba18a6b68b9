"""The names of flags: as typed on the command line, and as stored in argparse's namespace."""

from __future__ import annotations

from typing import Any

FLAG_OF_DEST = {
    "add_bias_linear": "--disable-bias-linear",
    "add_position_embedding": "--no-position-embedding",
    "fp4": "--fp4-format",
    "fp8": "--fp8-format",
    "layernorm_epsilon": "--norm-epsilon",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "logit_dtype": "--output-logit-dtype",
    "nccl_ub": "--use-nccl-ub",
    "perform_initialization": "--no-initialization",
}
"""Dest of a flag that is typed differently than it is stored -> the flag."""


def flag_of(dest: str) -> str:
    """The flag of an argparse dest, as typed."""
    return FLAG_OF_DEST.get(dest, "--" + dest.replace("_", "-"))


def dest_of(flag: str) -> str:
    """The argparse dest of a flag."""
    return flag.removeprefix("--").replace("-", "_")


def typed(flag: str, value: Any) -> str:
    """A flag and its value as typed."""
    if value is True:
        return flag
    if isinstance(value, tuple):
        return f"{flag} {','.join(map(str, value))}"
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def stated(flag: str, value: Any) -> str:
    """A flag and its value as typed, or `no FLAG` if the flag is off or not given."""
    return f"no {flag}" if value is False or value is None else typed(flag, value)
