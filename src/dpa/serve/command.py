"""`dpa serve`: start the engine, then the gateway before it, and leave nothing behind.
Run its tests: pytest tests/test_serve.py
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dpa.core.direction_text import printable
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, DpaError
from dpa.core.reference import ModelReference
from dpa.core.targets import Wish, wish_or_center
from dpa.models.files import count_parameters, load_space, policy_name, resolve_model
from dpa.remote.http_exchange import check_address, key_of_first
from dpa.serve.settings import EngineSettings, Served, ServeSettings
from dpa.serve.supervisor import EngineProcess
from dpa.storage.seals import check_in_run

KEY_VARIABLE, UPSTREAM_KEY_VARIABLE = "DPA_API_KEY", "DPA_UPSTREAM_KEY"


def serve(settings: ServeSettings) -> None:
    """Serve until asked to stop; then finish what was accepted, and end the engines.

    Raises ConfigError, ModelFileError or DirectionError for what cannot be served, EngineError when an engine died for
    good.
    """
    if (settings.model is None) == (settings.upstream is None):
        raise ConfigError("serve: give either a MODEL folder or --upstream URL.")
    if settings.upstream is not None:
        check_address(settings.upstream, "--upstream")
    keys = read_keys(settings.api_key_file)
    if not keys and not _is_local(settings.host):
        raise ConfigError(
            f"--host: {settings.host} lets others in, so a key is needed; set {KEY_VARIABLE} or give --api-key-file."
        )
    folder = None
    if settings.model is not None:
        folder = resolve_model(ModelReference(settings.model, settings.remote_code_revision)).path
    for used in (folder, settings.base):
        if used is not None:
            check_in_run(used)
    space = load_space(_space_folder(settings, folder))
    default = wish_or_center(space, settings.direction)
    listener = _listen(settings.host, settings.port)
    failure: list[DpaError] = []
    stop: list[Callable[[], None]] = []

    def failed(error: DpaError) -> None:
        failure.append(error)
        for end in stop:
            end()

    with contextlib.ExitStack() as cleanup:
        cleanup.callback(listener.close)
        engines = _start_engines(settings, folder, failed, cleanup)
        served, server = _server(settings, keys, folder, space, default, engines)
        stop.append(server.stop)
        if failure:  # it was quicker than we were
            raise failure[0]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        threading.Thread(target=_say_ready, args=(url, served, engines.values()), daemon=True).start()
        server.run(sockets=[listener])
        if failure:
            raise failure[0]


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys of the environment's DPA_API_KEY and of a file, one a line. Raises ConfigError."""
    keys = [os.environ.get(KEY_VARIABLE, "")]
    if file is not None:
        try:
            keys += file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"--api-key-file: {file} cannot be read ({type(error).__name__}); check it.") from None
        if not any(key.strip() for key in keys[1:]):
            raise ConfigError(f"--api-key-file: {file} has no key; write one a line.")
    kept = tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
    for key in kept:
        if len(key) < 8 or not key.isascii() or not key.isprintable():
            raise ConfigError("API key: one is shorter than 8 characters or not plain ASCII; take a long random one.")
    return kept


def _space_folder(settings: ServeSettings, folder: str | None) -> str:
    """The folder whose dpa_config.json says the objectives."""
    if settings.space is not None:
        return str(settings.space.parent if settings.space.is_file() else settings.space)
    if folder is not None:
        return folder
    raise ConfigError("--space: with --upstream give the policy's folder (its dpa_config.json says the objectives).")


def _start_engines(
    settings: ServeSettings, folder: str | None, failed: Callable[[DpaError], None], cleanup: contextlib.ExitStack
) -> dict[str, EngineProcess]:
    """The child processes: policy (which scores too), base, or a scorer alone in front of a foreign engine."""
    shared = settings.model_dump(include={"rows", "threads", "remote_code_revision"})
    scoring: dict[str, Any] = {}
    if settings.reward:
        scoring = {"reward": settings.reward, "space": _space_folder(settings, folder)}
    wanted: dict[str, EngineSettings] = {}
    if folder is not None:
        wanted["policy"] = EngineSettings(**shared, **scoring, model=folder, name="policy")
    elif scoring:
        wanted["scorer"] = EngineSettings(**shared, **scoring)
    if settings.base:
        wanted["base"] = EngineSettings(**shared, model=settings.base, name="base")
    engines = {}
    for role, engine in wanted.items():
        engines[role] = EngineProcess(engine.arguments(), failed)
        cleanup.callback(engines[role].close)
    return engines


def _server(
    settings: ServeSettings,
    keys: tuple[str, ...],
    folder: str | None,
    space: DirectionSpace,
    default: Wish | None,
    children: dict[str, EngineProcess],
) -> tuple[Served, Any]:
    try:  # while the engine loads: these take a second
        import uvicorn

        from dpa.serve.connections import bounded
        from dpa.serve.front import Front, load_front
        from dpa.serve.gateway import Gateway
        from dpa.serve.http import Server
        from dpa.serve.logs import log_json
        from dpa.serve.upstream import Engines, Upstream
    except ModuleNotFoundError as error:
        raise ConfigError(f'serve: {error.name} is not installed; run pip install "dpa[serve]".') from None

    def child(role: str) -> Upstream:
        return Upstream("http://engine", socket=children[role].socket, stall_s=settings.stall_seconds)

    if settings.upstream is not None:
        key = key_of_first([UPSTREAM_KEY_VARIABLE], "--upstream")
        policy = Upstream(settings.upstream, key, stall_s=settings.stall_seconds)
        upstream_model = settings.upstream_model or _first_model(settings.upstream, key)
    else:
        policy, upstream_model = child("policy"), "policy"
    engines = Engines(
        policy=policy,
        ours="policy" in children,
        base=child("base") if "base" in children else None,
        base_model="base",
        scorer=child("policy" if "policy" in children else "scorer") if settings.reward else None,
    )
    measured = settings.space if settings.space is not None and settings.space.is_dir() else folder
    front = Front() if measured is None else load_front(Path(measured), space)
    served = Served(
        name=settings.name or _name(settings.model, upstream_model),
        upstream_model=upstream_model,
        space=space,
        default=default,
        outside="clamp" if settings.clamp else "error",
        keys=keys,
        hosts=_hosts(settings),
        limits=settings,
        log_text=settings.log_text,
        front=front.points,
        front_reward=front.reward,
        front_follows=front.follows,
        examples=front.examples,
        parameters=None if folder is None else count_parameters(Path(folder)),
    )
    gateway = Gateway(served, engines, lambda: all(one.ready.is_set() for one in children.values()))
    log_json()
    config = uvicorn.Config(
        gateway.gate,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_seconds),
        h11_max_incomplete_event_size=64_000,
        http=bounded(settings),
        ws="none",
    )

    class Draining(Server):
        def stop(self) -> None:
            gateway.gate.draining = self.should_exit = True

        def _asked_to_stop(self, number: int) -> None:
            gateway.gate.draining = True
            super()._asked_to_stop(number)

    return served, Draining(config)


def _say_ready(url: str, served: Served, engines: Iterable[EngineProcess]) -> None:
    for engine in engines:
        engine.ready.wait()
    presets = f" ({', '.join(served.space.presets)})" if served.space.presets else ""
    print(f"dpa: serving {printable(served.name)}{presets} at {url}", flush=True)


def _first_model(url: str, key: str | None) -> str:
    from dpa.serve.bodies import RefusedError
    from dpa.serve.upstream import Upstream

    async def ask() -> Any:
        upstream = Upstream(url, key)
        try:
            return await upstream.get("/v1/models")
        finally:
            await upstream.aclose()

    try:
        return str(asyncio.run(ask())["data"][0]["id"])
    except (RefusedError, KeyError, IndexError, TypeError) as error:
        said = printable(str(error))
        raise ConfigError(f"--upstream: {url} does not say what it serves ({said}); give --upstream-model.") from None


def _name(model: str | None, upstream_model: str) -> str:
    """A name clients can write: the policy's, or the last part of what the upstream calls its model."""
    return upstream_model.rstrip("/").rpartition("/")[2] if model is None else policy_name(model)


def _hosts(settings: ServeSettings) -> tuple[str, ...]:
    """Names a Host header may carry, as serve/gate.py reads it; none: any. A gateway on this machine, and one whose
    names were given, is known by these and by its own."""
    if not settings.allow_host and not _is_local(settings.host):
        return ()
    return ("localhost", "127.0.0.1", "::1", settings.host.lower(), *map(_host_name, settings.allow_host))


def _host_name(given: str) -> str:
    """The name in NAME or NAME:PORT, in lower case."""
    if given.startswith("[") or given.count(":") == 1:  # a bare IPv6 address has more colons
        with contextlib.suppress(ValueError):
            return urlsplit(f"//{given}").hostname or ""
    return given.lower()


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _listen(host: str, port: int) -> socket.socket:
    """The listening socket, so that a port in use is said before anything is loaded. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: only then does asyncio switch off Nagle's delay, which costs every answer 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"--port: {host}:{port} cannot be used ({error.strerror}); take another.") from None
    return listener
