"""Keys by the names they had before: still understood, and rewritten before anything is checked.

The one idea: one table from old to new; everything else knows the new names alone. A recipe that an earlier limbeck
saved holds every key with its default, so a default of a part that is not chosen is left out and not refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.config.base import merged
from limbeck.config.teacher import SHORT_NAMES
from limbeck.errors import ConfigError


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a named part that had a key of its own: `part` at `key`, and what the old key was by default."""

    key: str
    part: str
    name: str
    default: Any


#: Old dotted key -> the part's parameter that it is now.
_PARAMETERS = {
    "loss.jsd_beta": _Parameter("divergence", "jsd", "beta", 0.5),
    "loss.skew": _Parameter("divergence", "skewed_kl", "skew", 0.1),
}
#: Old dotted key -> the key that it is now; the old names stay good as short ones.
_KEYS = {
    **{f"teacher.{short}": f"teacher.{key}" for short, key in SHORT_NAMES.items()},
    "training.gradient_checkpointing": "training.activation_checkpointing",
}
#: Keys that decided nothing and are gone.
_REMOVED = ("teacher.kind",)
#: All names that are understood beside the present ones.
EARLIER = (*_PARAMETERS, *_KEYS, *_REMOVED)


def present_key(key: str) -> str:
    """The key that an earlier name stands for; any other as it is."""
    return _KEYS.get(key, key)


def rewritten(tree: Mapping[str, Any], *, override: bool = False) -> dict[str, Any]:
    """The tree of keys with old names replaced; the tree that was given stays as it is.

    Args:
        tree: the keys.
        override: an old name beats its new one, because it was laid over it.

    Raises:
        ConfigError: a key is given by its old name and by its new one.
    """
    found: dict[str, Any] = dict(tree)
    for old in EARLIER:
        section, _, leaf = old.partition(".")
        if not isinstance(found.get(section), Mapping) or leaf not in found[section]:
            continue
        value = found[section][leaf]
        found[section] = {key: kept for key, kept in found[section].items() if key != leaf}
        if old in _KEYS:
            found = _moved(found, old, _KEYS[old], value, override)
        elif old in _PARAMETERS:
            found = _made_parameter(found, old, _PARAMETERS[old], value, override)
    return found


def _moved(tree: dict[str, Any], old: str, new: str, value: Any, override: bool) -> dict[str, Any]:
    section, part, leaf = new.split(".")
    inner = tree[section].get(part)
    known = inner.get(leaf) if isinstance(inner, Mapping) else None
    if known not in (None, value) and not override:
        raise ConfigError(f"{old} is {value} and {new}, its full name, is {known}; remove one of them.")
    return dict(merged(tree, {section: {part: {leaf: value}}}))


def _made_parameter(tree: dict[str, Any], old: str, moved: _Parameter, value: Any, override: bool) -> dict[str, Any]:
    section = old.partition(".")[0]
    chosen = tree[section].get(moved.key)
    name = chosen.get("name") if isinstance(chosen, Mapping) else chosen
    if name != moved.part and value == moved.default:
        return tree
    known = chosen.get(moved.name) if isinstance(chosen, Mapping) else None
    if known not in (None, value) and not override:
        new = f"{section}.{moved.key}.{moved.name}"
        raise ConfigError(f"{old} is {value} and {new}, its present name, is {known}; remove one of them.")
    return dict(merged(tree, {section: {moved.key: {moved.name: value}}}))
