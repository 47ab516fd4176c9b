# Two commands on a fresh machine with Python 3.11+ and make:   make train      make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

# The main job: PPO on Pong without sticky actions. Override with e.g. make train ENV=ALE/Breakout-v5 FLAGS="--seed 2"
ALGO  = ppo
ENV   = ALE/Pong-v5
FLAGS =

.PHONY: train test test-slow lint format grf bench chaos soak lock clean

train: $(VENV)/.installed
	$(BIN)/slipstream train $(ALGO) --env $(ENV) $(FLAGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -n 1 --timeout 3600

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Google Research Football from its sources (6 to 8 minutes): ids gfootball:SCENARIO, with checkpoint rewards. Debian's
# Boost.Python is for Debian's Python, 3.11. The build looks for programs of the environment, whose bin comes first.
GRF_DEBIAN := build-essential cmake libgl-dev libegl-dev libsdl2-dev libsdl2-image-dev libsdl2-ttf-dev libsdl2-gfx-dev \
              libboost-python-dev libboost-thread-dev libboost-system-dev libboost-filesystem-dev
SUDO       := $(if $(filter 0,$(shell id -u)),,sudo)
grf: $(VENV)/.installed
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "gfootball needs Python 3.11; make clean, then make grf PYTHON=python3.11")'
	$(SUDO) apt-get update -qq
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(GRF_DEBIAN)
	$(PIP) install -c constraints.txt setuptools==84.2.1 wheel==0.48.0 psutil absl-py six==1.17.0 opencv-python-headless==5.0.0.93
	PATH="$(abspath $(BIN)):$$PATH" $(abspath $(BIN))/python -m pip --disable-pip-version-check \
	  install --no-deps --no-build-isolation gfootball==2.10.2
	$(BIN)/slipstream check-env gfootball:academy_empty_goal_close

bench: $(VENV)/.installed-dev
	$(BIN)/slipstream bench ppo a2c impala appo --env ALE/Pong-v5 --net.torso nature_cnn --num-envs 64 \
		--schedules sync concurrent async --output benchmarks/results/bench_wide.json
	$(BIN)/slipstream bench ppo a2c impala appo dqn --env ALE/Pong-v5 --net.torso nature_cnn \
		--schedules sync concurrent async --output benchmarks/results/bench.json

# Runs that are killed twenty times each and resumed, beside runs that are not: half an hour on two cores.
chaos: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/chaos.py --output benchmarks/results/chaos.json

# Ten minutes of training while environments raise, die and hang: nothing grows, and the last third is as fast as the first.
soak: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/soak.py --output benchmarks/results/soak.json

# The newest versions that the ranges of pyproject.toml admit, frozen into constraints.txt.
lock:
	rm -rf .lock && $(PYTHON) -m venv .lock
	.lock/bin/python -m pip --quiet install -e ".[dev]"
	.lock/bin/python -m pip freeze --exclude-editable | sed -E 's/ @ .*//; s/\+cpu$$//' | grep '==' > constraints.txt
	rm -rf .lock

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Slipstream needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Slipstream into $(VENV) ..."
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Slipstream with its development tools into $(VENV) ..."
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build src/*.egg-info
