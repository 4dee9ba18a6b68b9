#!/usr/bin/env bash
# A language model of 30.5 B parameters of which a token uses 3.3 B: the sizes of Qwen3-30B-A3B with
# Avg-K, in blocks of 256 cells, in place of its 128 experts of 768. RMSNorm, SwiGLU, rotary
# positions, 4 key-value heads, bf16, 4,096 tokens.
#
#   modern_30b.sh [flags]
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
# The sizes are from the Qwen3 technical report (2025, arXiv 2505.09388) and the published config.json.
# Avg-K without a gate and a balance loss is that of Liu et al. (EMNLP 2023, arXiv 2305.13999); the
# mean over SwiGLU's gate keys is ours. Batch and schedule are usual ones, not tuned on this model.
set -euo pipefail

DATA=${DATA:-data/corpus} SAVE=${SAVE:-runs/modern-30b}
NNODES=${NNODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}

MODEL=(
    --num-layers 48 --hidden-size 2048 --num-attention-heads 32 --kv-channels 128
    --seq-length 4096 --max-position-embeddings 4096
    --group-query-attention --num-query-groups 4
    --swiglu --normalization RMSNorm --norm-epsilon 1e-6 --qk-layernorm --disable-bias-linear
    --position-embedding-type rope --rotary-base 1000000
    --untie-embeddings-and-output-weights
    --vocab-size 151936 # for tools/accounting.py; a run asks its tokenizer
    --attention-dropout 0 --hidden-dropout 0
)
MEMORY=(
    # 24 of 384 blocks of 256 cells; with --sffn-block-size 768, Qwen3's 8 of 128.
    --sffn-router avg-k --sffn-block-size 256 --sffn-expansion 16 --ffn-hidden-size 6144
)
TRAINING=(
    # 60,000 steps of 2,048 · 4,096 tokens: 503 B.
    --global-batch-size 2048 --micro-batch-size 1 --train-iters 60000
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --bf16
)
LAYOUT=(
    # The blocks are cut over the 8 GPUs of a node.
    --expert-model-parallel-size 8
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    # Attention scores are recomputed; with fused attention, only "moe" is of use.
    --recompute-granularity selective --recompute-modules core_attn
)
case $((NNODES * GPUS_PER_NODE)) in
    8) ;; # of 141 GB: 18 bytes for each of 30.5 B parameters are 550 GB, too much for 8 of 80 GB
    64) LAYOUT+=(--recompute-modules core_attn moe) ;; # room for ranks that get more tokens
    *) LAYOUT+=(--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 4) ;;
esac
INPUT=(
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$DATA/tokenizer"
    --train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/valid_text_document"
    --no-create-attention-mask-in-dataloader
)
OUTPUT=(
    --save "$SAVE" --load "$SAVE" --save-interval 250 --tensorboard-dir "$SAVE/tensorboard"
    --log-interval 10 --eval-interval 1000 --eval-iters 20
)

if [[ ${TOY:-} ]]; then
    NNODES=1 GPUS_PER_NODE=2
    MODEL+=(
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2
        --seq-length 64 --max-position-embeddings 64
    )
    MEMORY+=(--sffn-block-size 8 --ffn-hidden-size 192)
    TRAINING+=(
        --global-batch-size 8 --micro-batch-size 4 --train-iters 5 --lr 3e-3 --lr-warmup-iters 1
    )
    LAYOUT=(
        --expert-model-parallel-size 2
        --recompute-granularity selective --recompute-modules core_attn moe
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
