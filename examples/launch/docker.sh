#!/usr/bin/env bash
# One training in containers on several hosts. Start the same command on each, with its NODE_RANK:
#
#   export IMAGE=megatron-sffn:gpu DATA=/nfs/data RUNS=/nfs/runs NNODES=2 MASTER_ADDR=host-a
#   NODE_RANK=0 examples/launch/docker.sh --train-data-path /data/corpus --save /runs/mine ...
#   NODE_RANK=1 examples/launch/docker.sh --train-data-path /data/corpus --save /runs/mine ...
#
# Inputs: the flags of `python -m megatron_sffn.pretrain`; the variables of static.sh, which runs in
# the container; and
#   IMAGE     the image that docker/build.sh has built, on each host
#   DATA      a folder of the host, read-only in the container as /data
#   RUNS      a folder that all hosts share, /runs in the container, written as the calling user
#   ENV_FILE  variables of the ranks (default: nccl.env beside this script, without GPUs gloo.env)
#   GPUS      for docker run --gpus (default: all; empty for none)
# Outputs: those of the training. `docker stop` asks the ranks to save.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

for name in IMAGE DATA RUNS NNODES NODE_RANK MASTER_ADDR; do
    [ -n "${!name:-}" ] || {
        printf 'error: %s is not set; see the head of %s\n' "$name" "$0" >&2
        exit 2
    }
done

options=(
    # Names and ports of the host, so that MASTER_ADDR means the same in the container.
    --network host
    # NCCL and data loaders share memory between ranks; docker's default is 64 MB.
    --ipc host
    # Pinned memory for GPUs and InfiniBand.
    --ulimit memlock=-1 --ulimit stack=67108864
    # torchrun gets signals, and time for a step and a checkpoint.
    --init --stop-timeout 600
    # Files belong to the calling user, and caches lie where that user may write.
    --user "$(id -u):$(id -g)" --env HOME=/tmp
    --cap-drop ALL --security-opt no-new-privileges
)
gpus=${GPUS-all}
if [ -n "$gpus" ]; then
    options+=(--gpus "$gpus")
    default=$here/nccl.env
else
    default=$here/gloo.env
fi
if [ -d /dev/infiniband ]; then options+=(--device /dev/infiniband); fi
for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT GPUS_PER_NODE NODE_ADDR; do
    if [ -n "${!name:-}" ]; then options+=(--env "$name"); fi
done

exec docker run --rm "${options[@]}" --env-file "${ENV_FILE:-$default}" \
    --volume "$DATA:/data:ro" --volume "$RUNS:/runs" \
    "$IMAGE" /opt/megatron-sffn/examples/launch/static.sh "$@"
