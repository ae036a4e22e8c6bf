"""Whether a cache that is there answers a request it was not made for, and what is missing where it does not.

The one idea: a cache holds K ids, normalisers at some temperatures, and some rows; whoever wants fewer of each is
answered exactly, because the normalisers are over the whole vocabulary. What else it was made from must be what is
wanted.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.data.dataset import PackedDataset
from limbeck.errors import LimbeckError
from limbeck.folders import StageFolder
from limbeck.manifests import CacheManifest

#: Inputs of a cache that say how it lies on disk, and nothing of what is in it.
_STORAGE = {"rows_per_shard", "compression"}
_NARROWED = {"splits", "temperatures", "top_k", "train_rows"}
_NAMES = {"packed": "the packed rows", "dtype": "teacher.dtype", "attention": "dataset.attention",
          "sampling": "teacher.sampling", "teacher": "the teacher"}  # fmt: skip


def lacks(held: Mapping[str, Any], wanted: Mapping[str, Any], rows: PackedDataset) -> list[str]:
    """What a cache lacks to answer a request; nothing when it answers it.

    Args:
        held: the inputs it was made from.
        wanted: those that a cache for this run would be made from.
        rows: the run's packed training rows, all of them.
    """
    missing = [
        f"it is of {_NAMES.get(key, key)} {_short_name(held.get(key))} and this run has {_short_name(value)}"
        for key, value in wanted.items()
        if key not in _STORAGE | _NARROWED and held.get(key) != value
    ]
    if "packed" in held and held["packed"] == wanted["packed"]:
        missing += _too_little(held, wanted, rows)
    return missing


def _too_little(held: Mapping[str, Any], wanted: Mapping[str, Any], rows: PackedDataset) -> Iterator[str]:
    if absent := sorted(set(wanted["splits"]) - set(held.get("splits", []))):
        yield f"it has no targets of the {', '.join(absent)} rows (teacher.splits)"
    if absent := sorted(set(wanted["temperatures"]) - set(held.get("temperatures", []))):
        there = _listed(held.get("temperatures", []))
        yield f"it has no normaliser at temperature {_listed(absent)} (it has {there})"
    kept, asked = held.get("top_k"), wanted["top_k"]
    if kept is not None and (asked is None or asked > kept) and wanted.get("sampling") is None:
        yield f"it keeps {kept} ids a position and teacher.top_k is {asked or 'null, all of them'}"
    if held.get("train_rows") is not None and held["train_rows"] != wanted["train_rows"]:
        stored, read = (set(rows.places(_count(rows, inputs)).tolist()) for inputs in (held, wanted))
        if read - stored:
            absent_rows = len(read - stored)
            yield f"it has {len(stored):,} evenly spaced rows, and {absent_rows:,} of this run's are not among them"


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _count(rows: PackedDataset, inputs: Mapping[str, Any]) -> int:
    return min(inputs["train_rows"] or len(rows), len(rows))


def answering(folder: Path, wanted: Mapping[str, Any], rows: PackedDataset) -> dict[str, Any] | None:
    """The inputs of a finished cache that answers the request; None when this one does not."""
    try:
        CacheManifest.read(folder)
        held = StageFolder(folder, CacheManifest.command, {}).recorded_inputs()
    except (LimbeckError, OSError):  # unfinished, damaged, or just being moved
        return None
    return held if held and not lacks(held, wanted, rows) else None


def cost(wanted: Mapping[str, Any], held: CacheManifest | None, rows: int, length: int) -> str:
    """What making a cache takes: positions of the teacher, and room.

    Args:
        wanted: the inputs it would be made from.
        held: a cache of the same kind, whose size is known.
        rows: rows of all its splits.
        length: tokens in a row.
    """
    text = f"the teacher runs over {rows:,} rows of {length} tokens"
    if held is not None and wanted["top_k"] is not None and held.codec.get("top_k"):
        size = held.bytes_per_position * wanted["top_k"] / held.codec["top_k"] * rows * length
        text += f", about {size / 1e6:,.1f} MB"
    return text


def _short_name(value: Any) -> str:
    text = str(next(iter(value.values()), None) if isinstance(value, Mapping) else value)
    return text if len(text) <= 24 else text[:12]
