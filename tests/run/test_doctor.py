from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slipstream.run import cli, doctor
from slipstream.run.config import Config, override
from slipstream.run.doctor import diagnose
from slipstream.run.presets import configure
from slipstream.run.settings import ConfigError
from slipstream.run.speed import Speed, measure_speed
from slipstream.run.typed import file_of, settings_of

SMALL = {
    "num_envs": 8,
    "lanes": 4,
    "unroll": 8,
    "algo.batch_size": 32,
    "placement.workers": 1,
    "placement.device": "cpu",
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A machine of two cores where speed is a function of the settings, and what was tried there."""
    known: dict[str, Any] = {"tried": [], "speed": lambda config: 100.0, "busy": 1.0}

    def speed(config: Config, seconds: float) -> Speed:
        known["tried"].append(config)
        return Speed(known["speed"](config), known["busy"])

    monkeypatch.setattr(doctor, "measure_speed", speed)
    monkeypatch.setattr(doctor, "measure", lambda config, seconds: doctor.Stages(1e-4, 2e-4, 7e-4, 2, False))
    monkeypatch.setattr(doctor, "cores", lambda: 2)
    monkeypatch.chdir(tmp_path)
    return known


def found(rounds: int = 1, schedules: bool = False, env: str = "CartPole-v1") -> tuple[doctor.Diagnosis, str]:
    lines: list[str] = []
    return diagnose(configure("ppo", env, SMALL), 1.0, rounds, schedules, lines.append), "\n".join(lines)


def test_placements_that_are_faster_are_proposed_together(machine: dict[str, Any]) -> None:
    def speed(config: Config) -> float:
        return 100.0 * (1.5 if config.placement.workers == 2 else 1) * (1.2 if config.placement.env_workers else 1)

    machine["speed"] = speed
    diagnosis, text = found()
    assert diagnosis.proposal == {"placement.workers": 2, "placement.env_workers": 2}
    assert diagnosis.gain == pytest.approx(1.8)
    assert (
        "Faster placement, 1.80 times when measured again in turn: --placement.env-workers 2 --placement.workers 2"
        in text
    )
    assert "Bottleneck: learning, 70% of the work of a step" in text
    assert "limit: 2 cores / their sum = 2,000 steps/s" in text
    assert diagnosis.efficiency == pytest.approx(0.05)


def test_where_cores_are_idle_the_bottleneck_is_waiting(machine: dict[str, Any]) -> None:
    machine["busy"] = 0.07
    diagnosis, text = found()
    assert diagnosis.placements[0].busy == 0.07
    assert "Bottleneck: waiting: as configured, the cores are busy for 7% of the time." in text
    assert "Of the work that there is, 70% is learning." in text


def test_where_one_core_is_never_idle_it_is_one_thread_that_the_others_wait_for(machine: dict[str, Any]) -> None:
    machine["busy"] = 0.48
    assert "Bottleneck: one thread: as configured, the cores are busy for 48% of the time. While it" in found()[1]
    machine["busy"] = 0.4
    assert "Bottleneck: waiting" in found()[1]


def test_a_lucky_trial_has_to_win_again(machine: dict[str, Any]) -> None:
    machine["speed"] = lambda config: 200.0 if config.placement.workers == 2 and len(machine["tried"]) < 6 else 100.0
    diagnosis, text = found(rounds=3)
    assert [trial.speed for trial in diagnosis.placements if trial.changes == {"placement.workers": 2}] == [200.0]
    assert diagnosis.proposal == {}
    assert "No placement was faster than the configured one." in text


def test_only_placements_are_proposed_but_schedules_are_reported(machine: dict[str, Any]) -> None:
    machine["speed"] = lambda config: 100.0 * config.lanes
    diagnosis, text = found(schedules=True)
    assert diagnosis.proposal == {}
    assert "Changes the result, 2.00 times as fast again: --lanes 8" in text
    refused = {trial.changes["schedule"]: trial.refused for trial in diagnosis.schedules if "schedule" in trial.changes}
    assert refused["concurrent"] is None
    assert "just any older policy" in (refused["async"] or "")


def test_games_with_native_threads_are_not_put_into_workers(machine: dict[str, Any]) -> None:
    found(env="ALE/Pong-v5")
    assert not any(config.placement.env_workers for config in machine["tried"])
    assert any(config.placement.env_threads == 1 for config in machine["tried"])


def test_the_verb_measures_and_writes_the_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 7\nplacement: {workers: 3}\n")
    words = ["doctor", "toy:catch", "--algo", "a2c", "--seconds", "0.05", "--rounds", "1", "--no-schedules"]
    words += ["--num-envs", "4", "--lanes", "1", "--unroll", "4", "--log.dir", str(tmp_path), "--apply", str(file)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "stage, alone" in said
    assert f"slipstream train a2c --env toy:catch --config {file}" in said
    written = yaml.safe_load(file.read_text())
    assert written["seed"] == 7
    assert set(written) == {"seed", "placement"}
    config = override(configure("a2c", "toy:catch"), settings_of(file_of(["--config", str(file)]) or file))
    assert config.seed == 7
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "ENV is missing: slipstream doctor ENV"),
        (["CartPol-v1"], "CartPole-v1"),
        (["CartPole-v1", "--seconds", "0"], "seconds must be above 0"),
        (["CartPole-v1", "--algo", "pppo"], "unknown algorithm 'pppo'"),
    ],
)
def test_mistakes_are_named(words: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *words]) != 0
    assert match in capsys.readouterr().err


def test_a_budget_that_is_too_small_to_measure_is_refused() -> None:
    with pytest.raises(ConfigError, match="used up in less than 9 seconds"):
        measure_speed(configure("ppo", "toy:catch", {"total_steps": 10}), 9.0)
