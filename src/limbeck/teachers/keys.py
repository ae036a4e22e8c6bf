"""Keys for HTTP: they come from environment variables, and no message ever holds one."""

import os

from limbeck.errors import ConfigError


def environment_key(name: str | None, key: str) -> str | None:
    """The value of an environment variable that holds a key for HTTP.

    Raises:
        ConfigError: the variable is not set, or holds what no header can; its value is never shown.
    """
    if name is None:
        return None
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"{key} names {name}, and that variable is not set. Set it to the key, or unset {key}.")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(
            f"{key} names {name}, whose value is no key: it has spaces, line ends or characters beyond ASCII."
        )
    return value
