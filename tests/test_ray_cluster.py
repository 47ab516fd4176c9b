"""Connections to Ray clusters: what is said, and what is swept up."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
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
    left, living, starting = (tmp_path / f"slipray-{name}" for name in "abc")
    for folder in (left, living, starting):
        (folder / "logs").mkdir(parents=True)
    lock = ray_cluster._lock(living)
    assert lock is not None
    (other := tmp_path / "slipray-of-another-kind").mkdir()
    program = "from slipstream import ray_cluster as c; import sys, pathlib; c._lock(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(left)], check=True)
    ray_cluster._sweep()
    assert set(tmp_path.iterdir()) == {living, starting, other}
    os.close(lock)


def test_a_folder_has_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("a" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = ray_cluster._folder()
    try:
        assert len(str(folder)) <= ray_cluster._LONGEST
        assert list(long.iterdir()) == []
    finally:
        folder.rmdir()


def test_a_client_is_refused() -> None:
    with pytest.raises(ray_cluster.ClusterError, match="run the command on a node of the cluster"):
        ray_cluster.Cluster("ray://somewhere:10001", 1, 0)


def test_another_address_is_not_looked_at() -> None:
    here = SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(gcs_address="192.0.2.1:6379"))
    with pytest.warns(UserWarning, match=r"connected to the Ray cluster at 192\.0\.2\.1:6379, which is used"):
        ray_cluster._warn_if_other(here, "192.0.2.2:6379")


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
        pytest.raises(ray_cluster.ClusterError, match="the minimum allowed is 78643200 bytes"),
        ray_cluster._private_cluster(1, -5),
    ):
        raise AssertionError("it has started")


def test_one_process_has_one_cluster_at_a_time() -> None:
    pytest.importorskip("ray")
    with ray_cluster._taken, pytest.raises(ray_cluster.ClusterError, match="close that run first"):
        ray_cluster.Cluster("", 1, 0)
    assert not ray_cluster._taken.locked()


def test_privacy_is_undone_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    modes: list[str | None] = []
    monkeypatch.setattr(ray_cluster, "_look_again", lambda ray: modes.append(os.environ.get("RAY_AUTH_MODE")))
    stand_in = SimpleNamespace(_private=SimpleNamespace(ray_constants=SimpleNamespace(ENABLE_RAY_CLUSTER=True)))

    def fail() -> None:
        with ray_cluster._privacy(stand_in):
            assert stand_in._private.ray_constants.ENABLE_RAY_CLUSTER is False
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert modes == ["token", None]
    assert stand_in._private.ray_constants.ENABLE_RAY_CLUSTER is True
