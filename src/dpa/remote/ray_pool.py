"""A pool of Ray actors, on whatever node of a cluster has room. Needs `pip install "dpa[ray]"`.
Run its tests: pytest tests/test_ray.py

A stage stays one process that keeps the shards: it hands each shard to one of its samplers or scorers, and that hands
it on to an idle worker. A worker holds what a spec's `build()` makes (the object a local run would use), so the rows
are those of a local run. Model folders, files of scoring functions and the package itself must be at the same paths on
every node (a shared file system); a node whose weights differ is refused.
"""

import logging
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from dpa.core.closing import Closing
from dpa.core.errors import ConfigError, DpaError, EngineError
from dpa.core.records import score_in_full
from dpa.core.sections.cluster import ClusterConfig

MAX_DEATHS = 3
"""Deaths in a row after which a request, or the attempt to start a worker, is given up."""

_POLL_S = 0.5

log = logging.getLogger(__name__)


class Spec(Protocol):
    """What travels to a worker: picklable, and makes a Sampler or a Scorer there."""

    def build(self) -> Any:
        """Make it."""
        ...


class RayPool(Closing):
    """`size` workers that hold what `spec` makes. Whoever calls gets an idle one.

    A worker that dies (its process, or its node) is replaced where the cluster has room, and its request goes to the
    next idle worker; as long as one worker lives the work goes on. EngineError: one request ended max_deaths + 1
    workers, workers die while they start, or for `start_timeout_s` there has been no worker at all.
    """

    def __init__(self, spec: Spec, size: int, cluster: ClusterConfig, max_deaths: int = MAX_DEATHS) -> None:
        self._ray = _connect(cluster.address)
        self._spec, self._size, self._cluster, self._max_deaths = spec, size, cluster, max_deaths
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._actors: list[Any] = []
        self._description: tuple[str, ...] | None = None
        self._busy = self._failed_starts = 0
        self._last_seen = time.monotonic()
        self._closed = False
        for _ in range(size):
            self._start()

    def call(self, method: str, *arguments: Any) -> Any:
        """The answer of `method` of the object in some worker. Raises what it raises on purpose, and EngineError."""
        for _ in range(self._max_deaths + 1):
            actor = self._take()
            try:
                answer = self._ray.get(actor.call.remote(method, arguments))
            except self._ray.exceptions.RayError as error:
                last = error
                with self._lock:
                    self._busy -= 1
                self._replace(actor)
                continue
            with self._lock:
                self._busy -= 1
                self._last_seen = time.monotonic()
            self._idle.put(actor)
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise EngineError(
            f"ray: a request ended {self._max_deaths + 1} workers in a row ({_first_line(last)}); look for memory or "
            "driver trouble, or lower rollout.batch_size."
        )

    def describe(self) -> tuple[str, ...]:
        """(revision, *attributes) of what the workers hold; waits for the first."""
        actor = self._take()
        with self._lock:
            self._busy -= 1
        self._idle.put(actor)
        assert self._description is not None
        return self._description

    def close(self) -> None:
        """End the workers."""
        self._closed = True
        for actor in self._actors:
            self._ray.kill(actor)

    def _start(self) -> None:
        options = {"num_cpus": self._cluster.cpus_per_worker, "num_gpus": self._cluster.gpus_per_worker}
        cards = self._cluster.gpus_per_worker > 0
        actor = self._ray.remote(_Worker).options(**options).remote(self._spec, str(Path.cwd()), cards)
        self._actors.append(actor)
        threading.Thread(target=self._await_start, args=(actor,), daemon=True).start()

    def _await_start(self, actor: Any) -> None:
        try:
            description = self._ray.get(actor.describe.remote())
        except self._ray.exceptions.RayError as error:
            with self._lock:
                self._failed_starts += 1
                given_up = self._failed_starts > self._max_deaths * self._size
            if given_up:
                self._idle.put(
                    EngineError(f"ray: workers die while they start ({_first_line(error)}); see Ray's logs.")
                )
            else:
                self._replace(actor)
            return
        if not isinstance(description, Exception):
            with self._lock:
                self._failed_starts = 0
                self._last_seen = time.monotonic()
                self._description = self._description or description
                if description != self._description:
                    description = EngineError(
                        f"ray: two workers hold different models ({description[0]}, {self._description[0]}); put "
                        "models and scoring functions on storage that every node shares."
                    )
        self._idle.put(description if isinstance(description, Exception) else actor)

    def _replace(self, actor: Any) -> None:
        if self._closed or not self._ray.is_initialized():  # any call would start a cluster of its own
            return
        self._actors.remove(actor)
        log.warning("ray: a worker died; its work goes to another one, and a new worker is asked for.")
        self._ray.kill(actor)
        self._start()

    def _take(self) -> Any:
        """An idle worker. Raises what went wrong while one was started, or EngineError when none comes."""
        while True:
            try:
                actor = self._idle.get(timeout=_POLL_S)
            except queue.Empty:
                with self._lock:
                    waited = 0.0 if self._busy else time.monotonic() - self._last_seen
                if waited > self._cluster.start_timeout_s:
                    raise EngineError(
                        f"ray: no worker for {waited:.0f} s; each needs {self._cluster.cpus_per_worker:g} CPUs and "
                        f"{self._cluster.gpus_per_worker:g} GPUs, and the cluster has {_resources(self._ray)}; start "
                        "more nodes, or lower cluster.cpus_per_worker or rollout.workers."
                    ) from None
                continue
            if isinstance(actor, Exception):
                self._idle.put(actor)  # for the other threads too
                raise actor
            with self._lock:
                self._busy += 1
                self._last_seen = time.monotonic()
            return actor


def threads_of(cluster: ClusterConfig) -> int:
    """Threads of torch in a worker: as many as the CPUs that are set aside for it."""
    return max(1, int(cluster.cpus_per_worker))


class _Worker:
    """The actor. What its object raises comes back as an answer: only a death looks like one."""

    def __init__(self, spec: Spec, folder: str, cards: bool) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        if not cards:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what it was not given it must not take
        self._spec = spec
        self._built: Any = None

    def describe(self) -> Any:
        """(revision, *attributes), or the error that building met."""
        return self._try(lambda built: (built.revision, *getattr(built, "attributes", ())))

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """The method's answer, or its error; `score_in_full` is asked of any scorer."""
        if method == "score_in_full":
            return self._try(lambda built: score_in_full(built, *arguments))
        return self._try(lambda built: getattr(built, method)(*arguments))

    def _try(self, ask: Any) -> Any:
        try:
            self._built = self._built or self._spec.build()
            return ask(self._built)
        except DpaError as error:
            return error
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            if type(error).__name__ == "AcceleratorError":  # torch's: the card's state is lost
                os._exit(1)  # the pool starts another process
            return RuntimeError(f"{type(error).__name__}: {error}")  # any class may not survive the journey


def _connect(address: str | None) -> Any:
    """The ray module, connected. Raises ConfigError."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home
        import ray
    except ImportError:
        raise ConfigError('cluster.engine: ray is not installed; run pip install "dpa[ray]".') from None
    if not ray.is_initialized():
        _check_reachable(address)
        joining = address or "RAY_ADDRESS" in os.environ
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if joining else False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_cluster(address, error) from None
    return ray


def _check_reachable(address: str | None) -> None:
    """Ray itself tries an address where nobody listens for minutes, and then ends the process. Raises ConfigError."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # `auto`, or none
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str | None, error: BaseException) -> ConfigError:
    return ConfigError(
        f"cluster.address: no Ray cluster answers at {address} ({_first_line(error)}); start one with "
        "`ray start --head`, or leave the address out."
    )


def _resources(ray: Any) -> str:
    total = ray.cluster_resources()
    return f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
