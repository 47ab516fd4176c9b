#!/usr/bin/env bash
# All checks and measurements that need a GPU, in one call, or a part of them (no part has been run on a GPU yet):
#   bench       steps per second on Pong with the nature CNN, all schedules, against the slowest stage alone, which is
#               the environments' where the GPU is fast enough; the share of time that the learner waits is in wait/*
#   graphs      the same speeds with forwards and gradients recorded (placement.cuda_graphs), beside those without
#   exact       what deterministic kernels cost
#   scale       the machine's cores without the GPU: speed by cores, lanes and environments, beside the model's
#   cluster     APPO: one learner on the GPU, collectors in processes and in Ray actors on all cores; compare the two
#               speeds: the limit that is printed is of acting on the GPU
#   learners    several learners, one GPU each (nccl); needs two
#   verify      the bits: other numbers of threads, and recordings, give the same run, of PPO and of DQN
#   curves      Pong: PPO sync and concurrent, APPO async, three seeds each; `curves ppo concurrent 2` is one of them
#   replays     Pong: DQN and Rainbow, one seed each
#   ablation    Pong: the RLDM 2019 system taken apart, three seeds of the whole; `ablation --variants all` is a part
# Usage: benchmarks/gpu.sh [PART [ARGUMENTS]]      PYTHON=.venv/bin/python
# Results: benchmarks/results/gpu_*.json, benchmarks/results/learning/
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu.sh: PyTorch sees no GPU here")'
cores=$(nproc)

bench() {
  "$python" -m slipstream bench ppo a2c impala appo dqn --env ALE/Pong-v5 --net.torso nature_cnn \
    --schedules sync concurrent async --placement.device cuda --output benchmarks/results/gpu_bench.json
}
graphs() {
  "$python" -m slipstream bench ppo appo dqn --env ALE/Pong-v5 --net.torso nature_cnn --schedules concurrent \
    --placements default graphs --placement.device cuda --output benchmarks/results/gpu_graphs.json
}
exact() { "$python" benchmarks/exact_kernels.py --output benchmarks/results/gpu_exact_kernels.json "$@"; }
scale() { "$python" benchmarks/scale.py --output benchmarks/results/gpu_scale.json "$@"; }
cluster() {
  "$python" -m slipstream bench appo --env ALE/Pong-v5 --net.torso nature_cnn --schedules async --lanes "$cores" \
    --num-envs $((8 * cores)) --placements "process:$cores" "ray:$cores" --placement.device cuda \
    --output benchmarks/results/gpu_cluster.json
}
learners() {
  if [[ $("$python" -c 'import torch; print(torch.cuda.device_count())') -lt 2 ]]; then
    echo "gpu.sh: learners needs two GPUs; left out" >&2
    return
  fi
  "$python" -m slipstream bench ppo --env ALE/Pong-v5 --net.torso nature_cnn --schedules concurrent --shards 2 \
    --reduction all_reduce --placements learners:2 --placement.device cuda --output benchmarks/results/gpu_learners.json
}
verify() {
  for algo in ppo dqn; do
    "$python" -m slipstream verify "$algo" --env ALE/Pong-v5 --schedule concurrent --placement.device cuda --updates 5 \
      --placements thread:1 thread:2 graphs
  done
}
curve() {
  "$python" benchmarks/learning.py "$1" ALE/Pong-v5 --targets 15 18 --seeds 1 --first-seed "$3" --name "$1 $2 gpu" \
    --set "schedule=$2" --set placement.device=cuda
}
curves() {
  if (($#)); then curve "$@"; return; fi
  for seed in 1 2 3; do curve ppo sync "$seed"; curve ppo concurrent "$seed"; curve appo async "$seed"; done
}
replays() { curve dqn sync 1; curve rainbow sync 1; }
ablation() {
  if (($#)); then "$python" benchmarks/ablation.py --device cuda "$@"; return; fi
  "$python" benchmarks/ablation.py --device cuda
  "$python" benchmarks/ablation.py --device cuda --variants all --seeds 2 3
}

parts=(bench graphs exact scale cluster learners curves replays ablation verify)
part=${1:-all}
if [[ $part == all ]]; then
  for part in "${parts[@]}"; do "$part"; done
elif [[ " ${parts[*]} " == *" $part "* ]]; then
  "$@"
else
  echo "gpu.sh: unknown part $part; expected one of: ${parts[*]}" >&2
  exit 2
fi
