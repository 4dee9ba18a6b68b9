"""The best layout is the fastest of all that a run accepts and that fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sffn.accounting import TrainingSetup
from megatron_sffn.flags.megatron_flags import layout_of
from megatron_sffn.planning.candidates import RECOMPUTATIONS, Candidate, candidates, parse_base
from megatron_sffn.planning.layouts import refusal, workload_of
from megatron_sffn.planning.search import Plan, plan_of, search
from megatron_sffn.planning.step_time import step_time
from megatron_sffn.train.first_rank import parse_as_first_rank
from megatron_sffn.utils.errors import ConfigError
from tests.planning.runs import FLAGS, cluster
from tools import accounting

ROPE = "--position-embedding-type rope --untie-embeddings-and-output-weights"
MODELS_OF_2026 = {
    "hybrid": f"--sffn-model hybrid {ROPE}",
    "pattern": f"--hybrid-layer-pattern *-*E*E/*E {ROPE}",
    "MLA and MTP": f"--multi-latent-attention --q-lora-rank 48 --mtp-num-layers 1 {ROPE}",
    "Muon": "--optimizer muon",
}
"""What a model has other than `FLAGS`."""

CUT_PATTERN = f"--hybrid-layer-pattern *-*E|*-*-|*E|*E {ROPE}"

SMALL = 0.3e9
"""Bytes of a GPU on which some layouts fit only with recomputation, and some not at all."""

ONE_STAGE = " --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"


def flags_of(changes: str) -> list[str]:
    """The flags of a run; a pattern says the layers, and Muon has a whole optimizer."""
    words = FLAGS
    if "--hybrid-layer-pattern" in changes:
        words = words.replace("--num-layers 8 ", "").replace("--sffn-layers every:2 ", "")
    if "muon" in changes:
        words = words.replace("--use-distributed-optimizer ", "")
    return [*words.split(), *changes.split()]


# Megatron itself causes these warnings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning"),
    pytest.mark.filterwarnings("ignore:--moe-layer-recompute is deprecated:UserWarning"),
]


@pytest.mark.parametrize("changes", ["", *MODELS_OF_2026.values()])
def test_one_gpu_needs_the_memory_that_accounting_counts(changes: str) -> None:
    flags = [*flags_of(changes), "--micro-batch-size", "2"]
    options = accounting.build_parser().parse_args(["--device", "cuda"])
    row, _ = accounting.row_of(flags, options)
    outcome = search(parse_base(flags), cluster(1))
    (candidate,) = (plan.candidate for plan in outcome.plans)
    assert replace(candidate, pattern=None) == Candidate(micro_batch_size=2, recompute="none")
    assert row.costs is not None
    assert outcome.best.memory.total == row.costs.memory


@pytest.fixture(scope="module")
def tried() -> list[Plan]:
    """Every valid layout of 8 small GPUs with every recomputation."""
    base, node = parse_base(FLAGS.split()), cluster(8, memory=SMALL)
    return [
        plan_of(base, replace(candidate, recompute=recompute), node)
        for candidate in candidates(base, 8)
        if refusal(base, candidate, 8) is None
        for recompute in RECOMPUTATIONS
    ]


def test_the_first_plan_is_the_minimum_of_all_valid_layouts_that_fit(tried: list[Plan]) -> None:
    outcome = search(parse_base(FLAGS.split()), cluster(8, memory=SMALL))
    fitting = [plan for plan in tried if plan.memory.total <= 0.9 * SMALL]
    assert outcome.best.time.total == min(plan.time.total for plan in fitting)
    sizes = {replace(plan.candidate, recompute=None) for plan in fitting}
    assert len(outcome.plans) == len(sizes)
    assert len(outcome.plans) + len(outcome.too_large) == len(tried) / len(RECOMPUTATIONS)
    times = [plan.time.total for plan in outcome.plans]
    assert times == sorted(times)


def test_a_layout_recomputes_no_more_than_it_needs_to_fit(tried: list[Plan]) -> None:
    outcome = search(parse_base(FLAGS.split()), cluster(8, memory=SMALL))
    assert {plan.recompute for plan in outcome.plans} == set(RECOMPUTATIONS)
    fits = {plan.candidate: plan.fits for plan in tried}
    for plan in outcome.plans:
        first = next(r for r in RECOMPUTATIONS if fits[replace(plan.candidate, recompute=r)])
        assert plan.recompute == plan.candidate.recompute == first
    memory = {plan.candidate: plan.memory.total for plan in tried}
    for plan in outcome.too_large:
        each = [memory[replace(plan.candidate, recompute=r)] for r in RECOMPUTATIONS]
        assert plan.memory.total == min(each)


def test_less_recomputation_is_never_slower(tried: list[Plan]) -> None:
    """The search relies on it."""
    count = len(RECOMPUTATIONS)
    for start in range(0, len(tried), count):
        times = [plan.time.total for plan in tried[start : start + count]]
        assert times == sorted(times)


@pytest.mark.parametrize(
    ("flags", "recompute"),
    [
        ("--recompute-granularity selective", "selective"),
        ("--recompute-activations", "selective"),
        ("--moe-layer-recompute", "selective"),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 2", "full"),
    ],
)
def test_a_recomputation_that_a_flag_gives_is_kept(flags: str, recompute: str) -> None:
    given = [*FLAGS.split(), *flags.split(), *ONE_STAGE.split()]
    outcome = search(parse_base(given), cluster(memory=SMALL))
    plans = [*outcome.plans, *outcome.too_large]
    assert {plan.recompute for plan in plans} == {recompute}
    assert not any("recompute" in word for plan in plans for word in plan.candidate.flags())
    setup = plans[0].workload.setup
    assert setup.recompute_method == ("block" if "block" in flags else "uniform")
    assert setup.recomputes("moe") == ("moe" in flags)


@pytest.mark.parametrize("recompute", RECOMPUTATIONS)
def test_the_flags_of_a_plan_give_a_run_its_recomputation(recompute: str) -> None:
    base, candidate = parse_base(FLAGS.split()), Candidate(recompute=recompute)
    args, _ = parse_as_first_rank([*base.flags, *candidate.flags()], 8, device="cuda")
    assert (args.recompute_granularity or "none") == recompute
    setup = TrainingSetup.of_args(args, layout_of(args), activation=base.activation, cuda=True)
    assert plan_of(base, candidate, cluster()).workload.setup == setup


def test_a_hybrid_model_with_the_layers_of_a_gpt_takes_as_long_and_needs_as_much() -> None:
    sizes = ["--tensor-model-parallel-size", "1", "--micro-batch-size", "1"]
    gpt, hybrid = (
        search(parse_base([*FLAGS.split(), *sizes, *words]), cluster())
        for words in ((), ("--sffn-model", "hybrid"))
    )
    assert len(gpt.plans) == len(hybrid.plans)
    for plan, same in zip(gpt.plans, hybrid.plans, strict=True):
        assert plan.time == same.time and plan.memory == same.memory
        assert replace(same.candidate, pattern=None) == plan.candidate


def test_what_megatron_refuses_is_not_tried() -> None:
    base = parse_base([*FLAGS.split(), "--cpu-offloading-num-layers", "2"])
    assert base.recomputations == ("none",)


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ("", 29),
        (MODELS_OF_2026["hybrid"], 149),
        (MODELS_OF_2026["pattern"], 79),
        (MODELS_OF_2026["MLA and MTP"], 79),
        (CUT_PATTERN, 29),
    ],
)
def test_a_layout_is_refused_exactly_where_a_run_would_refuse_it(changes: str, step: int) -> None:
    base = parse_base(flags_of(changes))
    for index, candidate in enumerate(candidates(base, 8)):
        if index % step:
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
        ("--optimizer muon", 8, "--use-distributed-optimizer with --optimizer muon gives whole"),
        ("--sffn-router switch:0,avg-k", 8, "--sffn-router switch:0,avg-k has layers of different"),
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
    smallest = plan_of(base, Candidate(recompute="full"), cluster(1)).memory.total / 1e6
    assert (
        f"recomputation full) needs {smallest:.1f} MB beside a reserve of 10%, and 90.0 MB are left"
        in str(error.value)
    )
    assert "--recompute-granularity" not in str(error.value)  # all were tried


def test_a_given_recomputation_that_fits_nowhere_names_one_that_needs_less() -> None:
    words = ("--micro-batch-size", "64", "--recompute-granularity", "selective")
    with pytest.raises(ConfigError) as error:
        search(parse_base([*FLAGS.split(), *words]), cluster(1, memory=0.1e9))
    assert "ETP 1, recomputation selective) needs " in str(error.value)
    assert str(error.value).endswith(
        "or --recompute-granularity full, since activations are the larger part"
    )


def test_the_global_batch_size_is_required() -> None:
    flags = FLAGS.replace("--global-batch-size 64", "").split()
    with pytest.raises(ConfigError, match=r"^--global-batch-size is missing"):
        parse_base(flags)
