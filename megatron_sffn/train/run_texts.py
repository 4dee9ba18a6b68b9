"""What a run says when it opens and when it ends, on rank 0.

Inputs: Megatron's namespace, the model's shape, the content of `summary.json`. Outputs: lines.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.accounting import ModelShape, table
from megatron_sffn.checkpoints.files import TRACKER, iteration_folder
from megatron_sffn.checks import optimizers
from megatron_sffn.flags.megatron_flags import layout_of
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.layer_pattern import hybrid_layers
from megatron_sffn.train import param_groups
from megatron_sffn.train.arguments_file import ARGUMENTS
from megatron_sffn.utils.human_size import human_count, human_size

KINDS = {
    Symbols.ATTENTION: "attention",
    Symbols.MLA: "multi-latent attention",
    Symbols.MAMBA: "Mamba",
    Symbols.GDN: "gated delta net",
    Symbols.MLP: "dense",
}
"""Symbol of a hybrid model's layer -> its name in the line of layers."""


def opening(
    args: Namespace,
    sffn: SparseFFNConfig | None,
    shape: ModelShape,
    folder: Path,
    log: Path | None,
) -> str:
    """The costs of the model, its layers, remarks, and where the results of the run go.

    Args:
        args: Megatron's namespace, validated.
        sffn: the sparse layer; None if all layers are dense.
        shape: the model's shape.
        folder: the run's folder.
        log: file of Megatron's lines; None if they are printed.
    """
    remarks = [] if sffn is None else [router.remark(sffn) for router in sffn.routers]
    remarks += [optimizers.remark(args, sffn), param_groups.remark(args)]
    return "\n".join(
        [
            table(shape, layout_of(args)),
            layers_line(args, sffn),
            *(f"note: {remark}" for remark in remarks if remark),
            files_line(args, folder, log),
        ]
    )


def layers_line(args: Namespace, sffn: SparseFFNConfig | None) -> str:
    """The kinds of layers, with the numbers of the layers that have them.

    Args:
        args: Megatron's namespace, validated.
        sffn: the sparse layer; None if all layers are dense.
    """
    if args.hybrid_layer_pattern is not None:
        symbols = hybrid_layers(args.hybrid_layer_pattern)
    elif sffn is not None:
        symbols = "".join(Symbols.MOE if sparse else Symbols.MLP for sparse in args.moe_layer_freq)
    else:
        symbols = Symbols.MLP * args.num_layers
    layers: dict[str, list[int]] = {}
    num_sparse = 0
    for index, symbol in enumerate(symbols):
        kind = KINDS.get(symbol, symbol)
        if symbol == Symbols.MOE and sffn is not None:
            kind = sffn.of_layer(num_sparse).router.name
            num_sparse += 1
        layers.setdefault(kind, []).append(index)
    counts = " + ".join(
        f"{len(indices)} {kind} ({ranges(indices)})" for kind, indices in layers.items()
    )
    predicted = f"; {args.mtp_num_layers} of multi-token prediction" if args.mtp_num_layers else ""
    return f"layers, from 0: {len(symbols)} = {counts}{predicted}"


def ranges(numbers: list[int]) -> str:
    """Ascending numbers in short form: `0-2, 5`; `1, 3, ..., 11` if all steps are the same."""
    step = numbers[1] - numbers[0] if len(numbers) > 3 else 1
    if step > 1 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def files_line(args: Namespace, folder: Path, log: Path | None) -> str:
    """Where the results of the run go; see `opening`."""
    names = [f"{ARGUMENTS} (all flags)", "summary.json", "validation.jsonl"]
    if args.num_experts is not None:
        names.append("routing.jsonl")
    if log is not None:
        names.append(f"{log.name} (Megatron's lines)")
    names.append("checkpoints" if args.save else "no checkpoints, for want of --save")
    return f"files in {folder}: {', '.join(names)}"


def closing(
    args: Namespace, folder: Path, summary: dict[str, Any], training_loss: float | None
) -> str:
    """The results of a run in short, where they are, and what to do next.

    Args:
        args: Megatron's namespace.
        folder: the run's folder.
        summary: content of `summary.json`.
        training_loss: of the last step; None if no step was taken.
    """
    rows = {}
    if training_loss is not None:
        rows["training loss"] = f"{training_loss:.4f}, of the last step"
    if summary["validation_loss"] is not None:
        perplexity = f"perplexity {summary['validation_perplexity']:.4g}"
        rows["validation loss"] = f"{summary['validation_loss']:.4f}, {perplexity}"
    if summary["test_loss"] is not None:
        rows["test loss"] = f"{summary['test_loss']:.4f}"
    if summary["tokens_per_second"] is not None:
        rows["tokens per second"] = f"{summary['tokens_per_second']:,.0f}"
    rows["peak memory of a rank"] = human_size(summary["peak_memory_bytes"])
    if (folder / "routing.jsonl").exists():
        rows["routing"] = str(folder / "routing.jsonl")
    tracker = folder / TRACKER
    saved = args.save and tracker.is_file() and tracker.read_text().strip()
    if saved and saved.isdecimal():
        rows["checkpoint"] = str(iteration_folder(folder, int(saved)))
    width = max(map(len, rows))
    lines = [
        f"done: {summary['iterations']} steps, {human_count(summary['tokens']).strip()} tokens",
        *(f"  {name:<{width}}  {text}" for name, text in rows.items()),
        f"summary: {folder / 'summary.json'}",
    ]
    if "checkpoint" in rows:
        lines += [
            "next:",
            f"  megatron-sffn eval --load {folder} --data TEXT.jsonl",
            f"  megatron-sffn generate --load {folder} --prompt TEXT",
            f"  megatron-sffn export --load {folder} --output {folder}-hf",
        ]
    return "\n".join(lines)
