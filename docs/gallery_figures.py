"""The figures of `docs/gallery.md`: the command of each, and where its picture and data are."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "gallery"
QUICKSTART = ROOT / "runs" / "quickstart"

MODEL = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 4096 "
    "--max-position-embeddings 4096 --vocab-size 50257 --global-batch-size 1024 --bf16 "
    "--use-distributed-optimizer --sffn-layers every:2"
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the gallery.

    Args:
        name: file name in `docs/images/gallery/`.
        title: heading.
        text: what it shows.
        command: shell command that makes it, run in the root; OUT is its folder of results.
        collect: given that folder, the content of the figure and of its data files by name.
        data: files of the repository that it was made from, relative to the root.
    """

    name: str
    title: str
    text: str
    command: str
    collect: Callable[[Path], tuple[bytes, dict[str, bytes]]]
    data: tuple[str, ...] = ()

    @property
    def out(self) -> Path:
        """The folder of results of the command."""
        return RUNS / re.sub(r"\W", "_", self.command)[:60]


def files(picture: str, *data: str) -> Callable[[Path], tuple[bytes, dict[str, bytes]]]:
    """Collect files of the folder of results; the names of the data begin with the picture's."""
    stem = Path(picture).stem

    def collect(out: Path) -> tuple[bytes, dict[str, bytes]]:
        contents = {
            name if name.startswith(stem) else f"{stem}.{name}": (out / name).read_bytes()
            for name in data
        }
        return (out / picture).read_bytes(), contents

    return collect


def chart(number: int) -> Callable[[Path], tuple[bytes, dict[str, bytes]]]:
    """Collect a chart of the quick start's report, and the numbers that it draws."""

    def collect(_: Path) -> tuple[bytes, dict[str, bytes]]:
        svg = re.findall(r"<svg .*?</svg>", (QUICKSTART / "report.html").read_text(), re.DOTALL)
        namespace = "" if "xmlns=" in svg[number][:500] else 'xmlns="http://www.w3.org/2000/svg" '
        style = 'style="color: #333; background: white" '
        picture = svg[number].replace("<svg ", f"<svg {namespace}{style}", 1)
        name, numbers = (losses, loads)[number]()
        return picture.encode(), {name: numbers}

    return collect


def losses() -> tuple[str, bytes]:
    """The losses of both runs as CSV."""
    from examples.quickstart.report import read_curves

    rows: list[Sequence[Any]] = [("model", "kind", "step", "loss")]
    for model in ("dense", "avg-k"):
        curves = read_curves(QUICKSTART / model / "tensorboard")
        for kind, curve in zip(("training", "held-out"), curves, strict=True):
            pairs = zip(curve.steps, curve.losses, strict=True)
            rows += [(model, kind, step, f"{loss:.4f}") for step, loss in pairs]
    return "quickstart_losses.csv", as_csv(rows)


def loads() -> tuple[str, bytes]:
    """The tokens of every block at the last evaluation as CSV."""
    from examples.quickstart.report import read_loads

    all_loads = read_loads(QUICKSTART / "avg-k" / "routing.jsonl")
    last = max(load.iteration for load in all_loads)
    rows: list[Sequence[Any]] = [("layer", "block", "tokens")]
    for load in all_loads:
        if load.iteration == last:
            rows += [(load.layer, block, tokens) for block, tokens in enumerate(load.tokens)]
    return "quickstart_load.csv", as_csv(rows)


def as_csv(rows: Sequence[Sequence[Any]]) -> bytes:
    """Rows as the content of a CSV file."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def evaluated_loads(out: Path) -> tuple[bytes, dict[str, bytes]]:
    """Collect the load over time, and the lines of the run that it draws."""
    lines = (QUICKSTART / "avg-k" / "routing.jsonl").read_text().splitlines(keepends=True)
    data = "".join(line for line in lines if "tokens_per_block" in line)
    return (out / "load_over_time.png").read_bytes(), {"load_over_time.jsonl": data.encode()}


def sizes(out: Path) -> tuple[bytes, dict[str, bytes]]:
    """Collect the figure of scaling, and the results of the runs that it draws."""
    results = ROOT / "runs" / "studies" / "gallery-sizes" / "results.csv"
    picture = out / "figures" / "scaling.svg"
    return picture.read_bytes(), {"scaling.results.csv": results.read_bytes()}


def kernels(out: Path) -> tuple[bytes, dict[str, bytes]]:
    """Draw the recorded times of `make bench` again: forward + backward of its last run."""
    from benchmarks.blocks.table import Row, plot
    from benchmarks.rows import append, read

    rows = read(ROOT / "benchmarks" / "results.csv", Row)
    rows = [row for row in rows if row.commit == "aa31707" and row.pass_ == "forward + backward"]
    contenders = list(dict.fromkeys(row.contender for row in rows if row.contender != "dense"))
    (out / "kernels.csv").unlink(missing_ok=True)
    append(rows, out / "kernels.csv")
    plot(rows, contenders, out / "kernels.svg", ("forward + backward",))
    data = (out / "kernels.csv").read_bytes()
    return (out / "kernels.svg").read_bytes(), {"kernels.csv": data}


ROUTING = f"megatron-sffn analyze-routing {QUICKSTART.relative_to(ROOT)}/avg-k --out OUT"
REPORT = "megatron-sffn report docs/findings/block_size --output OUT"
SIZES = (
    "megatron-sffn sweep docs/gallery_sizes.yaml && "
    "megatron-sffn report runs/studies/gallery-sizes --output OUT"
)
FIGURES = (
    Figure(
        name="kernels.svg",
        title="Time of a sparse layer over a dense one",
        text="Forward and backward of a layer with given routing, over a dense layer of as many "
        "active cells, on one thread of a CPU with AVX-512 (2026-11-25, commit aa31707). This "
        "command draws the recorded rows of `make bench` "
        "([how it was measured](../benchmarks/README.md#a-sparse-layer-with-given-routing)).",
        command="python -m docs.draw_gallery --only kernels --again",
        collect=kernels,
    ),
    Figure(
        name="traffic.png",
        title="Bytes that a layer sends",
        text="A sparse layer with switch on ranks of one machine, ours and Megatron's, with the "
        "same weights. Bytes of a forward pass are counted at `torch.distributed`, so they do not "
        "depend on the machine; [the benchmark's page]"
        "(../benchmarks/README.md#a-sparse-layer-on-several-ranks) has the times.",
        command="python -m benchmarks.parallel --repeats 5 --output OUT/traffic.csv "
        "--plot OUT/traffic.png",
        collect=files("traffic.png", "traffic.csv"),
    ),
    Figure(
        name="quickstart_losses.svg",
        title="The quick start: losses",
        text="Dense and Avg-K with the same number of active cells, 300 steps on 2 ranks. The "
        "chart is one of the report that the command leaves; the time is that of the whole "
        "command after the installation.",
        command="make quickstart",
        collect=chart(0),
    ),
    Figure(
        name="quickstart_load.svg",
        title="The quick start: load of the blocks",
        text="Tokens of each block over an even load at the last evaluation, blocks in descending "
        "order, for the four layers of Avg-K. From the same report.",
        command="make quickstart",
        collect=chart(1),
    ),
    Figure(
        name="load_over_time.png",
        title="Routing: load over time",
        text="The load of each block of the quick start's Avg-K at each evaluation "
        "([how to read it](routing.md#the-plots)).",
        command=ROUTING,
        collect=evaluated_loads,
    ),
    Figure(
        name="coactivation.png",
        title="Routing: blocks that are chosen together",
        text="Tokens with both of two blocks, over what independent choices of the same loads "
        "would give. White is chance, red more often.",
        command=ROUTING,
        collect=files("coactivation.png", "summary.json"),
    ),
    Figure(
        name="fronts.svg",
        title="A study: loss and cost",
        text="The 142 runs of [the block-size study](findings.md) at each setting's best learning "
        "rate: what a lower loss costs in FLOPs and seconds.",
        command=REPORT,
        collect=files("figures/fronts.svg"),
        data=("docs/findings/block_size/results.csv",),
    ),
    Figure(
        name="scaling.svg",
        title="A study: scaling over sizes",
        text="Three sizes, dense and Avg-K, with a fitted loss surface and published laws beside "
        "it. **A demonstration of the figure, not a finding**: the widths are 32, 48 and 64, the "
        "trainings 60 to 240 steps, with one learning rate and two seeds. One of the 24 runs found "
        "its port taken; the same command again trained it, and the time is the sum of both.",
        command=SIZES,
        collect=sizes,
    ),
    Figure(
        name="plan.png",
        title="A plan: cost over GPUs and block sizes",
        text="Cost of 300 G tokens for a model of 24 layers of width 2,048 with the best layout of "
        "each number of GPUs. Derived, not measured ([how](planning.md)).",
        command="megatron-sffn plan --gpus 64 --gpu h100 --price 2.50 --tokens 300e9 "
        f"--compare-gpus 8,64,512 --compare-block-sizes 1024,256,64 {MODEL} "
        "--plot OUT/plan.png --csv > OUT/plan.csv",
        collect=files("plan.png", "plan.csv"),
    ),
    Figure(
        name="accounting.png",
        title="The accounting: FLOPs and memory over the block size",
        text="Closed forms for the same model on 8 GPUs: what the scores of four routers add to a "
        "dense model's FLOPs, and the memory of the fullest rank "
        "([the formulas](accounting.md)).",
        command="megatron-sffn accounting --ranks 8 --device cuda --compare-routers "
        "avg-k,vanilla-m,switch,rand-hash --compare-block-sizes 4096,1024,256,64,16,4 "
        f"{MODEL} --plot OUT/accounting.png --csv > OUT/accounting.csv",
        collect=files("accounting.png", "accounting.csv"),
    ),
)
