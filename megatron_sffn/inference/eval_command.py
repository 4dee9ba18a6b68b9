"""The command `eval`: perplexity of files and tasks of lm-evaluation-harness, as table and JSON.

Inputs: the flags of `tools/eval.py`. Outputs: a table or JSON on stdout, and JSON in a file.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from tqdm import tqdm

from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.inference.checkpoint_args import Source, checked_args, find_checkpoint
from megatron_sffn.inference.eval_data import Data, open_data
from megatron_sffn.inference.evaluate import evaluate, table
from megatron_sffn.inference.model import InferenceModel, finish, is_output_rank, load_model
from megatron_sffn.inference.quiet import quiet
from megatron_sffn.utils.atomic_files import atomic_write_text
from megatron_sffn.utils.errors import ConfigError, require
from megatron_sffn.utils.stderr import say


def run(options: Namespace) -> None:
    """Run the command.

    Raises:
        ConfigError: the checkpoint, the layout, a file or a task cannot work.
    """
    source = find_checkpoint(options)
    stride = _stride(options.stride, source.context)
    manager = None
    if options.tasks:
        require("lm_eval", "--tasks", extra="eval")
        from megatron_sffn.inference.lm_eval import find_tasks

        manager = find_tasks(options.tasks, options.include_path)
    args = checked_args(source, options)
    with quiet():
        tokenizer = load_tokenizer(args)
    files = [open_data(name, tokenizer, options.json_key) for name in options.data or []]
    model = load_model(source, args)
    records = [_evaluate(model, data, stride, options.batch_size).record() for data in files]
    results: dict[str, Any] = {**_described(source, model, stride), "results": records}
    if manager is not None:
        from megatron_sffn.inference.lm_eval import evaluate_tasks

        with quiet():
            results["tasks"] = evaluate_tasks(model, manager, options)
    if is_output_rank():
        _print(results, options)
    finish()


def _stride(stride: int | None, context: int) -> int:
    """The stride of the windows; by default nothing overlaps."""
    if stride is None:
        return context
    if not 1 <= stride <= context:
        raise ConfigError(
            f"--stride {stride} is not between 1 and the context of the model, {context} tokens; "
            f"give a number of this range, such as {max(1, context // 2)}"
        )
    return stride


def _evaluate(model: InferenceModel, data: Data, stride: int, batch_size: int) -> Any:
    """Score a file, with a progress bar on a terminal."""
    is_hidden = None if is_output_rank() else True
    with tqdm(unit="token", unit_scale=True, disable=is_hidden, desc=data.name) as bar:
        return evaluate(model, data, stride=stride, batch_size=batch_size, progress=bar.update)


def _described(source: Source, model: InferenceModel, stride: int) -> dict[str, Any]:
    """What was evaluated, and how."""
    return {
        "load": str(source.folder.parent),
        "iteration": model.iteration,
        "context": model.context,
        "stride": stride,
        "dtype": str(model.module.config.params_dtype).removeprefix("torch."),
    }


def _print(results: dict[str, Any], options: Namespace) -> None:
    """Print the results, and write them to the file of `--output`."""
    text = json.dumps(results, indent=2)
    if options.json:
        print(text, flush=True)
    else:
        if results["results"]:
            print(table(results["results"]), flush=True)
        for task, metrics in results.get("tasks", {}).items():
            for name, value in metrics.items():
                print(f"{task}  {name}  {value:.4f}", flush=True)
    if options.output:
        atomic_write_text(options.output, text + "\n")
        say(f"results -> {options.output}")
