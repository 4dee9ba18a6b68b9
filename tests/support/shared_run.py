"""A pytest plugin: several pytest processes share one run, module by module.

Inputs: `SHARED_RUN`, the folder in which the processes of a run claim modules. Outputs: each
process runs the modules that it claimed.

Design notes: every process collects all tests, and claims the next module when it is about to
finish the last one, so that none waits while another has work. pytest-xdist does not serve here:
its workers have threads, and tests fork their ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def claimed_items(items: list[pytest.Item], claims: Path) -> Iterator[pytest.Item]:
    """The tests of the modules that this process claims, in order.

    Args:
        items: all tests. Those that start a process group in this process are behind those that
            fork ranks, and are claimed separately.
        claims: folder with an empty file for each claimed module.
    """
    is_ours: dict[str, bool] = {}
    for item in items:
        process_group = "one_rank" in getattr(item, "fixturenames", ())
        key = item.nodeid.partition("::")[0].replace("/", ".") + ".one_rank" * process_group
        if key not in is_ours:
            is_ours[key] = _claim(claims / key)
        if is_ours[key]:
            yield item


def _claim(path: Path) -> bool:
    """Create a file; False if another process has created it."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def pytest_runtestloop(session: pytest.Session) -> bool:
    """Run the claimed tests, as pytest's own loop runs all tests."""
    if session.testsfailed and not session.config.option.continue_on_collection_errors:
        raise session.Interrupted("errors during collection")
    items = claimed_items(session.items, Path(os.environ["SHARED_RUN"]))
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True
