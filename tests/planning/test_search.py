"""The best layout is the fastest of all that a run accepts and that fit."""

from __future__ import annotations

import pytest

from megatron_sffn.planning.layouts import Candidate, candidates, parse_base, refusal, workload_of
from megatron_sffn.planning.search import plan_of, search
from megatron_sffn.planning.step_time import step_time
from megatron_sffn.train.first_rank import parse_as_first_rank
from megatron_sffn.utils.errors import ConfigError
from tests.planning.runs import FLAGS, cluster
from tools import accounting

ONE_STAGE = " --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"

# Megatron itself causes this warning.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")


def test_one_gpu_needs_the_memory_that_accounting_counts() -> None:
    flags = [*FLAGS.split(), "--micro-batch-size", "2"]
    options = accounting.build_parser().parse_args(["--device", "cuda"])
    row, _ = accounting.row_of(flags, options)
    outcome = search(parse_base(flags), cluster(1))
    assert [plan.candidate for plan in outcome.plans] == [Candidate(micro_batch_size=2)]
    assert row.costs is not None
    assert outcome.best.memory.total == row.costs.memory


def test_the_first_plan_is_the_minimum_of_all_valid_layouts_that_fit() -> None:
    base, node = parse_base(FLAGS.split()), cluster(8, memory=0.5e9)
    outcome = search(base, node)
    assert outcome.too_large
    valid = [
        plan_of(base, candidate, node)
        for candidate in candidates(base, 8)
        if refusal(base, candidate, 8) is None
    ]
    fitting = [plan.time.total for plan in valid if plan.memory.total <= 0.9 * 0.5e9]
    assert outcome.best.time.total == min(fitting)
    assert len(outcome.plans) == len(fitting)
    times = [plan.time.total for plan in outcome.plans]
    assert times == sorted(times)


def test_a_layout_is_refused_exactly_where_a_run_would_refuse_it() -> None:
    base = parse_base(FLAGS.split())
    for index, candidate in enumerate(candidates(base, 8)):
        if index % 29:
            continue
        problem = refusal(base, candidate, 8)
        try:
            parse_as_first_rank([*base.flags, *candidate.flags()], 8, device="cuda")
        except ConfigError:
            assert problem is not None, candidate
        else:
            # Megatron refuses chunks that do not divide a stage when it builds the model.
            only_when_built = {None, "--num-virtual-stages-per-pipeline-rank"}
            assert (problem and problem.flag) in only_when_built, (candidate, problem)


def test_a_size_that_a_flag_gives_is_kept() -> None:
    flags = [*FLAGS.split(), "--expert-model-parallel-size=4", "--micro-batch-size", "1"]
    outcome = search(parse_base(flags), cluster())
    sizes = {(plan.candidate.ep, plan.candidate.micro_batch_size) for plan in outcome.plans}
    assert sizes == {(4, 1)}


def test_tokens_cross_to_each_node_once_where_expert_ranks_fill_nodes() -> None:
    base = parse_base(FLAGS.split())
    run = workload_of(base, Candidate(ep=16), cluster(16))
    assert run.shape.sffn is not None
    assert run.shape.sffn.node_size == 8


def test_more_bandwidth_never_makes_the_best_plan_slower() -> None:
    base = parse_base([*FLAGS.split(), "--micro-batch-size", "2"])
    times = []
    for bandwidth in (5e9, 50e9, 500e9):
        outcome = search(base, cluster(16, network_bandwidth=bandwidth))
        times.append(outcome.best.time.total)
        best = outcome.best
        assert best.time == step_time(best.workload, best.cluster)
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    ("flags", "gpus", "sentence"),
    [
        ("--global-batch-size 3" + ONE_STAGE, 8, "--gpus 8 have no valid layout: "),
        ("--tensor-model-parallel-size 16", 8, "--gpus 8 are fewer than the ranks of the layout"),
        ("--context-parallel-size 2", 8, "--context-parallel-size is given, and a plan sets"),
        ("--micro-batch-size 0", 8, "--micro-batch-size 0 must be at least 1"),
    ],
)
def test_a_run_without_a_layout_is_one_sentence(flags: str, gpus: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        search(parse_base([*FLAGS.split(), *flags.split()]), cluster(gpus))
    assert str(error.value).startswith(sentence)


def test_a_model_that_fits_nowhere_says_what_is_missing() -> None:
    base = parse_base([*FLAGS.split(), "--micro-batch-size", "1"])
    with pytest.raises(ConfigError) as error:
        search(base, cluster(1, memory=0.1e9))
    smallest = plan_of(base, Candidate(), cluster(1)).memory.total / 1e6
    assert f"needs {smallest:.1f} MB beside a reserve of 10%, and 90.0 MB are left" in str(
        error.value
    )


def test_the_global_batch_size_is_required() -> None:
    flags = FLAGS.replace("--global-batch-size 64", "").split()
    with pytest.raises(ConfigError, match=r"^--global-batch-size is missing"):
        parse_base(flags)
