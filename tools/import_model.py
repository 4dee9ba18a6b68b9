"""Imports a Hugging Face folder as a checkpoint, or makes a dense model sparse.

Inputs: the folder of a model, or of a run. Outputs: a checkpoint; implemented in `hf/importing.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.warning_filters import silence

DESCRIPTION = """\
Import a model of transformers as a checkpoint that training and all commands load on every layout.
It holds the flags of the model and its tokenizer. Experts become blocks of their width, which
`megatron-sffn convert-checkpoint reblock` cuts finer. A setting that cannot be held exactly is
refused. The folder appears complete or not at all.

A dense FFN is a memory already. With --sffn-router a dense model becomes a sparse one: the cells of
the FFN are cut into blocks (the same function if all are active), or the FFN is copied (--upcycle).
"""

EXAMPLE = """\
example: a mixture of experts
  .venv/bin/python tools/import_model.py --model models/mixtral --save runs/mixtral

example: a dense model as Avg-K, an eighth of its 11008 cells active
  .venv/bin/python tools/import_model.py --model models/llama --save runs/avg-k \\
      --sffn-router avg-k --sffn-block-size 16 --sffn-active-cells 1376

example: the same from a dense run, by 8 copies of which a token uses 2
  .venv/bin/python tools/import_model.py --load runs/dense --save runs/upcycled \\
      --sffn-router softmax-after --upcycle 8 --sffn-active-cells 22016
"""

PASSED_ON = ("--sffn-", "--moe-", "--seed", "--init-method-std")
"""Beginnings of further flags that go into the checkpoint's model."""


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = CommandParser(description=DESCRIPTION, epilog=EXAMPLE)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="DIR", help="folder of a model")
    source.add_argument(
        "--load", type=Path, metavar="DIR", help="folder of a dense run, to make it sparse"
    )
    add(
        "--ckpt-step",
        type=int,
        metavar="N",
        help="iteration of --load (default: the one that training would load)",
    )
    add("--save", type=Path, required=True, metavar="DIR", help="folder of the new checkpoint")
    add(
        "--tokenizer-model",
        type=Path,
        metavar="DIR",
        help="folder of the tokenizer (default: the model's folder)",
    )
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="dtype of the weights (default: as in the model)",
    )
    add = parser.add_argument_group(
        "dense to sparse",
        "Other flags of the sparse layers (--sffn-... and --moe-... of pretrain, --seed and "
        "--init-method-std of new gates) go into the model as well.",
    ).add_argument
    add(
        "--sffn-router",
        metavar="ROUTER",
        help="make the dense model sparse with this router: avg-k, vanilla-m or another without "
        "weights; with --upcycle softmax-after or another with a linear gate network",
    )
    add(
        "--sffn-block-size",
        type=int,
        metavar="g",
        help="g, cells of a block (with --upcycle by default the width of the FFN)",
    )
    add(
        "--sffn-active-cells",
        type=int,
        metavar="k",
        help="k, active cells of a token (default: the width of the FFN)",
    )
    add(
        "--sffn-layers",
        default="every:1",
        metavar="LAYERS",
        help="which layers become sparse, as in pretrain (default: every:1)",
    )
    add("--upcycle", type=int, metavar="C", help="fill the memory with C copies of the FFN")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    parser = build_parser()
    args, further = parser.parse_known_args(argv)
    unknown = [w for w in further if w.startswith("--") and not w.startswith(PASSED_ON)]
    if unknown or (further and not further[0].startswith("--")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or further)}")
    given = {
        "--sffn-block-size": args.sffn_block_size,
        "--sffn-active-cells": args.sffn_active_cells,
        "--upcycle": args.upcycle,
    }
    for flag, value in given.items():
        if value is not None and args.sffn_router is None:
            raise ConfigError(
                f"{flag} {value} makes a dense model sparse, which needs --sffn-router; name one"
            )

    from megatron_sffn.patches import prepare
    from megatron_sffn.pretrain import one_rank_without_torchrun

    one_rank_without_torchrun()
    prepare()

    from megatron_sffn.hf.dense_to_sparse import DenseToSparse
    from megatron_sffn.hf.importing import import_model

    sparse = None
    if args.sffn_router is not None:
        sparse = DenseToSparse(
            router=args.sffn_router,
            block_size=args.sffn_block_size,
            active_cells=args.sffn_active_cells,
            layers=args.sffn_layers,
            copies=args.upcycle,
        )
    imported = import_model(
        args.save,
        model=args.model,
        load=args.load,
        step=args.ckpt_step,
        tokenizer=args.tokenizer_model,
        dtype=args.dtype,
        sparse=sparse,
        flags=further,
    )
    for note in imported.notes:
        print(f"note: {note}")
    source = args.load or args.model
    print(f"{imported.architecture or 'checkpoint'} {source} -> {args.save}, ", end="")
    print(f"{imported.parameters:,} parameters")
    print("flags of the model, which megatron-sffn's commands read from the checkpoint:")
    print(f"  {' '.join(imported.flags)}")
    print(f"training from it: pretrain with these flags and --load {args.save} --finetune")
    return 0


if __name__ == "__main__":
    run_command(main)
