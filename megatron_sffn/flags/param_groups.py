"""Factors for keys, values and gates: the form of `--sffn-lr-mult` and `--sffn-wd-mult`.

Inputs: the text of a flag, such as `values:4,gates:0.5`. Outputs: a factor for each group named.
"""

from __future__ import annotations

import math
from argparse import Namespace

GROUPS = {
    "keys": "the keys of the blocks",
    "values": "the values of the blocks",
    "gates": "the router's own weights",
}
"""Name of a group of weights -> what is in it."""


def factors_of(text: str | None) -> dict[str, float]:
    """Group -> factor; empty if the flag is not given.

    Raises:
        ValueError: with the part of a sentence that says what is wrong.
    """
    factors: dict[str, float] = {}
    for item in [] if text is None else text.split(","):
        group, colon, number = item.strip().partition(":")
        if not colon or group not in GROUPS:
            raise ValueError(f"has {item!r}, which is not one of {', '.join(GROUPS)} and a factor")
        if group in factors:
            raise ValueError(f"names {group} twice")
        factors[group] = _factor(group, number)
    return factors


def _factor(group: str, number: str) -> float:
    """A finite number of at least 0; raises ValueError otherwise."""
    try:
        factor = float(number)
    except ValueError:
        raise ValueError(f"has {number!r} for {group}, which is not a number") from None
    if not math.isfinite(factor) or factor < 0:
        raise ValueError(f"has {number} for {group}, which is not a finite number of at least 0")
    return factor


def lr_factors(args: Namespace) -> dict[str, float]:
    """Factors of the learning rate; of a checkpoint that is older than the flag, none."""
    return factors_of(vars(args).get("sffn_lr_mult"))


def wd_factors(args: Namespace) -> dict[str, float]:
    """Factors of the weight decay; of a checkpoint that is older than the flag, none."""
    return factors_of(vars(args).get("sffn_wd_mult"))
