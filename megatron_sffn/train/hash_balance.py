"""The counts of token ids by which a new run balances its hash maps (`--sffn-hash-balance`).

Inputs: the data set that the flag names. Outputs: balanced maps in the model's routers.

Design notes: every rank counts the ids and makes the maps, which follow from integers alone, so
that nothing has to be sent. A run that loads a checkpoint finds its maps there and reads nothing.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.checks.resume import checkpoint_to_load
from megatron_sffn.data.indexed.format import open_index
from megatron_sffn.data.indexed.stats import id_counts
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.nn.routers.rand_hash import RandHashRouter
from megatron_sffn.utils.errors import ConfigError


def counts_of_new_run(args: Namespace) -> Tensor | None:
    """Count the ids of the data set that `--sffn-hash-balance` names.

    Args:
        args: Megatron's validated namespace.

    Returns:
        Int64 occurrences of the ids, up to the largest that occurs; None without the flag, or if
        the run loads a checkpoint.

    Raises:
        ConfigError: the data set is missing, damaged, empty, or of another tokenizer.
    """
    data_set = args.sffn_hash_balance
    if data_set is None:
        return None
    if checkpoint_to_load(args) is not None:
        return None
    counts = id_counts([open_index(data_set)], lambda _: None)
    num_ids = load_tokenizer(args).vocab_size
    if not 0 < len(counts) <= num_ids:
        content = f"holds the id {len(counts) - 1}" if len(counts) else "holds no ids"
        raise ConfigError(
            f"--sffn-hash-balance {data_set} {content}, and the tokenizer has ids below "
            f"{num_ids}; give a data set that was made with the run's tokenizer"
        )
    return torch.from_numpy(counts)


def balance_maps(counts: Tensor, chunks: list[Any]) -> list[Any]:
    """Balance the maps of a new model; a pre-wrap hook of Megatron.

    Args:
        counts: of `counts_of_new_run`.
        chunks: the model chunks of this rank.

    Returns:
        The same chunks.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, RandHashRouter):
                module.balance_map(counts)
    return chunks
