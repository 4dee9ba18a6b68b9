"""The run without a fault, to which the other runs are compared."""

import pytest

from tests.faults.jobs import Job
from tests.faults.scenarios import undisturbed


@pytest.fixture(scope="session")
def undisturbed_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run without a fault, after its end."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))
