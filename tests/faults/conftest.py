"""The run without a fault, with which the others are compared."""

import pytest

from tests.faults.jobs import Job
from tests.faults.scenarios import undisturbed


@pytest.fixture(scope="session")
def undisturbed_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The undisturbed run; it has ended."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))
