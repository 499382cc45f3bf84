#!/usr/bin/env bash
# Train on one node or on several with torchrun.
#
#   one node, all its GPUs:      launch/torchrun.sh configs/glyphs.yaml [key=value ...]
#   two nodes, run on each:      NNODES=2 MASTER=node1:29500 launch/torchrun.sh configs/glyphs.yaml [key=value ...]
#
# NPROC   processes per node (default: the number of GPUs, or 2 on a machine without)
# NNODES  number of nodes (default 1)
# MASTER  host:port of one of the nodes, the same on every node (needed when NNODES is above 1)
# RUN_ID  any word, the same on every node and different for every job that shares the MASTER (default: the config's name)
set -euo pipefail

config=${1:?usage: launch/torchrun.sh CONFIG [key=value ...]}
if [[ -z ${NPROC:-} ]]; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
  NPROC=$((gpus > 0 ? gpus : 2))
fi
# torchrun would set 1 and say so at length; a CPU rank's threads are the config's `threads`.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ ${NNODES:-1} == 1 ]]; then
  rendezvous=(--standalone)
else
  rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "${MASTER:?set MASTER=host:port, the same on every node}"
    --rdzv-id "${RUN_ID:-$(basename "$config" .yaml)}")
fi
# SIGUSR1 is how clusters announce preemption; without naming it, torchrun would die of it and orphan the workers.
exec torchrun "${rendezvous[@]}" --nproc-per-node "$NPROC" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m dist_obdsd train "$@"
