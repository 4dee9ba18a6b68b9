"""Exports a checkpoint to a folder that transformers loads.

The implementation is in `hf/export.py`.

Inputs: the folder of a run. Outputs: safetensors, configuration, tokenizer and model card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_sffn.utils.errors import CommandParser, run_command
from megatron_sffn.utils.warning_filters import silence

DESCRIPTION = """\
Export a checkpoint to a folder that transformers loads. The model's flags come from the checkpoint,
and one process exports a checkpoint of any layout. Where a class of transformers computes exactly
the same, the folder has this class; otherwise it has sparse_ffn, whose file modeling_sparse_ffn.py
lies in the folder. The folder appears complete or not at all.
"""

EXAMPLE = """\
example
  .venv/bin/python tools/export.py --load runs/mine --output model
  python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('model')"

example: a former iteration in bf16, always as sparse_ffn
  .venv/bin/python tools/export.py --load runs/mine --ckpt-step 1000 --output model-1000 \\
      --dtype bf16 --architecture sparse_ffn
"""

ARCHITECTURES = (
    *("auto", "sparse_ffn", "llama", "qwen2", "qwen3", "gpt_neox", "starcoder2"),
    *("qwen3_moe", "mixtral", "qwen2_moe", "glm4_moe"),
)


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    from megatron_sffn.inference.options import add_checkpoint_flags

    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLE)
    add = parser.add_argument
    add_checkpoint_flags(add)
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace an existing folder")
    add(
        "--architecture",
        choices=ARCHITECTURES,
        default="auto",
        help="class of the model: auto takes one of transformers if it computes exactly the same, "
        "else sparse_ffn; another one is refused where it is not exact (default: auto)",
    )
    add(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest size of a file of weights, such as 500MB (default: 5GB)",
    )
    add(
        "--without-capacity",
        action="store_true",
        help="export a model with --moe-expert-capacity-factor as one that drops no token",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    args = build_parser().parse_args(argv)

    from megatron_sffn.patches import prepare
    from megatron_sffn.patches.unpickling import trust

    prepare()
    if args.sffn_trust_checkpoint:
        trust()

    from megatron_sffn.hf.export import export

    exported = export(
        args.load,
        args.output,
        step=args.ckpt_step,
        architecture=args.architecture,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        tokenizer=args.tokenizer_model,
        without_capacity=args.without_capacity,
        overwrite=args.overwrite,
    )
    print(f"architecture {exported.architecture}: {exported.reason}")
    for note in exported.notes:
        print(f"note: {note}")
    print(
        f"iteration {exported.iteration} of {args.load} -> {args.output}, "
        f"{exported.parameters:,} parameters"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
