"""The cache on disk: HDF5 shards of coded targets, written crash-safe.

The one idea: a shard is a fixed range of packed rows, so every shard can be made alone, by any rank, and
made again with the same bytes. It is written under a temporary name, fsynced and renamed; the journal
records it with its checksum; `manifest.json` comes when all shards are there.

    cache/ inputs.json  train-00000.h5 …  validation-00000.h5 …  manifest.json

Shapes: B rows, T positions a row, K support.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from limbeck.data.dataset import SHARD_FACTS, shard_facts
from limbeck.errors import LimbeckError
from limbeck.storage import commit_file, read_json, sha256_file, temporary_for, write_json
from limbeck.targets.codec import CODEC_VERSION, CodecSpec, RoundTrip, decode, encode, measure
from limbeck.targets.sparse import SparseTargets

_POSITIONS_PER_CHUNK = 1024


def write_shard(
    path: Path,
    targets: SparseTargets,
    spec: CodecSpec,
    *,
    split: str = "train",
    first_row: int = 0,
    compression: str = "gzip",
    max_kl: float = 1e-4,
) -> tuple[dict[str, Any], RoundTrip]:
    """Code targets `[B, T, ...]` into an HDF5 file; returns its record for the manifest and what coding cost.

    Args:
        path: the shard.
        targets: of rows `first_row` … of `split`.
        spec: the codec.
        split, first_row: kept in the file.
        compression: gzip or none.
        max_kl: largest cost in nats.

    Raises:
        LimbeckError: the measured round trip costs more than `max_kl` nats; nothing is left on disk.
        OSError: it can not be written.
    """
    import h5py

    rows, length = targets.token_ids.shape[:2]
    flat = targets.to("cpu").flatten()
    sections = encode(flat, spec)
    loss = measure(flat, decode(sections, spec))
    if loss.worst_kl > max_kl:
        raise LimbeckError(
            f"coding the targets costs {loss.worst_kl:.2e} nats (mean KL) and teacher.max_kl is {max_kl:.2e}. "
            "Raise teacher.top_k or teacher.max_kl, or train with teacher.use_cached_logits: false."
        )
    temporary = temporary_for(path)
    chunk = max(1, _POSITIONS_PER_CHUNK // length) * length
    options = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if compression == "gzip" else {}
    # Made in memory: HDF5 does not survive a disk that fills up under it.
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver="latest") as file:
        file.attrs[SHARD_FACTS] = json.dumps(
            {**shard_facts(split, first_row, rows, length), "codec": codec_record(spec)}, sort_keys=True
        )
        for name, value in sections.items():
            if value.size:
                chunks = (min(chunk, len(value)), *value.shape[1:])
                file.create_dataset(name, data=value, chunks=chunks, track_times=False, **options)
        file.flush()
        image = file.id.get_file_image()
    try:
        temporary.write_bytes(image)
        commit_file(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return {"file": path.name, "rows": rows, "sha256": sha256_file(path), "bytes": path.stat().st_size}, loss


def codec_record(spec: CodecSpec) -> dict[str, Any]:
    """The codec's parameters as JSON, with its version."""
    return {"version": CODEC_VERSION, **asdict(spec), "temperatures": list(spec.temperatures)}


class ShardJournal:
    """Which shards are finished; one file a writing process, merged when all are."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder, self._path = folder, folder / f".progress-{rank}.json"
        self._own: dict[str, Any] = read_json(self._path) if self._path.exists() else {}

    def add(self, record: dict[str, Any]) -> None:
        """Record a shard that is in place."""
        self._own[record["file"]] = record
        write_json(self._path, self._own)

    def finished(self) -> dict[str, dict[str, Any]]:
        """Records of all processes' shards whose files are there, by file name."""
        merged: dict[str, Any] = {}
        for path in sorted(self._folder.glob(".progress-*.json")):
            merged.update(read_json(path))
        return {name: record for name, record in merged.items() if (self._folder / name).is_file()}

    def remove(self) -> None:
        """Delete the journals, once the manifest has taken over."""
        for path in self._folder.glob(".progress-*.json"):
            path.unlink(missing_ok=True)
