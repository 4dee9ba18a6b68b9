"""Shared by all tests: the host platform, a single rank, and golden files."""

import os

# Before torch: ranks are forked, and a thread pool does not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"

import gc
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
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402

from tests.second_megatron import wrong_import  # noqa: E402
from tests.support import ranks  # noqa: E402
from tests.support.shared_run import starts_process_group  # noqa: E402

if (reason := wrong_import()) is not None:
    pytest.exit(reason, returncode=2)

# A background job of a shell ignores Ctrl-C, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.support.pretraining", "tests.support.checkpoints"]

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"

LONG_MODULES = [
    "faults/test_kills",
    "nn/distributed/test_training",
    "integration/test_pretrain",
    "patches/test_rehearsal",
    "integration/test_checkpoints",
    "examples/test_configs",
    "examples/test_tutorial",
    "tools/test_convert_checkpoint",
    "nn/distributed/test_layer",
    "tools/test_analyze_routing",
    "faults/test_signals",
    "test_packaging",
    "accounting/test_activations",
    "ops/test_triton_compile",
    "faults/test_disk",
    "integration/test_evaluation",
    "test_doctor",
    "nn/routers/test_new_router",
    "data/tokenize/test_preprocess",
    "data/loading/test_dali",
    "hf/test_import",
    "inference/test_generate",
    "inference/test_evaluate",
    "hf/test_stock",
    "hf/test_layouts",
    "hf/test_export",
    "hf/test_dense_to_sparse",
    "checkpoints/test_checkpoints",
    "flags/test_arguments",
    "tools/test_preprocess_on_ray",
    "study/test_sweep",
    "study/test_slurm",
    "nn/distributed/test_load_balancing",
    "faults/test_numbers",
    "test_security",
    "integration/test_routing",
    "tools/test_preprocess_data",
    "benchmarks/test_steps",
    "integration/test_loading",
    "integration/test_two_nodes",
    "ops/test_triton_operator",
    "accounting/test_counts",
    "ops/test_triton",
    "test_waits",
    "hf/test_model",
    "hf/test_variants",
    "data/tokenize/test_fast_tokenizers",
    "analysis/test_report",
    "integration/test_training_log",
    "nn/distributed/test_main_grad",
    "accounting/test_memory",
    "faults/test_failures",
    "flags/test_flag_sweep",
    "benchmarks/test_routing_overhead",
    "tools/test_build_index_cache",
    "benchmarks/test_blocks",
    "data/loading/test_index_cache",
    "examples/test_verified",
    "examples/test_data",
    "faults/test_hang",
    "study/test_report",
    "study/test_report_statistics",
]
"""Modules that take more than 12 seconds, the longest first; `make test-fast` leaves them out."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.json")


def pytest_collection_finish() -> None:
    """Take what was imported out of garbage collections, here and in the ranks that are forked."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long modules, and sort the tests.

    Tests that fork ranks come first: gloo's threads, once started here, do not survive a fork.
    Within both kinds the longest modules come first (see `tests.support.shared_run`).
    """
    position = {TESTS / f"{name}.py": index for index, name in enumerate(LONG_MODULES)}
    for item in items:
        if item.path in position:
            item.add_marker("long")
    items.sort(
        key=lambda item: (
            starts_process_group(item),
            position.get(item.path, len(position)),
        )
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compares a JSON-able value with `tests/golden/<name>.json`, or rewrites that file."""

    def compare(name: str, value: Any, *, tolerance: float = 0.0) -> None:
        path = GOLDEN / f"{name}.json"
        if request.config.getoption("--update-golden"):
            path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        expected, actual = json.loads(path.read_text()), json.loads(json.dumps(value))
        if tolerance:
            expected = pytest.approx(expected, abs=tolerance)
        assert actual == expected, (
            f"{path} differs; if that is meant: pytest --update-golden, and review the diff"
        )

    return compare


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """A test leaves the variables of a job, and what ranks inherit from Megatron, as they were."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # An auxiliary loss sets both: the scale in a shape that Megatron's start refuses, the tracker
    # for the number of layers of the first model.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    destroy_moe_metrics_tracker()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's groups over a world of one rank."""
    ranks.FORKS_ARE_SAFE = False
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("rank") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
