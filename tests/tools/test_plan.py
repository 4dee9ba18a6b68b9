"""The tool prints plans, comparisons and the check, and refuses bad input in one sentence."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from megatron_sffn.scaling.surface import fit_surface
from megatron_sffn.utils.errors import ConfigError
from tests.planning import runs
from tests.planning.test_loss import write_report
from tests.scaling.test_surface import observations
from tools import plan

FLAGS = f"{runs.FLAGS} --micro-batch-size 2 --expert-tensor-parallel-size 1"

# Megatron itself causes this warning.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")


def output_of(capsys: pytest.CaptureFixture[str], flags: str) -> str:
    """Standard output of the tool."""
    capsys.readouterr()
    assert plan.main(flags.split()) == 0
    return capsys.readouterr().out


def test_the_table_has_the_best_layouts_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output_of(capsys, f"--gpus 8 --top 4 --price 2 --tokens 1e9 {FLAGS}")
    lines = printed.splitlines()
    assert lines[0].startswith("8 × h100, 8 per node; products at 73% of the peak; all times are")
    assert lines[2].split()[:7] == ["TP", "PP", "VP", "EP", "ETP", "MB", "recompute"]
    assert lines[3].split()[6] == "none"
    assert "fastest of" in lines[3]
    assert all(lines[3:7])
    assert "are refused" in printed
    assert "flags of the best: " in printed


def test_a_layout_that_is_faster_but_does_not_fit_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = output_of(capsys, f"--gpus 8 --top 1 --gpu-memory 0.2 {FLAGS}")
    assert " of 180.0 MB\n" in printed
    assert "does not fit: " in printed


def test_json_and_csv_have_the_same_records(capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"--gpus 8 --top 3 --tokens 1e9 --price 3 {FLAGS}"
    records = json.loads(output_of(capsys, f"{flags} --json"))
    rows = list(csv.DictReader(io.StringIO(output_of(capsys, f"{flags} --csv"))))
    assert len(records) == len(rows) == 3
    for record, row in zip(records, rows, strict=True):
        assert float(row["step_seconds"]) == record["step_seconds"]
        hours = record["days"] * 24 * record["gpus"]
        assert record["cost"] == pytest.approx(3 * hours)
        assert record["days"] == pytest.approx(1e9 / record["tokens_per_day"])
        assert record["provenance"] == "derived"
        assert record["recompute"] == row["recompute"] == "none"


def test_comparisons_have_a_row_for_each_number_of_gpus_and_block_size(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "cost.png"
    printed = output_of(
        capsys,
        f"--compare-gpus 1,2,12 --compare-block-sizes 1024,128 --tokens 1e9 --plot {path} {FLAGS}",
    )
    rows = [line.split()[:2] for line in printed.splitlines()[1:7]]
    assert rows == [[str(gpus), size] for size in ("1024", "128") for gpus in (1, 2, 12)]
    assert "12 GPUs, g = 128: --gpus 12 is not a multiple of --gpus-per-node 8; use 8 or 16" in (
        printed
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_block_sizes_has_one_panel(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "cost.svg"
    given = "--pipeline-model-parallel-size 1 --expert-model-parallel-size 1"
    output_of(capsys, f"--compare-gpus 1,2 --tokens 1e9 --plot {path} {given} {FLAGS}")
    svg = path.read_text()
    assert svg.startswith("<?xml") and 'id="axes_1"' in svg and 'id="axes_2"' not in svg


def test_the_loss_of_each_law_is_printed_with_its_source_and_their_range(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = output_of(capsys, f"--gpus 8 --top 1 --tokens 1e9 --loss {FLAGS}")
    assert "loss after 1.0 G tokens, in nats per token, foreseen:" in printed
    assert "arXiv 2502.05172, table 3" in printed
    assert "trust differences between losses, not their values" in printed
    assert "Krajewski 2024 is left out: it was fitted to an expansion of 64" in printed
    records = json.loads(output_of(capsys, f"--gpus 8 --top 2 --tokens 1e9 --loss {FLAGS} --json"))
    for record in records:
        assert record["loss_krajewski_2024"] is None and record["tokens"] == 1e9
        low, high = sorted((record["loss_ludziejewski_2025"], record["loss_marin_grug_moe"]))
        assert (record["loss_laws_low"], record["loss_laws_high"]) == (low, high)
        assert f"{low:.3f} to {high:.3f}" in printed
        assert record["loss_left_out"].startswith("Krajewski 2024 is left out: ")


def test_a_comparison_has_tokens_cost_and_losses_of_a_block_size_in_one_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    surface = fit_surface(observations((5e8, 2e9, 8e9)), bootstraps=5)
    report = write_report(tmp_path, surface, "avg-k").parent
    flags = (
        f"--compare-block-sizes 1024,128 --tokens 1e9 --price 2000 --loss-from {report} "
        f"--sffn-router avg-k --sffn-expansion 64 {FLAGS.replace('every:2', 'every:1')}"
    )
    printed = output_of(capsys, flags).splitlines()
    start = next(i for i, line in enumerate(printed) if "Ludziejewski" in line)
    headings = printed[start].split()
    assert headings[:5] == ["GPUs", "g", "tokens", "days", "cost"]
    assert headings[-2:] == ["leverage", "fitted"]
    coarse, fine = printed[start + 1].split(), printed[start + 2].split()
    assert (coarse[1], fine[1]) == ("1024", "128")
    assert coarse[2:4] == fine[2:4] == ["1.0", "G"]
    krajewski, ludziejewski, leverage = 6, 7, 9
    assert float(fine[krajewski]) < float(coarse[krajewski])
    assert fine[ludziejewski] == coarse[ludziejewski]  # it does not depend on g
    assert float(fine[leverage]) > float(coarse[leverage])
    assert "g 1024, 128: beyond the fitted runs: " in "\n".join(printed)
    records = json.loads(output_of(capsys, f"{flags} --json"))
    assert [record["block_size"] for record in records] == [1024, 128]
    assert f"{records[1]['loss_fitted']:.3f}" in printed[start + 2]
    assert "E = 64 instead of 4" in records[1]["loss_fitted_beyond"]


def test_check_prints_published_and_foreseen_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output_of(capsys, "--check")
    assert "Mixtral-8x22B" in printed
    assert "mean of the absolute errors: " in printed


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--gpus 12",
            "--gpus 12 is not a multiple of --gpus-per-node 8; use 8 or 16",
        ),
        ("--gpus 0", "--gpus 0 must be at least 1; give a positive number"),
        (
            "--efficiency 73",
            "--efficiency 73 is not above 0 and at most 1; give the achieved over the peak FLOP/s "
            "of a large dense product",
        ),
        ("--block-ratio 0", "--block-ratio 0 is not above 0; give a positive number"),
        ("--node-bandwidth 0", "--node-bandwidth 0 is not above 0; give a positive number"),
        ("--price -1", "--price -1 is not a price; give that of a GPU hour, at least 0"),
        ("--tokens 0", "--tokens 0 is not above 0; give for example 300e9"),
        ("--top 0", "--top 0 must be at least 1; give a positive number"),
        ("--plot x.png", "--plot needs a budget; give --tokens, for example 300e9"),
        ("--loss", "--loss needs the tokens of the training; give --tokens, such as 300e9"),
        (
            "--loss-series avg-k",
            "--loss-series avg-k names a surface of a report; give --loss-from",
        ),
        (
            "--compare-gpus 8,x",
            "--compare-gpus 8,x is not a list of numbers; write for example 8,64,512",
        ),
    ],
)
def test_a_bad_number_is_one_sentence(flags: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan.main([*flags.split(), *FLAGS.split()])
    assert str(error.value) == sentence
