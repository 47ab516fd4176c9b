"""The tie to one actor of a Ray cluster, whatever lives in it: how it starts, is called, dies and is ended."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

from slipstream.process import ChildDied, ChildFailed
from slipstream.ray_cluster import Cluster


class RayTie:
    """The driver's end of the tie to an actor that may be replaced.

    Args:
        cluster: Where the actor will be.
        cpus: Cores of one node that it takes.
    """

    def __init__(self, cluster: Cluster, cpus: float) -> None:
        self._cluster, self._ray, self._cpus = cluster, cluster.ray, cpus
        self._changing = Lock()  # of what other threads look at
        self._actor: Any = None
        self._open = True
        self._end, self._traceback = "", ""

    def _begin(self, kind: type[Any], *words: Any, groups: dict[str, int] | None = None, memory: int = 0) -> None:
        """Starts an actor, on a node with so many bytes; what is left of the one before has been ended.

        Raises:
            ChildDied: All have been closed.
        """
        options = {"num_cpus": self._cpus, "memory": memory, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        made = self._ray.remote(concurrency_groups=groups or {}, **options)(kind)
        if not self._open:
            raise ChildDied
        self._end = self._traceback = ""
        with self._errors():
            self._actor = made.remote(*words)

    def obituary(self) -> tuple[str, str]:
        """How it ended, or why nothing comes from it any more."""
        return self._end, self._traceback

    def stack(self) -> str:
        """What is known of why it may not answer."""
        try:
            free, all_cores = self._ray.available_resources(), self._ray.cluster_resources()
        except self._ray.exceptions.RayError:
            return "the Ray cluster does not answer"
        return f"the Ray cluster has {free.get('CPU', 0.0):g} of {all_cores.get('CPU', 0.0):g} cores free"

    def kill(self) -> None:
        """Ends it at once."""
        with self._changing:
            actor, self._actor = self._actor, None
            if actor is not None and self._ray.is_initialized():  # else Ray would start a cluster of its own
                with suppress(self._ray.exceptions.RayError, ValueError):
                    self._ray.kill(actor)

    def close(self) -> None:
        """Ends it for good; before the connection to the cluster is."""
        self._open = False
        self.kill()

    def _ask(self, method: str, *words: Any, group: str | None = None) -> Any:
        """Calls a method of the actor; where the answer will be.

        Raises:
            ChildDied: There is none.
        """
        with self._changing:
            if self._actor is None:
                self._end = self._end or "was ended"
                raise ChildDied
            call = getattr(self._actor, method)
            with self._errors():
                return (call.options(concurrency_group=group) if group else call).remote(*words)

    def _get(self, reference: Any) -> Any:
        """What the actor has said.

        Raises:
            ChildDied: It died, or its node did, or what it said was lost on the way.
            ChildFailed: It could not even begin.
        """
        with self._errors():
            try:
                return self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise ChildFailed(type(error.cause).__name__, str(error.cause), str(error)) from None

    @contextmanager
    def _errors(self) -> Generator[None]:
        """Makes `ChildDied` of what Ray raises, and keeps what it said."""
        if not self._ray.is_initialized():  # whatever it is asked, it would start a cluster of its own
            self._end = "is gone with the connection to Ray"
            raise ChildDied
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayError as error:
            said = str(error)
            how = "has died" if isinstance(error, errors.RayActorError) else "can't be understood"
            reason = said.partition("The actor is dead because ")[2] or said  # before that it names itself
            first = " ".join(reason.partition("Some common causes")[0].partition("Traceback")[0].split())
            self._end = f"{how} ({type(error).__name__}: {first})"
            self._traceback = said if "Traceback" in said else ""
            raise ChildDied from None
