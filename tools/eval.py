"""Evaluates a trained checkpoint on text, on data sets and on tasks of lm-evaluation-harness.

The implementation is in `megatron_sffn/inference/`.

Inputs: the folder of a run; texts, data sets or tasks of lm-evaluation-harness. Outputs: losses,
perplexities, bits per byte and metrics, as a table and as JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_sffn.flags.names import flag_of
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.warning_filters import silence

DESCRIPTION = """\
Measure a checkpoint of megatron_sffn.pretrain: the loss, the perplexity per token and the bits per
byte of texts, and tasks of lm-evaluation-harness. The flags of the model and the tokenizer come
from the checkpoint; the layout may be another one than that of the run.
"""

EXAMPLE = """\
example: texts, every token with at least half of the context before it
  megatron-sffn eval --load runs/mine --data book.txt web.jsonl --stride 1024

example: a data set, on two expert parallel ranks
  torchrun --nproc-per-node 2 -m megatron_sffn.tools.eval --load runs/mine \\
      --data data/validation_text_document --expert-model-parallel-size 2

example: tasks of your own, without a network; the results also go to a file
  megatron-sffn eval --load runs/mine --tasks my_task --include-path tasks/ --output eval.json
"""


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    from megatron_sffn.inference.options import add_model_flags

    parser = CommandParser(prog="megatron-sffn eval", description=DESCRIPTION, epilog=EXAMPLE)
    add_model_flags(parser)
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        nargs="+",
        metavar="FILE",
        help="text files, JSON lines, Parquet files, folders of them, or data sets: the path of "
        "PREFIX.bin and PREFIX.idx without the ending",
    )
    add(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key or column of the text (default: text)",
    )
    add(
        "--stride",
        type=int,
        metavar="N",
        help="tokens between the beginnings of two windows: fewer mean more context for every "
        "token and more work (default: the context, so that windows do not overlap)",
    )
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="B",
        help="windows or requests that a replica computes together (default: 8)",
    )
    _add_task_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print the results as JSON")
    add("--output", type=Path, metavar="FILE", help="also write the results to a file, as JSON")
    return parser


def _add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of lm-evaluation-harness."""
    add = parser.add_argument_group(
        "lm-evaluation-harness", "pip install 'megatron-sffn[eval]'"
    ).add_argument
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="names of tasks, or paths of their YAML files; tasks with data of the hub need "
        "HF_HUB_OFFLINE=0",
    )
    add("--include-path", type=Path, metavar="DIR", help="folder with tasks of your own")
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples in the context (default: as the task has it)",
    )
    add("--limit", type=int, metavar="N", help="only the first N documents of a task, for a trial")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    options = build_parser().parse_args(argv)
    if not (options.data or options.tasks):
        raise ConfigError("there is nothing to evaluate; give --data FILE, or --tasks TASK")
    for dest in ("batch_size", "limit"):
        number = getattr(options, dest)
        if number is not None and number < 1:
            raise ConfigError(
                f"{flag_of(dest)} {number} must be at least 1; give a positive number"
            )

    from megatron_sffn.patches import prepare
    from megatron_sffn.pretrain import one_rank_without_torchrun

    one_rank_without_torchrun()
    prepare()

    from megatron_sffn.inference.eval_command import run

    run(options)
    return 0


if __name__ == "__main__":
    run_command(main)
