"""The pretraining command, with a RuntimeError at the third batch of some ranks.

Inputs: the flags of `megatron_sffn.pretrain`, and RAISING_RANKS, such as `0,1`, in the environment.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

from megatron_sffn import pretrain
from megatron_sffn.utils.errors import run_command

SENTENCE = "CUDA error: an illegal memory access was encountered"


def main() -> int:
    from megatron_sffn.patches import prepare

    prepare()  # before Megatron is imported

    from megatron_sffn.train import run

    next_batch, batches = run.next_batch, itertools.count(1)

    def raise_or_next_batch(*args: Any, **kwargs: Any) -> Any:
        rank = os.environ.get("RANK", "0")
        if next(batches) == 3 and rank in os.environ["RAISING_RANKS"].split(","):
            raise RuntimeError(SENTENCE)
        return next_batch(*args, **kwargs)

    run.next_batch = raise_or_next_batch
    return pretrain.main()


if __name__ == "__main__":
    run_command(main)
