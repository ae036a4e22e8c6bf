"""Keys by the names they had before: still understood, and rewritten before anything is checked.

The one idea: one table from old to new; everything else knows the new names alone.
"""

from collections.abc import Mapping
from typing import Any

from limbeck.config.base import merged
from limbeck.errors import ConfigError

#: Old dotted key -> new one.
MOVED = {
    "loss.jsd_beta": "loss.divergence.beta",
    "loss.skew": "loss.divergence.skew",
}


def rewritten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of keys with old names replaced; the tree that was given stays as it is.

    Raises:
        ConfigError: a key is given by its old name and by its new one.
    """
    found: dict[str, Any] = dict(tree)
    for old, new in MOVED.items():
        section, _, leaf = old.partition(".")
        if not isinstance(found.get(section), Mapping) or leaf not in found[section]:
            continue
        path, value = new.split("."), found[section][leaf]
        found[section] = {key: kept for key, kept in found[section].items() if key != leaf}
        known: Any = found
        for part in path:
            known = known.get(part) if isinstance(known, Mapping) else None
        if known is not None and known != value:
            raise ConfigError(f"{old} is {value} and {new}, its present name, is {known}; remove one of them.")
        for part in reversed(path):
            value = {part: value}
        found = merged(found, value)
    return found
