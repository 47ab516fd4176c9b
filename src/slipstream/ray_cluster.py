"""The driver's connection to a Ray cluster: one that runs already, or a private one on this machine.

A private cluster listens on the loopback interface only, wants a token that only this process and its children know,
and has no dashboard. It lives in a process group of its own (`main` here), which the kernel ends with the driver.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import tempfile
import threading
import warnings
import weakref
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from slipstream import process

_PREFIX, _LOCK = "slipray-", "slipstream.lock"
_SHORT = "/tmp"  # where the usual place has too long a name
_LONGEST = 107 - len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")  # of a folder's name
_ANSWER_SECONDS = 5.0  # for a cluster to take a connection
_LOOK_SECONDS = 5.0  # between two looks at an object store
_FAREWELL_SECONDS = 1.0  # for the thread that looks
_SMALLEST_STORE = 128 << 20  # bytes; Ray wants 75 MiB at least
_PRIVATE = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # has Ray take the loopback interface, on Linux too
    "RAY_USAGE_STATS_ENABLED": "0",
}


_taken = threading.Lock()  # by the one `Cluster` that has connected this process


class ClusterError(ConnectionError):
    """A cluster can't be started or joined."""


class ObjectStore(NamedTuple):
    """That of a node.

    Attributes:
        used: Bytes that objects take.
        size: Bytes that there are.
        spilled: Bytes that have gone to the disk so far, since there was no room.
    """

    used: int
    size: int
    spilled: int


class Cluster:
    """The connection of this process to a Ray cluster, of which it can have one at a time.

    Args:
        address: Of a cluster (`auto`, `host:port`), or "" for a private one. A connection that the process has already
            is used as it is, and kept.
        cpus: Of a private cluster.
        store: Bytes that are to lie in the object store of a private cluster at the same time.

    Attributes:
        ray: The library.
        private: Whether the cluster was started for this.

    Raises:
        ImportError: Ray is not installed.
        ClusterError: There is no such cluster, none can be started, or another of this process has one.
    """

    def __init__(self, address: str, cpus: int, store: int) -> None:
        if address.startswith("ray://"):
            raise ClusterError(
                f"placement.address={address}: Ray's client is not supported; run the command on a node of the "
                "cluster, with --placement.address auto"
            )
        with ExitStack() as undo:
            self.ray = ray = _ray()
            self.private = not address and not ray.is_initialized()
            if ray.is_initialized() and not _taken.locked():
                _warn_if_other(ray, address)
            else:
                if not _taken.acquire(blocking=False):
                    raise ClusterError("this program trains on a Ray cluster already: close that run first")
                undo.callback(_taken.release)
                undo.enter_context(_kept_variables("RAY_AUTH_MODE", "PYTHONBREAKPOINT"))
                if not address:
                    undo.enter_context(_privacy(ray))
                    address = undo.enter_context(_private_cluster(cpus, store))
                undo.callback(ray.shutdown)
                _connect(ray, address)
            _warn_if_open(ray)
            self._look = _Look(ray)
            undo.callback(self._look.close)
            self._finalizer = weakref.finalize(self, undo.pop_all().close)

    @property
    def cores(self) -> int:
        """That all its nodes have."""
        return int(self.ray.cluster_resources().get("CPU", 0))

    def object_store(self) -> ObjectStore | None:
        """That of this node as it was some seconds ago; None if its raylet has not said."""
        return self._look.found

    def close(self) -> None:
        """Leaves the cluster, and ends it if it is private; the second call does nothing."""
        self._finalizer()


def node() -> str:
    """Which node of the cluster this process is on."""
    return _ray().get_runtime_context().get_node_id()


def address() -> str:
    """The address of this node, as the others know it."""
    return str(_ray().util.get_node_ip_address())


class _Look:
    """A thread that looks at the object store of this node every few seconds: its raylet may take long to answer.

    Args:
        ray: The library, connected.

    Attributes:
        found: What it has seen last.
    """

    def __init__(self, ray: Any) -> None:
        self._ray, self._over = ray, threading.Event()
        self.found: ObjectStore | None = None
        self._thread = threading.Thread(target=self._watch, name="slipstream-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, or leaves it to its last question."""
        self._over.set()
        self._thread.join(_FAREWELL_SECONDS)

    def _watch(self) -> None:
        while True:
            try:
                self.found = self._ask()
            except Exception:  # noqa: BLE001 - Ray's, gRPC's, or that of a cluster that is gone: a metric ends no run
                self.found = None
            if self._over.wait(_LOOK_SECONDS):
                return

    def _ask(self) -> ObjectStore:
        internal = importlib.import_module("ray._private.internal_api")
        (here,) = (each for each in self._ray.nodes() if each["NodeID"] == node())
        told = internal.node_stats(here["NodeManagerAddress"], here["NodeManagerPort"], include_memory_info=False)
        store = told.store_stats
        return ObjectStore(store.object_store_bytes_used, store.object_store_bytes_avail, store.spilled_bytes_total)


def _connect(ray: Any, address: str) -> None:
    """Connects this process, and undoes what Ray makes of SIGTERM, which is the run's to handle."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _require_answer(ray, address)
        ray.init(address=address, namespace="slipstream", logging_level="WARNING")
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = "" if error.__cause__ is None else f" ({error.__cause__})"
        raise ClusterError(
            f"the Ray cluster at {address} can't be joined: {error}{reason}. The command has to run on a node of it "
            "(`ray start` makes this machine one), with the cluster's token and versions; without "
            "--placement.address a run has a cluster of its own"
        ) from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)


def _require_answer(ray: Any, address: str) -> None:
    """Refuses a cluster where nobody takes a connection, which Ray would try for minutes.

    Raises:
        ValueError: It is no address.
        ConnectionError: There is nobody.
    """
    services = ray._private.services
    found = services.canonicalize_bootstrap_address(address)
    if found is None:
        raise ValueError("it is no address; expected auto or host:port")
    host, port = services.extract_ip_port(found)
    try:
        socket.create_connection((host, port), _ANSWER_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"nobody answers at {host}:{port}, {error.strerror or error}") from None


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
    folder = _folder()
    while (lock := _lock(folder)) is None:  # another driver has swept in between
        folder = _folder()
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
        os.close(lock)


def _answer(head: process.Child) -> str:
    """The address of the cluster, when it has started."""
    (fd,) = head.answers
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        if not poll.poll(1000.0 * process.START_SECONDS):
            raise ClusterError(f"Ray has not started within {process.START_SECONDS:g} seconds\n\n{head.stack_now()}")
        return head.read(fd).decode()
    except process.ChildDied:
        raise ClusterError(f"the process that starts Ray {head.obituary()[0]}") from None
    except process.ChildFailed as error:
        raise ClusterError(f"{error}\n\n{error.traceback}") from None


def main(fds: process.Descriptors) -> None:
    """Entry point of the process that has a private cluster, until the driver closes its pipe."""
    if process.answer(fds.answers[0], partial(_head, json.loads(process.read_file(fds.setup)))):
        with open(fds.commands, "rb") as commands:
            commands.read()
        _ray().shutdown()
    process.leave()


def _head(options: dict[str, Any]) -> bytes:
    """Starts the cluster; tells its address."""
    return _ray().init(address="local", **options).address_info["address"].encode()


def _folder() -> Path:
    """A new folder for sockets and logs of a cluster, of a name that is short enough for sockets."""
    found = tempfile.mkdtemp(prefix=_PREFIX)
    if len(found) <= _LONGEST or not os.path.isdir(_SHORT):
        return Path(found)
    os.rmdir(found)
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_SHORT))


def _lock(folder: Path) -> int | None:
    """Marks a folder as in use for as long as this process lives; None if it is already."""
    file = -1
    try:
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_ino == os.lstat(folder / _LOCK).st_ino:
            return file
    except OSError:
        pass
    if file >= 0:
        os.close(file)
    return None


def _sweep() -> None:
    """Removes what private clusters of drivers that were killed have left in the file system: logs, mostly."""
    for place in {tempfile.gettempdir(), _SHORT}:
        for folder in Path(place).glob(f"{_PREFIX}*"):
            with suppress(OSError):  # another one sweeps, too
                if (folder / _LOCK).lstat().st_uid == os.getuid() and (lock := _lock(folder)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)


@contextmanager
def _privacy(ray: Any) -> Generator[None]:
    """Has Ray take the loopback interface and our token for a while, here and in processes that are started.

    It looks at the environment when it is imported, which may be long ago, so that it has to be told to look again.
    """
    constants = ray._private.ray_constants
    clusters = constants.ENABLE_RAY_CLUSTER
    try:
        with _kept_variables(*_PRIVATE):
            os.environ.update(_PRIVATE)
            constants.ENABLE_RAY_CLUSTER = False
            _look_again(ray)
            yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        _look_again(ray)


def _look_again(ray: Any) -> None:
    """Has Ray read mode and token of its authentication from the environment."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _kept_variables(*names: str) -> Generator[None]:
    """Gives environment variables back what they were; Ray sets some."""
    former = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _warn_if_other(ray: Any, address: str) -> None:
    """Says that an address is not looked at, since the program has connected itself to a cluster before."""
    here = ray.get_runtime_context().gcs_address
    if address not in ("", "auto", here):
        warnings.warn(
            f"this program is connected to the Ray cluster at {here}, which is used, not placement.address={address}",
            stacklevel=2,
        )


def _warn_if_open(ray: Any) -> None:
    """Says that whoever reaches the ports of a cluster that wants no token can run code on it."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return
    open_ones = {each["NodeManagerAddress"] for each in ray.nodes()} - {"127.0.0.1", "::1"}
    if open_ones:
        warnings.warn(
            f"the Ray cluster listens on {', '.join(sorted(open_ones))}, and RAY_AUTH_MODE=token is not set here: "
            "whoever reaches its ports may be able to run code on it (see docs/cluster.md)",
            stacklevel=2,
        )
