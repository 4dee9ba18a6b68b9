"""A refusal as a record, and the one function that turns the first refusal into an error.

Design notes: a check is a generator of problems. It knows neither the order of the checks nor how
a command ends; `run_checks` stops at the first problem, before any process group, file or process
of the run exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_sffn.flags.names import typed
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """A value that cannot work. Its text is one sentence: flag and value, rule, remedy.

    Args:
        flag: as typed, or another subject of the sentence, such as `data set`.
        value: as typed; None if the sentence names the flag alone.
        rule: the rule that the value breaks: how the sentence continues after the value.
        remedy: what to give instead; empty if the rule says it.
        lead: how the sentence begins before the flag, if it does not begin with the flag.
    """

    flag: str
    value: Any
    rule: str
    remedy: str
    lead: str = ""

    def __str__(self) -> str:
        subject = self.flag if self.value is None else typed(self.flag, self.value)
        space = "" if self.rule.startswith(",") else " "
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.lead}{subject}{space}{self.rule}{remedy}"


type Check = Callable[..., Iterable[Problem]]
"""Reads its inputs and reports every problem with them."""


def run_checks(checks: Iterable[Check], *inputs: Any) -> None:
    """Run checks in order.

    Args:
        checks: take the same inputs.
        inputs: inputs of each check.

    Raises:
        ConfigError: for the first problem.
    """
    for check in checks:
        for problem in check(*inputs):
            raise ConfigError(str(problem))
