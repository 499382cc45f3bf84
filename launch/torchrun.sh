#!/usr/bin/env bash
# Train on one node or on several with torchrun.
#
#   one node, all its GPUs:      launch/torchrun.sh configs/glyphs.yaml [key=value ...]
#   two nodes, run on each:      NNODES=2 MASTER=node1:29500 launch/torchrun.sh configs/glyphs.yaml [key=value ...]
#   two to four nodes, elastic:  NNODES=2:4 RESTARTS=3 MASTER=node1:29500 launch/torchrun.sh configs/glyphs.yaml ...
#
# NPROC     processes per node (default: the number of GPUs, or 2 on a machine without)
# NNODES    number of nodes, or MIN:MAX (default 1); every number of processes that can come of it must divide data.lanes
# MASTER    host:port of one of the nodes, the same on every node (needed unless NNODES is 1)
# RUN_ID    any word, the same on every node and different for every job that shares the MASTER (default: the config's name)
# RESTARTS  how often the processes are started again after a failure or when a node joins or leaves (default 0); each
#           time the run goes on from its last checkpoint, which needs the run folder on a file system that all nodes share
# GRACE     seconds from a signal to the kill, in which a step is finished and a checkpoint written (torchrun's own: 30)
#
# torchrun returns 1 after a signal although every process saved and exited with 0: judge by runs/NAME/status.json.
set -euo pipefail

config=${1:?usage: launch/torchrun.sh CONFIG [key=value ...]}
if [[ -z ${NPROC:-} ]]; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
  NPROC=$((gpus > 0 ? gpus : 2))
fi
# torchrun would set 1 and say so at length; a CPU rank's threads are the config's `threads`.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A collective that NCCL cannot finish ends the process instead of blocking it for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Ranks that are started again would else share a store with those before them, and wait for ranks that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [[ ${NNODES:-1} == 1 ]]; then
  rendezvous=(--standalone)
else
  : "${MASTER:?set MASTER=host:port, the same on every node}"
  # torchrun guesses from host names which node is the MASTER and how the others reach this one, which fails where names
  # do not resolve. The address that this node has on the way to the MASTER answers both.
  read -r own master < <(python3 -c '
import socket, sys, time
host, port = sys.argv[1].rsplit(":", 1)
for attempt in range(120):  # a pod has its name some time after its start
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        break
    except socket.gaierror as error:
        why = error.strerror
        time.sleep(1)
else:
    sys.exit(f"launch/torchrun.sh: MASTER={sys.argv[1]} has no address: {why}")
with socket.socket(family, kind) as probe:
    probe.connect(address)  # of a datagram socket: sends nothing
    print(probe.getsockname()[0], address[0])
' "$MASTER")
  # A port that is taken is another agent of this machine, which answers, or another program.
  if [[ $own == "$master" ]]; then
    refusal=$(python3 -c '
import errno, os, socket, sys, threading
from datetime import timedelta
where, address = f"MASTER={sys.argv[3]}", (sys.argv[1], int(sys.argv[2]))
def end(refusal=""):
    print(refusal, flush=True)
    os._exit(0)
try:
    socket.create_server(address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET).close()
    end()
except OSError as error:
    if error.errno != errno.EADDRINUSE:
        end(f"cannot listen at {where}: {error.strerror}; choose another address or port on every node")
try:
    from torch.distributed import TCPStore
except ImportError as error:
    end(f"{where} is taken, and {sys.executable} cannot ask by whom ({error}); put the python3 that has torch first on "
        "PATH, or choose another port on every node")
other = f"another program listens at {where}; choose another port on every node"
threading.Timer(10, end, [other]).start()  # the timeout below does not bound an answer that never comes
try:
    TCPStore(*address, timeout=timedelta(seconds=5))
except RuntimeError:
    end(other)
end()
' "$master" "${MASTER##*:}" "$MASTER" 2>/dev/null) || true
    if [[ -n $refusal ]]; then
      echo "launch/torchrun.sh: $refusal" >&2
      exit 1
    fi
  fi
  echo "waiting for $NNODES nodes at $MASTER, of which this is one" >&2
  rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER"
    --rdzv-id "${RUN_ID:-$(basename "$config" .yaml)}" --local-addr "$own"
    --rdzv-conf "is_host=$([[ $own == "$master" ]] && echo 1 || echo 0)")
fi
if [[ -n ${GRACE:-} ]]; then
  rendezvous+=(--shutdown-timeout "$GRACE")
fi
# SIGUSR1 is how clusters announce preemption; without naming it, torchrun would die of it and orphan the workers.
exec torchrun "${rendezvous[@]}" --nproc-per-node "$NPROC" --max-restarts "${RESTARTS:-0}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m dist_obdsd train "$@"
