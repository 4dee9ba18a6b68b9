"""One way to split a run over ranks: the model, the layout, and the batch of a step.

Inputs: Megatron's validated arguments, or the sizes themselves. Outputs: a `Workload`, which the
models of traffic, time and memory read.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.accounting import ModelShape, TrainingSetup
from megatron_sffn.accounting.pipeline_stages import Stage, pipeline_stages
from megatron_sffn.nn.parallel_layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model on ranks.

    Args:
        shape: shape of the model.
        parts: the parts of each layer (`accounting.layer_parts`).
        layout: layout of the ranks.
        setup: setup of the training, with the microbatches of a step.
        overlaps_gradients: True if gradients are reduced while the last microbatch runs backward
            (`--overlap-grad-reduce`).
        overlaps_parameters: True if parameters are gathered while the first microbatch runs forward
            (`--overlap-param-gather`).
    """

    shape: ModelShape
    parts: tuple[str, ...]
    layout: ParallelLayout
    setup: TrainingSetup
    overlaps_gradients: bool = False
    overlaps_parameters: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.setup.micro_batch_size * self.shape.seq_length

    @property
    def own_tokens(self) -> int:
        """Tokens of a microbatch that a rank routes: split by sequence parallelism."""
        return self.tokens // (self.layout.tp if self.layout.sequence_parallel else 1)

    @property
    def global_batch_size(self) -> int:
        """Sequences of a step."""
        return self.setup.micro_batch_size * self.layout.dp * self.setup.num_microbatches

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch_size * self.shape.seq_length

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of a microbatch, `[tokens, D]`."""
        return self.tokens * self.shape.hidden_size * self.layout.bytes_per_number

    def stages(self) -> list[Stage]:
        """The pipeline stages."""
        return pipeline_stages(self.layout, self.parts)
