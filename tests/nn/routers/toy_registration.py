"""A pytest plugin (`-p`) that registers the toy router, as a line in `ROUTERS` would."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register the router, and let the tests that train several routers together train it alone."""
    # Imported when tests/conftest.py has prepared Megatron for this machine.
    from megatron_sffn.nn.routers import ROUTERS
    from tests.nn.routers.toy_router import ToyConfig

    ROUTERS[ToyConfig.name] = ToyConfig
    from tests.support import router_cases

    router_cases.SPARSE[:] = [ToyConfig.name]
