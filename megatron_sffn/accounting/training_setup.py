"""The training setup that memory depends on beside the model and the parallel layout.

Inputs: Megatron's validated arguments, or the numbers themselves. Outputs: a `TrainingSetup`.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from megatron_sffn.accounting.muon import Muon
from megatron_sffn.nn.layer_pattern import recurrent_layers
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING
from megatron_sffn.utils.errors import ConfigError

RECOMPUTED = ("core_attn", "mla_up_proj", "mlp", "moe")
"""Modules of selective recomputation that are counted."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """The part of a run's training setup that memory depends on.

    Args:
        micro_batch_size: sequences of a microbatch.
        num_microbatches: number of microbatches of a step, per replica.
        gradient_bytes: bytes of a gradient in Megatron's buffer.
        moments: numbers of the optimizer's state per parameter: 2 for Adam.
        muon: settings of Muon if it trains weight matrices, with one such number; `moments` are of
            the rest.
        distributed_optimizer: True if the optimizer's state is sharded over data-parallel ranks.
        recompute: None, `full` or `selective` (`--recompute-granularity`).
        recompute_modules: modules of selective recomputation, of `RECOMPUTED`.
        recompute_method: `uniform` or `block`, of full recomputation.
        recompute_layers: layers between two saved inputs (uniform), or recomputed in each chunk
            (block).
        attention_dropout: True if attention has dropout.
        hidden_dropout: True if hidden states have dropout.
        softmax_in_fp32: True if attention's softmax is in fp32.
        rope_width: numbers of a head that RoPE rotates; 0 without RoPE.
        activation: name of the activation function.
        clamp: True if its inputs are clamped (`--activation-func-clamp-value`).
        offset: True if its linear half has an offset (`--glu-linear-offset`).
        losses: load-balancing losses of the routers' scores that are on.
        balance_numbers: fp32 numbers that load balancing holds for each block: the expert bias with
            its counts, the counts of a global loss, the prices of quantile balancing.
        cuda: True to count the tensors that torch's CUDA kernels save; False: its CPU kernels.
    """

    micro_batch_size: int = 1
    num_microbatches: int = 1
    gradient_bytes: int = 4
    moments: int = 2
    muon: Muon | None = None
    distributed_optimizer: bool = False
    recompute: str | None = None
    recompute_modules: tuple[str, ...] = ()
    recompute_method: str = "uniform"
    recompute_layers: int = 1
    attention_dropout: bool = False
    hidden_dropout: bool = False
    softmax_in_fp32: bool = True
    rope_width: int = 0
    activation: str = "gelu"
    clamp: bool = False
    offset: bool = False
    losses: frozenset[str] = frozenset()
    balance_numbers: int = 0
    cuda: bool = False

    @classmethod
    def of_args(
        cls, args: Namespace, layout: ParallelLayout, *, activation: str, cuda: bool = False
    ) -> TrainingSetup:
        """The setup that Megatron's validated arguments describe.

        Args:
            args: validated.
            layout: layout of the same arguments.
            activation: `gelu`, `relu`, `squared_relu`, `swiglu` or `quick_geglu`.
            cuda: see the class.

        Raises:
            ConfigError: if the memory formulas do not cover the layout, the model or the optimizer.
        """
        _refuse_uncounted(args)
        muon = args.optimizer == "muon"
        optimizer = args.muon_scalar_optimizer if muon else args.optimizer
        fp32_gradients = not layout.half_precision or args.accumulate_allreduce_grads_in_fp32
        step = args.micro_batch_size * layout.dp
        recompute, modules = args.recompute_granularity, args.recompute_modules or ["core_attn"]
        if args.moe_layer_recompute:  # Megatron's config turns it into these two
            recompute, modules = "selective", [*modules, "moe"]
        return cls(
            micro_batch_size=args.micro_batch_size,
            num_microbatches=max(1, (args.global_batch_size or step) // step),
            gradient_bytes=4 if fp32_gradients else 2,
            moments=_moments(args)[optimizer],
            muon=_muon(args) if muon else None,
            distributed_optimizer=args.use_distributed_optimizer,
            recompute=recompute,
            recompute_modules=tuple(modules),
            recompute_method=args.recompute_method or "uniform",
            recompute_layers=args.recompute_num_layers or 1,
            attention_dropout=args.attention_dropout > 0,
            hidden_dropout=args.hidden_dropout > 0,
            softmax_in_fp32=args.attention_softmax_in_fp32,
            rope_width=_rope_width(args),
            activation=activation,
            clamp=args.activation_func_clamp_value is not None,
            offset=bool(args.glu_linear_offset),
            losses=_losses(args),
            balance_numbers=_balance_numbers(args),
            cuda=cuda,
        )

    def state_bytes(self, layout: ParallelLayout, *, matrix: bool = False) -> int:
        """Bytes of the optimizer's state per parameter that a rank keeps the state of, in fp32.

        Half-precision weights have an fp32 master copy. Where the gradient buffer is not in fp32,
        the optimizer step also makes an fp32 gradient for the master copy.

        Args:
            layout: layout of the ranks.
            matrix: True for a weight matrix, which has one moment under Muon.
        """
        copies = int(layout.half_precision) + (1 if self.gradient_bytes < 4 else 0)
        moments = 1 if matrix and self.muon is not None else self.moments
        return 4 * (moments + copies)

    def recomputes(self, module: str) -> bool:
        """True if selective recomputation drops the activations of this module."""
        return self.recompute == "selective" and module in self.recompute_modules


def _refuse_uncounted(args: Namespace) -> None:
    """Refuse arguments whose memory has no closed form in this package."""
    optimizers = (*_moments(args), "muon")
    if args.optimizer not in optimizers:
        raise ConfigError(
            f"--optimizer {args.optimizer} is not counted by the memory formulas; use "
            f"{' or '.join(optimizers)}"
        )
    if args.use_layer_wise_distributed_optimizer:
        raise ConfigError(
            "--use-distributed-optimizer with --optimizer muon gives whole weights to ranks, which "
            "is not counted by the memory formulas; leave it out to see the memory without it"
        )
    for dest in (
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    ):
        if getattr(args, dest):
            raise ConfigError(
                f"--{dest.replace('_', '-')} is not counted by the memory formulas; leave it "
                "out, or set --decoder-first-pipeline-num-layers"
            )
    modules = sorted(set(args.recompute_modules or []) - set(RECOMPUTED))
    if args.recompute_granularity == "selective" and modules:
        raise ConfigError(
            f"--recompute-modules {modules[0]} is not counted by the memory formulas; use "
            f"{', '.join(RECOMPUTED)}"
        )
    if recurrent := recurrent_layers(args.hybrid_layer_pattern or ""):
        raise ConfigError(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern} has {recurrent[0]}, which is not "
            "counted by the memory formulas; leave out its M and G to see the memory without them"
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"--context-parallel-size {args.context_parallel_size} is not counted by the "
            "memory formulas; use 1"
        )


def _muon(args: Namespace) -> Muon:
    """Muon's settings in Megatron's arguments."""
    return Muon(
        num_ns_steps=args.muon_num_ns_steps,
        tp_mode=args.muon_tp_mode,
        split_qkv=args.muon_split_qkv,
        half=args.muon_fp32_matmul_prec == "medium",
    )


def _rope_width(args: Namespace) -> int:
    """Numbers of a head that RoPE rotates; multi-latent attention has RoPE of its own."""
    if args.multi_latent_attention:
        share = args.rotary_percent if args.rope_type == "rope" else 1.0
        return int(args.qk_pos_emb_head_dim * share)
    rotated = args.position_embedding_type == "rope"
    return int(args.kv_channels * args.rotary_percent) if rotated else 0


def _moments(args: Namespace) -> dict[str, int]:
    """Optimizer -> numbers of its state per parameter."""
    return {"adam": 2, "lion": 1, "sgd": 1 if args.sgd_momentum else 0}


def _losses(args: Namespace) -> frozenset[str]:
    """Megatron's load-balancing losses whose coefficient is not 0."""
    kinds, weights = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    kinds = kinds if isinstance(kinds, list) else [kinds]
    weights = weights if isinstance(weights, list) else [weights] * len(kinds)
    active = {kind for kind, weight in zip(kinds, weights, strict=True) if weight}
    return frozenset(active - {"none"} | ({"z_loss"} if args.moe_z_loss_coeff else set()))


def _balance_numbers(args: Namespace) -> int:
    """Numbers of each block in the buffers of `nn/load_balancing.py`."""
    count = 2 if args.moe_router_enable_expert_bias else 0
    count += 1 if "global_aux_loss" in _losses(args) else 0
    return count + (2 if args.moe_router_load_balancing_type == QUANTILE_BALANCING else 0)
