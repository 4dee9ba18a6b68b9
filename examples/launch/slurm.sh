#!/usr/bin/env bash
# One training under Slurm that may take longer than one job:
#
#   sbatch --nodes 8 --time 24:00:00 examples/launch/slurm.sh \
#       --save /shared/mine --load /shared/mine --save-interval 500 --num-layers 12 ...
#
# Inputs: the flags of `python -m megatron_sffn.pretrain`, --save and --load among them; the
# environment of the shell that calls sbatch, with torchrun on its PATH and the variables of
# nccl.env or gloo.env. Options of sbatch on the command line override those below.
# Outputs: those of the training, and a log, which a requeued job continues.
# Design notes: Slurm warns this script before the time is up; the script asks the ranks to save, waits
# for them, and requeues the job. A node that fails has the same effect (--requeue).

#SBATCH --job-name=megatron-sffn
#SBATCH --nodes=2
# One torchrun per node, which starts a rank for each of its GPUs.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# Only this script gets the signal, 10 minutes before the end: time for a step and a checkpoint.
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

for flag in --save --load; do
    case " $* " in
    *" $flag "* | *" $flag="*) ;;
    *)
        printf 'error: %s is not among the flags, but a job that starts again goes on from a checkpoint; give --save and --load the same folder\n' "$flag" >&2
        exit 2
        ;;
    esac
done

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# Jobs that share a node use different ports.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# As long as Slurm's warning: torchrun kills ranks that take longer to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600

warned=false
# shellcheck disable=SC2329 # called by the trap
warn() {
    warned=true
    printf 'slurm.sh: time is nearly up; the ranks save and end\n'
    # scancel signals the steps of the job, not this script. srun would kill its tasks on TERM.
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap warn USR1

# --wait: nodes end one after the other, and nodes that still save must not be killed at once.
# shellcheck disable=SC2016 # the variables are those of each node
srun --wait 120 bash -c '
    exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        --nproc-per-node "${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-auto}}" \
        -m megatron_sffn.pretrain "$@"' torchrun "$@" &
step=$!

code=0
wait "$step" || code=$?
if $warned; then
    # The signal ended the first wait.
    wait "$step" || true
    printf 'slurm.sh: back into the queue\n'
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$code"
