"""The command line that a run stored in its checkpoint, made fit for another process.

Inputs: the words of the command. Outputs: the words that remain when flags of the layout, of data,
of results or of the machine are removed.

Design notes: flags are removed by name and every other flag is kept. A list of the flags to keep
would silently lose a flag that defines the model, and a flag that should have been removed fails
with a sentence.
"""

from __future__ import annotations

from megatron_sffn.checkpoints.pickle_scan import NOT_FROM_A_CHECKPOINT

LAYOUT = """
    tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size
    expert-model-parallel-size expert-tensor-parallel-size sequence-parallel
    hierarchical-context-parallel-sizes cp-comm-type num-layers-per-virtual-pipeline-stage
    num-virtual-stages-per-pipeline-rank microbatch-group-size-per-virtual-pipeline-stage
    pipeline-model-parallel-layout decoder-first-pipeline-num-layers
    decoder-last-pipeline-num-layers account-for-embedding-in-pipeline-split
    account-for-loss-in-pipeline-split overlap-p2p-communication-warmup-flush
    no-overlap-p2p-communication use-distributed-optimizer num-distributed-optimizer-instances
    overlap-grad-reduce overlap-param-gather overlap-param-gather-with-optimizer-step
    use-precision-aware-optimizer tp-comm-overlap overlap-moe-expert-parallel-comm
    defer-embedding-wgrad-compute delay-wgrad-compute
"""
"""Flags of layouts with several ranks."""

RESULTS = """
    load ckpt-step save save-interval save-retain-interval async-save non-persistent-save-interval
    non-persistent-ckpt-type tensorboard-dir wandb-project wandb-exp-name wandb-save-dir
    wandb-entity eval-iters eval-micro-batch-size eval-global-batch-size full-validation
    multiple-validation-sets validation-set-names skip-train sffn-record-routing
"""
"""Flags of checkpoints, results and evaluation."""

DATA = """
    data-path split train-data-path valid-data-path test-data-path data-args-path
    per-split-data-args-path per-dataset-sequences-path data-cache-path mock-data
    dataloader-fast-cache-load dataloader-defer-npy-index-mmap dataloader-type sffn-dataloader
    sffn-validation-data num-dataset-builder-threads mid-level-dataset-surplus
    reset-position-ids reset-attention-mask eod-mask-loss eval-interval
"""
"""Flags of the training and validation data."""

TRAINING = """
    micro-batch-size global-batch-size rampup-batch-size step-batch-size-schedule
    decrease-batch-size-if-needed train-iters train-samples lr-decay-iters lr-decay-samples
    lr-warmup-iters lr-warmup-samples lr-warmup-fraction lr-wsd-decay-iters lr-wsd-decay-samples
    finetune pretrained-checkpoint no-load-optim no-load-rng use-checkpoint-args exit-interval
    exit-duration-in-mins recompute-granularity recompute-method recompute-num-layers
    recompute-modules recompute-activations moe-layer-recompute distribute-saved-activations
    override-opt-param-scheduler use-checkpoint-opt-param-scheduler sffn-regather profile
    sffn-exchange-chunks log-params-norm log-num-zeros-in-grad check-for-nan-in-loss-and-grad
"""
"""Flags of the optimizer's steps that do not change the model's output."""

MACHINE = """
    transformer-impl distributed-backend attention-backend sffn-backend sffn-node-size
    moe-token-dispatcher-type cuda-graph-impl cuda-graph-scope cuda-graph-modules
    enable-cuda-graph external-cuda-graph distributed-timeout-minutes
"""
"""Flags that choose among computations of the same output on the machine of the run."""


def flags_of(*texts: str) -> frozenset[str]:
    """The flags in lists such as `LAYOUT`, and those that are never taken from a checkpoint."""
    return NOT_FROM_A_CHECKPOINT.union(f"--{name}" for text in texts for name in text.split())
