"""The quick start reports results, skips finished runs, and resumes an interrupted run exactly."""

import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from examples.quickstart import __main__ as quickstart
from examples.quickstart import corpus, data, report, samples
from examples.quickstart.charts import Curve, Load
from examples.quickstart.report import Result
from examples.quickstart.runs import RUNS, VOCAB_SIZE, Plan, program
from examples.quickstart.samples import PROMPTS, Sample
from megatron_sffn.study.running.launch import Display, RunFailedError, launch
from megatron_sffn.train.log_status import Status
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.processes import HANGS

DENSE, AVG_K = RUNS


def summary_of(perplexity: float, **numbers) -> dict:
    return {
        "iterations": 12,
        "seed": 7,
        "tokens": 24576,
        "active_cells": 512,
        "validation_perplexity": perplexity,
        "parameters_total": 1_300_000,
        "parameters_active": 1_300_000,
        "flops_per_token": 3_000_000,
        "tokens_per_second": 10_000.0,
        "layout": {"world_size": 2},
        "versions": {"python": "3", "megatron-sffn": "0", "megatron-core": "0", "torch": "2"},
    } | numbers


TEXTS = [[Sample(prompt=prompt, text=" <x>") for prompt in PROMPTS["stdlib"]]] * 2


def result_of(run, perplexity: float, **numbers) -> Result:
    curve = Curve(steps=(1, 2), losses=(2.0, 1.0))
    summary = summary_of(perplexity, **numbers)
    return Result(run=run, summary=summary, training=curve, validation=curve, loads=())


def write_run(plan: Plan, run, perplexity: float, **numbers) -> None:
    """Write the folder of a finished run that was interrupted once."""
    folder = plan.folder_of(run)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary_of(perplexity, **numbers)))
    # The first start was killed after step 8; the second resumed from step 6.
    for start, stop, offset in ((1, 9, 1.0), (7, 13, 0.0)):
        with SummaryWriter(str(folder / "tensorboard"), filename_suffix=str(start)) as writer:
            for step in range(start, stop):
                writer.add_scalar("lm loss", 8 - step / 4 + offset, step)
                writer.add_scalar("lm loss vs samples", 0, step * 8)
                if step % 6 == 0:
                    writer.add_scalar("lm loss validation-0", 7 - step / 4, step)
                    writer.add_scalar("lm loss validation-0 vs samples", 0, step * 8)
    if run is AVG_K:
        lines = [
            {
                "iteration": iteration,
                "layer": layer,
                "load_entropy": 0.9,
                "dead_blocks": 1,
                "tokens_per_block": [30, 10, 0, 20 * layer],
            }
            for iteration in (6, 12)
            for layer in (1, 2)
        ]
        text = "\n".join(map(json.dumps, lines)) + "\n"
        (folder / "routing.jsonl").write_text(text)


@pytest.fixture
def plan(tmp_path):
    plan = Plan(folder=tmp_path / "out", seed=7, train_iters=12)
    write_run(plan, DENSE, 120.0)
    write_run(plan, AVG_K, 90.0, parameters_total=3_900_000, tokens_per_second=5_000.0)
    return plan


def test_the_report_holds_all_results_and_loads_nothing(plan):
    results = report.read_results(plan)
    page = report.write(plan, results, TEXTS).read_text()
    # The page works offline. The URLs of xmlns and metadata are names and not loaded.
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import|<script|<link', page)
    assert page.count("<svg") == 2 and "#010203" not in page
    html_ids = re.findall(r'id="([^"]+)"', page)
    assert len(html_ids) == len(set(html_ids))
    assert report.finding(results) in page
    # The commands are longer than a line of the page.
    assert page.count("<td> &lt;x&gt;</td>") == 20 and "megatron-sffn export --load" in page
    assert max(map(len, page.partition("<pre>")[2].splitlines())) > 100
    assert "white-space: pre-wrap; overflow-wrap: anywhere" in page
    for text in (
        "120.0",
        "90.0",
        "3.90 M",
        "10,000",
        "--sffn-router avg-k",
        "1 of 4",
        "2.0 × even",
    ):
        assert text in page
    assert sorted(path.name for path in plan.folder.iterdir()) == ["avg-k", "dense", "report.html"]


def test_curves_join_the_log_of_all_starts_of_a_run(plan):
    training, validation = report.read_curves(plan.folder_of(DENSE) / "tensorboard")
    assert training.steps == tuple(range(1, 13))
    # Steps 7 and 8 ran twice, and the second start counts.
    assert training.losses == tuple(8 - step / 4 + (step < 7) for step in range(1, 13))
    assert validation == Curve(steps=(6, 12), losses=(5.5, 4.0))
    constant = Curve(steps=(1, 2, 3), losses=(2.0, 2.0, 2.0))
    assert constant.smoothed() == pytest.approx(constant.losses)


def test_loads_are_shares_of_the_mean_load(plan):
    loads = report.read_loads(plan.folder_of(AVG_K) / "routing.jsonl")
    assert [(load.iteration, load.layer) for load in loads] == [(6, 1), (6, 2), (12, 1), (12, 2)]
    assert loads[0].shares == (2.0, 10 / 15, 0.0, 20 / 15)
    unused = Load(iteration=1, layer=1, entropy=0.0, dead=2, tokens=(0, 0))
    assert unused.shares == (0.0, 0.0)
    assert report.read_loads(plan.folder_of(DENSE) / "routing.jsonl") == ()


@pytest.mark.parametrize(
    ("perplexity", "verdict"),
    [(75.0, "25.0% lower"), (110.0, "10.0% higher"), (100.2, "no difference")],
)
def test_the_finding_compares_the_two_models(perplexity, verdict):
    numbers = {"parameters_total": 3_900_000, "flops_per_token": 3_210_000}
    results = [result_of(DENSE, 100.0), result_of(AVG_K, perplexity, **numbers)]
    sentence = report.finding(results)
    assert f"Avg-K reached a held-out perplexity of {perplexity:.1f} against 100.0" in sentence
    assert verdict in sentence and sentence.count(". ") == 0
    assert "3.0 times the parameters" in sentence and "7% more FLOPs" in sentence
    assert sentence.endswith(" and 100% of the tokens per second on this machine.")
    fewer = result_of(AVG_K, 75.0, flops_per_token=2_700_000, tokens_per_second=None)
    assert report.finding([results[0], fewer]).endswith(" and 10% fewer FLOPs per token.")


def test_the_terminal_table_is_aligned():
    table = report.terminal_table([result_of(DENSE, 120.0), result_of(AVG_K, 90.0)])
    header, dense, sparse = table.splitlines()
    assert len({len(header), len(dense), len(sparse)}) == 1
    assert header.split("  ")[0] == "model" and dense.startswith("dense ")
    assert dense.split()[-2:] == ["120.0", "10,000"]
    resumed = result_of(AVG_K, 90.0, tokens_per_second=None)
    assert report.terminal_table([resumed, resumed]).endswith(" unknown")


STEP_LINE = (
    " [2026-01-02 03:04:05.678901] iteration      120/     300 | consumed samples:          960 | "
    "elapsed time per iteration (ms): 250.0 | learning rate: 1.0E-03 | global batch size:     8 | "
    "lm loss: 5.500000E+00 | loss scale: 1.0 | grad norm: 0.5 | number of skipped iterations:   0 |"
)
EVALUATION_LINE = (
    " validation-0 loss at iteration 101 | lm loss value: 5.0E+00 | lm loss PPL: 1.484132E+02 | "
)


def test_commands_name_a_program_as_this_environment_has_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert program("torchrun") == "torchrun"
    (tmp_path / ".venv").symlink_to(sys.prefix)
    assert program("torchrun") == ".venv/bin/torchrun"


def test_the_status_follows_the_log():
    status = Status()
    assert str(status) == "starting the ranks"
    status.read("  seed ...................... 1234")
    status.read(STEP_LINE)
    assert str(status) == "iteration 120/300, loss 5.500, 250 ms per iteration, ETA 0:45"
    status.read("WARNING: Setting RerunStateMachine mode RerunMode.DISABLED")
    assert str(status).endswith("ETA 0:45, evaluating")
    status.read("Evaluating iter 3/152")
    assert str(status).endswith(", evaluating 3/152")
    status.read(EVALUATION_LINE)
    status.read("WARNING: Setting RerunStateMachine mode RerunMode.VALIDATE_RESULTS")
    assert str(status).endswith("ETA 0:45, held-out perplexity 148.4 at 101")
    status.read(STEP_LINE.replace("5.500000E+00", "nan"))
    assert "loss nan" in str(status)


def test_the_display_prints_a_changed_status_at_intervals():
    stream = io.StringIO()
    display = Display("  dense", stream)
    display.show("starting", now=True)
    display.show("soon after")
    display.show("done", now=True)
    display.show("done", now=True)
    display.end()
    assert stream.getvalue() == "  dense 0:00 | starting\n  dense 0:00 | done\n"


def test_a_failed_run_is_reported_with_the_end_of_its_log(tmp_path):
    log = tmp_path / "run" / "train.log"
    script = "print('before'); print('the reason'); raise SystemExit(3)"
    with pytest.raises(RunFailedError, match=r"(?s)exit code 3.*train\.log:\nbefore\nthe reason$"):
        launch([sys.executable, "-c", script], log, os.environ, title="dense", stream=io.StringIO())
    again = [sys.executable, "-c", "print('again')"]
    launch(again, log, os.environ, title="dense", stream=io.StringIO())
    assert log.read_text() == "before\nthe reason\nagain\n"


def test_only_a_finished_run_of_the_same_plan_is_skipped(plan):
    assert plan.summary(DENSE) is not None
    assert Plan(folder=plan.folder, seed=8, train_iters=12).summary(DENSE) is None
    assert Plan(folder=plan.folder, seed=7, train_iters=13).summary(DENSE) is None
    (plan.folder_of(DENSE) / "summary.json").write_text("{")
    assert plan.summary(DENSE) is None
    assert plan.saved_iteration(DENSE) == 0
    (plan.folder_of(DENSE) / "latest_checkpointed_iteration.txt").write_text("6")
    assert plan.saved_iteration(DENSE) == 6


def write_samples(plan: Plan, run, prompts) -> None:
    """Write texts as `tools/generate.py` does."""
    lines = [json.dumps({"prompt": prompt, "text": " a \nb"}) for prompt in prompts]
    (plan.folder_of(run) / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_text_is_generated_once_and_gives_a_line_per_prompt(plan, monkeypatch):
    prompts = PROMPTS["stdlib"]
    commands = []

    def run_tool(*command, environment):
        commands.append((*command, environment["OMP_NUM_THREADS"]))
        write_samples(plan, AVG_K, prompts)

    monkeypatch.setattr(samples, "run_tool", run_tool)
    write_samples(plan, AVG_K, PROMPTS["debian-docs"])
    for _ in range(2):
        texts = quickstart.generated(plan, AVG_K, prompts)
    ((name, _, folder, *_, threads),) = commands
    assert (name, folder, threads) == ("generate", str(plan.folder_of(AVG_K)), "1")
    heading, *lines = samples.terminal_lines(plan, AVG_K, texts).splitlines()
    assert "temperature 0.7, seed 7" in heading
    assert len(lines) == 10 and lines[0] == "  import | a"
    assert len(Sample(prompt="ab", text="c" * 200).shown) == samples.LINE_WIDTH - 2


def test_every_corpus_has_ten_prompts_that_end_with_a_whole_token():
    assert PROMPTS.keys() == set(corpus.KINDS)
    for prompts in PROMPTS.values():
        assert len(set(prompts)) == 10 and all(prompt == prompt.strip() for prompt in prompts)


def claim(plan: Plan, kind: str = "stdlib", *, fresh: bool = False) -> None:
    settings = quickstart.settings_of(plan, kind)
    quickstart.claim_folder(plan, settings, fresh=fresh)
    (plan.folder / quickstart.SETTINGS).write_text(json.dumps(settings))


def test_a_folder_holds_one_experiment(plan):
    claim(plan)
    claim(plan)
    other_plan = Plan(folder=plan.folder, seed=8, train_iters=12)
    for second_plan, kind in ((other_plan, "stdlib"), (plan, "debian-docs")):
        with pytest.raises(ConfigError, match="add --fresh to replace it"):
            claim(second_plan, kind)
    assert plan.summary(DENSE) is not None
    (plan.folder / "mine.txt").write_text("stays")
    claim(other_plan, fresh=True)
    assert sorted(path.name for path in plan.folder.iterdir()) == ["mine.txt", "settings.json"]


def test_held_out_text_of_a_large_corpus_is_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "run_tool", lambda *arguments: None)
    folder = tmp_path / "data"
    folder.mkdir()
    text = tiny_corpus(tmp_path / "corpus")
    monkeypatch.setattr(data, "HELD_OUT_BYTES", 4000)
    for documents, step in ((8, 1), (100, 3)):
        lines = [f"{{{number:98}}}\n" for number in range(documents)]
        text.valid.write_text("".join(lines))
        data.make_datasets(folder, text, VOCAB_SIZE)
        assert (folder / "valid.jsonl").read_text() == "".join(lines[::step])
        assert data.is_complete(folder, text, VOCAB_SIZE)


def test_a_folder_is_locked_while_it_is_in_use(tmp_path):
    folder = tmp_path / "new" / "out"
    with (
        quickstart.locked(folder),
        pytest.raises(ConfigError, match="is in use"),
        quickstart.locked(folder),
    ):
        pass
    with quickstart.locked(folder):
        pass
    (folder / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), quickstart.locked(folder / "file"):
        pass


def test_fresh_keeps_a_folder_without_settings(plan):
    claim(plan, fresh=True)
    assert plan.summary(DENSE) is not None


@pytest.mark.parametrize(
    "flags",
    [
        ["--corpus", "novels"],
        ["--train-iters", "0"],
        ["--seed", "0"],
        ["--folder", __file__],
    ],
)
def test_bad_flags_are_refused(flags):
    with pytest.raises(ConfigError, match=flags[0]):
        quickstart.parse_arguments(flags)


def test_environment_variables_give_the_defaults(monkeypatch):
    monkeypatch.setenv("SEED", "5")
    monkeypatch.setenv("CORPUS", "debian-docs")
    args = quickstart.parse_arguments([])
    assert (args.seed, args.corpus) == (5, "debian-docs")
    monkeypatch.setenv("SEED", "")
    assert quickstart.parse_arguments([]).seed == 1234


# --- Real runs on 2 ranks


def tiny_corpus(folder: Path) -> corpus.Corpus:
    """A small corpus that the quick start accepts as its own."""
    parameters = {"kind": "stdlib", "origin": [platform.python_version()], "recipe": corpus.RECIPE}
    texts = sorted((ROOT / "megatron_sffn").rglob("*.py")) * 3
    documents = [
        corpus.Document(source=f"{number}/{path.name}", text=f"{number}\n{path.read_text()}")
        for number, path in enumerate(texts)
    ]
    return corpus._write(folder, parameters, documents)


def start_quickstart(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "examples.quickstart"]
    return subprocess.Popen(
        [*command, "--folder", str(folder), "--train-iters", "12", "--seed", "7"],
        cwd=ROOT,
        env={**os.environ, "CORPUS": "stdlib"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=HANGS)
    finally:
        process.kill()
    return process.returncode, output


@pytest.mark.slow
def test_an_interrupted_run_resumes_exactly(tmp_path):
    plan = Plan(folder=tmp_path / "out", seed=7, train_iters=12)
    tiny_corpus(plan.folder / "corpus")
    write_run(plan, DENSE, 120.0)
    write_samples(plan, DENSE, PROMPTS["stdlib"])
    log = plan.folder_of(AVG_K) / "train.log"

    process = start_quickstart(plan.folder)
    deadline = time.monotonic() + HANGS
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and "iteration        1/      12" in log.read_text():
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    code, output = wait_for_end(process)
    assert code == quickstart.INTERRUPTED, output
    saved_iteration = plan.saved_iteration(AVG_K)
    assert 1 <= saved_iteration < 12, output
    assert f"Avg-K is saved at iteration {saved_iteration} of 12" in output
    assert plan.summary(AVG_K) is None

    code, output = wait_for_end(start_quickstart(plan.folder))
    assert code == 0, output
    assert (
        f"Avg-K, continued from iteration {saved_iteration}" in output and "there already" in output
    )
    assert "Avg-K reached a held-out perplexity" in output
    assert (plan.folder / "report.html").exists()
    generated_lines = output.partition("Avg-K continues")[2].partition("\n\n")[0].splitlines()[1:]
    assert len(generated_lines) == 10, output
    assert f"megatron-sffn eval --load {plan.folder_of(AVG_K)}" in output
    resumed_summary = plan.summary(AVG_K)
    assert data.is_complete(
        plan.folder / "data", corpus.build_corpus("stdlib", plan.folder / "corpus"), VOCAB_SIZE
    )

    plan.folder_of(AVG_K).rename(tmp_path / "continued")
    code, output = wait_for_end(start_quickstart(plan.folder))
    assert code == 0, output
    undisturbed_summary = plan.summary(AVG_K)
    assert undisturbed_summary["validation_loss"] == resumed_summary["validation_loss"]
    curves = [
        report.read_curves(folder / "tensorboard")
        for folder in (plan.folder_of(AVG_K), tmp_path / "continued")
    ]
    assert curves[0] == curves[1]
