#!/usr/bin/env bash
# One training on a fixed number of nodes. Start the same command on each, with its NODE_RANK:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a examples/launch/static.sh --num-layers 12 ...
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a examples/launch/static.sh --num-layers 12 ...
#
# Inputs: the flags of `python -m megatron_sffn.pretrain`, and
#   NNODES         how many nodes there are
#   NODE_RANK      the number of this node, counted from 0
#   MASTER_ADDR    a name or address of node 0 that every node can reach
#   MASTER_PORT    a free port of node 0, the same on every node (default: 29500)
#   GPUS_PER_NODE  ranks of this node (default: its GPUs; without GPUs, its cores)
#   NODE_ADDR      a name or address of this node, if other nodes cannot resolve its host name
# and the environment of nccl.env or gloo.env. Outputs: those of the training.
# When a rank fails, all nodes end, and this script does not restart them; Slurm, Kubernetes and
# elastic.sh do.
set -euo pipefail

for name in NNODES NODE_RANK MASTER_ADDR; do
    [ -n "${!name:-}" ] || {
        printf 'error: %s is not set; see the head of %s\n' "$name" "$0" >&2
        exit 2
    }
done

exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "${GPUS_PER_NODE:-auto}" ${NODE_ADDR:+--local-addr "$NODE_ADDR"} \
    -m megatron_sffn.pretrain "$@"
