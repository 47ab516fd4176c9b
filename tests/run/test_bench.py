from __future__ import annotations

import json
from pathlib import Path

import pytest

from slipstream.run import bench as module
from slipstream.run import cli
from slipstream.run.bench import bench, outline, table, variants
from slipstream.run.config import Config
from slipstream.run.limit import Stages
from slipstream.run.presets import configure
from slipstream.run.settings import ConfigError
from slipstream.run.speed import Speed

SMALL = {"num_envs": 4, "lanes": 2, "unroll": 16, "algo.batch_size": 32, "placement.device": "cpu"}


def test_variants_are_the_combinations_that_can_be_had() -> None:
    configs = [configure(algo, "CartPole-v1", SMALL) for algo in ("ppo", "appo")]
    names = [each.name for each in variants(configs, ("sync", "async"), ("default", "thread:2"))]
    assert names == [
        "ppo sync default",
        "ppo sync thread:2",
        "appo sync default",
        "appo sync thread:2",
        "appo async default",
        "appo async thread:2",
    ]
    assert [each.name for each in variants(configs, (), ("default",))] == ["ppo sync default", "appo async default"]
    placed = [configure("ppo", "CartPole-v1", {"placement.learners": 2, "placement.workers": 1})]
    (own, threads) = variants(placed, (), ("default", "thread:2"))
    assert own.name == "ppo sync default workers=1 learners=2"
    assert threads.name == "ppo sync thread:2"
    assert variants(configs, ("sync",), ("thread:3",))[0].config.placement.workers == 3
    with pytest.raises(ConfigError, match="unknown placement 'threads'"):
        variants(configs, (), ("threads",))


def test_what_is_going_to_be_measured_is_told_with_its_length() -> None:
    configs = [configure(algo, "CartPole-v1", SMALL) for algo in ("ppo", "appo")]
    chosen = variants(configs, ("sync", "async"), ("default", "thread:2"))
    assert outline(chosen, 2, 20.0, 5.0) == (
        "rounds: 2; in each, trainings: 6, 20 s long, and stages: 6, 5 s long; 5:00 in all, and what starting takes"
    )


def test_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is twice as slow in the second round; the ratios do not see it."""
    rounds = iter([1.0, 0.5, 1.0])
    now = [1.0]

    def stages(config: Config, seconds: float) -> Stages:
        now[0] = next(rounds)
        return Stages(1e-3, 2e-3, 7e-3 / now[0] + 3e-3 / now[0] - 3e-3, 2, False)

    def speed(config: Config, seconds: float) -> Speed:
        return Speed({"sync": 100.0, "concurrent": 150.0}[config.schedule] * now[0], 1.0)

    monkeypatch.setattr(module, "measure", stages)
    monkeypatch.setattr(module, "measure_speed", speed)
    monkeypatch.setattr(module, "_process", lambda config: {"startup_seconds": 2.0, "peak_mb": 300.0})
    chosen = variants([configure("ppo", "CartPole-v1", SMALL)], ("sync", "concurrent"), ("default",))
    told: list[str] = []
    result = bench(chosen, 3, 1.0, 0.25, told.append)
    row = result["variants"]["ppo concurrent default"]
    assert row["of_first"] == 1.5
    assert row["efficiency"] == pytest.approx(0.75)
    assert row["steps_per_second"] == 150
    assert result["rounds"]["speeds"]["ppo sync default"] == [100, 50, 100]
    assert len(told) == 9
    text = table(result)
    assert "| ppo concurrent default | 150 | 0.75 | 1.50 |" in text
    assert "| ppo | 2.0 | 300 |" in text


def test_the_verb_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    words = ["bench", "a2c", "--env", "toy:catch", "--rounds", "1", "--seconds", "0.05", "--num-envs", "4"]
    assert cli.main([*words, "--schedules", "sync", "--output", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["env"] == "toy:catch"
    assert result["command"].startswith("slipstream bench a2c --env toy:catch")
    assert result["variants"]["a2c sync default"]["steps_per_second"] > 0
    assert 0 < result["process"]["a2c"]["startup_seconds"] < 300
    assert result["process"]["a2c"]["peak_mb"] > 50
    out, error = capsys.readouterr()
    assert "| a2c sync default |" in out
    assert error.startswith("rounds: 1; in each, trainings: 1, 0.05 s long, and stages: 3, 0.0125 s long; 0:00 in all")


def test_the_memory_of_a_fresh_process_is_its_own() -> None:
    mine = bytearray(b"1") * 1_000_000_000  # which a process that is launched inherits, in the kernel's accounts
    small = {"num_envs": 2, "lanes": 1, "unroll": 5, "placement.device": "cpu"}
    config = configure("a2c", "CartPole-v1", small)
    assert 50.0 < module._process(config)["peak_mb"] < len(mine) / 1e6 / 2


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--env", "CartPole-v1"], "ALGO is missing"),
        (["ppo", "--env", "CartPole-v1", "--schedules", "async"], "none of the schedules async is for ppo"),
        (["ppo", "--env", "CartPole-v1", "--schedules", "asynch"], "unknown schedule 'asynch'"),
        (["ppo", "--env", "CartPole-v1", "--rounds", "0"], "rounds must be at least 1"),
        (
            ["ppo", "dqn", "--env", "CartPole-v1", "--algo.replay.capacity", "99"],
            "--algo.replay.capacity is no setting of ppo: leave it out, or type slipstream bench dqn ... "
            "--algo.replay.capacity 99, and ppo apart",
        ),
        (["ppo", "dqn", "--env", "CartPole-v1", "--algo.replay.capacty", "9"], "Did you mean --algo.replay.capacity?"),
    ],
)
def test_mistakes_are_named(words: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) != 0
    assert match in capsys.readouterr().err
