"""What all tests share: the host platform, one rank, and golden files."""

import os

# Before torch: ranks are forked, and a thread pool does not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"

import importlib.util
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sffn.patches import prepare

if importlib.util.find_spec("megatron") is None:
    pytest.exit(
        "megatron-core is not installed, which every test needs; run make env, or on a machine "
        "without a network see docs/gpu.md",
        returncode=2,
    )
prepare()

from megatron.core import parallel_state  # noqa: E402  (imported on an adapted platform)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker  # noqa: E402

from tests.support import ranks  # noqa: E402

# A shell's background job ignores Ctrl-C, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.support.pretraining", "tests.support.checkpoints"]

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork ranks first: gloo's threads, once started here, do not survive a fork."""
    items.sort(key=lambda item: "one_rank" in getattr(item, "fixturenames", ()))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compares a JSON-able value with `tests/golden/<name>.json`, or rewrites that file."""

    def compare(name: str, value: Any, *, tolerance: float = 0.0) -> None:
        path = GOLDEN / f"{name}.json"
        if request.config.getoption("--update-golden"):
            path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        expected, found = json.loads(path.read_text()), json.loads(json.dumps(value))
        if tolerance:
            expected = pytest.approx(expected, abs=tolerance)
        assert found == expected, (
            f"{path} differs; if that is meant: pytest --update-golden, and review the diff"
        )

    return compare


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's groups over a world of one rank."""
    ranks.FORKS_ARE_SAFE = False
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("rank") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    destroy_moe_metrics_tracker()  # it has the number of layers of the first model
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
