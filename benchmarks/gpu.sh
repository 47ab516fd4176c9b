#!/usr/bin/env bash
# All checks and measurements that need a GPU, in one call (about 25 minutes on one GPU with 16 cores):
#   1. steps per second on Pong with the nature CNN: PPO and A2C against the slowest stage alone, and the schedules
#   2. the bits: `slipstream verify` on the GPU
#   3. curves on Pong: PPO sync and concurrent, APPO async
# Usage: benchmarks/gpu.sh [python]      Results: benchmarks/results/gpu_*.json, benchmarks/results/learning/
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu.sh: PyTorch sees no GPU here")'
"$python" benchmarks/throughput.py --device cuda --output benchmarks/results/gpu_throughput.json
"$python" benchmarks/schedules.py --device cuda --output benchmarks/results/gpu_schedules.json
"$python" -m slipstream verify ppo --env ALE/Pong-v5 --system hts --placement.device cuda --updates 5 --placements thread:1 thread:2
curves() { "$python" benchmarks/learning.py "$1" ALE/Pong-v5 --targets 15 18 --set "schedule=$2" --set placement.device=cuda \
  --name "$1 $2 gpu" --seeds 3; }
curves ppo sync
curves ppo concurrent
curves appo async
