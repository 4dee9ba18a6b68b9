"""Every flag that is refused with sparse layers says why they do not have its feature."""

from __future__ import annotations

import re

import pytest

from megatron_sffn.flags.absent_features import ABSENT, reason_of_absence
from megatron_sffn.flags.megatron_flags import DERIVED, LAYER, REPLACED, is_moe_flag
from megatron_sffn.nn.routers import ROUTERS
from tests.flag_sweep import actions

# Megatron's parser gives this warning.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")


def refused_flags() -> set[str]:
    """Megatron's MoE flags (dest) that no router has."""
    used = {flag for config in ROUTERS.values() for flag in config.megatron_flags}
    used |= {*DERIVED, *LAYER, "moe_router_score_function"}
    return {action.dest for action in actions() if is_moe_flag(action.dest)} - used


def test_every_refused_flag_has_a_reason() -> None:
    assert not {dest for dest in refused_flags() if reason_of_absence(dest) is None}


def test_every_reason_belongs_to_a_refused_flag() -> None:
    refused = refused_flags()
    assert not [flags for flags in ABSENT if not any(re.fullmatch(flags, dest) for dest in refused)]


def test_a_flag_of_a_later_megatron_has_no_reason() -> None:
    assert reason_of_absence("moe_from_the_future") is None


def test_flags_with_another_name_here_are_megatrons() -> None:
    assert {action.dest for action in actions()} >= set(REPLACED)
