#!/usr/bin/env bash
# A language model of 1.06 B parameters of which a token uses 0.21 B: Avg-K in every layer, in
# blocks of 64 cells. RMSNorm, SwiGLU, rotary positions, 4 key-value heads, bf16, 4,096 tokens.
#
#   modern_1b.sh [flags]
#
# flags         flags of megatron_sffn.pretrain; they override those below
#
# DATA          folder with tokenizer/ and the pairs train_text_document, valid_text_document
# SAVE          folder of checkpoints and results; the same command resumes from it
# NNODES, GPUS_PER_NODE, NODE_RANK, MASTER_ADDR, MASTER_PORT    as for torchrun; one node of 8 GPUs.
#               The layout is for 8, 64 or 1,024 GPUs; other numbers take the last one
# TOY=1         5 steps of a small model on mock data and 2 ranks, with or without GPUs
# RUN           a command in place of torchrun: RUN=echo prints the flags,
#               RUN="python tools/accounting.py --ranks 8" counts what they cost
#
# Avg-K without a gate and a balance loss is that of Liu et al. (EMNLP 2023, arXiv 2305.13999), who
# find smaller blocks better; the mean over SwiGLU's gate keys is ours. Sizes, batch and schedule are
# ours, too: they are usual for models of this kind and not tuned on this one.
set -euo pipefail

DATA=${DATA:-data/corpus} SAVE=${SAVE:-runs/modern-1b}
NNODES=${NNODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}

MODEL=(
    --num-layers 18 --hidden-size 1024 --num-attention-heads 16 --seq-length 4096
    --max-position-embeddings 4096
    --group-query-attention --num-query-groups 4
    --swiglu --normalization RMSNorm --norm-epsilon 1e-6 --qk-layernorm --disable-bias-linear
    --position-embedding-type rope --rotary-base 10000
    --untie-embeddings-and-output-weights
    --vocab-size 50257 # for tools/accounting.py; a run asks its tokenizer
    --attention-dropout 0 --hidden-dropout 0
)
MEMORY=(
    # 16 of 256 blocks of 64 cells.
    --sffn-router avg-k --sffn-block-size 64 --sffn-expansion 16 --ffn-hidden-size 1024
)
TRAINING=(
    # 25,000 steps of 1,024 · 4,096 tokens: 105 B.
    --global-batch-size 1024 --train-iters 25000
    --lr 4e-4 --min-lr 4e-5 --lr-decay-style cosine --lr-warmup-iters 1000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --bf16
)
LAYOUT=(
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    # Attention scores are recomputed; with fused attention, leave this out.
    --recompute-granularity selective
)
case $((NNODES * GPUS_PER_NODE)) in
    8) LAYOUT+=(--micro-batch-size 4) ;; # every GPU holds all blocks: no token travels
    # The blocks, and so the traffic of their gradients, are cut over the 8 GPUs of a node.
    64) LAYOUT+=(--micro-batch-size 4 --expert-model-parallel-size 8) ;;
    *) LAYOUT+=(--micro-batch-size 1 --expert-model-parallel-size 8) ;; # 1,024, one sequence each
esac
INPUT=(
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$DATA/tokenizer"
    --train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/valid_text_document"
    --no-create-attention-mask-in-dataloader
)
OUTPUT=(
    --save "$SAVE" --load "$SAVE" --save-interval 500 --tensorboard-dir "$SAVE/tensorboard"
    --log-interval 10 --eval-interval 1000 --eval-iters 20
)

if [[ ${TOY:-} ]]; then
    NNODES=1 GPUS_PER_NODE=2
    MODEL+=(
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2
        --seq-length 64 --max-position-embeddings 64
    )
    MEMORY+=(--sffn-block-size 4 --ffn-hidden-size 64)
    TRAINING+=(--global-batch-size 8 --train-iters 5 --lr 3e-3 --lr-warmup-iters 1)
    LAYOUT=(
        --micro-batch-size 4 --expert-model-parallel-size 2 --recompute-granularity selective
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    )
    INPUT=(
        --mock-data --tokenizer-type NullTokenizer --vocab-size 1024 --num-workers 0
        --no-create-attention-mask-in-dataloader
    )
    OUTPUT=(--log-interval 1 --eval-iters 1)
fi

LAUNCH=(
    torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}"
    -m megatron_sffn.pretrain
)
if [[ ${RUN:-} ]]; then read -ra LAUNCH <<<"$RUN"; fi
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron's, for overlap under tensor parallelism
exec "${LAUNCH[@]}" "${MODEL[@]}" "${MEMORY[@]}" "${TRAINING[@]}" "${LAYOUT[@]}" "${INPUT[@]}" \
    "${OUTPUT[@]}" "$@"
