"""Retention over rows that may hold several documents and padding: one function for its three forms.

    parallel    O = (Q Kᵀ ⊙ D) V,              D_nm = γ^(n−m) for n ≥ m
    recurrent   S_n = γ S_{n−1} + K_nᵀ V_n,    O_n = Q_n S_n
    chunkwise   O_i = (Q_i K_iᵀ ⊙ D) V_i + diag(γ^1…γ^C) Q_i S_{i−1},   S_i = γ^C S_{i−1} + (K_i ⊙ γ^(C−1)…γ^0)ᵀ V_i

The one idea: the chunkwise form is the parallel one where a chunk is the whole row and the recurrent one where it is a
single position, so there is one function, and everything that is special about a row (a document that begins, padding,
a last chunk that is not full) lies in the decays, which are made once and used by every layer.

Source: RetNet (arXiv 2307.08621, eq. 5–7), γ_h = 1 − 2^(−5−h).
Shapes: B rows, T positions, H heads, K and V the widths of a head's key and value, C positions of a chunk, N chunks.
"""

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Places:
    """Where the tokens of a batch of rows stand.

    Attributes:
        positions: `[1 or B, T]` of each token in its document.
        documents: `[1 or B, T]` how many documents have begun in the row up to a token; None: what came before goes on.
        steps: `[1 or B, T]` tokens of the row up to and including this one, padding not counted.
        used: `[B, T]` False for padding; None where there is none.
    """

    positions: Tensor
    documents: Tensor | None
    steps: Tensor
    used: Tensor | None

    @classmethod
    def of(
        cls, length: int, before: int, position_ids: Tensor | None, mask: Tensor | None, device: torch.device
    ) -> "Places":
        """The places that a forward's arguments mean.

        Args:
            length: T.
            before: tokens that a carried state has seen.
            position_ids: `[1 or B, T]`; a document begins at each 0. None: the row goes on.
            mask: `[B, T or more]`, 0 for padding; its last T columns are those of the row.
            device: of the row.
        """
        used = None if mask is None else mask[:, -length:].bool()
        counts = torch.arange(1, length + 1, device=device).unsqueeze(0)
        steps = counts if used is None else used.long().cumsum(-1)
        if position_ids is None:
            if mask is None:
                return cls(counts - 1 + before, None, steps, used)
            # A mask as long as the whole text counts what came before; a shorter one is the row's alone.
            whole = mask.long().cumsum(-1)[:, -length:] - 1
            positions = whole if mask.shape[-1] > length else whole + before
            return cls(positions.clamp_min(0), None, steps, used)
        begins = position_ids == 0
        begins = begins if used is None else begins & used
        return cls(position_ids, begins.long().cumsum(-1), steps, used)


@dataclass(frozen=True)
class Decays:
    """The factors of one batch of rows, for every layer that is applied to it.

    Attributes:
        chunk: C.
        length: T.
        within: `[1 or B, H, N, C, C]` D inside a chunk, 0 across documents and for padding.
        read: `[1 or B, H, N, C, 1]` what a position reads the state before its chunk with.
        write: `[1 or B, H, N, C, 1]` what a position's key goes into the state after its chunk with.
        keep: `[1 or B, H, N, 1, 1]` what is left of the state after the chunk.
        borders: `[documents + 1]` where documents begin in the batch laid end to end; None where it is not known.
    """

    chunk: int
    length: int
    within: Tensor
    read: Tensor
    write: Tensor
    keep: Tensor
    borders: Tensor | None = None

    @classmethod
    def of(cls, places: Places, heads: int, chunk: int, dtype: torch.dtype, borders: Tensor | None = None) -> "Decays":
        """The decays of rows cut into chunks, in float32 at least: in bfloat16 the slow heads' γ would be 1."""
        exact = torch.promote_types(dtype, torch.float32)
        device = places.steps.device
        rates = torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=device, dtype=exact)))  # ln γ_h
        rates = rates.view(1, heads, 1, 1, 1)
        length = places.steps.shape[-1]
        chunk = min(chunk, length)
        steps = _in_chunks(places.steps, chunk)  # the tail repeats the last: no decay there
        last = steps[:, :, -1:]
        before = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], dim=1)
        if places.used is None:  # every whole chunk is like every other
            inside = steps[:, :1]
            within = _decayed(rates, inside.unsqueeze(-1) - inside.unsqueeze(-2), exact).tril()
        else:
            within = _decayed(rates, steps.unsqueeze(-1) - steps.unsqueeze(-2), exact).tril()
            within = within * _used(places, chunk).unsqueeze(1).unsqueeze(-2)
        read = _decayed(rates[..., 0], steps - before, exact)
        write = _decayed(rates[..., 0], last - steps, exact)
        keep = _decayed(rates[..., 0], last - before, exact)
        if places.used is not None:
            write = write * _used(places, chunk).unsqueeze(1)
        if places.documents is not None:
            documents = _in_chunks(places.documents, chunk)
            ends = documents[:, :, -1:]
            came = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=1)
            within = within * (documents.unsqueeze(-1) == documents.unsqueeze(-2)).unsqueeze(1)
            read, keep = read * (documents == came).unsqueeze(1), keep * (ends == came).unsqueeze(1)
            write = write * (documents == ends).unsqueeze(1)
        return cls(chunk, length, within, read.unsqueeze(-1), write.unsqueeze(-1), keep.unsqueeze(-1), borders=borders)


def _decayed(rates: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """γ^steps with the heads as second dimension; steps of what is masked anyway may be negative."""
    return torch.exp(rates * steps.clamp_min(0).to(dtype).unsqueeze(1))


def _in_chunks(values: Tensor, chunk: int) -> Tensor:
    """`[B, T]` to `[B, N, C]`, the last value repeated where the last chunk is not full."""
    missing = -values.shape[-1] % chunk
    if missing:
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=-1)
    return values.reshape(values.shape[0], -1, chunk)


def _used(places: Places, chunk: int) -> Tensor:
    assert places.used is not None
    return _in_chunks(places.used, chunk)


def document_borders(position_ids: Tensor) -> Tensor:
    """Where documents begin in rows laid end to end, and their whole length, `[documents + 1]` int32."""
    begins = position_ids == 0
    begins[:, 0] = True
    starts = begins.flatten().nonzero().squeeze(-1)
    return torch.cat([starts, starts.new_tensor([position_ids.numel()])]).int()


def retention(
    queries: Tensor, keys: Tensor, values: Tensor, decays: Decays, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Retention of rows, chunk by chunk.

    Args:
        queries, keys: `[B, T, H, K]`, rotated; keys divided by √K.
        values: `[B, T, H, V]`.
        decays: of these rows.
        state: `[B, H, K, V]` S of what came before, in float32 at least; None: nothing did.

    Returns:
        `[B, T, H, V]` and the state after the row.
    """
    q, k, v = (_heads_in_chunks(part, decays.chunk) for part in (queries, keys, values))
    outputs = (q @ k.mT * decays.within.to(q.dtype)) @ v
    exact = torch.promote_types(q.dtype, torch.float32)
    written = ((k * decays.write.to(k.dtype)).mT @ v).to(exact)  # [B, H, N, K, V]
    chunks = q.shape[2]
    if state is None:
        state = torch.zeros_like(written[:, :, 0])
        if chunks == 1:
            return _back(outputs, decays.length), written[:, :, 0]
    before, keep = [], decays.keep.to(exact)
    for number in range(chunks):
        before.append(state)
        state = keep[:, :, number] * state + written[:, :, number]
    carried = torch.stack(before, dim=2).to(q.dtype)
    outputs = outputs + (q * decays.read.to(q.dtype)) @ carried
    return _back(outputs, decays.length), state


def _heads_in_chunks(part: Tensor, chunk: int) -> Tensor:
    """`[B, T, H, W]` to `[B, H, N, C, W]`, zeros where the last chunk is not full."""
    missing = -part.shape[1] % chunk
    if missing:
        part = torch.nn.functional.pad(part, (0, 0, 0, 0, 0, missing))
    return part.reshape(part.shape[0], -1, chunk, *part.shape[2:]).permute(0, 3, 1, 2, 4)


def _back(part: Tensor, length: int) -> Tensor:
    """The inverse of `_heads_in_chunks`."""
    return part.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
