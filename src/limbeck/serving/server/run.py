"""`limbeck serve`: load, listen, answer until told to stop."""

import time
from pathlib import Path
from typing import Any

from limbeck.config.engine import EngineConfig, ServerConfig
from limbeck.console import warn
from limbeck.errors import ConfigError
from limbeck.serving.model import GgufModel
from limbeck.teachers.keys import environment_key


def serve_model(path: Path, config: ServerConfig, engine: EngineConfig) -> dict[str, Any]:
    """Serve a GGUF file; returns when stopped by SIGINT or SIGTERM, with running texts finished.

    Args:
        path: the file.
        config: where it listens, and its limits.
        engine: how the model is run.

    Raises:
        ConfigError: the extra is not installed, or the key's variable is empty.
        LimbeckError: the file cannot be loaded or the port is taken.
    """
    try:
        import uvicorn  # noqa: F401

        from limbeck.serving.server.app import ServedModel, create_chat_app
        from limbeck.teachers.server.run import LOOPBACK, listen_on, run_until_stopped, uvicorn_settings
    except ImportError as error:
        raise ConfigError(f"serving needs more packages ({error.name}): `pip install 'limbeck[serve]'`.") from None
    api_key = environment_key(config.api_key_env, "server.api_key_env")
    if api_key is None and config.host not in LOOPBACK:
        warn(f"{config.host} can be reached from other machines and no key is asked for; set --api-key-env NAME")
    bound = listen_on(config.host, config.port)  # a port that is taken shows before a long load
    url = f"http://{config.host}:{bound.getsockname()[1]}"
    model = GgufModel(path, engine)
    name = config.name or path.stem
    served = ServedModel(model, name, config, int(time.time()), engine.batch_tokens)
    facts = f"{model.engine.architecture}, {model.engine.threads} threads, context {served.context or 'without end'}"
    settings = uvicorn_settings(create_chat_app(served, api_key), config.max_connections, config.drain_seconds)
    run_until_stopped(settings, bound, f"serving {name} ({facts}) at {url}")
    return {"url": url, "model": name}
