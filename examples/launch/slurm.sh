#!/usr/bin/env bash
# One training under Slurm, longer than a job may be:
#
#   sbatch --nodes 8 --time 24:00:00 examples/launch/slurm.sh \
#       --save /shared/mine --load /shared/mine --save-interval 500 --num-layers 12 ...
#
# Enters: the flags of `python -m megatron_sffn.pretrain`, --save and --load among them; the
# environment of the shell that calls sbatch, with torchrun on its PATH and the variables of
# nccl.env or gloo.env. Options of sbatch on the command line win over those below.
# Leaves: what the training leaves, and a log, which goes on when the job starts again.
# Choice: Slurm warns this script before the time is up; it asks the ranks to save, waits for them,
# and puts the job back into the queue. A node that fails has the same effect (--requeue).

#SBATCH --job-name=megatron-sffn
#SBATCH --nodes=2
# One torchrun on a node, which starts a rank for each of its GPUs.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# To this script alone, 10 minutes before the end: time for a step and a checkpoint.
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
# Jobs that share a node meet on ports of their own.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# As long as Slurm's warning: torchrun kills ranks that take longer to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600

warned=false
# shellcheck disable=SC2329 # called by the trap
warn() {
    warned=true
    printf 'slurm.sh: time is nearly up; the ranks save and end\n'
    # Reaches the steps of the job, not this script. srun itself would kill its tasks on TERM.
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap warn USR1

# --wait: nodes end one after the other, and those that still save must not be killed at once.
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
    # The signal has ended the first wait.
    wait "$step" || true
    printf 'slurm.sh: back into the queue\n'
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$code"
