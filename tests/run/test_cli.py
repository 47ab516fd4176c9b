from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slipstream.algos import ALGORITHMS
from slipstream.envs import AtariOptions
from slipstream.envs.options import PROTOCOLS
from slipstream.run import checkpoint, cli, measuring, metrics, verbs
from slipstream.run.config import from_plain
from slipstream.run.options import WatchOptions
from slipstream.run.progress import Progress
from slipstream.run.saving import Checkpoints
from slipstream.run.verify import Outcome
from tests.run.runs import resume, stop_after, train

SMALL = [
    "--num-envs",
    "3",
    "--lanes",
    "1",
    "--unroll",
    "7",
    "--algo.batch-size",
    "21",
    "--algo.epochs",
    "2",
    "--net.hidden",
    "8",
    "--log.no-tensorboard",
]


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], str]:
    """Exit code, lines of output, and the last line of the errors."""
    code = cli.main(list(words))
    out, error = capsys.readouterr()
    return code, out.splitlines(), (error.splitlines() or [""])[-1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("trian", 2, "unknown verb 'trian'. Did you mean train?"),
        ("train", 2, f"ALGO is missing: slipstream train {'|'.join(sorted(ALGORITHMS))} --env ENV"),
        ("train pop --env CartPole-v1", 2, "unknown algorithm 'pop'. Did you mean ppo?"),
        ("train ppo", 2, "--env is missing: slipstream train ppo --env ENV (slipstream envs lists them)"),
        ("train ppo x --env CartPole-v1", 2, "unexpected argument 'x'; see slipstream train ppo --help"),
        ("train ppo --env CartPole-v1 --algo.lrr 3", 2, "unknown flag --algo.lrr. Did you mean --algo.lr?"),
        ("train ppo --env CartPole-v1 --algo.lr x", 2, "algo.lr: expected a number, got 'x'"),
        ("train ppo --env CartPole-v1 --seed", 2, "--seed needs a value"),
        (
            "train ppo --env CartPole-v1 --num-envs 9 --lanes 2",
            2,
            "lanes=2 must divide num_envs=9; nearest that fit: lanes=1, or num_envs=10",
        ),
        ("train ppo --config nowhere.yaml", 2, "nowhere.yaml: No such file or directory"),
        ("eval nowhere", 2, "nowhere does not exist"),
        ("resume", 2, "RUN is missing: type slipstream resume RUN"),
        (
            "resume --latest nowhere",
            2,
            "there is no run in nowhere; start one: slipstream train ALGO --env ENV --log.dir nowhere",
        ),
        ("watch nowhere", 2, "nowhere does not exist"),
        ("envs nosuchenvironment", 2, "no environment id contains 'nosuchenvironment'"),
        ("presets pop", 2, "no preset for 'pop'. Did you mean ppo?"),
        ("train ppo --env CartPole-v1 --algo.size 3", 2, "unknown flag --algo.size. Did you mean --algo.batch-size?"),
        ("train ppo --env CartPole-v1 --steps 3", 2, "unknown flag --steps. Did you mean --total-steps?"),
        ("presets ppo zzz", 2, "no preset for 'zzz'. `slipstream presets` lists all."),
        ("presets dqn HalfCheetah-v5", 2, "no preset for dqn on HalfCheetah-v5: `slipstream presets` lists all"),
        ("algos ppo", 2, "unexpected argument 'ppo': type slipstream algos"),
        ("envs cart pole", 2, "unexpected argument 'pole'; see slipstream envs --help"),
        ("envs --wrd cart", 2, "unknown flag --wrd. Did you mean --word?"),
        ("resume RUN --steps 3", 2, "unknown flag --steps. Did you mean --total-steps?"),
        ("train --config .", 2, ". is not a run directory: it has no config.yaml"),
        ("train ppo --env CartPole-v1 --system htz", 2, "unknown system 'htz'. Did you mean hts?"),
        (
            "train ppo --env CartPole-v1 --system appo",
            2,
            "system appo is an algorithm as well: slipstream train appo --system appo --env ENV",
        ),
        (
            "train ppo --env CartPole-v1 --schedule async",
            2,
            "ppo can't learn from rows of just any older policy, as schedule=async gives them; use --schedule "
            "concurrent, or an algorithm with V-trace (appo, impala)",
        ),
        ("verify --env CartPole-v1", 2, f"ALGO is missing: slipstream verify {'|'.join(sorted(ALGORITHMS))} --env ENV"),
        (
            "verify appo --env CartPole-v1",
            2,
            "schedule=async does not promise the same bits: its rows depend on timing. Verify sync or concurrent",
        ),
        ("verify ppo --env CartPole-v1 --delay inf", 2, "delay must be between 0 and 60, got inf"),
        ("verify ppo --env CartPole-v1 --placements []", 2, "placements must name one at least, such as thread:2"),
        (
            "train ppo --env CartPole-v1 --env-options.timeout-seconds inf",
            2,
            "env_options: timeout_seconds must be above 0 and at most 2592000, got inf",
        ),
        ("eval nowhere --seed -1", 2, "seed must be at least 0, got -1"),
        ("watch nowhere --episodes 0", 2, "episodes must be at least 1, got 0"),
        (
            "train ppo --env .foo:CartPole-v1",
            1,
            ".foo:CartPole-v1: before the colon stands no module, as it does in package:CartPole-v1",
        ),
        (
            "verify ppo --env CartPole-v1 --placements gpu",
            2,
            "unknown placement 'gpu': expected inline, graphs, thread:N, process:N, ray:N, learners:N or shards:N, as "
            "in thread:2",
        ),
    ],
)
def test_mistakes_end_in_one_clear_line(
    capsys: pytest.CaptureFixture[str], words: str, code: int, message: str
) -> None:
    found, out, last = _run(capsys, *words.split())
    assert (found, out, last) == (code, [], f"slipstream: error: {message}")


def test_unknown_environment(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, last = _run(capsys, "train", "ppo", "--env", "CartPol-v1", "--log.dir", str(tmp_path))
    assert code == 1
    assert last.startswith("slipstream: error: unknown environment 'CartPol-v1'; did you mean CartPole-v1")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback_and_the_message_stays_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "nowhere", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1] == "slipstream: error: nowhere does not exist"


def test_a_bug_shows_its_traceback_unasked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> dict[str, list[str]]:
        raise KeyError("oops")

    monkeypatch.setattr(verbs, "list_envs", bug)
    assert cli.main(["envs"]) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1] == "slipstream: error: KeyError: 'oops'"


def test_print_config_is_the_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        "train",
        "ppo",
        "--env",
        "CartPole-v1",
        "--n-envs",
        "4",
        "--learning-rate",
        "1e-3",
        "--total-timesteps",
        "2e4",
        "--print-config",
    ]
    code, out, _ = _run(capsys, *words, "--log.dir", str(tmp_path / "runs"))
    assert code == 0
    config = from_plain(yaml.safe_load("\n".join(out)))
    assert (config.num_envs, config.algo.lr, config.total_steps) == (4, 1e-3, 20_000)
    assert not (tmp_path / "runs").exists()
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(out))
    code, again, _ = _run(capsys, "train", "--config", str(file), "--seed", "9", "--print-config")
    assert code == 0
    assert [(old, new) for old, new in zip(out, again, strict=True) if old != new] == [("seed: 1", "seed: 9")]
    code, _, last = _run(capsys, "train", "a2c", "--config", str(file))
    assert (code, last) == (2, "slipstream: error: the file is for algo.name ppo, not a2c")


def test_a_file_may_hold_a_part_of_the_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Flags are over the file, the file is over the preset of its environment."""
    file = tmp_path / "part.yaml"

    def printed(text: str, *words: str) -> list[str]:
        file.write_text(text)
        code, out, last = _run(capsys, "train", *words, "--config", str(file), "--print-config")
        return out if code == 0 else [last]

    def wanted(*words: str) -> list[str]:
        return _run(capsys, "train", "ppo", "--env", "CartPole-v1", *words, "--print-config")[1]

    whole = "env: CartPole-v1\nlearning_rate: 0.125\nnet: {hidden: [7]}\nseed: 3\n"
    flags = ["--algo.lr", "0.125", "--net.hidden", "7"]
    assert printed(whole, "ppo") == wanted(*flags, "--seed", "3")
    assert printed(whole, "ppo", "--seed", "4", "--lr", "0.5") == wanted(*flags, "--seed", "4", "--algo.lr", "0.5")
    assert printed("algo: ppo\nenv: CartPole-v1\n") == wanted()
    assert printed("algo: {name: ppo, lr: 0.125}\n", "--env", "CartPole-v1") == wanted("--algo.lr", "0.125")
    assert printed("seed: 3\n", "ppo")[0].startswith("slipstream: error: --env is missing")
    assert printed("seed: 3\n")[0].startswith("slipstream: error: ALGO is missing")
    assert printed("sede: 3\n", "ppo", "--env", "CartPole-v1") == [
        "slipstream: error: unknown setting sede. Did you mean seed?"
    ]


def test_a_run_directory_is_its_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=20).run.path
    text = (run / "config.yaml").read_text()
    code, out, _ = _run(capsys, "train", "--config", str(run), "--seed", "7", "--print-config")
    assert (code, out) == (0, text.replace("seed: 1\n", "seed: 7\n").splitlines())
    (run / "config.yaml").write_text(text.replace("env: CartPole-v1", "env: callable:Mine"))
    code, _, last = _run(capsys, "train", "--config", str(run))
    assert code == 2
    assert last.endswith(
        "config.yaml is for the Python callable Mine, which the command line can't know; add --env ENV"
    )


def test_an_unknown_flag_names_a_few_others(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, last = _run(capsys, "train", "ppo", "--env", "CartPole-v1", "--qqqq", "1")
    assert code == 2
    assert last == "slipstream: error: unknown flag --qqqq. `slipstream train ALGO --help` lists all."
    code, _, last = _run(capsys, "train", "ppo", "--env", "CartPole-v1", "--stops-when", "1")
    assert code == 2
    assert last.count("--") <= 5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(capsys, "--version") == (0, [f"slipstream {importlib.metadata.version('slipstream')}"], "")


def test_a_protocol_given_with_a_file_replaces_the_one_written_out_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    words = ["train", "ppo", "--env", "ALE/Pong-v5", "--print-config"]
    file.write_text("\n".join(_run(capsys, *words, "--env-options.atari.noop-max", "7")[1]))
    base = ["train", "--config", str(file), "--print-config"]

    def atari(*flags: str) -> AtariOptions:
        return from_plain(yaml.safe_load("\n".join(_run(capsys, *base, *flags)[1]))).env_options.atari

    assert (atari().noop_max, atari().sticky_actions) == (7, 0.0)
    protocol = ["--env-options.atari.protocol", "ale_v5"]
    assert atari(*protocol).spelled_out() == PROTOCOLS["ale_v5"]
    assert atari(*protocol, "--env-options.atari.frame-skip", "3").frame_skip == 3
    assert atari("--env-options.atari.protocol", "v4").noop_max == 7


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert "  CartPole-v1" in _run(capsys, "envs", "cartpole")[1]
    assert [line.split()[0] for line in _run(capsys, "algos")[1]] == list(ALGORITHMS)
    assert _run(capsys, "presets", "a2c", "classic")[1][0] == "# a2c on classic"

    def titles(*words: str) -> list[str]:
        return [line for line in _run(capsys, "presets", *words)[1] if line.startswith("#")]

    assert titles("sac", "Pendulum-v1") == ["# sac on classic"]
    assert titles("dqn", "PongNoFrameskip-v4") == ["# dqn on atari", "# dqn on ALE/Pong-v5"]
    assert {"# ppo on classic", "# c51 on CartPole-v1"} < set(titles("CartPole-v1"))
    assert _run(capsys)[1][0].startswith("slipstream: fast parallel")


@pytest.mark.parametrize(
    "verb", ["eval", "watch", "resume", "envs", "check-env", "train", "train ppo --env CartPole-v1"]
)
def test_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = _run(capsys, *verb.split(), "--help")
    assert code == 0
    assert f"slipstream {' '.join(verb.split()[:2])}" in out[0]
    text = " ".join(out)
    assert "STR " not in out[0]
    if verb in ("eval", "watch", "resume"):
        assert out[0].split()[-1] == "RUN" or " RUN [" in out[0]
    if verb == "envs":
        assert out[0].endswith(" [WORD]")
    if verb.startswith("train"):
        assert "--n-envs (--num-envs)" in text
        assert "--config FILE|RUN" in text
    if verb == "train":
        assert ", ".join(sorted(ALGORITHMS)) in text
    if verb.startswith("train ppo"):
        assert "--stop-at-return {None}|FLOAT" in text
        for flag in ("--algo.clip-range", "--net.hidden", "--placement.workers", "--log.eval-every", "--total-steps"):
            assert flag in text


def test_train_eval_resume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["train", "ppo", "--env", "CartPole-v1", "--total-steps", "2e2", "--log.dir", str(tmp_path), *SMALL]
    code, out, error = _run(capsys, *words)
    assert (code, error) == (0, "")
    (run,) = tmp_path.iterdir()
    assert out[0] == f"ppo on CartPole-v1, seed 1 -> {run}"
    assert out[-4:] == [
        f"run:       {run}",
        f"evaluate:  slipstream eval {run} --episodes 30",
        f"watch:     slipstream watch {run}",
        f"go on:     slipstream resume {run} --total-steps 400",
    ]
    assert (run / "command.txt").read_text() == f"slipstream {' '.join(words)}\n"

    code, out, _ = _run(capsys, *out[-3].split()[2:])
    assert code == 0
    assert out[0].startswith("ppo on CartPole-v1 after 2")
    assert out[1].startswith("return: mean ")
    assert all(word in out[1] for word in ("std", "min", "max"))

    code, _, last = _run(capsys, "resume", str(run))
    assert code == 2
    assert "is finished" in last
    code, out, _ = _run(capsys, "resume", str(run), "--total-steps", "300")
    assert code == 0
    assert ", resumed at step 2" in out[0]
    assert metrics.read(run / "metrics.jsonl")[-1]["time/steps"] >= 300


def test_resume_takes_what_the_result_does_not_depend_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=42).run
    longer = ["resume", str(run.path), "--total-steps", "84"]
    code, _, error = _run(capsys, *longer, "--lr", "0.5", "--num-envs", "6")
    assert code == 2
    assert "can't go on with other settings that change its result: algo.lr was 0.002, not 0.5; num_envs was 3" in error
    assert f"slipstream train --config {run.path} --algo.lr 0.5 --num-envs 6" in error
    code, _, error = _run(capsys, *longer, "--env-options.kwargs.sutton_barto_reward", "true")
    assert code == 2
    assert "env_options.kwargs was {}, not {'sutton_barto_reward': True}" in error
    assert _run(capsys, *longer, "--placement.restarts", "7", "--log.keep-last", "5")[0] == 0
    assert run.config().placement.restarts == 7, "it is written down"
    code, _, error = _run(capsys, "resume", str(run.path), "--algo.lrr", "1")
    assert (code, error) == (2, "slipstream: error: unknown flag --algo.lrr. Did you mean --algo.lr?")


def test_the_latest_run_is_resumed_until_it_is_finished(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a job does that is stopped now and then: `resume --latest DIR || train --log.dir DIR`."""
    older = train(tmp_path, total_steps=20).run.path
    older.rename(tmp_path / "CartPole-v1__ppo__1__20200101-000000")
    shutil.copytree(tmp_path / "CartPole-v1__ppo__1__20200101-000000", tmp_path / "best")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "__call__", stop_after(3, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, log__checkpoint_every=21)
    code, out, _ = _run(capsys, "resume", "--latest", str(tmp_path))
    assert code == 0
    assert ", resumed at step 4" in out[0]
    (newer,) = (path for path in tmp_path.iterdir() if "2020" not in path.name and path.name != "best")
    assert metrics.read(newer / "metrics.jsonl")[-1]["time/steps"] >= 200
    code, out, error = _run(capsys, "resume", "--latest", str(tmp_path))
    assert (code, error) == (0, "")
    assert out[0].startswith(f"{newer} is finished")
    assert _run(capsys, "resume", "--latest", str(tmp_path), "--total-steps", "150")[0] == 0, "that has been taken"


def test_a_newest_run_without_a_configuration_is_not_passed_over_for_an_older_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A job would believe that it has succeeded, by the older run; after an error it trains anew."""
    older = train(tmp_path, total_steps=20).run.path
    killed = tmp_path / "CartPole-v1__ppo__1__30000101-000000"
    killed.mkdir()
    code, out, error = _run(capsys, "resume", "--latest", str(tmp_path))
    assert (code, out) == (2, [])
    assert error.startswith(f"slipstream: error: {killed}, started last, has no config.yaml to go on with")
    assert error.endswith(f"Start it anew; without that directory, the newest run is {older}")
    killed.rmdir()
    assert _run(capsys, "resume", "--latest", str(tmp_path))[0] == 0


def test_a_configuration_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for content, said in [
        (b"\xff\xfe\x00", " is not text: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"env: x\nalgo: {name: ppo, lrr: 1}", ": unknown setting algo.lrr. Did you mean algo.lr?"),
    ]:
        file.write_bytes(content)
        for verb in ("resume", "eval"):
            assert _run(capsys, verb, str(tmp_path)) == (2, [], f"slipstream: error: {file}{said}")


def test_who_names_a_checkpoint_is_told_its_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=20).run
    saved = checkpoint.newest(run.checkpoints)
    for place in (run.checkpoints, saved.path):
        code, _, error = _run(capsys, "resume", str(place))
        assert code == 2
        assert error.endswith(
            f"{place} is not a run directory: it has no config.yaml; it belongs to the run {run.path}"
        )


def test_another_environment_is_announced_only_if_it_is_taken(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = train(tmp_path, env="CliffWalking-v1", total_steps=20).run.path
    code, out, error = _run(capsys, "resume", str(run), "--total-steps", "40", "--env", "Acrobot-v1")
    assert (code, out) == (1, [])
    assert "belongs to another environment" in error
    code, out, _ = _run(capsys, "resume", str(run), "--total-steps", "40", "--env", "CliffWalkingSlippery-v1")
    assert (code, out[0]) == (0, "trained on CliffWalking-v1 so far, on CliffWalkingSlippery-v1 from here on")


def test_sys_exit_within_a_run_waits_for_the_checkpoint_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[tuple[Any, ...]] = []
    close = Checkpoints.close

    def closing(self: Checkpoints, *patience: float) -> None:
        closed.append(patience)
        close(self, *patience)

    monkeypatch.setattr(Checkpoints, "close", closing)
    monkeypatch.setattr(Progress, "__call__", stop_after(3, SystemExit))
    with pytest.raises(SystemExit):
        train(tmp_path, log__checkpoint_every=21)
    assert closed == [()], "for as long as it takes"
    (run,) = tmp_path.iterdir()
    assert any((run / "checkpoints").glob("[0-9]*"))


def test_watch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = ["--num-envs", "2", "--lanes", "1", "--unroll", "5", "--total-steps", "20"]
    words = ["train", "a2c", "--env", "ALE/Pong-v5", "--log.no-tensorboard", *sizes]
    assert _run(capsys, *words, "--log.dir", str(tmp_path))[0] == 0
    (run,) = tmp_path.iterdir()
    code, out, _ = _run(capsys, "watch", str(run), "--format", "gif", "--episodes", "2", "--max-steps", "7")
    assert code == 0
    files = [run / "videos" / f"20-{episode}-max7.gif" for episode in range(2)]
    assert out == [f"{file}  (return 0, 7 steps, cut there: --max-steps)" for file in files]
    assert all(file.read_bytes().startswith(b"GIF89a") for file in files)


def test_recordings_that_differ_have_files_of_their_own() -> None:
    manners = [{}, {"greedy": True}, {"seed": 3}, {"seed": 4}, {"max_steps": 9}, {"reconstruct": True}]
    names = [WatchOptions("run", **manner).stem(20, 1) for manner in manners]
    assert names == ["20-1", "20-1-greedy", "20-1-seed3", "20-1-seed4", "20-1-max9", "20-1-reconstructed"]
    assert WatchOptions("run", greedy=True, seed=0, reconstruct=True).stem(5, 0) == "5-0-greedy-seed0-reconstructed"
    assert WatchOptions("run", checkpoint="best", format="gif", episodes=2).stem(20, 1) == "20-1", "as those say anyway"


def test_a_checkpoint_of_another_environment_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = train(tmp_path, total_steps=20).run.path
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("CartPole-v1", "Acrobot-v1"))
    code, _, last = _run(capsys, "eval", str(run), "--episodes", "2")
    assert code == 1
    assert last.startswith(f"slipstream: error: {run} belongs to another environment: its observation space")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_environment_is_the_last_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, workers: int
) -> None:
    words = ["train", "ppo", "--env", "toy:chaos", "--placement.env-workers", str(workers), "--log.dir", str(tmp_path)]
    assert cli.main([*words, *SMALL]) == 1
    lines = capsys.readouterr().err.splitlines()
    problem = "RuntimeError: Chaos was told to raise"
    assert re.fullmatch(
        rf"slipstream: error: toy:chaos: slot \d, step \d, episode 0: step\(\d\) raised {problem}", lines[-1]
    )
    assert (problem in lines[:-1]) == (workers > 0)
    (run,) = tmp_path.iterdir()
    assert f"traceback:  {run / 'error.txt'}" in lines
    assert problem in (run / "error.txt").read_text()


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    program = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # a job under nohup inherits SIG_IGN
        "from slipstream.run.cli import main; sys.exit(main())"
    )
    words = ["train", "ppo", "--env", "CartPole-v1", "--total-steps", "1e9", "--log.dir", str(tmp_path), *SMALL]
    terminal, end = os.openpty()
    child = subprocess.Popen([sys.executable, "-c", program, *words], stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    while b"steps/s" not in shown:
        shown += os.read(terminal, 4096)
    child.send_signal(signal.SIGHUP)
    os.close(terminal)
    try:
        assert child.wait(60) == 128 + signal.SIGHUP
    finally:
        child.kill()
        child.wait()
    (run,) = tmp_path.iterdir()
    assert checkpoint.newest(run / "checkpoints").steps > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    program = "import sys; from slipstream.run.cli import main; sys.exit(main())"
    words = ["train", "ppo", "--env", "CartPole-v1", "--total-steps", "1e9", "--log.console-every", "50", *SMALL]
    child = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(3)]
    assert "steps" in lines[2]
    child.send_signal(number)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    (run,) = (tmp_path / "runs").iterdir()
    assert error.splitlines()[-1] == f"resume:  slipstream resume {run.relative_to(tmp_path)}"
    assert checkpoint.newest(run / "checkpoints").steps > 0


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Sends this process SIGINT in the given call of a function, before it does anything."""
    original, calls = getattr(owner, name), [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("place", ["fsync", "rename", "rmtree", "facts"])
def test_a_second_signal_while_saving_leaves_whole_checkpoints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Updates are of 21 rows at most, so that there are checkpoints after updates 2 and 3, and the signal at 4.

    The one that is being written is finished, since there is time for it.
    """
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    _interrupt_at(monkeypatch, Progress, "__call__", 4)
    owner: dict[str, tuple[Any, str, int]] = {
        "fsync": (os, "fsync", 19),  # five of the run's start, seven of the first checkpoint, six of the second
        "rename": (checkpoint, "flush_directory", 5),
        "rmtree": (checkpoint, "prune", 3),
        "facts": (checkpoint, "save", 3),
    }
    _interrupt_at(monkeypatch, *owner[place])
    words = ["train", "ppo", "--env", "CartPole-v1", "--total-steps", "1e9", "--log.checkpoint-every", "25", *SMALL]
    try:
        code = cli.main([*words, "--log.dir", str(tmp_path), "--log.console-every", "1000000"])
    finally:
        signal.signal(signal.SIGINT, former)
    (run,) = tmp_path.iterdir()
    saved = checkpoint.newest(run / "checkpoints")
    assert saved.facts()["progress"]["updates"] == 4
    assert code == 130
    assert capsys.readouterr().err.splitlines() == [
        "slipstream: interrupted",
        f"the last checkpoint is that of step {saved.steps}",
        f"resume:  slipstream resume {run}",
    ]
    monkeypatch.undo()
    assert resume(run, total_steps=200).progress.steps >= 200
    assert not list((run / "checkpoints").glob(".*"))


IMPORTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from slipstream.run.cli import main
sys.exit(main())
"""


def test_a_signal_while_torch_is_imported_ends_the_program_quietly() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING, "algos"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "slipstream: interrupted\n")


def test_a_signal_after_the_last_word_shows_no_traceback() -> None:
    program = (
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from slipstream.run.cli import main\ncode = main()\nos.kill(os.getpid(), signal.SIGINT)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


HANGING = """
import os, signal, sys, threading
import gymnasium, numpy as np
from slipstream.run.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

class Hanging(gymnasium.Env):
    observation_space, action_space = gymnasium.spaces.Box(0, 1, (2,)), gymnasium.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == int(sys.argv[1]):
            os.write(1, b"hanging\\n")
            threading.Event().wait()
        return np.zeros(2, np.float32), 0.0, False, False, {}

gymnasium.register("Hanging-v0", Hanging, disable_env_checker=True, order_enforce=False)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("at", [3, 17], ids=["before a checkpoint", "after a checkpoint"])
def test_a_second_signal_ends_a_run_whose_environment_hangs(tmp_path: Path, at: int, workers: int) -> None:
    words = [
        "train",
        "ppo",
        "--env",
        "Hanging-v0",
        *SMALL,
        "--num-envs",
        "2",
        "--lanes",
        "2",
        "--algo.batch-size",
        "14",
    ]
    words += ["--log.checkpoint-every", "20", "--placement.workers", str(workers), "--log.dir", str(tmp_path)]
    words += ["--log.stall-seconds", "0.5"]
    child = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(at), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert any("hanging" in line for line in child.stdout)
    assert any("no update for" in line for line in child.stdout)
    assert any(line.endswith("in step\n") for line in child.stdout)
    child.send_signal(signal.SIGINT)
    assert any("Stopping after this update" in line for line in child.stdout)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130, error
    (run,) = tmp_path.iterdir()
    saved = ["the last checkpoint is that of step 28", f"resume:  slipstream resume {run}"]
    nothing = ["there is no checkpoint yet"]
    assert error.splitlines() == ["slipstream: interrupted", *(saved if at == 17 else nothing)]


def test_an_interrupted_evaluation_has_nothing_to_save(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "load", interrupted)
    assert _run(capsys, "eval", "somewhere") == (130, [], "slipstream: interrupted")


def test_a_verification_of_nothing_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> Iterator[Outcome]:
        yield Outcome("inline", 1, digest="1")
        yield Outcome("thread:2", 0, refused="as the test says")

    monkeypatch.setattr(measuring, "verify", refused)
    code, out, last = _run(capsys, "verify", "ppo", "--env", "CartPole-v1", "--placements", "thread:2")
    assert code == 2
    assert out[-1] == "thread:2    not to be had: as the test says"
    assert last == (
        "slipstream: error: nothing was compared: none of the placements is to be had for this configuration"
    )


def test_verify_names_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--help"]) == 0
    assert "usage: slipstream verify ALGO --env ENV" in capsys.readouterr().out
    _, _, last = _run(capsys, "verify", "ppo", "--env", "CartPole-v1", "--updates", "0")
    assert last == "slipstream: error: updates must be at least 1, got 0"


def test_toys_are_listed_with_what_can_be_set_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "envs", "toy:")
    assert code == 0
    (line,) = [line for line in out if "toy:step_time" in line]
    assert "mean_ms=5.0, distribution=exponential" in line
