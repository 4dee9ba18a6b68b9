"""Run every router in a layer on fake GPU tensors: `python -m tests.support.fake_gpu`.

A fake tensor has a shape, a dtype and a device, but no numbers. torch raises an error if tensors of
two devices or of wrong dtypes are combined, or if the host asks for a number or a shape that only
the device knows. The process prints the errors as JSON: `case` -> error.

The forward pass runs on `cuda`. torch's backward pass asks the driver for the existing devices, so
both passes run again on `meta` in place of the GPU.

This needs its own process, because the tests' host platform replaces GPU tensors with CPU tensors.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_sffn.nn.layer import layer_class
from megatron_sffn.nn.routers import s_base
from tests.support.router_cases import BATCH, SPARSE, VOCAB, Case, S, config_of
from tests.support.simulated_gpu import simulate_gpu

D = 16
"""Width of the layers; some backends need a multiple of 16."""
DEVICES = {"cuda": 0, "meta": torch.device("meta")}
"""Device type in place of the GPU -> the answer of `torch.cuda.current_device`."""
BACKENDS = {
    "naive": ("fp32", "bf16", "fp16"),
    "masked": ("fp32", "bf16", "fp16"),
    "bags": ("fp32", "bf16", "fp16"),
    "grouped": ("bf16",),
    "triton": ("fp32", "bf16", "fp16"),
}
"""Backends that never wait -> dtypes."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SWITCH = {
    "switch, loss per sequence": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "switch, global loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "switch, prices": {
        "moe_router_load_balancing_type": "quantile_balancing",
        "moe_aux_loss_coeff": 0.0,
    },
    "switch, bias and z loss": {"moe_router_enable_expert_bias": True, "moe_z_loss_coeff": 0.1},
}
WAITS = "remoe"
"""The router of which only the device knows how many blocks the tokens have (`test_waits.py`)."""
CASES = {
    **{name: Case(router=name) for name in SPARSE if name != WAITS},
    **{
        name: Case(router="switch", megatron=tuple({"moe_aux_loss_coeff": 0.1, **flags}.items()))
        for name, flags in SWITCH.items()
    },
    "sigma-moe, entropy": Case(router="sigma-moe", options=(("entropy_coefficient", 0.1),)),
    **{
        f"avg-k, {kind}": Case(router="avg-k", options=(("descriptor", kind), ("gate", "sigmoid")))
        for kind in ("max-norm", "norm-weighted", "learned", "ema")
    },
}


def check_case(case: Case, backend: str, dtype: torch.dtype, on: str) -> None:
    """Forward and backward of a new layer; its results must have the right device and dtype."""
    fields = {"params_dtype": dtype, "moe_router_dtype": "fp32", "perform_initialization": False}
    fields |= dict(case.megatron)
    case = Case(**{**vars(case), "megatron": tuple(fields.items())})
    layer = layer_class(case.backend)(
        replace(config_of(case), hidden_size=D), layer_number=1
    ).train()
    layer.backend = backend
    if case.router == "rand-hash":
        # The router computes this table once, which needs real numbers.
        layer.router._table = torch.empty(
            VOCAB, layer.router.sffn.num_active_blocks, dtype=torch.int16, device=on
        )
    # As Megatron's schedules set it for each microbatch.
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones((), device=on)
    x = torch.empty(S, BATCH, D, dtype=dtype, device=on, requires_grad=True)
    y, _ = layer(x, padding_mask=torch.zeros(BATCH, S, dtype=torch.long, device=on))
    assert (y.dtype, y.device.type) == (dtype, on), y
    if on == "cuda":
        return
    y.sum().backward()
    weights = {name: weight for name, weight in layer.named_parameters() if weight.grad is not None}
    assert any(name.startswith("experts") for name in weights), weights.keys()
    for name, weight in {"x": x, **weights}.items():
        assert (weight.grad.dtype, weight.grad.device.type) == (dtype, on), name


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """One rank, and the answers of an H100 wherever torch would ask the driver."""
    simulate_gpu(pytest.MonkeyPatch(), is_gpu=lambda tensor: tensor.device.type != "cpu")
    # The host reads the error every few iterations; stop before the first time.
    s_base.MAX_ITERATIONS = s_base.ITERATIONS_PER_CHECK - 1
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield
        torch.distributed.destroy_process_group()


def main() -> dict[str, str]:
    """Run every case in every dtype, and one case with every backend; return the errors."""
    plans = list(itertools.product(CASES.items(), ["auto"], DTYPES, DEVICES))
    swiglu = Case(router="sigma-moe", swiglu=True, block_size=8)
    backend_plans = itertools.product([("swiglu", swiglu)], BACKENDS.items(), DEVICES)
    plans += [
        (case, backend, dtype, on)
        for case, (backend, names), on in backend_plans
        for dtype in names
    ]
    # Triton's products have two forms, and no form has all three products in the case before.
    coarse = Case(router="sigma-moe", swiglu=True, block_size=16, expansion=64)
    fine = Case(router="pkm", block_size=1)
    plans += itertools.product((("coarse", coarse), ("fine", fine)), ["triton"], ["bf16"], DEVICES)
    # `cuda` adds little to `meta`, so one dtype is enough.
    plans = [plan for plan in plans if plan[2:] not in (("fp32", "cuda"), ("fp16", "cuda"))]
    errors = {}
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    for (name, case), backend, dtype, on in plans:
        torch.cuda.current_device = partial(DEVICES.get, on)
        get_moe_metrics_tracker().clear()
        try:
            with mode:
                check_case(case, backend, DTYPES[dtype], on)
        except Exception as error:
            if "-v" in sys.argv:
                traceback.print_exc()
            errors[f"{name}, {backend}, {dtype}, {on}"] = f"{type(error).__name__}: {error}"
    return errors


if __name__ == "__main__":
    with simulated_gpu():
        failed = main()
    print(json.dumps(failed, indent=1))
