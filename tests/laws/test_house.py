"""The shape of the house, read from the source: where packages are imported, what is never called, the three rooms."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from slipstream.algos import ALGORITHMS
from slipstream.run.preset_table import PRESETS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "slipstream"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))

# Packages that may be missing, or that only one file is to know. Gymnasium imports mujoco, Box2D and pygame itself.
HOMES = {
    "envpool": "envs/envpool.py",
    "gfootball": "envs/football.py",
    "imageio": "run/video.py",
    "ale_py": "envs/atari.py",
    "ray": "ray_cluster.py",
}
MADE = {"gfootball"}  # no pip line installs it: `make grf` does

# Called nowhere: they run what a file says, go through a shell, read the wall clock or print past the console.
FORBIDDEN = re.compile(
    r"(pickle|_pickle|marshal|shelve|dill|joblib|random|numpy\.load|torch\.load|torch\.jit\.load"
    r"|yaml\.(load|load_all|full_load|unsafe_load|Loader|UnsafeLoader|FullLoader)|eval|exec|compile|__import__|print"
    r"|os\.(system|popen)|subprocess\.getoutput|time\.(time|time_ns|clock)"
    r"|numpy\.random\.(seed|rand|randn|randint|random|uniform|normal|choice|shuffle|permutation|RandomState|default_rng)"
    r"|torch\.(manual_seed|seed|default_generator|cuda\.manual_seed(_all)?|cuda\.seed(_all)?"
    r"|rand|randn|randint|randperm|rand_like|randn_like|normal|multinomial|bernoulli))(\..*)?"
)
# cloudpickle carries the user's callable and policy from the driver to its own processes, over an anonymous file, and
# to its own Ray actors, and nothing else.
# torch's global generator is borrowed, seeded and given back where initial weights are drawn.
EXCEPTIONS = {
    ("cloudpickle.dumps", "process.py"),
    ("cloudpickle.loads", "envs/worker_process.py"),
    ("cloudpickle.loads", "ray_outpost.py"),
    ("cloudpickle.loads", "ray_replay.py"),
    ("cloudpickle.loads", "ray_team.py"),
    ("cloudpickle.loads", "remote_process.py"),
    ("cloudpickle.loads", "teammate_process.py"),
    ("pickle", "parcel.py"),
    ("torch.default_generator.manual_seed", "nets/initialize.py"),
}


@dataclass(frozen=True)
class Use:
    """A name of another package (or a builtin) that a file imports or calls, spelled out in full.

    Attributes:
        name: Such as `torch.load`, whatever the file calls it.
        called: Whether it is called here, rather than imported.
        lazy: Whether that happens inside a function.
    """

    name: str
    called: bool
    lazy: bool


def uses(text: str) -> set[Use]:
    """Every import (`importlib.import_module` of a literal too) and every call; annotations' imports are left out."""
    tree = ast.parse(text)
    found: set[Use] = set()
    aliases: dict[str, str] = {}

    def full(node: ast.expr) -> str | None:
        if isinstance(node, ast.Attribute):
            owner = full(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else None

    def imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
        for name in node.names:
            if isinstance(node, ast.ImportFrom):
                yield name.asname or name.name, f"{node.module}.{name.name}"
            else:
                yield (name.asname, name.name) if name.asname else (name.name.split(".")[0],) * 2

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.If) and full(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            aliases.update(imported(node))
            found.update(Use(name, False, lazy) for _, name in imported(node))
        elif isinstance(node, ast.Call) and (name := full(node.func)):
            found.add(Use(name, True, lazy))
            found.update(Use(f"shell in {name}", True, lazy) for word in node.keywords if word.arg == "shell")
            first = node.args[0] if node.args else None
            if name == "importlib.import_module" and isinstance(first, ast.Constant):
                found.add(Use(str(first.value), False, lazy))
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    # Imports first: a function may use a name that the module imports further down.
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            aliases.update(imported(node))
    visit(tree, False)
    return found


def breaches(text: str, file: str) -> set[str]:
    """Names of a file that the house forbids."""
    names = {use.name for use in uses(text)}
    allowed = {name for name, home in EXCEPTIONS if home == file}
    suspicious = {name for name in names if FORBIDDEN.fullmatch(name) or name.startswith(("cloudpickle.", "shell in "))}
    return suspicious - allowed


@cache
def uses_of(file: str) -> set[Use]:
    return uses((SOURCE / file).read_text())


@cache
def declared() -> tuple[frozenset[str], frozenset[str]]:
    """Distributions that pyproject.toml requires, and those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w.-]", text)[0].lower() for text in requirements}

    extras = set[str]().union(*(names(lines) for lines in project["optional-dependencies"].values()))
    return frozenset(names(project["dependencies"])), frozenset(extras)


@cache
def packages() -> dict[str, list[str]]:
    """Distributions by the package that they install."""
    return dict(importlib.metadata.packages_distributions())


def third_party(file: str) -> set[Use]:
    """Imports that are neither Python's nor ours, with the package as the name."""
    own = {"slipstream", "__future__"} | sys.stdlib_module_names
    tops = {Use(use.name.split(".")[0], False, use.lazy) for use in uses_of(file) if not use.called}
    return {use for use in tops if use.name not in own}


@pytest.mark.parametrize("file", FILES)
def test_every_import_is_a_declared_dependency(file: str) -> None:
    core, extras = declared()
    for use in third_party(file):
        names = {name.lower() for name in packages().get(use.name, [use.name])}
        assert names & (core | extras | MADE), f"{use.name} is not in pyproject.toml"
        assert names & core or use.lazy, f"{use.name} is optional, but is imported with the file"


@pytest.mark.parametrize(("package", "home"), HOMES.items())
def test_package_has_one_home(package: str, home: str) -> None:
    assert [file for file in FILES if package in {use.name for use in third_party(file)}] == [home]


def test_optional_packages_are_those_with_a_home() -> None:
    core, _ = declared()
    imported = {use.name for file in FILES for use in third_party(file)}
    optional = {name for name in imported if not core & {dist.lower() for dist in packages().get(name, [name])}}
    assert optional == set(HOMES) - {"ale_py"}


@pytest.mark.parametrize("file", FILES)
def test_nothing_forbidden(file: str) -> None:
    assert breaches((SOURCE / file).read_text(), file) == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch as t\nt.load('x')", {"torch.load"}),
        ("def f(): return load('x')\nfrom torch import load", {"torch.load"}),
        ("import pickle", {"pickle"}),
        ("from pickle import loads", {"pickle.loads"}),
        ("import yaml\nyaml.load(x, yaml.Loader)", {"yaml.load"}),
        ("import subprocess\nsubprocess.run('ls', shell=True)", {"shell in subprocess.run"}),
        ("import cloudpickle\ncloudpickle.loads(x)", {"cloudpickle.loads"}),
        ("from time import time\nx = time() - 3", {"time.time"}),
        ("import numpy as np\nnp.random.default_rng()", {"numpy.random.default_rng"}),
        ("import torch\ntorch.randperm(3)", {"torch.randperm"}),
        ("import torch\ntorch.default_generator.manual_seed(3)", {"torch.default_generator.manual_seed"}),
        ("import random", {"random"}),
        ("print(eval('1'))", {"print", "eval"}),
    ],
)
def test_what_is_forbidden_would_be_found(text: str, found: set[str]) -> None:
    assert breaches(text, "run/agent.py") == found


def test_what_is_allowed_is_not_found() -> None:
    text = "import re, time, yaml\nre.compile(x)\ntime.perf_counter()\nyaml.safe_load(x)\nself.load(1)\nmodel.eval()"
    assert breaches(text, "run/agent.py") == set()


@pytest.mark.parametrize(("name", "file"), sorted(EXCEPTIONS))
def test_every_exception_is_needed(name: str, file: str) -> None:
    assert name in {use.name for use in uses_of(file)}


def test_every_algorithm_has_three_rooms() -> None:
    contracts = {"__init__", "algorithm", "replaying"}
    shared = {"exploring", "q_learning", "continuous_control", "cloning"}
    homes = {path.stem for path in (SOURCE / "algos").glob("*.py")} - contracts - shared
    assert homes == set(ALGORITHMS), "one file per algorithm, one algorithm per file"
    for name, kind in ALGORITHMS.items():
        assert kind.name == name
        assert kind.__module__ == f"slipstream.algos.{name}"
        assert (ROOT / "tests" / "algos" / f"test_{name}.py").is_file()
        assert any(algorithm == name for algorithm, _ in PRESETS)
    assert {algorithm for algorithm, _ in PRESETS} == set(ALGORITHMS)
