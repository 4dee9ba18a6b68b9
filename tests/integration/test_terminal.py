"""What a run shows on a terminal, what it prints without one, and where the rest goes."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from megatron_sffn.pretrain import main
from tests.support.jobs import run_as_job
from tests.support.pretraining import MODEL, Log
from tests.support.slow import slow
from tests.support.terminals import on_terminal

FLAGS = "--train-iters 4 --eval-interval 2 --split 90,10,0 --sffn-layers 1 --save run"
FLAGS += " --save-interval 4"


def run_on_terminals(ranks: int, flags: str, data: str, folder: Path, columns: int) -> list[str]:
    """Run the command with a terminal for each rank; returns what each of them got."""

    def body() -> str:
        sys.argv = ["pretrain", *shlex.split(f"{MODEL} --data-path {data} {flags}")]
        return on_terminal(main, columns=columns)

    return [output.result for output in run_as_job(ranks, body, folder=folder)]


@pytest.mark.parametrize("columns", [100, slow(0)])
def test_a_terminal_shows_one_line_of_progress_and_the_log_is_in_a_file(
    pretrain, text: str, tmp_path: Path, columns: int
) -> None:
    # The first rank has no loss, and the last one prints it.
    flags = f"{FLAGS} --pipeline-model-parallel-size 2"
    (tmp_path / "terminal").mkdir()
    first, last = run_on_terminals(2, flags, text, tmp_path / "terminal", columns)
    printed = pretrain(2, flags)
    log = Log(text=(tmp_path / "terminal/run/train.log").read_text())
    assert log.values("lm loss") == printed.values("lm loss")
    assert log.validation_loss == printed.validation_loss
    assert "megatron is initialized" in log.text
    # The line is rewritten, and each evaluation leaves one.
    states = last.replace("\n", "\r").split("\r")
    assert all(len(state) <= (columns or 80) for state in states)
    for state in (r"training: .* 0/4 \[", r"evaluating: .* 2/4 \[", r"training: .* 4/4 \["):
        assert any(re.match(state, shown) for shown in states), (state, states)
    [final_state] = [state for state in states if " 4/4 [" in state][-1:]
    assert f"loss={log.values('lm loss')[-1]:.3f}, tokens/s=" in final_state
    shown = [state for state in states if state.startswith("step ")]
    assert [state.split(":")[0] for state in shown] == ["step 2", "step 4"]
    assert shown[-1].endswith(f": validation loss {log.validation_loss:.4f}")
    # What Megatron prints is on neither terminal.
    assert "iteration" not in first + last
    assert "megatron is initialized" not in first + last
    assert "layers, from 0: 2 = 1 dense (0) + 1 avg-k (1)" in first
    assert "train.log (Megatron's lines)" in first
    loss = re.search(r"training loss +([\d.]+), of the last step", first)
    assert loss and float(loss[1]) == pytest.approx(log.values("lm loss")[-1], abs=2e-4)


def test_without_a_terminal_all_is_printed_but_the_arguments(pretrain, tmp_path: Path) -> None:
    log = pretrain(1, FLAGS)
    assert len(log.values("lm loss")) == 4
    assert "end of arguments" not in log.text
    arguments = (tmp_path / "run/arguments.txt").read_text().splitlines()
    assert {"seq_length 64", "sffn_layers 1", "padded_vocab_size 256"} <= set(arguments)
    assert len(arguments) > 500
    assert not (tmp_path / "run/train.log").exists()
    end = log.text.partition("done: 4 steps, 2.0 k tokens\n")[2]
    assert f"validation loss        {log.validation_loss:.4f}, perplexity " in end
    assert "checkpoint             run/iter_0000004\nsummary: run/summary.json\n" in end
    assert "  megatron-sffn eval --load run --data " in end


def test_verbose_prints_all_that_megatron_prints_on_a_terminal(text: str, tmp_path: Path) -> None:
    [shown] = run_on_terminals(1, f"{FLAGS} --sffn-verbose", text, tmp_path, columns=100)
    assert "end of arguments" in shown
    assert len(Log(text=shown).values("lm loss")) == 4
    assert sorted(os.listdir(tmp_path / "run")) == [
        "arguments.txt",
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
        "routing.jsonl",
        "summary.json",
        "validation.jsonl",
    ]
