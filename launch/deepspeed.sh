#!/usr/bin/env bash
# Train under the DeepSpeed launcher, with DeepSpeed's engine (ZeRO stage 1, see launch/zero1.json).
#
#   one node:                    launch/deepspeed.sh configs/glyphs.yaml [key=value ...]
#   the nodes of a hostfile:     HOSTFILE=launch/hostfile launch/deepspeed.sh configs/glyphs.yaml ...
#                                (once, on the first node; needs ssh without a password, and pdsh)
#   without ssh, on every node:  HOSTFILE=launch/hostfile NODE_RANK=0 MASTER=node1:29500 launch/deepspeed.sh configs/glyphs.yaml ...
#   inside a SLURM allocation:   LAUNCHER=slurm HOSTFILE=launch/hostfile launch/deepspeed.sh configs/glyphs.yaml ...
#                                (DeepSpeed then starts srun itself; launch/slurm.sbatch does the same with torchrun)
#
# NPROC     processes per node (default: the number of GPUs, or 2 on a machine without)
# HOSTFILE  one line "HOST slots=GPUS" per node, see launch/hostfile.example
# ZERO      DeepSpeed's settings (default launch/zero1.json; launch/zero2.json spreads the gradients, too)
#
# The launcher returns 1 after a signal although every process saved and exited with 0: judge by runs/NAME/status.json.
set -euo pipefail

config=${1:?usage: launch/deepspeed.sh CONFIG [key=value ...]}
shift
if [[ -z ${NPROC:-} ]]; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
  NPROC=$((gpus > 0 ? gpus : 2))
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
ZERO=${ZERO:-$(dirname "$0")/zero1.json}

options=(--num_gpus "$NPROC")
if [[ -n ${HOSTFILE:-} ]]; then
  if [[ ! -f $HOSTFILE || ! -r $HOSTFILE ]]; then
    echo "launch/deepspeed.sh: cannot read HOSTFILE=$HOSTFILE; see launch/hostfile.example" >&2
    exit 2
  fi
  options=(--hostfile "$HOSTFILE")
  if [[ -n ${NODE_RANK:-} ]]; then
    : "${MASTER:?set MASTER=host:port, the same on every node}"
    options+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER%:*}" --master_port "${MASTER##*:}")
  fi
elif [[ -n ${MASTER:-} ]]; then
  options+=(--master_addr "${MASTER%:*}" --master_port "${MASTER##*:}")
fi
if [[ -n ${LAUNCHER:-} ]]; then
  options+=(--launcher "$LAUNCHER")
fi

deepspeed "${options[@]}" --module dist_obdsd train "$config" strategy=deepspeed deepspeed.config="$ZERO" "$@" &
launcher=$!
# A signal ends DeepSpeed's runner at once and orphans what it started, so it goes to the process below it, which hands
# it on to the ranks and gives them 30 seconds.
# shellcheck disable=SC2317,SC2329  # the trap calls it
forward() {
  pkill -TERM -P "$launcher" || kill -TERM "$launcher" 2>/dev/null || true
}
trap forward TERM INT USR1
status=0
while kill -0 "$launcher" 2>/dev/null; do
  status=0
  wait "$launcher" || status=$? # a trapped signal ends the wait, so ask again
done
exit "$status"
