"""The training setup that memory depends on beside the model and the parallel layout.

Inputs: Megatron's validated arguments, or the numbers themselves. Outputs: a `TrainingSetup`.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from megatron_sffn.nn.layer_pattern import recurrent_layers
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """The part of a run's training setup that memory depends on.

    Args:
        micro_batch_size: sequences of a microbatch.
        num_microbatches: number of microbatches of a step, per replica.
        gradient_bytes: bytes of a gradient in Megatron's buffer.
        moments: numbers of the optimizer's state per parameter: 2 for Adam.
        muon: True if Muon trains weight matrices, with one such number; `moments` are of the rest.
        distributed_optimizer: True if the optimizer's state is sharded over data-parallel ranks.
        recompute: None, `full` or `selective` (`--recompute-granularity`).
        recompute_modules: modules of selective recomputation: `core_attn`, `mlp`, `moe`.
        recompute_method: `uniform` or `block`, of full recomputation.
        recompute_layers: layers between two saved inputs (uniform), or recomputed in each chunk
            (block).
        attention_dropout: True if attention has dropout.
        hidden_dropout: True if hidden states have dropout.
        softmax_in_fp32: True if attention's softmax is in fp32.
        rope_width: numbers of a head that RoPE rotates; 0 without RoPE.
        activation: name of the activation function.
        losses: load-balancing losses of the routers' scores that are on.
        cuda: True to count the tensors that torch's CUDA kernels save; False: its CPU kernels.
    """

    micro_batch_size: int = 1
    num_microbatches: int = 1
    gradient_bytes: int = 4
    moments: int = 2
    muon: bool = False
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
    losses: frozenset[str] = frozenset()
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
        rotated = args.position_embedding_type == "rope"
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
            muon=muon,
            distributed_optimizer=args.use_distributed_optimizer,
            recompute=recompute,
            recompute_modules=tuple(modules),
            recompute_method=args.recompute_method or "uniform",
            recompute_layers=args.recompute_num_layers or 1,
            attention_dropout=args.attention_dropout > 0,
            hidden_dropout=args.hidden_dropout > 0,
            softmax_in_fp32=args.attention_softmax_in_fp32,
            rope_width=int(args.kv_channels * args.rotary_percent) if rotated else 0,
            activation=activation,
            losses=_losses(args),
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
        moments = 1 if matrix and self.muon else self.moments
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
    for dest in (
        "mtp_num_layers",
        "attention_output_gate",
        "hybrid_layer_pattern",
        "multi_latent_attention",
    ):
        if getattr(args, dest):
            raise ConfigError(
                f"--{dest.replace('_', '-')} is not counted by the memory formulas; leave it "
                "out to see the memory of the model without it"
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
