"""`limbeck teacher serve`: load, listen, answer until told to stop."""

import signal
import socket
from typing import Any

from limbeck.config import TeacherConfig
from limbeck.config.recipe import TeacherServerConfig
from limbeck.console import say, warn
from limbeck.errors import ConfigError, LimbeckError
from limbeck.teachers.keys import environment_key

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(section: TeacherConfig, config: TeacherServerConfig, device: str | None = None) -> dict[str, Any]:
    """Serve a teacher; returns when stopped by SIGINT or SIGTERM, with running requests finished.

    Args:
        section: the model and how it is run.
        config: where it listens, and its limits.
        device: where the section names none.

    Raises:
        ConfigError: the extra is not installed, or the key's variable is empty.
        LimbeckError: the model cannot be loaded or the port is taken.
    """
    try:
        import uvicorn  # noqa: F401

        from limbeck.teachers.server.app import create_app
    except ImportError as error:
        raise ConfigError(f"serving needs more packages ({error.name}): `pip install 'limbeck[serve]'`.") from None
    from limbeck.teachers.server.load import load_served

    api_key = environment_key(config.api_key_env, "teacher_server.api_key_env")
    if api_key is None and config.host not in LOOPBACK:
        warn(f"{config.host} can be reached from other machines and no key is asked for; set --api-key-env NAME")
    bound = listen_on(config.host, config.port)  # a port that is taken shows before minutes of loading
    url = f"http://{config.host}:{bound.getsockname()[1]}"
    served = load_served(section, config, device)
    app = create_app(served, config, api_key, max_batch_tokens=section.local.max_batch_tokens)
    facts = f"fingerprint {served.fingerprint[:12]}, vocabulary {served.teacher.vocab_size}"
    run_until_stopped(uvicorn_settings(app, config.max_connections), bound, f"serving {served.name} ({facts}) at {url}")
    return {"url": url, "model": served.name, "fingerprint": served.fingerprint}


def run_until_stopped(settings: Any, bound: socket.socket, ready: str) -> None:
    """Answer until SIGINT or SIGTERM, with running requests finished.

    Args:
        settings: of uvicorn.
        bound: the socket that is listened on.
        ready: what is said once it answers.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            say(ready)

    server = Server(settings)
    # uvicorn takes the signals over while it runs, and raises them again when it has stopped, which is no error.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[bound])
    say("stopped; nothing is left running")


def uvicorn_settings(app: Any, max_connections: int, graceful: float = 30.0, **clocks: float) -> Any:
    """How uvicorn runs the application: bounded connections, and warnings that cannot fill a disk.

    Args:
        app: the ASGI application.
        max_connections: at once.
        graceful: seconds that running requests have when it is stopped.
        clocks: of `connection_class`.
    """
    import logging

    import uvicorn

    from limbeck.teachers.server.connection import connection_class, once_per_second

    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=int(graceful),
        timeout_keep_alive=75, h11_max_incomplete_event_size=65536, lifespan="on",
        http=connection_class(max_connections, **clocks),
    )  # fmt: skip
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(once_per_second)
    return settings


def listen_on(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        LimbeckError: the address is taken, or none of this machine.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise LimbeckError(
            f"{host}:{port} cannot be listened on ({error.strerror}). Choose another --port (0 for a free one), or "
            "a --host of this machine."
        ) from None
    return bound
