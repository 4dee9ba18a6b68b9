"""Megatron's real training step on any layout: model, schedule, gradient reduction, optimizer.

The results of one rank are the oracle. Weights and gradients are joined from the shards of all
ranks, with the offsets that Megatron's checkpoints record; shards that several ranks hold must
agree.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.models.hybrid import HybridModelConfig
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.hybrid_spec import hybrid_stack_spec
from megatron_sffn.nn.layer import set_weights_version, sparse_layers
from megatron_sffn.nn.layer_pattern import (
    cut,
    gpt_name,
    hybrid_layers,
    hybrid_pattern,
    layer_pattern,
)
from megatron_sffn.nn.layer_spec import block_spec
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.reinit import reinit_dense_weights
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.transformer_config import (
    SparseFFNMLATransformerConfig,
    SparseFFNTransformerConfig,
)
from megatron_sffn.train import param_groups
from megatron_sffn.train.run import finish_gradients

LAYERS, WIDTH, SEQUENCE, VOCAB = 4, 16, 8, 32
SAMPLES = 4
"""Samples of a global batch; a microbatch is one sample, so there are at most 4 DP ranks."""
LR, DECAY = 1e-2, 1e-2
STEPS = 3
"""Adam's moments, biases and moving averages act in the second step, their results in the third."""


@dataclass(frozen=True, kw_only=True)
class Layout(ParallelLayout):
    """A parallel layout in float64, with other settings that must not change the model.

    Args:
        recompute: None, `full`, or a module of selective recomputation.
        distributed_optimizer: with overlapped gradient reduction and parameter gather.
        hybrid: Megatron's HybridModel in place of its GPTModel.
        pattern: its layers, if they are not those of the GPT.
        optimizer: `adam`, or `muon`, which has no float64.
    """

    recompute: str | None = None
    optimizer: str = "adam"
    distributed_optimizer: bool = False
    hybrid: bool = False
    pattern: str | None = None
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Variant:
    """A sparse layer to train.

    Args:
        router: name.
        options: fields of its config.
        sffn: fields of the layer's config.
        megatron: fields of Megatron's config.
        factors: values of `--sffn-lr-mult` and `--sffn-wd-mult`.
    """

    router: str
    options: tuple[tuple[str, Any], ...] = ()
    sffn: tuple[tuple[str, Any], ...] = ()
    megatron: tuple[tuple[str, Any], ...] = ()
    factors: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Results of a run, joined from all ranks.

    Args:
        losses: of each step.
        grad_norms: of each step.
        grads: by name, of the first step; empty under the distributed optimizer, which has no
            rank with a whole gradient.
        weights: by name, after the last step.
        balance: the routers' expert biases after the last step, by layer.
    """

    losses: list[float]
    grad_norms: list[float]
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]
    balance: dict[int, Tensor]


def train(variant: Variant, layout: Layout) -> dict[str, Any]:
    """Train `STEPS` steps on this rank; returns its share of the results, for `join`."""
    chunks = build(variant, layout)
    optimizer = build_optimizer(chunks, variant, layout)
    losses, norms, grads = [], [], []
    for number in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(forward_and_backward(chunks, number, layout))
        if number == 0 and not layout.distributed_optimizer:
            grads = local_shards(chunks, "main_grad")
        optimizer.prepare_grads()
        norms.append(float(optimizer.get_grad_norm()))
        optimizer.step_with_ready_grads()
    if layout.distributed_optimizer:
        for chunk in chunks:
            chunk.disable_forward_pre_hook()
    return {
        "losses": losses,
        "grad_norms": norms,
        "grads": grads,
        "weights": local_shards(chunks, None),
        "balance": expert_biases(chunks),
    }


def build_optimizer(chunks: list[Any], variant: Variant, layout: Layout) -> Any:
    """Megatron's optimizer of the chunks, which reduce their gradients as in a run."""
    lr_mult, wd_mult = variant.factors
    param_groups.install(Namespace(sffn_lr_mult=lr_mult, sffn_wd_mult=wd_mult))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=layout.optimizer,
            lr=LR,
            weight_decay=DECAY,
            # Whole weights also under TP, and no rounding to bf16, so that layouts can be compared.
            muon_tp_mode="duplicated",
            muon_fp32_matmul_prec="highest",
            # Steps of about Adam's size.
            muon_extra_scale_factor=0.2,
            params_dtype=layout.dtype,
            # Megatron's clipping is written for fp32 only.
            clip_grad=0.0,
            # A gradient that is zero but for rounding must not become a step of size lr.
            adam_eps=1e-5,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.distributed_optimizer,
        ),
        chunks,
    )
    # It gives each parameter group its learning rate and weight decay.
    OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=STEPS,
        lr_decay_style="constant",
        start_wd=DECAY,
        end_wd=DECAY,
        wd_incr_steps=STEPS,
        wd_incr_style="constant",
    )
    config = chunks[0].config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finish_gradients
    if layout.distributed_optimizer:
        sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = sync[0] if len(sync) == 1 else sync
        config.grad_sync_func = None
    return optimizer


def forward_and_backward(chunks: list[Any], number: int, layout: Layout) -> float:
    """Megatron's schedule for the microbatches of one step; returns the step's mean loss."""
    batches = [samples(number) for _ in chunks]
    sums = get_forward_backward_func()(
        forward_step_func=partial(forward, number),
        data_iterator=batches if layout.virtual_stages > 1 else batches[0],
        model=chunks if layout.virtual_stages > 1 else chunks[0],
        num_microbatches=SAMPLES // parallel_state.get_data_parallel_world_size(),
        seq_length=SEQUENCE,
        micro_batch_size=1,
        forward_only=False,
    )
    return mean_loss(sums)


def expert_biases(chunks: list[Any]) -> dict[int, Tensor]:
    """The expert biases of this rank's layers, by the number of the layer."""
    return {
        chunks[0].config.ffn_number(layer.layer_number): layer.router.balance.expert_bias.clone()
        for chunk in chunks
        for layer in sparse_layers(chunk)
        if hasattr(layer.router, "balance") and layer.router.balance.biased
    }


def build(variant: Variant, layout: Layout) -> list[Any]:
    """This rank's model chunks, as Megatron builds and wraps them."""
    config = transformer_config(variant, layout)
    sizes: dict[str, Any] = {
        "transformer": config,
        "vocab_size": VOCAB,
        "seq_length": SEQUENCE,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": True,
    }
    model: Any = GPTModelConfig(**sizes, transformer_layer_spec=block_spec)
    if layout.hybrid:
        model = HybridModelConfig(
            **sizes,
            hybrid_layer_pattern=config.hybrid_pattern,
            hybrid_stack_spec=hybrid_stack_spec(config),
        )
    model.pre_wrap_hooks += [partial(reinit_dense_weights, 7), partial(widen_decays, layout.dtype)]
    overlap = layout.distributed_optimizer
    chunks: list[Any] = model.get_builder_cls()(model).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=overlap,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            bucket_size=2000 if overlap else None,
        ),
        data_parallel_random_init=False,
        mixed_precision_wrapper=None,
    )
    return chunks


def transformer_config(variant: Variant, layout: Layout) -> Any:
    """The config of a small model of the variant, with Megatron's own modules."""
    options = dict(variant.megatron)
    # With a dense layer among them, stages differ.
    sparse = list(options.pop("moe_layer_freq", (1, 0, 1, 1)))
    latent = "kv_lora_rank" in options
    balance: dict[str, Any] = {"moe_router_load_balancing_type": "none"}
    if variant.router == "switch":
        balance = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.05}
    return (SparseFFNMLATransformerConfig if latent else SparseFFNTransformerConfig)(
        **layer_fields(layout, sparse, latent=latent),
        hidden_size=WIDTH,
        num_attention_heads=4,
        ffn_hidden_size=32,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=layout.dtype,
        pipeline_dtype=layout.dtype,
        moe_router_dtype="fp64" if layout.dtype == torch.float64 else "fp32",
        # Large, so that a wrong term shows.
        init_method_std=0.3,
        **layout.megatron_sizes(),
        sequence_parallel=layout.tp > 1,
        moe_token_dispatcher_type=layout.dispatcher,
        transformer_impl="local",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        batch_p2p_comm=False,
        sffn=sffn_config(variant),
        # A variant is hashable, and has tuples where Megatron has lists.
        **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in (balance | recompute_fields(layout.recompute) | options).items()
        },
    )


def layer_fields(layout: Layout, sparse: list[int], *, latent: bool) -> dict[str, Any]:
    """Fields of the config that say which layers the model has.

    Args:
        layout: layout of the run.
        sparse: 1 for each sparse layer of the GPT, 0 for each dense one.
        latent: True for multi-latent attention.
    """
    if not layout.hybrid:
        return {"num_layers": LAYERS, "moe_layer_freq": sparse}
    pattern = hybrid_pattern(sparse, layout.layers_per_chunk(LAYERS), latent=latent)
    if layout.pattern is not None:
        pattern = cut(layout.pattern, layout.pp * layout.virtual_stages)
    return {
        "num_layers": len(hybrid_layers(pattern)),
        "moe_layer_freq": layer_pattern("", 0, pattern),
        "hybrid_pattern": pattern,
        "is_hybrid_model": True,
    }


def recompute_fields(recompute: str | None) -> dict[str, Any]:
    """Fields of the config that say what the backward pass computes again."""
    if recompute is None:
        return {}
    if recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {"recompute_granularity": "selective", "recompute_modules": [recompute]}


def sffn_config(variant: Variant) -> SparseFFNConfig:
    """The config of the variant's layer."""
    router = ROUTERS[variant.router]
    numbers = router.test_numbers.layer(active_cells=16, block_size=4, expansion=4)
    return SparseFFNConfig(
        router=router(**{**router.test_numbers.options, **dict(variant.options)}),
        **numbers | dict(variant.sffn),
    )


def widen_decays(dtype: torch.dtype, chunks: list[Any]) -> list[Any]:
    """Let Mamba's rates of decay have the dtype of the model, as gloo sums up one dtype at a time.

    Megatron makes them in fp32, and narrows them with the model.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith(".A_log"):
                parameter.data = parameter.data.to(dtype)
    return chunks


def samples(step: int) -> Any:
    """This rank's samples of a step, in order: `(ids [1, s], targets [1, s, V])`."""
    rank, replicas = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB, (SAMPLES, SEQUENCE), generator=draw)
    targets = torch.randn(SAMPLES, SEQUENCE, VOCAB, dtype=torch.float64, generator=draw)
    return iter([(ids[i : i + 1], targets[i : i + 1]) for i in range(rank, SAMPLES, replicas)])


def forward(step: int, batches: Any, model: Any) -> tuple[Tensor, Any]:
    """Megatron's forward step. The loss is a squared distance of the logits to random targets.

    Megatron's cross-entropy is computed in fp32 whatever the model's dtype: it would hide what
    float64 shows. The runs of the whole command have it.
    """
    ids, targets = next(batches)
    # The oracle has no version of the weights: it computes descriptors anew for every microbatch.
    alone = torch.distributed.get_world_size() == 1
    set_weights_version(model, None if alone else step)
    positions = torch.arange(SEQUENCE)[None]
    logits = model(ids, positions, None, padding_mask=ids)
    return logits, partial(loss_of, targets)


def loss_of(targets: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Megatron's loss function, for this TP rank's slice of the vocabulary."""
    width = VOCAB // parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() * width
    local_targets = targets[:, :, first : first + width].to(logits.dtype)
    loss = (logits - local_targets).square().sum() / (SEQUENCE * VOCAB)
    return loss, {"loss": loss.detach().clone()}


def mean_loss(sums: list[dict[str, Tensor]]) -> float:
    """The mean over all samples: stages without a loss, and replicas, add up."""
    local_sum = sum((microbatch["loss"].double() for microbatch in sums), torch.zeros(()).double())
    # Every TP rank holds part of the loss of each sample; CP is 1.
    total = local_sum.clone()
    torch.distributed.all_reduce(total)
    return float(total) / SAMPLES


Shard = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]


def local_shards(chunks: list[Any], attribute: str | None) -> list[Shard]:
    """This rank's shards of every weight, or of an attribute of every weight.

    Returns:
        Name, shape of the whole tensor, offset in it, and the shard.
    """
    shards = []
    for chunk in chunks:
        weights = {id(parameter): parameter for parameter in chunk.parameters()}
        for sharded in nested_values(chunk.module.sharded_state_dict()):
            if not isinstance(sharded, ShardedTensor | ShardedTensorFactory):
                continue
            parameter = weights.get(id(sharded.data))
            if parameter is None:
                continue  # a buffer
            value = parameter if attribute is None else getattr(parameter, attribute)
            value = value.detach().view(parameter.shape).clone()
            sharded = replace(sharded, data=value)
            pieces = sharded.build() if isinstance(sharded, ShardedTensorFactory) else sharded
            for piece in nested_values({"": pieces}):
                axes = piece.prepend_axis_num
                data = piece.data.reshape((1,) * axes + piece.local_shape)
                shards.append(
                    (name_of(chunk, piece.key), piece.global_shape, piece.global_offset, data)
                )
    return shards


def name_of(chunk: Any, key: str) -> str:
    """The name of a weight in the GPT, also where the chunk is of a hybrid model."""
    pattern = chunk.config.hybrid_pattern
    return key if pattern is None else gpt_name(key, pattern)


def join(results: list[dict[str, Any]]) -> Trained:
    """Join the results of all ranks."""
    for result in results[1:]:
        for name in ("losses", "grad_norms"):
            torch.testing.assert_close(result[name], results[0][name], rtol=1e-12, atol=0)
    balance: dict[int, Tensor] = {}
    for result in results:
        for layer, bias in result["balance"].items():
            assert torch.equal(balance.setdefault(layer, bias), bias), layer
    return Trained(
        losses=results[0]["losses"],
        grad_norms=results[0]["grad_norms"],
        grads=whole_tensors([shard for result in results for shard in result["grads"]]),
        weights=whole_tensors([shard for result in results for shard in result["weights"]]),
        balance=balance,
    )


def whole_tensors(shards: list[Shard]) -> dict[str, Tensor]:
    """Join shards to tensors by name; no number may be missing, and equal shards must agree."""
    tensors: dict[str, Tensor] = {}
    for name, shape, offset, data in shards:
        tensor = tensors.setdefault(name, torch.full(shape, torch.nan, dtype=data.dtype))
        region = tensor[tuple(slice(i, i + n) for i, n in zip(offset, data.shape, strict=True))]
        known = ~region.isnan()
        torch.testing.assert_close(region[known], data[known], rtol=1e-10, atol=1e-12, msg=name)
        region.copy_(data)
    for name, tensor in tensors.items():
        assert not tensor.isnan().any(), f"a shard of {name} is on no rank"
    return tensors


def run(layout: Layout, variants: list[Variant]) -> list[dict[str, Any]]:
    """`train` of each layer in one world."""
    # Megatron warns about its experimental models and its dense MLP.
    warnings.simplefilter("ignore")
    torch.set_default_dtype(layout.dtype)  # torch's norms use it
    replicas = parallel_state.get_data_parallel_world_size()
    init_num_microbatches_calculator(0, None, SAMPLES, 1, replicas)
    try:
        return [train(variant, layout) for variant in variants]
    finally:
        destroy_num_microbatches_calculator()
