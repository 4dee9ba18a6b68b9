"""Published throughput of Megatron's MoE on H100, and what this package foresees for it.

Inputs: none. Outputs: rows with the published and the foreseen number, and the error.

Design notes
- One set of constants, that of `cluster.py` and `step_time.py`, serves all rows. None was fitted to
  a row.
- The runs balance the load by force or drop tokens, as uniform routing assumes, and use Transformer
  Engine with fused attention.
- What a source does not say is assumed: a microbatch of 1, stages that are not interleaved, and
  gradients that are reduced while the backward pass runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_sffn.accounting import ModelShape, TrainingSetup, flops_per_token
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.routers.softmax_after import SoftmaxAfterConfig
from megatron_sffn.planning.cluster import CARDS, TFLOP, Cluster
from megatron_sffn.planning.step_time import step_time
from megatron_sffn.planning.workload import Workload
from megatron_sffn.utils.text_table import text_table

FOLDING = "arXiv 2504.14960, table 3"
ZOO = "github.com/yanring/Megatron-MoE-ModelZoo c1ad0b5, best_practice/Qwen3/readme.md"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published run.

    Args:
        model: key of `MODELS`.
        gpus: number of H100, in nodes of 8.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        ep: expert-parallel size.
        etp: expert-tensor-parallel size.
        end_stage_layers: layers of the first and of the last stage, if they have fewer.
        virtual_stages: model chunks of a stage.
        global_batch_size: sequences of a step, of 4,096 tokens.
        tflops: model FLOP/s of a GPU in bf16, in 10¹².
        source: where the number and the layout are from.
        once_per_node: True if the dispatcher sends a token to each node once (DeepEP); False for
            Megatron's all-to-all.
        causal: True if the source counts the causal half of attention's scores. Of the Qwen3 runs
            it does: 245 TFLOP/s in steps of 19.7 s are 147 GFLOP a token, not 167.
    """

    model: str
    gpus: int
    tp: int
    pp: int
    ep: int
    etp: int = 1
    end_stage_layers: int | None = None
    virtual_stages: int = 1
    global_batch_size: int = 256
    tflops: float
    source: str
    once_per_node: bool = False
    causal: bool = False


# Shapes: the models' config.json; the fine-grained Mixtral has 64 experts of an eighth, 8 of them
# active (arXiv 2504.14960, section 4.1).
COMMON: dict[str, Any] = {
    "seq_length": 4096,
    "kv_channels": 128,
    "gated": True,
    "bias": False,
    "layernorm": False,
    "tied_embeddings": False,
}
MIXTRAL = COMMON | {
    "num_layers": 56,
    "hidden_size": 6144,
    "ffn_hidden_size": 16384,
    "num_attention_heads": 48,
    "num_query_groups": 8,
    "padded_vocab_size": 32768,
}
# Name -> shape, experts, experts of a token, cells of an expert, shared cells.
MODELS: dict[str, tuple[dict[str, Any], int, int, int, int]] = {
    "Mixtral-8x22B": (MIXTRAL, 8, 2, 16384, 0),
    "Mixtral-8x22B-G8T8": (MIXTRAL, 64, 8, 2048, 0),
    "Qwen2-57B-A14B": (
        COMMON
        | {
            "num_layers": 28,
            "hidden_size": 3584,
            "ffn_hidden_size": 18944,
            "num_attention_heads": 28,
            "num_query_groups": 4,
            "padded_vocab_size": 151936,
            "qkv_bias": True,
        },
        64,
        8,
        2560,
        20480,
    ),
    "Qwen3-235B-A22B": (
        COMMON
        | {
            "num_layers": 94,
            "hidden_size": 4096,
            "ffn_hidden_size": 12288,
            "num_attention_heads": 64,
            "num_query_groups": 4,
            "padded_vocab_size": 151936,
            "qk_layernorm": True,
        },
        128,
        8,
        1536,
        0,
    ),
}
"""Published model -> its sizes."""

PEAK = 989.5
"""TFLOP/s to which arXiv 2504.14960 relates its MFU."""

# Qwen3's embedding and loss count as a layer each, so that the end stages have one layer fewer.
QWEN3: dict[str, Any] = {"gpus": 256, "global_batch_size": 2048, "source": ZOO, "causal": True}
PUBLISHED = (
    Published(
        model="Mixtral-8x22B", gpus=128, tp=2, pp=8, ep=8, tflops=0.493 * PEAK, source=FOLDING
    ),
    Published(
        model="Mixtral-8x22B",
        gpus=128,
        tp=2,
        pp=8,
        ep=4,
        etp=2,
        tflops=0.463 * PEAK,
        source=FOLDING,
    ),
    Published(
        model="Mixtral-8x22B-G8T8", gpus=128, tp=4, pp=8, ep=8, tflops=0.288 * PEAK, source=FOLDING
    ),
    Published(
        model="Mixtral-8x22B-G8T8",
        gpus=128,
        tp=2,
        pp=8,
        ep=8,
        etp=2,
        tflops=0.171 * PEAK,
        source=FOLDING,
    ),
    Published(
        model="Qwen2-57B-A14B", gpus=64, tp=2, pp=4, ep=4, tflops=0.390 * PEAK, source=FOLDING
    ),
    Published(
        model="Qwen2-57B-A14B",
        gpus=64,
        tp=2,
        pp=4,
        ep=4,
        etp=2,
        tflops=0.353 * PEAK,
        source=FOLDING,
    ),
    Published(
        model="Qwen3-235B-A22B",
        tp=2,
        pp=8,
        ep=32,
        end_stage_layers=11,
        virtual_stages=4,
        tflops=245,
        once_per_node=True,
        **QWEN3,
    ),
    Published(
        model="Qwen3-235B-A22B",
        tp=4,
        pp=8,
        ep=8,
        end_stage_layers=11,
        virtual_stages=4,
        tflops=167,
        once_per_node=True,
        **QWEN3,
    ),
    Published(
        model="Qwen3-235B-A22B",
        tp=2,
        pp=32,
        ep=8,
        end_stage_layers=2,
        virtual_stages=3,
        tflops=200,
        **QWEN3,
    ),
)
"""Runs in bf16 on H100 whose layout is published. Left out are runs in fp8, with a batch-level
overlap of exchanges, or with FSDP, among them all that were found of DeepSeek-V3."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A published run beside what is foreseen.

    Args:
        run: the published run.
        foreseen: model FLOP/s of a GPU, in 10¹².
    """

    run: Published
    foreseen: float

    @property
    def error(self) -> float:
        """Foreseen over published, minus 1."""
        return self.foreseen / self.run.tflops - 1


def workload_of(run: Published) -> Workload:
    """The run as this package describes it."""
    sizes, experts, active, cells, shared = MODELS[run.model]
    sffn = SparseFFNConfig(
        active_cells=active * cells + shared,
        router=SoftmaxAfterConfig(),
        block_size=cells,
        expansion=experts * cells // (active * cells + shared),
        shared_blocks=shared // cells,
        backend=Backend.AUTO if run.once_per_node else Backend.MEGATRON,
        node_size=8 if run.once_per_node else 0,
    )
    layers = sizes["num_layers"]
    layout = ParallelLayout(
        world_size=run.gpus,
        tp=run.tp,
        pp=run.pp,
        ep=run.ep,
        etp=run.etp,
        virtual_stages=run.virtual_stages,
        sequence_parallel=run.tp > 1,
        dtype=torch.bfloat16,
        first_stage_layers=run.end_stage_layers,
        last_stage_layers=run.end_stage_layers,
    )
    return Workload(
        shape=ModelShape(**sizes, sffn=sffn, sparse_layers=layers),
        parts=("*E",) * layers,
        layout=layout,
        setup=TrainingSetup(
            num_microbatches=run.global_batch_size // layout.dp,
            distributed_optimizer=True,
            activation="swiglu",
            cuda=True,
        ),
        overlaps_gradients=True,
        overlaps_parameters=True,
    )


def compare_published() -> list[Comparison]:
    """All published runs beside what is foreseen."""
    comparisons = []
    for run in PUBLISHED:
        workload = workload_of(run)
        cluster = Cluster(gpus=run.gpus, gpus_per_node=8, card=CARDS["h100"])
        shape = workload.shape
        not_counted = 2 * shape.attentions * shape.seq_length * shape.query_width * run.causal
        flops = 3 * (flops_per_token(shape).total - not_counted) * workload.step_tokens
        rate = flops / step_time(workload, cluster).total / run.gpus
        comparisons.append(Comparison(run=run, foreseen=rate / TFLOP))
    return comparisons


def published_table() -> str:
    """The comparison as a table, with the sources and the mean of the absolute errors."""
    comparisons = compare_published()
    sources = list(dict.fromkeys(comparison.run.source for comparison in comparisons))
    sizes_of = ("GPUs", "TP", "PP", "VP", "EP", "ETP")
    lines: list[tuple[str, ...]] = [
        ("model, bf16 on H100", *sizes_of, "published", "foreseen", "error", "source")
    ]
    for comparison in comparisons:
        run = comparison.run
        sizes = (run.gpus, run.tp, run.pp, run.virtual_stages, run.ep, run.etp)
        rates = (f"{run.tflops:.0f}", f"{comparison.foreseen:.0f}", f"{comparison.error:+.0%}")
        lines.append((run.model, *map(str, sizes), *rates, f"[{sources.index(run.source) + 1}]"))
    mean = sum(abs(comparison.error) for comparison in comparisons) / len(comparisons)
    notes = [f"[{index}] {source}" for index, source in enumerate(sources, start=1)]
    return "\n".join(
        [
            text_table(lines),
            "",
            "published, foreseen: model TFLOP/s of a GPU; foreseen is derived, with one set of "
            "constants for all rows",
            f"mean of the absolute errors: {mean:.0%}",
            *notes,
        ]
    )
