"""`dpa serve`: start the engine, then the gateway before it, and leave nothing behind.
Run its tests: pytest tests/test_serve.py
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpa.core.directions import Direction, DirectionSpace
from dpa.core.errors import ConfigError, DpaError, ModelFileError
from dpa.core.reference import ModelReference
from dpa.models.files import load_space, resolve_model
from dpa.serve.settings import Limits, Settings
from dpa.serve.supervisor import EngineProcess
from dpa.storage.seals import check_in_run

NO_DIRECTION = "none"
"""`--direction none`: a request that states no direction is asked under none."""
KEY_VARIABLE, UPSTREAM_KEY_VARIABLE = "DPA_API_KEY", "DPA_UPSTREAM_KEY"


@dataclass(frozen=True)
class Options:
    """The command line of `dpa serve`; cli/commands.py documents each."""

    model: str | None = None
    upstream: str | None = None
    upstream_model: str | None = None
    space: Path | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    allow_hosts: tuple[str, ...] = ()
    key_file: Path | None = None
    direction: str | None = None
    clamp: bool = False
    reward: str | None = None
    base: str | None = None
    rows: int = 32
    threads: int | None = None
    remote_code_revision: str | None = None
    log_text: bool = False
    limits: Limits = field(default_factory=Limits)


def serve(options: Options) -> None:
    """Serve until asked to stop; then finish what was accepted, and end the engines.

    Raises ConfigError, ModelFileError or DirectionError for what cannot be served, EngineError when an engine died for
    good.
    """
    if (options.model is None) == (options.upstream is None):
        raise ConfigError("serve: give either a MODEL folder or --upstream URL.")
    keys = read_keys(options.key_file)
    if not keys and not _is_local(options.host):
        raise ConfigError(
            f"--host: {options.host} lets others in, so a key is needed; set {KEY_VARIABLE} or give --api-key-file."
        )
    folder = None
    if options.model is not None:
        folder = resolve_model(ModelReference(options.model, options.remote_code_revision)).path
    for used in (folder, options.reward, options.base):
        if used is not None:
            check_in_run(used)
    space = _space(options, folder)
    default = _default_direction(options.direction, space)
    if options.reward:
        _check_attributes(options.reward, space)
    listener = _listen(options.host, options.port)
    failure: list[DpaError] = []
    stop: list[Callable[[], None]] = []

    def failed(error: DpaError) -> None:
        failure.append(error)
        for end in stop:
            end()

    with contextlib.ExitStack() as cleanup:
        cleanup.callback(listener.close)
        engines = _start_engines(options, folder, failed, cleanup)
        gateway, server = _gateway(options, keys, folder, space, default, engines)
        stop.append(server.stop)
        if failure:  # it was quicker than we were
            raise failure[0]
        url = f"http://{_shown(options.host)}:{listener.getsockname()[1]}"
        threading.Thread(target=_say_ready, args=(url, gateway, engines.values()), daemon=True).start()
        server.run(sockets=[listener])
        if failure:
            raise failure[0]


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys of the environment's DPA_API_KEY and of a file, one a line. Raises ConfigError."""
    keys = [os.environ.get(KEY_VARIABLE, "")]
    if file is not None:
        try:
            keys += file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"--api-key-file: {file} cannot be read ({type(error).__name__}); check it.") from None
        if not any(key.strip() for key in keys[1:]):
            raise ConfigError(f"--api-key-file: {file} has no key; write one a line.")
    kept = tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
    for key in kept:
        if len(key) < 8 or not key.isascii() or not key.isprintable():
            raise ConfigError("API key: one is shorter than 8 characters or not plain ASCII; take a long random one.")
    return kept


def _space(options: Options, folder: str | None) -> DirectionSpace:
    if options.space is not None:
        place = options.space.parent if options.space.is_file() else options.space
        return load_space(place)
    if folder is not None:
        return load_space(folder)
    raise ConfigError("--space: with --upstream give the policy's folder (its dpa_config.json says the objectives).")


def _start_engines(
    options: Options, folder: str | None, failed: Callable[[DpaError], None], cleanup: contextlib.ExitStack
) -> dict[str, EngineProcess]:
    """The child processes: policy (which scores too), base, or a scorer alone in front of a foreign engine."""
    common = ["--rows", str(options.rows)]
    if options.threads:
        common += ["--threads", str(options.threads)]
    if options.remote_code_revision:
        common += ["--remote-code-revision", options.remote_code_revision]
    reward = ["--reward", options.reward] if options.reward else []
    wanted: dict[str, list[str]] = {}
    if folder is not None:
        wanted["policy"] = ["--model", folder, "--name", "policy", *reward, *common]
    elif reward:
        wanted["scorer"] = [*reward, *common]
    if options.base:
        wanted["base"] = ["--model", options.base, "--name", "base", *common]
    engines = {}
    for role, arguments in wanted.items():
        engines[role] = EngineProcess(arguments, failed)
        cleanup.callback(engines[role].close)
    return engines


def _default_direction(text: str | None, space: DirectionSpace) -> Direction | None:
    """The direction of requests that state none: the center of the cone, unless told otherwise.

    A policy was trained on stated directions only, and answers badly where none is (docs/findings.md).
    """
    if text == NO_DIRECTION:
        return None
    return space.direction(space.center) if text is None else space.parse(text)


def _gateway(
    options: Options,
    keys: tuple[str, ...],
    folder: str | None,
    space: DirectionSpace,
    default: Any,
    children: dict[str, EngineProcess],
) -> tuple[Any, Any]:
    try:  # while the engine loads: these take a second
        import uvicorn

        from dpa.serve.connections import bounded
        from dpa.serve.front import load_examples, load_front
        from dpa.serve.gate import log_json
        from dpa.serve.gateway import Engines, Gateway
        from dpa.serve.http import Server
        from dpa.serve.upstream import Upstream
    except ModuleNotFoundError as error:
        raise ConfigError(f'serve: {error.name} is not installed; run pip install "dpa[serve]".') from None

    limits = options.limits

    def child(role: str) -> Upstream:
        return Upstream("http://engine", socket=children[role].socket, stall_s=limits.stall_seconds)

    if options.upstream is not None:
        key = os.environ.get(UPSTREAM_KEY_VARIABLE)
        policy = Upstream(options.upstream, key, stall_s=limits.stall_seconds)
        upstream_model = options.upstream_model or _first_model(options.upstream, key)
    else:
        policy, upstream_model = child("policy"), "policy"
    scorer = child("policy") if "policy" in children and options.reward else None
    if "scorer" in children:
        scorer = child("scorer")
    engines = Engines(
        policy=policy,
        ours="policy" in children,
        base=child("base") if "base" in children else None,
        base_model="base",
        scorer=scorer,
    )
    measured = options.space if options.space is not None and options.space.is_dir() else folder
    front, reward = load_front(Path(measured), space) if measured is not None else (None, None)
    settings = Settings(
        name=options.name or _name(folder, upstream_model),
        upstream_model=upstream_model,
        space=space,
        default=default,
        outside=_outside(options.clamp),
        keys=keys,
        hosts=_hosts(options),
        limits=limits,
        log_text=options.log_text,
        front=front,
        front_reward=reward,
        examples=tuple(load_examples(Path(measured))) if measured is not None else (),
    )
    gateway = Gateway(settings, engines, lambda: all(one.ready.is_set() for one in children.values()))
    log_json()
    config = uvicorn.Config(
        gateway.gate,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.drain_seconds),
        h11_max_incomplete_event_size=64_000,
        http=bounded(limits),
        ws="none",
    )

    class Draining(Server):
        def stop(self) -> None:
            gateway.gate.draining = self.should_exit = True

        def _asked_to_stop(self, number: int) -> None:
            gateway.gate.draining = True
            super()._asked_to_stop(number)

    return gateway, Draining(config)


def _say_ready(url: str, gateway: Any, engines: Any) -> None:
    for engine in engines:
        engine.ready.wait()
    settings = gateway._settings
    presets = f" ({', '.join(settings.space.presets)})" if settings.space.presets else ""
    print(f"dpa: serving {settings.name}{presets} at {url}", flush=True)


def _check_attributes(reward: str, space: DirectionSpace) -> None:
    """Refuse a reward model that does not rate what the objectives are made of, before anything waits for it."""
    import json

    file = Path(reward) / "dpa_reward.json"
    try:
        attributes = json.loads(file.read_text(encoding="utf-8"))["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelFileError(
            f"--reward: {reward} has no readable dpa_reward.json; give a reward model folder."
        ) from None
    space.combine(np.zeros((1, len(attributes))), attributes)


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
        raise ConfigError(f"--upstream: {url} does not say what it serves ({error}); give --upstream-model.") from None


def _name(folder: str | None, upstream_model: str) -> str:
    """A name clients can write: the folder's; of a `policy` in a run folder, the run's and the iteration's number."""
    if folder is None:
        return upstream_model.rstrip("/").rpartition("/")[2]
    path = Path(folder).resolve()
    if path.name == "policy" and path.parent.name.startswith("iter_"):
        return f"{path.parents[1].name}-{path.parent.name.removeprefix('iter_')}"
    return path.name


def _outside(clamp: bool) -> Literal["error", "clamp"]:
    return "clamp" if clamp else "error"


def _hosts(options: Options) -> tuple[str, ...]:
    """On this machine only its own names are answered to; beyond it, those that were given, or any."""
    if not _is_local(options.host):
        return options.allow_hosts
    return ("localhost", "127.0.0.1", "::1", options.host, *options.allow_hosts)


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


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
