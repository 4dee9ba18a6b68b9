"""The file of a study: its runs, their names and costs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.study.running.foresee import foresee, valid_forecasts
from megatron_sffn.study.running.study_file import read_study
from megatron_sffn.study.running.terminal_tables import dry_run_table
from megatron_sffn.utils.errors import ConfigError
from tests.study.conftest import WriteStudy
from tools import sweep

# Of Python 3.13's argparse, for a flag of Megatron's.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

AVG_K = {"sffn-router": "avg-k", "sffn-block-size": 8}


def test_lists_are_combined_and_seeds_and_rates_make_no_new_point(write_study: WriteStudy) -> None:
    points = [
        {"sffn-router": "dense"},
        {"sffn-router": ["avg-k", "switch"], "sffn-block-size": [4, 8], "swiglu": [True, False]},
    ]
    runs = read_study(write_study(points, each={"seed": [1, 2], "lr": [0.001, 0.002]})).runs
    assert len(runs) == (1 + 8) * 4 and len({run.name for run in runs}) == len(runs)
    assert len({run.point for run in runs}) == 9
    assert runs[0].name == "dense-seed1-lr0.001" and runs[0].point == "dense"
    assert {"avg-k-g4-swiglu", "avg-k-g4"} < {run.point for run in runs}
    words = next(run.flags for run in runs if run.name == "switch-g8-swiglu-seed2-lr0.002")
    expected = "--sffn-router switch --sffn-block-size 8 --swiglu --seed 2 --lr 0.002"
    assert list(words[-9:]) == expected.split()


def test_a_value_of_several_words_gives_several_words(write_study: WriteStudy) -> None:
    balance = {"moe-router-load-balancing-type": "aux_loss", "weight-decay": 0}
    points = [{**balance, "adam-beta2": None, "sffn-layers": "2 3"}]
    (run,) = read_study(write_study(points)).runs
    expected = "--moe-router-load-balancing-type aux_loss --weight-decay 0 --sffn-layers 2 3"
    assert list(run.flags[-7:]) == expected.split()
    assert run.name == "moe-router-load-balancing-type=aux_loss-weight-decay=0-layers=2_3"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"paralel": 2}, "the key paralel is unknown; did you mean parallel?"),
        ({"sizes": {"cpu": {"rank": 2}}}, "the key rank is unknown; did you mean ranks?"),
        ({"points": []}, "the key points is missing"),
        ({"points": {"sffn-router": "dense"}}, "points has to be a list"),
        ({"points": ["dense"]}, "'dense' has to be flags with their values"),
        ({"points": [{"save": "x"}]}, "--save differs from run to run and is set for you"),
        ({"flags": "--load x"}, "--load differs from run to run"),
        ({"flags": "--load=x"}, "--load differs from run to run"),
        ({"points": [{"lr": []}]}, "lr has no value that a flag takes"),
        ({"each": {"lr": "fitted"}}, "lr fitted needs a ladder of learning rates"),
        ({"each": {"lr": "transferred"}}, "lr transferred needs the folder of a study"),
        ({"ladder_steps": 2}, "ladder-steps 2 is no share of the steps"),
        ({"points": [AVG_K, AVG_K]}, "the run avg-k-g8 is listed twice"),
        ({"ranks": 0}, "ranks 0 is no whole number from 1 up"),
        ({"parallel": "two"}, "parallel two is no whole number from 1 up"),
        ({"match": "loss"}, "match loss is unknown; choose of active, parameters"),
        ({"target_flops": "much"}, "target-flops much is no positive number"),
        ({"target_flops": 1e9, "flags": "--train-iters 3"}, "flags has --train-iters too"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(
    write_study: WriteStudy, keys: dict, sentence: str
) -> None:
    path = write_study(**{"points": [AVG_K], **keys})
    with pytest.raises(ConfigError) as raised:
        read_study(path)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_includes_another_and_has_sizes(write_study: WriteStudy, tmp_path: Path) -> None:
    base = write_study(
        [AVG_K],
        file="base.yaml",
        sizes={"cpu": {"parallel": 2, "flags": "--seed 3"}, "gpu": {"parallel": 8, "ranks": 2}},
    )
    path = tmp_path / "study.yaml"
    path.write_text(f"include: {base.name}\nflags: --train-iters 7\npoints: [{{lr: 0.1}}]\n")
    cpu, gpu = read_study(path), read_study(path, "gpu")
    assert cpu.folder == tmp_path / "results" / "cpu" and gpu.folder.name == "gpu"
    assert (cpu.parallel, cpu.ranks, gpu.parallel, gpu.ranks) == (2, 1, 8, 2)
    assert cpu.runs[0].flags[-6:] == ("--train-iters", "7", "--seed", "3", "--lr", "0.1")
    assert "--seed" not in gpu.runs[0].flags and gpu.runs[0].name == "lr0.1"
    with pytest.raises(ConfigError, match=r"--size tpu is unknown in .*; choose of cpu, gpu"):
        read_study(path, "tpu")
    with pytest.raises(ConfigError, match="the file has no sizes"):
        read_study(write_study([AVG_K], file="plain.yaml"), "cpu")


def test_sizes_of_a_file_add_to_those_of_the_included_file(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    sizes = {"cpu": {"parallel": 2, "flags": "--seed 3"}, "gpu": {"parallel": 8}}
    base = write_study([AVG_K], file="base.yaml", sizes=sizes)
    path = tmp_path / "study.yaml"
    path.write_text(f"include: {base.name}\nsizes: {{cpu: {{flags: --lr 0.1}}, new: {{ranks: 2}}}}")
    assert " --seed 3 --lr 0.1 " in " ".join(read_study(path).runs[0].flags)
    assert [read_study(path, size).parallel for size in ("cpu", "gpu", "new")] == [2, 8, 1]


def test_a_ladder_trains_a_share_of_the_steps(write_study: WriteStudy) -> None:
    ladder = {"seed": 1, "lr": [0.001, 0.004]}
    each = {"seed": 1, "lr": "fitted", "clip-grad": [1.0, 2.0]}
    path = write_study(
        [AVG_K],
        flags="--train-iters 7 --eval-interval 2 --eval-iters 1",
        ladder=ladder,
        each=each,
        ladder_steps=0.5,
    )
    forecasts = valid_forecasts(read_study(path))
    assert [forecast.train_iters for forecast in forecasts] == [4] * 4 + [7] * 2
    sources = [forecast.run.rate_source for forecast in forecasts]
    assert sources == ["ladder"] * 4 + ["fitted"] * 2
    assert len({forecast.run.point for forecast in forecasts}) == 2  # one ladder for each clip-grad


@pytest.mark.parametrize("rates", [[], [0.001], [0.001, 0.001], [0, 0.001], 0.001, ["x", "y"]])
def test_a_ladder_without_steps_cannot_go_on(write_study: WriteStudy, rates: Any) -> None:
    path = write_study([AVG_K], ladder={"lr": rates} if rates else {}, ladder_extra=1)
    with pytest.raises(ConfigError, match=r"ladder-extra 1 goes on in the steps of the ladder"):
        read_study(path)


@pytest.mark.parametrize("content", [None, "", "a: [", "- 1"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "study.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"study\.yaml"):
        read_study(path)


def test_a_forecast_has_the_costs_of_the_run(write_study: WriteStudy) -> None:
    study = read_study(write_study([{"sffn-router": "dense"}, AVG_K], flags="--train-iters 5"))
    dense, avg_k = foresee(study)
    assert dense.tokens == avg_k.tokens == 5 * 8 * 64
    assert dense.parameters_active == avg_k.parameters_active < avg_k.parameters_total
    assert dense.flops < avg_k.flops and dense.floor_seconds > 0


def test_runs_of_equal_flops_have_as_many_steps_as_these_pay(write_study: WriteStudy) -> None:
    points = [{"sffn-router": "dense"}, {**AVG_K, "sffn-block-size": [1, 8]}]
    forecasts = valid_forecasts(read_study(write_study(points, target_flops=2e10)))
    assert all(abs(run.flops / 2e10 - 1) < 0.5 / run.train_iters for run in forecasts)
    steps = [run.train_iters for run in forecasts]
    assert steps[0] > steps[2] > steps[1] > 1
    assert forecasts[0].run.flags[-2:] == ("--train-iters", str(steps[0]))


def test_dense_runs_get_the_parameters_of_the_sparse_run(write_study: WriteStudy) -> None:
    points = [{"sffn-router": "dense"}, AVG_K]
    study = read_study(write_study(points, match="parameters", flags="--train-iters 5"))
    dense, avg_k = foresee(study)
    assert abs(dense.parameters_total / avg_k.parameters_total - 1) < 0.01
    with pytest.raises(ConfigError, match="needs a sparse run"):
        foresee(read_study(write_study(points[:1], match="parameters")))


def test_dry_run_says_which_run_cannot_start_and_starts_nothing(
    write_study: WriteStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [{**AVG_K, "sffn-block-size": [8, 7]}, {"sffn-router": "avgk"}]
    path = write_study(points, flags="--train-iters 5")
    assert sweep.main([str(path), "dry-run"]) == 2
    printed = capsys.readouterr().out
    assert "avg-k-g7 cannot start: --sffn-block-size 7 does not divide" in printed
    assert "avgk cannot start: " in printed and "3 runs, 2 of which cannot start" in printed
    with pytest.raises(ConfigError, match=r"2 of 3 runs cannot start.*avg-k-g7"):
        sweep.main([str(path), "run"])
    assert not (tmp_path / "results").exists()


def test_a_study_without_steps_or_data_cannot_start(write_study: WriteStudy) -> None:
    (forecast,) = foresee(read_study(write_study([AVG_K])))
    assert "--train-iters" in str(forecast.reason)
    path = write_study([AVG_K], flags="--train-iters 5 --data-path missing")
    (forecast,) = foresee(read_study(path))
    assert "missing" in str(forecast.reason)
    assert "cannot start" in dry_run_table(read_study(path), [forecast])
