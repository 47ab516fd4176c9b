"""What the documents say is true of the code: commands, calls, settings, files, links."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import slipstream
from slipstream.algos import ALGORITHMS
from slipstream.algos.algorithm import Algorithm
from slipstream.envs import football
from slipstream.run import cli, flags, measuring, metrics, verbs
from slipstream.run.agent import Agent
from slipstream.run.config import known_settings
from slipstream.run.directory import to_yaml
from slipstream.run.presets import configure
from slipstream.run.training import Training
from slipstream.run.typed import resumed

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def fences(document: str, language: str) -> list[str]:
    """Contents of the fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def shell_lines(program: str) -> list[str]:
    """Every line of a bash block that starts with `program`, without its comment and what comes if it fails."""
    blocks = [block for document in DOCUMENTS for block in fences(document, "bash")]
    lines = [line.partition(" || ")[0] for block in blocks for line in block.splitlines()]
    return sorted({shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith(f"{program} ")})


def calls() -> list[tuple[str, ast.Call]]:
    """Calls of the public functions and of an agent's methods in the Python blocks."""
    trees = [ast.parse(block) for document in DOCUMENTS for block in fences(document, "python")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        (ast.unparse(node.func), node) for node in nodes if ast.unparse(node.func).startswith(("slipstream.", "agent."))
    ]


@pytest.mark.parametrize("line", shell_lines("slipstream"))
def test_command_is_understood(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(configure("ppo", "CartPole-v1")))
    verb, *words = (word.replace("RUN", str(tmp_path)) for word in shlex.split(line)[1:])
    assert verb in verbs.VERBS
    if verb == "train":
        code = cli.main([verb, *words, "--print-config"])
        if "gfootball:" in line and not football.scenarios():
            assert code == 1
            assert "type `make grf`" in capsys.readouterr().err
        else:
            assert code == 0
    elif verb == "verify":
        assert cli.main([verb, *words, "--updates", "1", "--placements", "thread:2"]) == 0
    elif verb == "doctor":
        monkeypatch.setattr(measuring, "diagnose", lambda *given: None)  # what it measures is tested elsewhere
        assert cli.main([verb, *words]) == 0
    elif verb == "bench":
        monkeypatch.setattr(measuring, "bench", lambda *given: {"stages": {}, "variants": {}, "process": {}})
        assert cli.main([verb, *words]) == 0
    elif verb == "resume":
        resumed(words)
    elif verb in verbs.OPTIONS and verb != "envs":
        flags.parse(verbs.OPTIONS[verb], words, verb)
    else:
        assert cli.main([verb, *words]) == 0


@pytest.mark.parametrize("line", shell_lines("make"))
def test_target_exists(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_verb_is_shown() -> None:
    assert {line.split()[1] for line in shell_lines("slipstream")} == set(verbs.VERBS)


@pytest.mark.parametrize(("name", "call"), calls(), ids=lambda value: value if isinstance(value, str) else "")
def test_call_fits_its_function(name: str, call: ast.Call) -> None:
    owner, _, attribute = name.partition(".")
    places: dict[str, Any] = {word.arg: word.value for word in call.keywords if word.arg}
    if owner == "slipstream":
        assert attribute in slipstream.__all__
        inspect.signature(getattr(slipstream, attribute)).bind(*call.args, **places)
    else:
        inspect.signature(getattr(Agent, attribute)).bind(None, *call.args, **places)
    if isinstance(settings := places.get("config"), ast.Dict):
        algo = ast.literal_eval(call.args[0])
        assert {ast.literal_eval(key) for key in settings.keys if key} <= set(known_settings(algo))


def test_flags_of_the_atari_table_exist() -> None:
    table = (ROOT / "README.md").read_text().partition("| choice | `v4`")[2].partition("\n\n")[0]
    last_cells = [row.rstrip(" |").rpartition("|")[2] for row in table.splitlines()[2:]]
    named = {flag.replace("-", "_") for cell in last_cells for flag in re.findall(r"`([\w-]+)`", cell)}
    options = {key.rpartition(".")[2] for key in known_settings("ppo") if key.startswith("env_options.atari.")}
    assert named == options - {"protocol"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_links_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    files = {name for name in re.findall(r"`([\w/.-]+\.(?:py|toml|md|txt))`", text) if "NAME" not in name}
    inside_runs = {"command.txt", "error.txt"}
    for name in files - inside_runs:
        assert (ROOT / name).is_file() or (ROOT / "src" / "slipstream" / name).is_file(), name
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / document).parent.joinpath(link).exists(), link


def test_every_fault_has_its_tests() -> None:
    """Or the word that says why not; and the tests are there."""
    rows = re.findall(r"^\| ([A-H]\d+)†? \|.*$", text := (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
    sizes = {"A": 18, "B": 9, "C": 13, "D": 7, "E": 3, "F": 4, "G": 7, "H": 8}
    assert rows == [f"{section}{number}" for section, size in sizes.items() for number in range(1, size + 1)]
    for line in text.splitlines():
        if re.match(r"\| [A-H]\d", line):
            assert "::" in line or "*Refused*" in line or "*Open*" in line, line
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_architecture_stays_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 200


def test_every_change_says_whether_it_changes_learning() -> None:
    entries = (ROOT / "CHANGELOG.md").read_text().split("\n### ")[1:]
    assert entries
    for entry in entries:
        assert re.search(r"^Changes learning behaviour: (yes|no)\b", entry, re.MULTILINE), entry.splitlines()[0]


def test_every_decision_is_listed() -> None:
    pages = {path.name for path in (ROOT / "docs" / "adr").glob("0*.md")}
    assert pages == set(re.findall(r"\]\((0[\w-]+\.md)\)", (ROOT / "docs" / "adr" / "README.md").read_text()))


def test_contributing_names_all_that_an_algorithm_must_have() -> None:
    """But for the hyperparameters that every algorithm has."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    members = {name for name in vars(Algorithm) | Algorithm.__annotations__ if not name.startswith("_")}
    hyperparameters = {"lr", "eps", "gamma", "optimizer", "max_grad_norm"}
    assert not [name for name in members - hyperparameters if f"`{name}`" not in text and f"`{name}:" not in text]


TABLES = "\n".join(line for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("|"))
METRICS = re.findall(r"`([a-z]+/[a-zA-Z_*/]+)`", TABLES)
_TINY = {"num_envs": 4, "lanes": 2, "unroll": 4, "net.hidden": (8,), "placement.workers": 1, "total_steps": 10_000}


def _metrics_of(algo: str, env: str, **changes: Any) -> set[str]:
    """Names of what some updates report."""
    config = configure(algo, env, _TINY)
    sizes: dict[str, Any] = {"algo.batch_size": 8} if hasattr(config.algo, "batch_size") else {}
    if config.algo.replays:
        sizes |= {"algo.replay.learning_starts": 0, "algo.replay.capacity": 400, "algo.replay.ratio": 0.5}
    training = Training(configure(algo, env, {**_TINY, **sizes, **changes}))
    try:
        return {name for report in islice(training, 12) for name in report.metrics}
    finally:
        training.close()


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_every_metric_is_documented(algo: str) -> None:
    env = "Pendulum-v1" if algo in ("sac", "td3", "ddpg") else "CartPole-v1"
    names = _metrics_of(algo, env, schedule="sync" if algo in ("a2c", "ppo") else "async")
    assert any(name.startswith("train/") and name.endswith("loss") for name in names)
    assert {name for name in names if not any(fnmatch(name, known) for known in METRICS)} == set()


def test_every_metric_of_replayed_unrolls_and_pictures_is_documented() -> None:
    replay = {"algo.replay.proportion": 1.0, "algo.replay.trust_region": 1.0, "algo.replay.clone_policy": 0.1}
    pictures = {"autoencoder.weight": 1.0, "autoencoder.variational": True, "net.latent": 4}
    names = _metrics_of("appo", "ALE/Pong-v5", **replay, **pictures)
    assert {"train/clone_loss", "train/outside_region", "train/latent_kl", "lag/replayed_mean"} < names
    assert {name for name in names if not any(fnmatch(name, known) for known in METRICS)} == set()


def test_every_metric_of_a_run_is_documented(tmp_path: Path) -> None:
    """What is written down beside what updates report, too."""
    config = {
        **_TINY,
        "log.dir": str(tmp_path),
        "algo.batch_size": 8,
        "total_steps": 400,
        "log.eval_every": 200,
        "log.eval_episodes": 1,
    }
    slipstream.train("ppo", "CartPole-v1", config=config, quiet=True)
    (path,) = tmp_path.glob("*/metrics.jsonl")
    names = {name for row in metrics.read(path) for name in row}
    assert {"eval/mean_reward", "time/steps_per_second", "rollout/ep_rew_mean", "limit/efficiency"} <= names
    assert {name for name in names if not any(fnmatch(name, known) for known in METRICS)} == set()


def test_every_documented_metric_of_learning_exists() -> None:
    """Its last part is a name in the sources."""
    sources = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    leaves = {name.split("/")[1].strip("*") for name in METRICS if name.startswith(("train/", "replay/", "lag/"))}
    assert len(leaves) > 30
    assert {leaf for leaf in leaves if not re.search(rf'["/]{leaf}["{{/]', sources)} == set()
