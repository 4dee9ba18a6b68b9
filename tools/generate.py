"""Generates text with a trained checkpoint.

The implementation is in `megatron_sffn/inference/`.

Inputs: the folder of a run, and prompts. Outputs: their continuations on stdout, or as JSON lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.warning_filters import silence

DESCRIPTION = """\
Continue prompts with a checkpoint of megatron_sffn.pretrain. The flags of the model and the
tokenizer come from the checkpoint; the layout may be another one than that of the run.
"""

EXAMPLE = """\
example: one prompt, printed as it is written
  megatron-sffn generate --load runs/mine --prompt "The sparse layer" --max-new-tokens 50

example: all prompts of a file, greedy, as JSON lines with the continuation under "text"
  megatron-sffn generate --load runs/mine --prompt-file prompts.txt --temperature 0 --json

example: a conversation with the terminal, from a checkpoint on two pipeline stages
  torchrun --nproc-per-node 2 -m megatron_sffn.tools.generate --load runs/mine --interactive \\
      --pipeline-model-parallel-size 2
"""


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    from megatron_sffn.inference.options import add_model_flags

    parser = CommandParser(prog="megatron-sffn generate", description=DESCRIPTION, epilog=EXAMPLE)
    add_model_flags(parser)
    prompts = parser.add_argument_group("prompts").add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; may be given several times; ids where the run has NullTokenizer",
    )
    prompts.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="one prompt per line, or JSON lines with the text under prompt (.jsonl)",
    )
    prompts.add_argument(
        "--interactive", action="store_true", help="read prompts from standard input, line by line"
    )
    _add_sampling_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print a JSON object per prompt")
    add("--output", type=Path, metavar="FILE", help="write the JSON objects to a file instead")
    return parser


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the continuation, with the names and meanings that transformers and vLLM have."""
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens of a continuation (default: 128, or fewer if the context ends before)",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="divides the logits; 0 is greedy (default: 1)",
    )
    add(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw one of the K likeliest tokens (default: 0, which is all)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw one of the likeliest tokens that have probability P together (default: 1)",
    )
    add(
        "--seed",
        type=int,
        default=1234,
        metavar="S",
        help="the same seed gives the same text, on every layout (default: 1234)",
    )
    add(
        "--ignore-eod",
        action="store_true",
        help="do not stop at the end-of-document token",
    )
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="B",
        help="prompts that are continued together; it does not change their text (default: 8)",
    )
    add(
        "--no-kv-cache",
        dest="kv_cache",
        action="store_false",
        help="compute all tokens again for every new one, as a check of the cache",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    options = build_parser().parse_args(argv)
    if options.batch_size < 1:
        raise ConfigError(
            f"--batch-size {options.batch_size} must be at least 1; give a positive number"
        )
    if options.interactive and (options.json or options.output):
        raise ConfigError(
            "--interactive prints text, so --json and --output have nothing to act on; leave them "
            "out, or give --prompt-file"
        )

    from megatron_sffn.patches import prepare
    from megatron_sffn.pretrain import one_rank_without_torchrun

    one_rank_without_torchrun()
    prepare()

    from megatron_sffn.inference.generate_command import run

    run(options)
    return 0


if __name__ == "__main__":
    run_command(main)
