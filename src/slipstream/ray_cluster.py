"""The driver's connection to a Ray cluster: one that runs already, or a private one on this machine.

A private cluster listens on the loopback interface only, wants a token that only this process and its children know,
and has no dashboard. It lives in a process group of its own (`main` here), which the kernel ends with the driver.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import tempfile
import threading
import warnings
import weakref
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from slipstream import process

_FOLDER = "slipstream-ray-"
_SMALLEST_STORE = 128 << 20  # bytes; Ray wants 75 MiB at least
_PRIVATE = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # has Ray take the loopback interface, on Linux too
    "RAY_USAGE_STATS_ENABLED": "0",
}


class RayError(ConnectionError):
    """A cluster can't be started or joined."""


class Cluster:
    """The connection of this process to a Ray cluster, of which it can have one at a time.

    Args:
        address: Of a cluster (`auto`, `host:port`), or "" for a private one. A connection that the process has already
            is used as it is, and kept.
        cpus: Of a private cluster.
        store: Bytes that are to lie in the object store of a private cluster at the same time.

    Attributes:
        ray: The library.

    Raises:
        ImportError: Ray is not installed.
        RayError: There is no such cluster, or none can be started.
    """

    def __init__(self, address: str, cpus: int, store: int) -> None:
        with ExitStack() as undo:
            self.ray = ray = _ray()
            if not ray.is_initialized():
                if not address:
                    undo.enter_context(_privacy(ray))
                try:
                    address = address or undo.enter_context(_private_cluster(cpus, store))
                    with _debugger_and_signals():
                        ray.init(address=address, namespace="slipstream", logging_level="WARNING")
                except RayError:
                    raise
                except (ConnectionError, ValueError, RuntimeError) as error:
                    raise RayError(
                        f"no Ray cluster at {address or 'this machine'}: {error}. `ray start --head` starts one; "
                        "without --placement.address a run has its own"
                    ) from error
                undo.callback(ray.shutdown)
                _warn_if_open(ray)
            self._finalizer = weakref.finalize(self, undo.pop_all().close)

    def close(self) -> None:
        """Leaves the cluster, and ends it if it is private; the second call does nothing."""
        self._finalizer()


def _ray() -> Any:
    try:
        import ray  # optional: the extra `ray`
    except ModuleNotFoundError as error:
        raise ImportError('placement.collectors=ray needs a package: pip install "slipstream[ray]"') from error
    return ray


@contextmanager
def _private_cluster(cpus: int, store: int) -> Generator[str]:
    """Starts a cluster on this machine; its address."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
    options = {
        "num_cpus": cpus,
        "object_store_memory": max(store, _SMALLEST_STORE),
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "ERROR",
        "_temp_dir": str(folder),
    }
    memory = process.anonymous_file()
    try:
        head = process.start("slipstream.ray_cluster", json.dumps(options).encode(), memory)
        try:
            yield _answer(head)
        finally:
            process.stop([head])
    finally:
        os.close(memory)
        shutil.rmtree(folder, ignore_errors=True)


def _answer(head: process.Child) -> str:
    """The address of the cluster, when it has started."""
    (fd,) = head.answers
    try:
        if not select.select([fd], [], [], process.START_SECONDS)[0]:
            raise RayError(f"Ray has not started within {process.START_SECONDS:g} seconds\n\n{head.stack_now()}")
        return head.read(fd).decode()
    except process.ChildDied:
        raise RayError(f"the process that starts Ray {head.obituary()[0]}") from None
    except process.ChildFailed as error:
        raise RayError(f"{error}\n\n{error.traceback}") from None


def main() -> None:
    """Entry point of the process that has a private cluster, until the driver closes its pipe."""
    fds = process.enter()
    if process.answer(fds.answers[0], partial(_head, json.loads(process.read_file(fds.setup)))):
        with open(fds.commands, "rb") as commands:
            commands.read()
        _ray().shutdown()
    process.leave()


def _head(options: dict[str, Any]) -> bytes:
    """Starts the cluster; tells its address."""
    return _ray().init(address="local", **options).address_info["address"].encode()


def _sweep() -> None:
    """Removes what private clusters of drivers that were killed have left in the file system: logs, mostly."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        pid = folder.name.removeprefix(_FOLDER).partition("-")[0]
        if pid.isdecimal() and folder.stat().st_uid == os.getuid() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _privacy(ray: Any) -> Generator[None]:
    """Has Ray take the loopback interface and our token for a while, here and in processes that are started.

    It looks at the environment when it is imported, which may be long ago, so that it has to be told to look again.
    """
    former = {name: os.environ.get(name) for name in _PRIVATE}
    os.environ.update(_PRIVATE)
    constants = ray._private.ray_constants
    clusters, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    _look_again(ray)
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        for name, value in former.items():
            _restore(name, value)
        _look_again(ray)


def _look_again(ray: Any) -> None:
    """Has Ray read mode and token of its authentication from the environment."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _debugger_and_signals() -> Generator[None]:
    """Undoes what Ray makes of `breakpoint()` and of SIGTERM, which is the run's to handle."""
    main = threading.current_thread() is threading.main_thread()
    former, debugger = signal.getsignal(signal.SIGTERM), os.environ.get("PYTHONBREAKPOINT")
    try:
        yield
    finally:
        _restore("PYTHONBREAKPOINT", debugger)
        if main:
            signal.signal(signal.SIGTERM, former)


def _restore(name: str, value: str | None) -> None:
    """Sets an environment variable, or removes it."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _warn_if_open(ray: Any) -> None:
    """Says that whoever reaches the ports of a cluster that is not private can run code on it."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return
    open_ones = {node["NodeManagerAddress"] for node in ray.nodes()} - {"127.0.0.1", "::1"}
    if open_ones:
        warnings.warn(
            f"the Ray cluster listens on {', '.join(sorted(open_ones))}, and RAY_AUTH_MODE=token is not set here: "
            "whoever reaches its ports may be able to run code on it (see docs/cluster.md)",
            stacklevel=2,
        )
