"""How a run is cut over ranks, and how it trains: what memory depends on beside the model.

Enters: Megatron's validated arguments, for any number of ranks; or the numbers themselves. Leaves:
a `RankLayout` with the layers of each pipeline stage, and a `TrainingSetup`.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from megatron_sffn.accounting.shape import ModelShape
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one pipeline stage holds.

    Args:
        index: from 0.
        chunks: its model chunks: whether each of their layers is sparse.
        first: whether it has the embedding.
        last: whether it has the final norm and the logits.
    """

    index: int
    chunks: tuple[tuple[bool, ...], ...]
    first: bool
    last: bool

    @property
    def layers(self) -> tuple[bool, ...]:
        """Those of all chunks."""
        return tuple(layer for chunk in self.chunks for layer in chunk)


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """Sizes of the groups of ranks, as Megatron's flags name them.

    Args:
        num_ranks: of the world.
        tensor: ranks that a layer's matrices are cut over.
        pipeline: stages.
        chunks: model chunks of a stage; above 1, the interleaved schedule.
        expert: ranks that the blocks are cut over.
        expert_tensor: ranks that the cells of a block are cut over.
        sequence_parallel: whether tensor-parallel ranks share the tokens outside of the matrices.
        dispatcher: how sparse layers exchange tokens.
        first_layers: of the first stage, where it differs from the others.
        last_layers: of the last stage, where it differs.
    """

    num_ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False
    dispatcher: str = "alltoall"
    first_layers: int | None = None
    last_layers: int | None = None

    @classmethod
    def of_args(cls, args: Namespace) -> RankLayout:
        """The layout that Megatron's validated arguments describe.

        Raises:
            ConfigError: if its memory has no closed form here.
        """
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
        for dest in ("mtp_num_layers", "attention_output_gate"):
            if getattr(args, dest):
                raise ConfigError(
                    f"--{dest.replace('_', '-')} is not counted by the memory formulas; leave it "
                    "out to see the memory of the model without it"
                )
        if args.context_parallel_size > 1:
            raise ConfigError(
                f"--context-parallel-size {args.context_parallel_size} is not counted by the "
                "memory formulas; use 1"
            )
        return cls(
            num_ranks=args.world_size,
            tensor=args.tensor_model_parallel_size,
            pipeline=args.pipeline_model_parallel_size,
            chunks=args.virtual_pipeline_model_parallel_size or 1,
            expert=args.expert_model_parallel_size,
            expert_tensor=args.expert_tensor_parallel_size or 1,
            sequence_parallel=args.sequence_parallel,
            dispatcher=args.moe_token_dispatcher_type or "alltoall",
            first_layers=args.decoder_first_pipeline_num_layers,
            last_layers=args.decoder_last_pipeline_num_layers,
        )

    @property
    def data(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.num_ranks // (self.tensor * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same cells."""
        return self.num_ranks // (self.expert * self.expert_tensor * self.pipeline)

    @property
    def exchanging(self) -> int:
        """Ranks that a token may have to visit, its own among them."""
        return self.expert * self.expert_tensor

    def stages(self, pattern: tuple[bool, ...]) -> list[Stage]:
        """The stages of a model, chunk after chunk as Megatron deals them.

        Args:
            pattern: whether each layer of the model is sparse.
        """
        given = [self.first_layers, self.last_layers]
        fixed = sum(count for count in given if count is not None)
        free = self.pipeline - sum(count is not None for count in given)
        each = (len(pattern) - fixed) // max(1, free)
        counts = [each] * self.pipeline
        for place, count in zip((0, -1), given, strict=True):
            counts[place] = counts[place] if count is None else count
        assert sum(counts) == len(pattern), (counts, len(pattern))
        held: list[list[tuple[bool, ...]]] = [[] for _ in counts]
        start = 0
        for _ in range(self.chunks):
            for stage, count in enumerate(counts):
                end = start + count // self.chunks
                held[stage].append(pattern[start:end])
                start = end
        return [
            Stage(
                index=index,
                chunks=tuple(chunks),
                first=index == 0,
                last=index == self.pipeline - 1,
            )
            for index, chunks in enumerate(held)
        ]

    def in_flight(self, stage: Stage, num_microbatches: int) -> float:
        """Microbatches whose activations of the whole stage a rank of it holds at most.

        Of the 1F1B schedule as many as stages follow, and one; of the interleaved one a chunk's
        share for each chunk that has run forward and not yet backward (Narayanan et al. 2021).
        """
        after = self.pipeline - stage.index - 1
        if self.chunks == 1:
            return min(num_microbatches, after + 1)
        warm_up = 2 * after + (self.chunks - 1) * self.pipeline
        return min(num_microbatches * self.chunks, warm_up + 1) / self.chunks


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """How a run trains, as far as memory depends on it.

    Args:
        micro_batch_size: sequences of a microbatch.
        num_microbatches: of a step, per replica.
        number_bytes: of a weight and of an activation.
        gradient_bytes: of a gradient in Megatron's buffer.
        moments: numbers of the optimizer's state per parameter: 2 for Adam.
        distributed_optimizer: whether its state is cut over the ranks that hold the same weights.
        recompute: None, `full` or `selective`.
        recompute_modules: of selective recomputation; `core_attn`, `mlp`, `moe`.
        recompute_method: of full recomputation, `uniform` or `block`.
        recompute_layers: layers between two saved inputs (uniform), or recomputed in each chunk
            (block).
        attention_dropout: whether there is any.
        hidden_dropout: whether there is any.
        softmax_in_fp32: of the attention.
        rope_width: numbers of a head that are rotated; 0 without RoPE.
        activation: name of the nonlinearity.
        losses: balance losses of the routers' scores that are on.
        router_groups: see `Exchange`.
        router_group_topk: see `Exchange`.
        cuda: count what torch's CUDA kernels save rather than its CPU ones.
    """

    micro_batch_size: int = 1
    num_microbatches: int = 1
    number_bytes: int = 4
    gradient_bytes: int = 4
    moments: int = 2
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
    router_groups: int = 1
    router_group_topk: int = 1
    cuda: bool = False

    @classmethod
    def of_args(cls, args: Namespace, *, activation: str, cuda: bool = False) -> TrainingSetup:
        """The setup that Megatron's validated arguments describe.

        Args:
            args: validated.
            activation: `gelu`, `relu`, `squared_relu` or `swiglu`.
            cuda: see the class.

        Raises:
            ConfigError: if its memory has no closed form here.
        """
        moments = {"adam": 2, "sgd": 1 if args.sgd_momentum else 0}
        if args.optimizer not in moments:
            raise ConfigError(
                f"--optimizer {args.optimizer} is not counted by the memory formulas; use "
                f"{' or '.join(moments)}"
            )
        rotated = args.position_embedding_type == "rope"
        half = args.bf16 or args.fp16
        fp32_gradients = not half or args.accumulate_allreduce_grads_in_fp32
        replicas = args.world_size // (
            args.tensor_model_parallel_size * args.pipeline_model_parallel_size
        )
        step = args.micro_batch_size * replicas
        return cls(
            micro_batch_size=args.micro_batch_size,
            num_microbatches=max(1, (args.global_batch_size or step) // step),
            number_bytes=2 if half else 4,
            gradient_bytes=4 if fp32_gradients else 2,
            moments=moments[args.optimizer],
            distributed_optimizer=args.use_distributed_optimizer,
            recompute=args.recompute_granularity,
            recompute_modules=tuple(args.recompute_modules or ("core_attn",)),
            recompute_method=args.recompute_method or "uniform",
            recompute_layers=args.recompute_num_layers or 1,
            attention_dropout=args.attention_dropout > 0,
            hidden_dropout=args.hidden_dropout > 0,
            softmax_in_fp32=args.attention_softmax_in_fp32,
            rope_width=int(args.kv_channels * args.rotary_percent) if rotated else 0,
            activation=activation,
            losses=_losses(args),
            router_groups=args.moe_router_num_groups or 1,
            router_group_topk=args.moe_router_group_topk or 1,
            cuda=cuda,
        )

    @property
    def state_bytes(self) -> int:
        """Of the optimizer, per parameter that a rank keeps the state of, in fp32.

        Half-precision weights have a master copy; and the step gives the master its own fp32
        gradient where the buffer's is not.
        """
        half = self.number_bytes < 4
        copies = (1 if half else 0) + (1 if self.gradient_bytes < 4 else 0)
        return 4 * (self.moments + copies)

    def recomputes(self, module: str) -> bool:
        """Whether selective recomputation drops what this module saves."""
        return self.recompute == "selective" and module in self.recompute_modules


def _losses(args: Namespace) -> frozenset[str]:
    """Megatron's balance losses of a weight that is not 0."""
    kinds, weights = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    kinds = kinds if isinstance(kinds, list) else [kinds]
    weights = weights if isinstance(weights, list) else [weights] * len(kinds)
    known = {kind for kind, weight in zip(kinds, weights, strict=True) if weight}
    return frozenset(known - {"none"} | ({"z_loss"} if args.moe_z_loss_coeff else set()))


def sparse_pattern(shape: ModelShape, layers: list[int] | None) -> tuple[bool, ...]:
    """Whether each layer is sparse.

    Args:
        shape: of the model.
        layers: Megatron's `moe_layer_freq`; None if all layers are dense.
    """
    if shape.sffn is None or layers is None:
        return (False,) * shape.num_layers
    pattern = tuple(map(bool, layers))
    assert sum(pattern) == shape.sparse_layers, (pattern, shape.sparse_layers)
    return pattern
