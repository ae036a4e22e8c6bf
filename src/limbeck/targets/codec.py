"""The cache's codec: K ids and log-probabilities of a position in about 160 bytes instead of 768.

The one idea: ids are sorted and Elias–Fano coded, log-probabilities are 8-bit levels of sqrt(distance to the
largest), so the likely ids get the fine steps; and the head's scale is not stored at all but follows from the exact
tail mass, which is kept as a half-precision logit per temperature. Every position of a block has the same size, so
decoding is a handful of NumPy calls over whole blocks.

    d_i = R (level_i / 255)²,  l_i = −d_i − logsumexp(−d) + log(1 − tail_1),
    log Z_τ = logsumexp(l / τ) − log(1 − tail_τ)

Shapes: N positions, K support, V vocabulary, n_tau temperatures. Sections (all uint8 unless said):
`low`, `bits`, `high` of `elias_fano`; `levels` [N, K]; `range` [N] float16; `tails` [N, n_tau] float16;
`used` [N] uint16 when K varies; `draws` [N, K] uint16 for sampled tails.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from limbeck.errors import ConfigError, LimbeckError
from limbeck.targets.elias_fano import IdLayout, decode_ids, encode_ids
from limbeck.targets.sparse import PAD_ID, SparseTargets

CODEC_VERSION = 2  # 2: each shard says which rows it holds
_FARTHEST = np.float32(32.0)  # nats below the likeliest id
_BLOCK = 2048  # positions coded at a time: a block's arrays stay in cache
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CodecSpec:
    """What encoder and decoder must agree on; stored in the manifest.

    Attributes:
        top_k: K.
        vocab_size: V, at most 2^24.
        temperatures: the declared temperatures.
        head: exact ids of a sampled support, None for a deterministic one.
        num_draws: draws of a sampled support.
        sampling_temperature: the temperature of the draws.
    """

    top_k: int
    vocab_size: int
    temperatures: tuple[float, ...]
    head: int | None = None
    num_draws: int | None = None
    sampling_temperature: float | None = None

    def __post_init__(self) -> None:
        if self.top_k > self.vocab_size:
            raise ConfigError(f"K is {self.top_k} and the vocabulary has {self.vocab_size} ids; K must not exceed it")
        if self.vocab_size > 1 << 24:
            raise ConfigError(f"the vocabulary has {self.vocab_size} ids; the codec holds at most {1 << 24}")

    @property
    def sampling(self) -> tuple[int, int, float]:
        """Head, draws and temperature of a sampled support."""
        if self.head is None or self.num_draws is None or self.sampling_temperature is None:
            raise ConfigError("this codec was made for a deterministic support; it holds no draws")
        return self.head, self.num_draws, self.sampling_temperature

    @property
    def ids(self) -> IdLayout:
        """How the ids are coded."""
        return IdLayout(self.top_k, self.vocab_size)


def encode(targets: SparseTargets, spec: CodecSpec) -> dict[str, Array]:
    """Encode flattened targets `[N, ...]` into the sections described above."""
    if not bool(torch.isfinite(targets.log_z).all() and torch.isfinite(targets.logprobs[targets.valid]).all()):
        raise LimbeckError(
            "the teacher's log-probabilities are not finite (NaN or infinite logits). Load it in a wider precision: "
            "teacher.dtype: bfloat16 or float32."
        )
    ids = targets.token_ids.numpy()
    logprobs = targets.logprobs.numpy().astype(np.float32, copy=False)
    tails = tail_logits(targets)
    draws = _draw_counts(targets, spec) if spec.head is not None else None
    variable = bool((ids < 0).any()) or ids.shape[1] < spec.top_k
    parts: dict[str, list[Array]] = {}
    for start in range(0, len(ids), _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = _encode_block(ids[rows], logprobs[rows], draws[rows] if draws is not None else None, spec, variable)
        for name, value in block.items():
            parts.setdefault(name, []).append(value)
    return {**{name: np.concatenate(values) for name, values in parts.items()}, "tails": tails}


def tail_logits(targets: SparseTargets) -> Array:
    """logit of the tail's mass per temperature, `[N, n_tau]` float16; -inf where there is no tail."""
    columns = []
    for index, temperature in enumerate(targets.temperatures):
        log_p = targets.logprobs.double() / temperature - targets.log_z[..., index : index + 1].double()
        tail = 1.0 - log_p.exp().sum(dim=-1)
        if targets.top_k >= targets.vocab_size:
            tail.zero_()
        columns.append(torch.where(tail > 0.0, torch.logit(tail.clamp(1e-12, 1.0 - 1e-7)), -math.inf))
    return torch.stack(columns, dim=-1).to(torch.float16).numpy()


def _draw_counts(targets: SparseTargets, spec: CodecSpec) -> Array:
    """How often each place of a sampled support was drawn; 0 for the exact head."""
    weights, (head, num_draws, temperature) = targets.weights, spec.sampling
    assert weights is not None
    log_p, _ = targets.at_temperature(temperature)
    tail = 1.0 - log_p[:, :head].double().exp().sum(dim=-1, keepdim=True)
    counts = (weights.double() * num_draws / tail.clamp_min(1e-30)).round()
    counts[:, :head] = 0
    return counts.clamp(0, num_draws).numpy().astype(np.uint16)


def _encode_block(
    ids: Array, logprobs: Array, draws: Array | None, spec: CodecSpec, variable: bool
) -> dict[str, Array]:
    if ids.shape[1] < spec.top_k:
        missing = ((0, 0), (0, spec.top_k - ids.shape[1]))
        ids = np.pad(ids, missing, constant_values=PAD_ID)
        logprobs = np.pad(logprobs, missing, constant_values=-math.inf)
        draws = np.pad(draws, missing) if draws is not None else None
    sections: dict[str, Array] = {}
    # No float32 sum feels exp(-32); a masked id at -1e9 must not stretch the levels of the others.
    with np.errstate(invalid="ignore"):  # a position without support has nothing but -inf
        distance = np.minimum(logprobs.max(axis=1, keepdims=True) - logprobs, _FARTHEST)
    if variable:
        unused = ids < 0
        sections["used"] = (spec.top_k - unused.sum(axis=1)).astype(np.uint16)
        distance[unused] = 0.0
        ids = np.where(unused, spec.vocab_size - 1, ids)
    span = _ceil_half(distance.max(axis=1))
    sections["range"] = span
    scale = 65025.0 / np.maximum(span.astype(np.float32), np.float32(6e-8))[:, None]
    levels = np.sqrt(distance * scale)
    np.rint(levels, out=levels)
    # One sort of id and payload packed into one integer; unused places get the largest payload and stay last.
    keys = (ids.astype(np.uint32) << 8) | levels.astype(np.uint32)
    if draws is not None or variable:
        wide = (keys.astype(np.uint64) << 17) | (draws.astype(np.uint64) if draws is not None else np.uint64(0))
        if variable:
            wide |= (unused.astype(np.uint64) << np.uint64(16)) | (unused.astype(np.uint64) << np.uint64(17 + 8 + 24))
        wide.sort(axis=1)
        if draws is not None:
            sections["draws"] = (wide & np.uint64(0xFFFF)).astype(np.uint16)
        keys = ((wide >> np.uint64(17)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    else:
        keys.sort(axis=1)
    sections["levels"] = keys.astype(np.uint8)
    sections.update(encode_ids(keys >> 8, spec.ids))
    return sections


def _ceil_half(values: Array) -> Array:
    """The smallest float16 not below each float32."""
    half = values.astype(np.float16)
    return np.where(half.astype(np.float32) < values, np.nextafter(half, np.float16(np.inf)), half)


def decode(sections: dict[str, Array], spec: CodecSpec) -> SparseTargets:
    """Targets `[N, ...]` from their sections; ids ascend, log-probabilities and normalisers are float32."""
    count = len(sections["levels"])
    ids = np.empty((count, spec.top_k), dtype=np.int32)
    logprobs = np.empty((count, spec.top_k), dtype=np.float32)
    log_z = np.empty((count, len(spec.temperatures)), dtype=np.float32)
    for start in range(0, count, _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = {name: value[rows] for name, value in sections.items()}
        decode_ids(block, spec.ids, ids[rows])
        _decode_logprobs(block, spec, logprobs[rows], log_z[rows])
        if "used" in block:
            ids[rows][np.arange(spec.top_k) >= block["used"][:, None]] = PAD_ID
    targets = SparseTargets(
        token_ids=torch.from_numpy(ids),
        logprobs=torch.from_numpy(logprobs),
        log_z=torch.from_numpy(log_z),
        temperatures=spec.temperatures,
        vocab_size=spec.vocab_size,
        sampling_temperature=spec.sampling_temperature,
    )
    return targets if spec.head is None else _with_weights(targets, sections["draws"], spec)


_SQUARES = (np.arange(256, dtype=np.float32) / 255.0) ** 2


def _decode_logprobs(block: dict[str, Array], spec: CodecSpec, out: Array, log_z: Array) -> None:
    np.multiply(_SQUARES[block["levels"]], -block["range"].astype(np.float32)[:, None], out=out)
    normalise(out, block["tails"], block.get("used"), spec.temperatures, log_z)


def normalise(out: Array, tails: Array, used: Array | None, temperatures: tuple[float, ...], log_z: Array) -> None:
    """Give rounded log-probabilities the mass that the tail leaves them, and fill in the normalisers.

    Args:
        out: `[N, K]` float32 log-probabilities up to a constant of the row, changed in place.
        tails: `[N, n_tau]` float16, of `tail_logits`.
        used: `[N]` places of a row that hold an id; None: all.
        temperatures: the declared ones, with 1.
        log_z: `[N, n_tau]` float32, filled.
    """
    empty = None
    if used is not None:
        out[np.arange(out.shape[1]) >= used[:, None]] = -np.inf
        empty = used == 0  # no support: the teacher said nothing here
        out[empty, 0] = 0.0
    head = -np.logaddexp(0.0, tails.astype(np.float32))  # log(1 − tail): log sigmoid(−logit)
    first = temperatures.index(1.0)
    out += (head[:, first] - _logsumexp(out))[:, None]
    for index, temperature in enumerate(temperatures):
        if temperature == 1.0:
            log_z[:, index] = 0.0
        else:
            log_z[:, index] = _logsumexp(out * np.float32(1.0 / temperature)) - head[:, index]
    if empty is not None:
        out[empty], log_z[empty] = -np.inf, 0.0


def _logsumexp(values: Array) -> Array:
    top = values.max(axis=1)
    result: Array = np.log(np.exp(values - top[:, None]).sum(axis=1)) + top
    return result


def _with_weights(targets: SparseTargets, draws: Array, spec: CodecSpec) -> SparseTargets:
    """Weights of a sampled support: p itself for the head, count · tail / n for what was drawn."""
    _, num_draws, temperature = spec.sampling
    index = spec.temperatures.index(temperature)
    p = (targets.logprobs / temperature - targets.log_z[:, index : index + 1]).exp()
    counts = torch.from_numpy(draws.astype(np.float32))
    in_head = targets.valid & (counts == 0)
    tail = (1.0 - torch.where(in_head, p, 0.0).sum(dim=-1, keepdim=True)).clamp_min(0.0)
    weights = torch.where(in_head, p, counts * tail / num_draws)
    return targets.with_tensors({**targets.tensors(), "weights": torch.where(targets.valid, weights, 0.0)})


@dataclass(frozen=True)
class RoundTrip:
    """What coding cost: mean KL (nats) per temperature and the mean absolute error of log-probabilities."""

    kl: dict[float, float]
    mean_abs_error: float

    @property
    def worst_kl(self) -> float:
        """The largest of the temperatures' mean KLs."""
        return max(self.kl.values())


def measure(original: SparseTargets, decoded: SparseTargets) -> RoundTrip:
    """KL(original ‖ decoded) of the (K+1)-partition, averaged over positions, and mean |Δl|.

    Raises:
        LimbeckError: the ids did not come back.
    """
    order = torch.where(original.valid, original.token_ids, 1 << 30).argsort(dim=-1)
    width = order.shape[-1]
    if not torch.equal(original.token_ids.gather(-1, order), decoded.token_ids[:, :width]):
        raise LimbeckError("the codec did not give the same ids back; the cache would be wrong. Please report this.")
    valid = original.valid.gather(-1, order)
    before, after = original.logprobs.gather(-1, order), decoded.logprobs[:, :width]
    felt = valid & (before > -float(_FARTHEST))
    error = torch.where(felt, (before - after).abs(), 0.0).sum() / felt.sum().clamp_min(1)
    kl = {}
    for index, temperature in enumerate(original.temperatures):
        log_p = before / temperature - original.log_z[:, index : index + 1]
        log_q = after / temperature - decoded.log_z[:, index : index + 1]
        p = torch.where(valid, log_p.exp(), 0.0)
        q = torch.where(valid, log_q.exp(), 0.0)
        head = torch.where(valid, p * (log_p - log_q), 0.0).double().sum(dim=-1)
        tail_p, tail_q = (1.0 - x.double().sum(dim=-1) for x in (p, q))
        tail = torch.where(tail_p > 1e-7, tail_p * (tail_p / tail_q.clamp_min(1e-7)).clamp_min(1e-30).log(), 0.0)
        mean = float((head + tail).mean())
        if not math.isfinite(mean):
            raise LimbeckError("the codec's round trip gave values that are not finite. Please report this.")
        kl[temperature] = max(0.0, mean)
    return RoundTrip(kl=kl, mean_abs_error=float(error))
