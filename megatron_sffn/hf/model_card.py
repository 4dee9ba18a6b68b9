"""The model card of an export: data, tokens, settings, losses, how it routes, how to load it.

Inputs: the settings of a checkpoint, and the results in the folder of its run where they are.
Outputs: the text of `README.md`. What is not known is said to be unknown.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sffn.accounting import ModelShape, count_parameters, flops_per_token
from megatron_sffn.hf.names import SPARSE_FFN
from megatron_sffn.hf.settings import Settings
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.peer import PeerConfig
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.utils.atomic_files import read_json_object, read_records

if TYPE_CHECKING:
    from megatron_sffn.hf.export import Export

UNKNOWN = "unknown"

EVALUATION = "eval.json"
"""File in the folder of a run: the output of `megatron-sffn eval --output`."""

DATA_FLAGS = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
"""Flags (dest) that name the data of training."""


def model_card(settings: Settings, run: Path, exported: Export) -> str:
    """The text of the card.

    Args:
        settings: of the model.
        run: folder of the run.
        exported: the export.
    """
    notes = "".join(f"- {note}\n" for note in exported.notes)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {run.resolve().name}\n\n"
        f"A language model that megatron-sffn pretrained, iteration {exported.iteration}. The "
        "licence and the intended use are not known to the tool that wrote this card.\n\n"
        f"## Load it\n\n{_how_to_load(exported)}\n"
        f"## Model\n\n{_table(_model_rows(settings, exported))}\n"
        f"## How it routes\n\n{_routing(settings)}\n\n"
        f"## Training\n\n{_table(_training_rows(settings, run, exported.iteration))}\n"
        f"## Evaluation\n\n{_evaluation(run, exported.iteration)}\n"
        + (f"## Notes\n\n{notes}" if notes else "")
    )


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {UNKNOWN if value is None else value} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def _how_to_load(exported: Export) -> str:
    trust = ", trust_remote_code=True" if exported.architecture == SPARSE_FFN else ""
    text = (
        "```python\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})\n'
        "```\n\n"
        f"Architecture `{exported.architecture}`: {exported.reason}.\n"
    )
    if trust:
        text += (
            "Without `trust_remote_code`, `import megatron_sffn.hf` first; the class is that of "
            "`modeling_sparse_ffn.py`.\n"
        )
    return text


def _model_rows(settings: Settings, exported: Export) -> list[tuple[str, Any]]:
    args = settings.args
    shape = ModelShape.of_args(args, settings.sffn)
    parameters = count_parameters(shape)
    return [
        ("parameters, total", f"{parameters.total:,}"),
        ("parameters, active per token", f"{parameters.active:,}"),
        ("FLOPs per token, forward", f"{flops_per_token(shape).total:,}"),
        ("parameters in this folder", f"{exported.parameters:,}"),
        ("layers", f"{args.num_layers}, of which sparse: {len(settings.sparse_layers)}"),
        ("sparse layers, from 0", ", ".join(map(str, settings.sparse_layers)) or "none"),
        ("hidden size", args.hidden_size),
        ("attention heads", f"{args.num_attention_heads}, key heads {settings.num_query_groups}"),
        ("activation", settings.activation),
        ("normalization", args.normalization),
        ("positions", f"{settings.position_embedding}, up to {settings.context}"),
        ("vocabulary", f"{args.padded_vocab_size} rows, padding of Megatron's included"),
    ]


def _routing(settings: Settings) -> str:
    sffn = settings.sffn
    if sffn is None:
        return "It does not: all layers are dense."
    sentences = [
        *(f"Router `{router.name}`: {ROUTERS[router.name].summary}." for router in sffn.routers),
        f"A sparse layer has {sffn.num_cells:,} memory cells in {sffn.num_blocks:,} blocks of "
        f"{sffn.block_size}; a token uses {sffn.num_active_blocks} of the blocks{_shared(sffn)}.",
    ]
    factor = settings.args.moe_router_topk_scaling_factor or 1.0
    scaled = "" if factor == 1.0 else f", times {factor:g}"
    gates = [
        str(router.gate) for router in sffn.routers if isinstance(router, ScoredConfig | PeerConfig)
    ]
    if gates:
        sentences.append(f"The gate of a block: {' or '.join(dict.fromkeys(gates))}{scaled}.")
    if sffn.other_routers:
        layers = ", ".join(
            f"{settings.sparse_layers[index]} ({router.name})"
            for index, router in sffn.other_routers
        )
        sentences.append(f"All sparse layers have `{sffn.router.name}`, except {layers}.")
    if settings.biased:
        sentences.append("An expert bias, learned without gradients, is added to choose blocks.")
    if settings.priced:
        sentences.append(
            "Prices of quantile balancing are subtracted from scores to choose blocks."
        )
    if (groups := settings.args.moe_router_num_groups or 1) > 1:
        chosen = settings.args.moe_router_group_topk
        sentences.append(f"The blocks of a token lie in {chosen} of {groups} groups.")
    losses = "none" if settings.priced else settings.args.moe_router_load_balancing_type
    names = " ".join(losses) if isinstance(losses, list) else losses
    sentences.append(f"Load balancing loss in training: {names}.")
    return " ".join(sentences)


def _shared(sffn: SparseFFNConfig) -> str:
    if not sffn.shared_blocks:
        return ""
    return f", and {sffn.shared_blocks} blocks that all tokens share"


def _training_rows(settings: Settings, run: Path, iteration: int) -> list[tuple[str, Any]]:
    args, values = settings.args, vars(settings.args)
    data = [values[dest] for dest in DATA_FLAGS if values.get(dest)]
    names = sorted({Path(word).name for entry in data for word in _words(entry)})
    samples = values.get("consumed_train_samples")
    rows: list[tuple[str, Any]] = [
        ("data", ", ".join(f"`{name}`" for name in names) or ("mock" if args.mock_data else None)),
        ("tokens seen", None if samples is None else f"{samples * args.seq_length:,}"),
        ("sequence length", args.seq_length),
        ("batch size, sequences", args.global_batch_size),
        ("learning rate", f"{args.lr}, {args.lr_decay_style}"),
        ("optimizer", args.optimizer),
        ("precision", str(args.params_dtype).removeprefix("torch.")),
        ("seed", args.seed),
    ]
    validation, perplexity = None, None
    for record in read_records(run / "validation.jsonl"):
        if record["iteration"] == iteration:
            validation = f"{record['loss']:.4f}"
    results = read_json_object(run / "summary.json")
    if results.get("iterations") == iteration and results.get("validation_perplexity"):
        perplexity = f"{results['validation_perplexity']:.2f}"
    return [*rows, ("validation loss", validation), ("validation perplexity", perplexity)]


def _evaluation(run: Path, iteration: int) -> str:
    """What `megatron-sffn eval` measured of this iteration and wrote to the folder of the run."""
    results = read_json_object(run / EVALUATION)
    if results.get("iteration") != iteration:
        return f"{UNKNOWN.capitalize()}: no `{EVALUATION}` of `megatron-sffn eval` is in the run.\n"
    lines = [
        f"`megatron-sffn eval`, {results['dtype']}, windows of {results['context']} tokens, a new "
        f"one every {results['stride']}.\n",
        "| | metric | value |",
        "|---|---|---|",
    ]
    for record in results["results"]:
        for name in ("loss", "perplexity", "bits_per_byte"):
            if record[name] is not None:
                name_of_data = Path(record["data"]).name
                lines.append(f"| {name_of_data} | {name.replace('_', ' ')} | {record[name]:.4f} |")
    for task, metrics in results.get("tasks", {}).items():
        lines += [f"| {task} | {name} | {value:.4f} |" for name, value in metrics.items()]
    return "\n".join(lines) + "\n"


def _words(entry: Any) -> list[str]:
    """Names in a flag of data, without the weights of a blend."""
    words = entry if isinstance(entry, list) else [entry]
    return [str(word) for word in words if not _is_number(str(word))]


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()
