#!/usr/bin/env bash
# All checks and measurements that need a GPU, in one call, or a part of them (no part has been run on a GPU yet):
#   bench       steps per second on Pong with the nature CNN, all schedules, against the slowest stage alone
#   verify      the bits: other numbers of threads give the same run
#   curves      Pong: PPO sync and concurrent, APPO async, three seeds each; `curves ppo concurrent 2` is one of them
#   replays     Pong: DQN and Rainbow, one seed each
#   ablation    Pong: the RLDM 2019 system taken apart, three seeds of the whole; `ablation --variants all` is a part
# Usage: benchmarks/gpu.sh [PART [ARGUMENTS]]      PYTHON=.venv/bin/python
# Results: benchmarks/results/gpu_*.json, benchmarks/results/learning/
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu.sh: PyTorch sees no GPU here")'

bench() {
  "$python" -m slipstream bench ppo a2c impala appo --env ALE/Pong-v5 --net.torso nature_cnn \
    --schedules sync concurrent async --placement.device cuda --output benchmarks/results/gpu_bench.json
}
verify() {
  "$python" -m slipstream verify ppo --env ALE/Pong-v5 --system hts --placement.device cuda --updates 5 \
    --placements thread:1 thread:2
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

case ${1:-all} in
  all) bench; curves; replays; ablation; verify ;;
  bench | verify | curves | replays | ablation) "$@" ;;
  *) echo "gpu.sh: unknown part $1; expected bench, verify, curves, replays or ablation" >&2; exit 2 ;;
esac
