"""The host waits for a GPU only where these tables say. They may only shrink.

The default path never waits. The exceptions are in `ALLOWED_WAITS` and docs/backends.md. With
several ranks the host waits for counts: see `RANK_CASES` and docs/parallelism.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron_sffn.nn.config import Backend
from megatron_sffn.nn.layer import set_weights_version
from megatron_sffn.nn.routers.descriptors import DESCRIPTORS
from megatron_sffn.ops.block_ffn import pairs_of_ids
from megatron_sffn.ops.block_ffn.check import pairs as check_pairs
from megatron_sffn.train.nan_check import NanCheck
from tests.support import router_cases, waits
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.router_cases import SPARSE, VOCAB, Case


def switch_case(**megatron: Any) -> Case:
    """A layer with router switch and these fields of Megatron's config."""
    return Case(router="switch", megatron=tuple({"moe_aux_loss_coeff": 0.1, **megatron}.items()))


CASES = {
    **{name: Case(router=name, megatron=(("padded_vocab_size", VOCAB),)) for name in SPARSE},
    "rand-hash, vocabulary not known": Case(router="rand-hash"),
    "switch, loss per sequence": switch_case(moe_router_load_balancing_type="seq_aux_loss"),
    "switch, global loss": switch_case(moe_router_load_balancing_type="global_aux_loss"),
    "switch, z loss": switch_case(moe_z_loss_coeff=0.1),
    "switch, bias": switch_case(moe_router_enable_expert_bias=True),
    "switch, prices": switch_case(
        moe_router_load_balancing_type="quantile_balancing", moe_aux_loss_coeff=0.0
    ),
    "switch, capacity": switch_case(moe_expert_capacity_factor=1.0, moe_token_drop_policy="probs"),
    "sigma-moe, entropy": Case(router="sigma-moe", options=(("entropy_coefficient", 0.1),)),
    "sigma-moe, dropout": Case(router="sigma-moe", options=(("block_dropout", 0.1),)),
    "remoe, loss": Case(router="remoe", options=(("l1_coefficient", 0.1),)),
    "peer, heads": Case(router="peer", options=(("heads", 2),)),
    **{
        f"avg-k, {kind}": Case(router="avg-k", options=(("descriptor", kind), ("gate", "sigmoid")))
        for kind in DESCRIPTORS
    },
    **{
        f"backend {name}": Case(router="avg-k", backend=Backend(name))
        for name in ("torch", "masked", "bags")
    },
}

WAITS_FOR_EMPTY_PLACES = {"ops/block_ffn/pairs.py:pairs_of_ids": 1}
ALLOWED_WAITS: dict[str, dict[str, int]] = {
    "peer, heads": WAITS_FOR_EMPTY_PLACES,
    "remoe": WAITS_FOR_EMPTY_PLACES,
    "remoe, loss": WAITS_FOR_EMPTY_PLACES,
    # The hash repeats until all ids are in range, and the host reads the number of ids.
    "rand-hash, vocabulary not known": {
        "nn/routers/rand_hash.py:forward": 1,
        "utils/hashing.py:hashed_subsets": 4,
    },
    # The host reads the error of Sinkhorn once in 10 iterations.
    "s-base": {"nn/routers/s_base.py:balancing_prices": 1},
    # The number of empty places depends on the tokens.
    "switch, capacity": WAITS_FOR_EMPTY_PLACES,
    "sigma-moe, dropout": WAITS_FOR_EMPTY_PLACES,
    # The loop over blocks needs their offsets.
    "backend torch": {"ops/block_ffn/torch_backend.py:_host_offsets": 1},
}
"""Case -> `file:function` -> waits of one forward and backward pass."""


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_only_where_the_table_says(one_rank: None, name: str) -> None:
    layer = router_cases.build(CASES[name]).train()
    hidden, ids, weights = router_cases.inputs()

    def step() -> None:
        y, _ = layer(hidden.clone().requires_grad_(), padding_mask=ids)
        (y * weights).sum().backward()

    # The first step may wait for values that are computed once.
    step()
    layer.router.end_step()
    set_weights_version(layer, "another")
    assert waits.recorded(step) == ALLOWED_WAITS.get(name, {})


def expert_parallel_case(dispatcher: str, **sffn: Any) -> Case:
    """A layer with expert parallelism."""
    return Case(
        router="switch",
        megatron=(("moe_token_dispatcher_type", dispatcher),),
        sffn=tuple(sffn.items()),
    )


RANK_CASES: dict[str, tuple[Case, int]] = {
    "alltoall": (expert_parallel_case("alltoall"), 1),
    "alltoall in chunks": (expert_parallel_case("alltoall", exchange_chunks=4), 1),
    "alltoall, rows sent again": (expert_parallel_case("alltoall", regather="on"), 1),
    "alltoall on two nodes": (expert_parallel_case("alltoall", node_size=2), 2),
    "alltoall on two nodes in chunks": (
        expert_parallel_case("alltoall", node_size=2, exchange_chunks=4),
        2,
    ),
    "allgather": (expert_parallel_case("allgather"), 1),
    "allgather, rows sent again": (expert_parallel_case("allgather", regather="on"), 1),
}
"""Exchange -> a layer, and the waits for counts in one forward and backward pass, with EP 4."""


def waits_between_ranks() -> dict[str, dict[str, int]]:
    """Case -> the waits of a step on this rank."""
    result = {}
    for name, (case, _) in RANK_CASES.items():
        layer = router_cases.build(case).train()
        hidden, ids, weights = router_cases.inputs()

        def step(layer: Any = layer, x: Any = hidden, ids: Any = ids, w: Any = weights) -> None:
            y, _ = layer(x.clone().requires_grad_(), padding_mask=ids)
            (y * w).sum().backward()

        step()
        layer.router.end_step()
        result[name] = waits.recorded(step)
    return result


def test_an_exchange_waits_for_counts_once_per_level_for_any_number_of_chunks() -> None:
    expected = {name: {"ops/streams.py:wait": number} for name, (_, number) in RANK_CASES.items()}
    for rank_waits in run_ranks(4, waits_between_ranks, expert_model_parallel_size=4):
        assert rank_waits == expected


def test_the_nan_check_at_the_end_of_a_step_waits_once(one_rank: None) -> None:
    model = torch.nn.ModuleList([router_cases.build(Case(router="avg-k")) for _ in range(3)])
    args = Namespace(
        num_layers=2,
        mtp_num_layers=None,
        hybrid_layer_pattern=None,
        curr_iteration=4,
        sffn_router="avg-k",
    )
    args.check_for_nan_in_loss_and_grad = args.check_for_spiky_loss = False
    check = NanCheck(args)
    for loss in (1.0, 2.0):
        check.note_loss(torch.full((), loss))
    assert waits.recorded(lambda: check.after_step([model])) == {
        "train/nan_check.py:_check_scores": 1
    }
    model[1].router.score_flag.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 5, layer 1, router avg-k: scores are NaN"):
        check.after_step([model])


def test_the_recorder_detects_every_operation_that_waits() -> None:
    x = torch.tensor([3, 1, 2])
    waiting = {
        "item": lambda: x[0].item(),
        "bool": lambda: bool(x[0] > 2),
        "if": lambda: 1 if x.sum() else 0,
        "int": lambda: int(x[1]),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "nonzero": lambda: x.nonzero(),
        "where": lambda: torch.where(x > 1),
        "mask": lambda: x[x > 1],
        "mask to write": lambda: x.clone().__setitem__(x > 1, x[:2]),
        "masked_select": lambda: x.masked_select(x > 1),
        "bincount": lambda: x.bincount(),
        "unique": lambda: x.unique(),
        "repeats": lambda: x.repeat_interleave(x),
        "equal": lambda: torch.equal(x, x),
        "new": lambda: torch.tensor(3, device="cpu"),
        "check": lambda: check_pairs_of(x),
    }
    not_waiting = {
        "repeats of a known size": lambda: x.repeat_interleave(x, output_size=6),
        "index": lambda: x[x - 1],
        "scatter": lambda: x.clone().scatter_add_(0, x - 1, x),
        "fill": lambda: x.clone().fill_(2),
        "set": lambda: x.clone().__setitem__(0, 7),
        "topk": lambda: x.topk(2),
        "shape": lambda: len(x) + x.numel(),
    }
    assert [name for name, call in waiting.items() if not waits.recorded(call)] == []
    assert [name for name, call in not_waiting.items() if waits.recorded(call)] == []


def check_pairs_of(ids: torch.Tensor) -> None:
    """The checks of `SFFN_CHECK=1`, for which the host waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFFN_CHECK", "1")
        pairs, _ = pairs_of_ids(ids[:, None], None, may_be_empty=False)
        check_pairs(pairs, 3, 4, distinct=True)


def test_every_router_runs_on_fake_tensors_of_a_gpu() -> None:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.fake_gpu"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == {}
