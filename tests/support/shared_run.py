"""A pytest plugin: several pytest processes share one run, module by module.

Inputs: `SHARED_RUN`, the folder in which the processes of a run claim modules, and
`SHARED_RUN_PROCESS`, the number of this one. Outputs: each process runs the modules that it
claimed.

Design notes:
- Every process collects all tests, and claims the next module when it is about to finish the last
  one, so that none waits while another has work.
- Even processes begin with the longest modules, odd ones with the shortest. Most of the former
  start several ranks: two of these at a time take more than twice as long on two cores.
- pytest-xdist does not serve here: its workers have threads, and tests fork their ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest


def claimed_items(items: list[pytest.Item], claims: Path, process: int) -> Iterator[pytest.Item]:
    """The tests of the modules that this process claims, in the order in which it claims them.

    Args:
        items: all tests. Those that start a process group in this process are behind those that
            fork ranks, and are claimed separately.
        claims: folder with an empty file for each claimed module.
        process: number of this process, from 0.
    """
    for one_rank, sorted_items in groupby(items, key=starts_process_group):
        modules = [list(group) for _, group in groupby(sorted_items, key=lambda item: item.path)]
        for module in modules if process % 2 == 0 else reversed(modules):
            name = module[0].nodeid.partition("::")[0].replace("/", ".")
            if _claim(claims / f"{name}{'.one_rank' if one_rank else ''}"):
                yield from module


def starts_process_group(item: pytest.Item) -> bool:
    """True if the test starts a process group in the process of pytest, which then cannot fork."""
    return "one_rank" in getattr(item, "fixturenames", ())


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
    claims, process = Path(os.environ["SHARED_RUN"]), int(os.environ["SHARED_RUN_PROCESS"])
    items = claimed_items(session.items, claims, process)
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
