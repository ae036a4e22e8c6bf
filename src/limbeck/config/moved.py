"""Keys by the names they had before: still understood, and rewritten before anything is checked.

The one idea: one table from old to new; everything else knows the new names alone. A recipe that an earlier limbeck
saved holds every key with its default, so a default of a part that is not chosen is left out and not refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.config.base import merged
from limbeck.errors import ConfigError


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a named part that had a key of its own: `part` at `key`, and what the old key was by default."""

    key: str
    part: str
    name: str
    default: Any


#: Old dotted key -> the part's parameter that it is now.
MOVED = {
    "loss.jsd_beta": _Parameter("divergence", "jsd", "beta", 0.5),
    "loss.skew": _Parameter("divergence", "skewed_kl", "skew", 0.1),
}
#: Keys that decided nothing and are gone.
REMOVED = ("teacher.kind",)


def rewritten(tree: Mapping[str, Any], *, override: bool = False) -> dict[str, Any]:
    """The tree of keys with old names replaced; the tree that was given stays as it is.

    Args:
        tree: the keys.
        override: an old name beats its new one, because it was laid over it.

    Raises:
        ConfigError: a key is given by its old name and by its new one.
    """
    found: dict[str, Any] = dict(tree)
    for old in (*MOVED, *REMOVED):
        section, _, leaf = old.partition(".")
        if not isinstance(found.get(section), Mapping) or leaf not in found[section]:
            continue
        value = found[section][leaf]
        found[section] = {key: kept for key, kept in found[section].items() if key != leaf}
        if old not in MOVED:
            continue
        moved = MOVED[old]
        chosen = found[section].get(moved.key)
        name = chosen.get("name") if isinstance(chosen, Mapping) else chosen
        if name != moved.part and value == moved.default:
            continue
        known = chosen.get(moved.name) if isinstance(chosen, Mapping) else None
        if known not in (None, value) and not override:
            new = f"{section}.{moved.key}.{moved.name}"
            raise ConfigError(f"{old} is {value} and {new}, its present name, is {known}; remove one of them.")
        found = merged(found, {section: {moved.key: {moved.name: value}}})
    return found
