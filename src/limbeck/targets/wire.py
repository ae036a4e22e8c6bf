"""Targets on the wire: what limbeck's server answers, `application/x-limbeck-targets`.

The one idea: sorted ids in Elias–Fano form, log-probabilities split into byte planes (so that zstd, when the
connection has it, sees the repetitive bytes together): float32 with log Z as float32, or float16 with the tail's mass
as a float16 logit, from which head and log Z follow as in the cache's codec, so that a small tail is not lost in the
head's rounding. All sizes follow from a fixed header, which names the request that is answered, and a checksum covers
header and payload. docs/formats.md gives the layout to the byte.

Shapes: B rows, T positions, N = B·T, K support, V vocabulary, n_tau temperatures.
"""

import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from limbeck.errors import CorruptError
from limbeck.targets.codec import normalise, tail_logits
from limbeck.targets.elias_fano import Array, IdLayout, decode_ids, encode_ids
from limbeck.targets.sparse import PAD_ID, SparseTargets

MEDIA_TYPE = "application/x-limbeck-targets"
VERSION = 2
_MAGIC = b"LIMBECK\0"
#: magic, version, flags, n_tau, reserved, B, T, K, V, sampling temperature, fingerprint, request, payload bytes, CRC-32
_HEADER = struct.Struct("<8sHHHHIIIIf16s16sQI")
_FULL, _VARIABLE, _WEIGHTS = 1, 2, 4  # flags: float32 log-probabilities; K varies; weights of sampled tails
_LIMIT = 1 << 31  # no header makes us allocate more


@dataclass(frozen=True)
class WireTargets:
    """A decoded reply.

    Attributes:
        targets: `[B, T, K]`, the likeliest id first.
        fingerprint: first 16 bytes (hex) of the fingerprint of the model that made them.
        request: first 16 bytes (hex) of the hash of the request that they answer.
    """

    targets: SparseTargets
    fingerprint: str
    request: str


def request_hash(body: bytes) -> str:
    """The hash (hex) by which an answer names its request: of the body's bytes as they were sent."""
    return hashlib.sha256(body).hexdigest()


def encode_targets(targets: SparseTargets, *, full: bool, fingerprint: str, request: str) -> bytes:
    """Targets `[B, T, K]` as bytes.

    Args:
        targets: leading shape [B, T].
        full: log-probabilities as float32 instead of float16.
        fingerprint: of the model, hex, at least 32 digits.
        request: `request_hash` of the request, hex, at least 32 digits.
    """
    rows, length, top_k = targets.token_ids.shape
    flat = targets.to("cpu").flatten()
    ids = flat.token_ids.numpy()
    unused = ids < 0
    variable, weights = bool(unused.any()), flat.weights
    order = np.argsort(np.where(unused, np.iinfo(np.int32).max, ids), axis=1, kind="stable")
    kind = np.dtype("<f4") if full else np.dtype("<f2")
    logprobs = np.take_along_axis(flat.logprobs.numpy(), order, 1)
    if variable:
        logprobs = np.where(np.take_along_axis(unused, order, 1), 0.0, logprobs)
    sorted_ids = np.where(unused, targets.vocab_size - 1, ids)
    sections: list[bytes] = []
    if variable:
        sections.append((top_k - unused.sum(axis=1)).astype("<u2").tobytes())
    coded = encode_ids(np.take_along_axis(sorted_ids, order, 1).astype(np.uint32), IdLayout(top_k, targets.vocab_size))
    sections += [coded[name].tobytes() for name in ("low", "bits", "high")]
    sections.append(_planes(logprobs.astype(kind)))
    sections.append((flat.log_z.numpy().astype("<f4") if full else tail_logits(flat).astype("<f2")).tobytes())
    if weights is not None:
        sections.append(_planes(np.take_along_axis(weights.numpy(), order, 1).astype("<f4")))
    payload = struct.pack(f"<{len(targets.temperatures)}d", *targets.temperatures) + b"".join(sections)
    flags = _FULL * full | _VARIABLE * variable | _WEIGHTS * (weights is not None)
    fields = (
        _MAGIC, VERSION, flags, len(targets.temperatures), 0, rows, length, top_k, targets.vocab_size,
        math.nan if targets.sampling_temperature is None else targets.sampling_temperature,
        bytes.fromhex(fingerprint[:32]), bytes.fromhex(request[:32]), len(payload),
    )  # fmt: skip
    header = _HEADER.pack(*fields, 0)
    return _HEADER.pack(*fields, zlib.crc32(payload, zlib.crc32(header))) + payload


def decode_targets(data: bytes) -> WireTargets:
    """The inverse of `encode_targets`; float16 values come back as float32, moved to the exact mass of their row.

    Raises:
        CorruptError: not our format or version, cut off, altered, or sizes that do not agree.
    """
    if len(data) < _HEADER.size or data[:8] != _MAGIC:
        raise CorruptError(f"{len(data)} bytes that do not begin as {MEDIA_TYPE} does")
    *fields, checksum = _HEADER.unpack_from(data)
    _, version, flags, n_tau, _, rows, length, top_k, vocab_size, sampled_at, fingerprint, request, size = fields
    if version != VERSION:
        raise CorruptError(f"version {version} of {MEDIA_TYPE}, and this limbeck reads version {VERSION}")
    if len(data) != _HEADER.size + size:
        raise CorruptError(f"{len(data)} bytes of {_HEADER.size + size}")
    if zlib.crc32(memoryview(data)[_HEADER.size :], zlib.crc32(_HEADER.pack(*fields, 0))) != checksum:
        raise CorruptError("the checksum is wrong: the reply was altered on its way")
    count = rows * length
    sizes = _sizes(flags, n_tau, count, top_k, vocab_size)
    if size != sum(sizes):
        raise CorruptError(f"{size} bytes of payload for {count} positions of K {top_k}, expected {sum(sizes)}")
    parts = _cut_tensors(memoryview(data)[_HEADER.size :], sizes)
    temperatures = tuple(float(t) for t in np.frombuffer(next(parts), "<f8"))
    used = np.frombuffer(next(parts), "<u2") if flags & _VARIABLE else None
    layout = IdLayout(top_k, vocab_size)
    coded = {name: np.frombuffer(next(parts), np.uint8).reshape(count, width) for name, width in layout.widths.items()}
    ids = np.empty((count, top_k), dtype=np.int32)
    decode_ids(coded, layout, ids)
    logprobs = _from_planes(next(parts), "<f4" if flags & _FULL else "<f2", (count, top_k))
    shape = (count, n_tau)
    if flags & _FULL:
        log_z = np.frombuffer(next(parts), "<f4").reshape(shape).astype(np.float32)
    else:
        if 1.0 not in temperatures:
            raise CorruptError(f"temperatures {list(temperatures)} without 1")
        log_z = np.empty(shape, dtype=np.float32)
        normalise(logprobs, np.frombuffer(next(parts), "<f2").reshape(shape), used, temperatures, log_z)
    weights = _from_planes(next(parts), "<f4", (count, top_k)) if flags & _WEIGHTS else None
    if used is not None:
        unused = np.arange(top_k) >= used[:, None]
        ids[unused], logprobs[unused] = PAD_ID, -math.inf
    tensors = {"token_ids": torch.from_numpy(ids), "logprobs": torch.from_numpy(logprobs)}
    if weights is not None:
        tensors["weights"] = torch.from_numpy(weights)
    order = torch.argsort(tensors["logprobs"], dim=-1, descending=True, stable=True)
    tensors = {name: tensor.gather(-1, order) for name, tensor in tensors.items()}
    tensors["log_z"] = torch.from_numpy(log_z)
    targets = SparseTargets(
        **{name: tensor.reshape(rows, length, -1) for name, tensor in tensors.items()},
        temperatures=temperatures,
        vocab_size=vocab_size,
        sampling_temperature=None if math.isnan(sampled_at) else _nearest_code(sampled_at, temperatures),
    )
    return WireTargets(targets, fingerprint.hex(), request.hex())


def largest_reply(positions: int, top_k: int, vocab_size: int, n_tau: int) -> int:
    """Bytes that a reply for so many positions can have at most."""
    return _HEADER.size + sum(_sizes(_FULL | _VARIABLE | _WEIGHTS, n_tau, positions, top_k, vocab_size))


def _sizes(flags: int, n_tau: int, count: int, top_k: int, vocab_size: int) -> list[int]:
    """Bytes of the payload's parts, in order.

    Raises:
        CorruptError: a header that asks for gigabytes.
    """
    if not 0 < count * top_k * 16 <= _LIMIT or vocab_size < top_k or n_tau < 1:
        raise CorruptError(f"{count} positions of K {top_k}, vocabulary {vocab_size}, {n_tau} temperatures")
    widths = IdLayout(top_k, vocab_size).widths
    return [
        8 * n_tau,
        *([2 * count] if flags & _VARIABLE else []),
        *(count * width for width in widths.values()),
        count * top_k * (4 if flags & _FULL else 2),
        (4 if flags & _FULL else 2) * count * n_tau,
        *([4 * count * top_k] if flags & _WEIGHTS else []),
    ]


def _cut_tensors(payload: memoryview, sizes: list[int]) -> Iterator[memoryview]:
    start = 0
    for size in sizes:
        yield payload[start : start + size]
        start += size


def _planes(values: Array) -> bytes:
    """All first bytes, then all second bytes …"""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _from_planes(data: memoryview, kind: str, shape: tuple[int, int]) -> Any:
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(kind).itemsize, -1)
    return np.ascontiguousarray(planes.T).view(kind).reshape(shape).astype(np.float32)


def _nearest_code(value: float, temperatures: tuple[float, ...]) -> float:
    """The declared temperature that a float32 stands for."""
    return min(temperatures, key=lambda temperature: abs(temperature - value))
