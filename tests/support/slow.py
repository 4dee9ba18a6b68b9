"""Cases that `make test-slow` runs and `make test` leaves out."""

from typing import Any

import pytest
from _pytest.mark import ParameterSet


def slow(*values: Any) -> ParameterSet:
    """A case of `parametrize` for `make test-slow` alone.

    A faster test makes the same proof at its hardest case; this one adds breadth.
    """
    return pytest.param(*values, marks=pytest.mark.slow)
