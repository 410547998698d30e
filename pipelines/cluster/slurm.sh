#!/usr/bin/env bash
#SBATCH --job-name=capfilt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#
# Starts a Ray cluster on the nodes of a Slurm job and runs one capfilt command on it:
#
#     sbatch slurm.sh run photographs --set data=/shared/flickr -w /shared/photographs
#
# The Python environment (capfilt[cluster,train]) and the workspace lie on a file system that all nodes see. Ten minutes
# before the time is over, training saves its state; the same sbatch goes on from what is done.
set -euo pipefail

# Only who has the token can use the cluster. It travels in the environment, which other users cannot read.
RAY_AUTH_TOKEN="$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n')"
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST}")
step=(srun --overlap --nodes=1 --ntasks=1)

# Jobs that share a node have ports of their own.
host="$("${step[@]}" --nodelist="${nodes[0]}" hostname --ip-address | awk '{ print $1 }')"
export RAY_ADDRESS="${host}:$((20000 + SLURM_JOB_ID % 10000))"
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

# Slurm says what a job has of a node; Ray would take the whole node.
has=(--num-cpus="${SLURM_CPUS_PER_TASK}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
"${step[@]}" --nodelist="${nodes[0]}" ray start --head --block --node-ip-address="${host}" \
  --port="${RAY_ADDRESS##*:}" --include-dashboard=false "${has[@]}" &
until ray health-check --address "${RAY_ADDRESS}" > /dev/null 2>&1; do
  kill -0 $! || exit 1
  sleep 1
done
for node in "${nodes[@]:1}"; do
  "${step[@]}" --nodelist="${node}" ray start --block --address="${RAY_ADDRESS}" "${has[@]}" &
done

# capfilt sizes its workers by the nodes that are there when a stage begins.
python - "${#nodes[@]}" <<'END'
import sys, time, ray
ray.init(log_to_driver=False)
deadline = time.monotonic() + 300
while (here := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]):
    if time.monotonic() > deadline:
        sys.exit(f"{here} of {sys.argv[1]} nodes have joined the cluster")
    time.sleep(1)
END

capfilt "$@" &
capfilt=$!
trap 'kill -TERM "${capfilt}"' TERM
# A trapped signal ends `wait` early; the second one waits for the state to be saved.
wait "${capfilt}" || wait "${capfilt}"
