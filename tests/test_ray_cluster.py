"""Connections to Ray clusters: what is said, and what is swept up."""

from __future__ import annotations

import builtins
import os
import subprocess
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slipstream import ray_cluster


def stand_in(*addresses: str) -> Any:
    return SimpleNamespace(nodes=lambda: [{"NodeManagerAddress": address} for address in addresses])


def test_an_open_cluster_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.warns(UserWarning, match=r"listens on 192\.0\.2\.7, and RAY_AUTH_MODE=token is not set"):
        ray_cluster._warn_if_open(stand_in("127.0.0.1", "192.0.2.7"))


@pytest.mark.parametrize(("mode", "address"), [("token", "192.0.2.7"), ("disabled", "127.0.0.1")])
def test_another_one_is_not(monkeypatch: pytest.MonkeyPatch, mode: str, address: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ray_cluster._warn_if_open(stand_in(address))


def test_what_killed_drivers_left_is_swept_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f"slipstream-ray-{ended.pid}-a", f"slipstream-ray-{os.getpid()}-b", "slipstream-ray-x-c", "other"]
    for name in names:
        (tmp_path / name / "logs").mkdir(parents=True)
    ray_cluster._sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_missing_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_ray(name: str, *args: Any) -> Any:
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(ImportError, match=r'needs a package: pip install "slipstream\[ray\]"'):
        ray_cluster.Cluster("", 1, 0)


def test_a_head_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "_SMALLEST_STORE", -1)
    with (
        pytest.raises(ray_cluster.RayError, match="the minimum allowed is 78643200 bytes"),
        ray_cluster._private_cluster(1, -5),
    ):
        raise AssertionError("it has started")
