"""Builds a configuration at full size without storage, and counts it.

Outputs: parameters and FLOPs per token in closed form; the built model must have the parameters.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.training.models.dist_utils import build_virtual_pipeline_stages
from megatron.training.models.gpt import GPTModelBuilder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sffn.accounting import (
    ModelShape,
    count_parameters,
    flops_per_token,
    training_flops_per_token,
)
from megatron_sffn.flags.sffn_flags import sffn_config
from megatron_sffn.train.run import model_config


@contextmanager
def fake_rank(rank: int, args: Namespace) -> Iterator[None]:
    """Megatron's process groups of one rank of the full world; no other rank exists."""
    store = FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=args.world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def parameters_on_rank(rank: int, args: Namespace) -> Counter[str]:
    """Parameters of a rank, built without storage, by the parallelism that shards them."""
    config, count = model_config(args, sffn_config(args)), Counter[str]()
    config.transformer.perform_initialization = False
    with fake_rank(rank, args), FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the command's own filters count here
        chunks = build_virtual_pipeline_stages(
            GPTModelBuilder(config).build_model,
            ProcessGroupCollection.use_mpu_process_groups(),
            args.virtual_pipeline_model_parallel_size,
        )
    for chunk in chunks:
        for parameter in chunk.parameters():
            is_expert = not getattr(parameter, "allreduce", True)
            is_sharded = getattr(parameter, "tensor_model_parallel", False)
            count["expert" if is_expert else "tensor" if is_sharded else "all"] += parameter.numel()
    return count


def parameters_of_all_ranks(args: Namespace) -> int:
    """Parameters of the model, from those of the first and last rank of every stage."""
    stages, total = args.pipeline_model_parallel_size, 0
    ranks_per_stage = args.world_size // stages
    for first_rank in range(0, args.world_size, ranks_per_stage):
        count = parameters_on_rank(first_rank, args)
        assert (
            ranks_per_stage == 1
            or parameters_on_rank(first_rank + ranks_per_stage - 1, args) == count
        )
        total += count["expert"] * args.expert_model_parallel_size
        total += count["tensor"] * args.tensor_model_parallel_size + count["all"]
    return total


def counts(args: Namespace) -> dict[str, int]:
    """Total and active parameters, and FLOPs per token, in closed form."""
    shape = ModelShape.of_args(args, sffn_config(args))
    parameters = count_parameters(shape)
    return {
        "total": parameters.total,
        "active": parameters.active,
        "flops_forward": flops_per_token(shape).total,
        "flops_training": training_flops_per_token(
            shape, recompute=args.recompute_granularity == "full"
        ),
    }


def count_and_check(args: Namespace) -> dict[str, int]:
    """`counts`, where the built model must have the total.

    Raises:
        AssertionError: if it has another number of parameters.
    """
    expected, built = counts(args), parameters_of_all_ranks(args)
    assert built == expected["total"], f"built: {built:,} parameters, counted {expected['total']:,}"
    return expected
