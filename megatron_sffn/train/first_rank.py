"""Parses the command line of a run as its first rank would, without starting the run.

Inputs: the flags of a run and its number of ranks. Outputs: Megatron's namespace, checked as a run
checks it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence

from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.patches import prepare
from megatron_sffn.patches.cpu import is_host
from megatron_sffn.train.arguments import parse
from megatron_sffn.utils.errors import ConfigError


def parse_as_first_rank(
    flags: Sequence[str], ranks: int, *, device: str | None = None, read_tokenizer: bool = False
) -> tuple[Namespace, bool]:
    """Parse and check the flags of a run of `ranks` ranks.

    Args:
        flags: command line of the run. The default of `--micro-batch-size` is 1.
        ranks: world size.
        device: "cpu" or "cuda"; None for that of this machine.
        read_tokenizer: True to take the size of the vocabulary from the tokenizer if no flag has
            it.

    Returns:
        Megatron's namespace with a padded vocabulary size, and True if the run is one on CUDA.

    Raises:
        ConfigError: if a run would refuse the flags, or no flag says the size of the vocabulary.
    """
    defaults, _ = prepare()
    cuda = device == "cuda" or (device is None and not is_host())
    defaults = {"micro_batch_size": 1, **defaults}
    defaults["distributed_backend"] = "nccl" if cuda else "gloo"
    with as_first_rank(flags, ranks):
        args = parse(defaults)
        if args.padded_vocab_size is None:
            if args.vocab_size is None and read_tokenizer:
                args.vocab_size = load_tokenizer(args).vocab_size
            if args.vocab_size is None:
                raise ConfigError(
                    "--vocab-size is missing, and no tokenizer is read here; give --vocab-size N, "
                    "or --padded-vocab-size N"
                )
            args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args, False)
    return args, cuda


@contextlib.contextmanager
def as_first_rank(flags: Sequence[str], ranks: int) -> Iterator[None]:
    """Let this process look like the first rank of a run, without its output."""
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    argv, saved_environ = sys.argv, {name: os.environ.get(name) for name in world}
    sys.argv = ["pretrain", *flags]
    os.environ.update(world)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.argv = argv
        for name, value in saved_environ.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
