#!/usr/bin/env bash
# All checks and measurements that need a GPU, in one call (about 8 minutes on one GPU with 16 cores):
#   1. PPO and A2C on Pong with the nature CNN: steps per second against the slowest stage alone
#   2. minutes and steps of PPO on Pong to a mean return of 18
# Usage: benchmarks/gpu.sh [python]      Results: benchmarks/results/gpu_throughput.json, benchmarks/results/learning/
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu.sh: PyTorch sees no GPU here")'
"$python" benchmarks/throughput.py --device cuda --output benchmarks/results/gpu_throughput.json
"$python" benchmarks/learning.py ppo ALE/Pong-v5 --seeds 1 --target 18 --set placement.device=cuda
