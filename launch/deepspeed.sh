#!/usr/bin/env bash
# Train under the DeepSpeed launcher, with DeepSpeed's engine (ZeRO stage 1, see launch/zero1.json).
#
#   one node:                    launch/deepspeed.sh configs/glyphs.yaml [key=value ...]
#   the nodes of a hostfile:     HOSTFILE=launch/hostfile launch/deepspeed.sh configs/sop_2x8.yaml ...
#                                (once, on the first node; needs ssh without a password, and pdsh)
#   without ssh, on every node:  HOSTFILE=launch/hostfile NODE_RANK=0 MASTER=node1:29500 launch/deepspeed.sh configs/sop_2x8.yaml ...
#   inside a SLURM allocation:   LAUNCHER=slurm HOSTFILE=launch/hostfile launch/deepspeed.sh configs/sop_2x8.yaml ...
#                                (DeepSpeed then starts srun itself; launch/slurm.sbatch does the same with torchrun)
#
# NPROC     processes per node (default: the number of GPUs, or 2 on a machine without)
# HOSTFILE  one line "HOST slots=GPUS" per node, see launch/hostfile.example
# ZERO      DeepSpeed's settings (default launch/zero1.json; launch/zero2.json spreads the gradients, too)
#
# SIGTERM, SIGUSR1 and Ctrl-C save the run on all nodes, by the stop file in its folder; a second one kills.
# Exits with 0 when the run is finished, 75 when it was stopped in good order and can go on, else 1 or 2.
set -euo pipefail

config=${1:?usage: launch/deepspeed.sh CONFIG [key=value ...]}
shift
if [[ " $* " == *" --fresh "* ]]; then
  echo "launch/deepspeed.sh: --fresh hides from this script which run to stop and to judge; set name=NEW instead" >&2
  exit 2
fi
run=("$config") # what names the run, without flags
for word in "$@"; do [[ $word == -* ]] || run+=("$word"); done
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
  # DeepSpeed itself answers a mistake with a traceback.
  mistake=$(awk '/^[[:space:]]*(#|$)/ {next}
    NF < 2 || $2 !~ /^slots=[1-9][0-9]*$/ {print "line " NR " is \"" $0 "\", which is not HOST slots=GPUS"; exit}
    seen[$1]++ {print "line " NR " has " $1 " again"; exit}
    {hosts++}
    END {if (!hosts) print "it names no host"}' "$HOSTFILE" | head -n 1)
  if [[ -n $mistake ]]; then
    echo "launch/deepspeed.sh: HOSTFILE=$HOSTFILE: $mistake; see launch/hostfile.example" >&2
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

# Over ssh DeepSpeed hands on few variables, and those of a file. Others belong into .deepspeed_env.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
{
  cat ~/.deepspeed_env .deepspeed_env 2>/dev/null || true
  env | grep -E '^(OMP|TORCH|GLOO|NCCL)_' || true
} >"$DS_ENV_FILE"

started=$(date +%s)
deepspeed "${options[@]}" --module dist_obdsd train "$config" strategy=deepspeed deepspeed.config="$ZERO" "$@" &
launcher=$!
asked=""
# A signal would end DeepSpeed's runner at once, orphan what it started here, and kill it on the other nodes.
# shellcheck disable=SC2317,SC2329  # the trap calls it
forward() {
  if [[ -z $asked ]] && dist-obdsd stop "${run[@]}"; then
    asked=1
  else
    pkill -TERM -P "$launcher" || kill -TERM "$launcher" 2>/dev/null || true
  fi
}
trap forward TERM INT USR1
status=0
while kill -0 "$launcher" 2>/dev/null; do
  status=0
  wait "$launcher" || status=$? # a trapped signal ends the wait, so ask again
done
case $(dist-obdsd status --since "$started" "${run[@]}" 2>/dev/null) in
  finished) exit 0 ;;
  preempted) exit 75 ;;
  *) exit $((status ? status : 1)) ;;
esac
