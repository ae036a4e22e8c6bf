"""Protocols that know sequences and nothing of packed rows: a document is asked for alone.

The one idea: packed rows are cut at their document borders (so that no document sees another, whatever the server
does), sent as plain sequences, and the answers put back in place. A temperature other than 1 is asked for by a second
request where the endpoint honours it; else its normaliser is estimated, if the user allows that.

Shapes: n tokens of a sequence, K' ids of an answer, B rows, T positions, K support.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch

from limbeck.data.dataset import PackedRows
from limbeck.targets.sparse import PAD_ID, SparseTargets
from limbeck.targets.tail import estimate_log_z
from limbeck.teachers.http import Query, RefusedError, Reply, WrongAnswerError
from limbeck.teachers.protocols.base import EndpointInfo, Session, Signature, WireProtocol, WireSpec, as_json

Array = np.ndarray[Any, Any]
#: A few ordinary ids that every vocabulary has, for finding out how an endpoint behaves.
CANARY = [5, 17, 40, 33, 61, 12, 90, 7, 28, 55, 71, 19]
CHANGED = (4, 6, 8)  # the places of the canary that the alignment test changes
_SIGNATURE_IDS = 4  # a row
_NOISE = 0.05  # nats by which a server in bfloat16 differs from itself


@dataclass(frozen=True)
class Segment:
    """A sequence and where it stands: `ids` begin at place `start` of row `row`."""

    row: int
    start: int
    ids: list[int]


@dataclass(frozen=True)
class Answer:
    """What is known of one sequence: row t speaks of token t+1.

    Attributes:
        token_ids: `[n', K']` int32, -1 in unused places; n' ≤ n.
        logprobs: `[n', K']` float32, log-probabilities at the asked temperature, -inf in unused places.
        log_z: `[n', n_tau]` when the whole vocabulary was seen.
    """

    token_ids: Array
    logprobs: Array
    log_z: Array | None = None


def cut_rows(rows: PackedRows, attention: str) -> list[Segment]:
    """The sequences of packed rows; those of one token say nothing that is used."""
    found = []
    ids, docs = rows.input_ids.cpu().numpy(), rows.doc_ids.cpu().numpy()
    for row in range(len(ids)):
        used = np.flatnonzero(docs[row] >= 0)
        if not len(used):
            continue
        if attention == "packed":  # plain causal attention sees the filler before a text too
            edges = [0, int(used[-1]) + 1]
        else:
            edges = [0, *(np.flatnonzero(np.diff(docs[row])) + 1).tolist(), ids.shape[1]]
        found += [
            Segment(row, start, ids[row, start:stop].tolist())
            for start, stop in pairwise(edges)
            if stop - start > 1 and (attention == "packed" or docs[row, start] >= 0)
        ]
    return found


class SegmentProtocol(WireProtocol):
    """Base of the protocols that take lists of sequences.

    Subclasses give `path`, `body` and `read`.
    """

    path: str
    max_sequences: int = 256
    whole_vocabulary: ClassVar[bool] = False  # answers with every id, so any temperature is exact
    gives_last: bool = False  # also the distribution after the last token
    is_partial: bool = False  # may leave out rows at the end of a sequence
    canary: list[int] = CANARY

    @abstractmethod
    def body(self, sequences: list[list[int]], top_k: int, temperature: float, model: str | None) -> dict[str, Any]:
        """The request's JSON."""

    @abstractmethod
    def read(self, reply: Any, sequences: list[list[int]], spec: WireSpec) -> list[Answer]:
        """Answers from the reply's JSON; KeyError, TypeError and the like mean a wrong shape."""

    # -- asking ----------------------------------------------------------------------------------------

    def queries(self, rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> list[Query]:
        """For each temperature that the endpoint honours, the rows' sequences in as few requests as fit."""
        groups = self._groups(rows, spec, info)
        return [
            self.query([segment.ids for segment in group], spec, temperature)
            for temperature in self._asked(spec, info)
            for group in groups
        ]

    def query(self, sequences: list[list[int]], spec: WireSpec, temperature: float = 1.0) -> Query:
        """One request."""

        def parse(reply: Reply) -> list[Answer]:
            document = as_json(reply)
            try:
                answers = self.read(document, sequences, spec)
            except (KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError) as error:
                raise WrongAnswerError(
                    f"the teacher's answer has not the shape of protocol {self.name} "
                    f"({type(error).__name__}: {str(error)[:120]})."
                ) from None
            if len(answers) != len(sequences):
                raise WrongAnswerError(
                    f"{len(sequences)} sequences were sent to the teacher and {len(answers)} came back."
                )
            for answer, ids in zip(answers, sequences, strict=True):
                self._check(answer, len(ids))
            return answers

        return Query(self.path, self.body(sequences, spec.support, temperature, spec.model), parse)

    def _check(self, answer: Answer, length: int) -> None:
        """Refuse an answer of another length (one position more shifts all), NaN and ids below 0."""
        wanted = length if self.gives_last else length - 1
        found = len(answer.token_ids)
        if found != wanted and not (self.is_partial and found <= length):
            raise WrongAnswerError(
                f"the teacher gave distributions for {found} positions of a sequence of {length} tokens; protocol "
                f"{self.name} has {wanted}."
            )
        if np.isnan(answer.logprobs).any():
            raise WrongAnswerError("the teacher gave log-probabilities that are NaN. Serve it in a wider precision.")
        strange = (answer.token_ids < 0) & ~np.isneginf(answer.logprobs)
        if strange.any():
            raise WrongAnswerError(f"the teacher names id {int(answer.token_ids[strange][0])}.")

    def _asked(self, spec: WireSpec, info: EndpointInfo) -> list[float]:
        others = [] if self.whole_vocabulary or not info.temperatures else spec.temperatures
        return [1.0, *(temperature for temperature in others if temperature != 1.0)]

    def _groups(self, rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> list[list[Segment]]:
        tokens = min(spec.max_tokens, info.max_tokens or spec.max_tokens)
        most = min(self.max_sequences, info.max_sequences or self.max_sequences)
        groups: list[list[Segment]] = []
        held = 0
        for segment in cut_rows(rows, spec.attention):
            if not groups or held + len(segment.ids) > tokens or len(groups[-1]) >= most:
                groups.append([])
                held = 0
            groups[-1].append(segment)
            held += len(segment.ids)
        return groups

    # -- reading ---------------------------------------------------------------------------------------

    def targets(self, answers: Sequence[Any], rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> SparseTargets:
        """The answers put back where their sequences stand; elsewhere there is no support."""
        groups = self._groups(rows, spec, info)
        segments = [segment for group in groups for segment in group]
        found: dict[float, list[Answer]] = {}
        for number, temperature in enumerate(self._asked(spec, info)):
            part = answers[number * len(groups) : (number + 1) * len(groups)]
            found[temperature] = [answer for group in part for answer in group]
        shape = tuple(rows.input_ids.shape)
        ids = np.full((*shape, spec.support), PAD_ID, dtype=np.int32)
        logprobs = np.full((*shape, spec.support), -math.inf, dtype=np.float32)
        log_z = np.zeros((*shape, len(spec.temperatures)), dtype=np.float32)
        for index, segment in enumerate(segments):
            tempered = {t: held[index] for t, held in found.items()}
            known = min(len(tempered[1.0].token_ids), len(segment.ids))
            place = (segment.row, slice(segment.start, segment.start + known))
            own_ids, own, own_z = settle({t: _cut(a, known) for t, a in tempered.items()}, spec)
            ids[place][:, : own_ids.shape[1]] = own_ids
            logprobs[place][:, : own.shape[1]] = own
            log_z[place] = own_z
        return SparseTargets(
            torch.from_numpy(ids),
            torch.from_numpy(logprobs),
            torch.from_numpy(log_z),
            spec.temperatures,
            spec.vocab_size,
        )

    # -- finding out -----------------------------------------------------------------------------------

    async def describe(self, session: Session) -> EndpointInfo | None:
        """Ask for a few tokens; whoever answers in this protocol's shape speaks it."""
        model = await self.model_name(session)
        spec = WireSpec(top_k=4, temperatures=(1.0,), vocab_size=1 << 24, model=model)
        answers = await session.try_query(self.query([self.canary], spec))
        if not answers or not answers[0].token_ids.size:
            return None
        changes = self.whole_vocabulary or await self._honours(session, spec, answers[0])
        info = EndpointInfo(protocol=self.name, model=model, max_sequences=self.max_sequences, temperatures=changes)
        info = await self.more(session, info, spec)
        if self.whole_vocabulary or info.max_top_k is not None:
            return info
        return replace(info, max_top_k=await self._largest_top_k(session, spec))

    async def _largest_top_k(self, session: Session, spec: WireSpec) -> int:
        """The largest K, up to 1024, that the endpoint answers with."""
        low, high = 4, 1025
        while high - low > 1:
            top_k = 1024 if high == 1025 else (low + high) // 2
            answers = await session.try_query(self.query([self.canary], replace(spec, top_k=top_k)))
            given = answers[0].token_ids.shape[1] if answers else 0
            low, high = (top_k, high) if given >= top_k else (low, top_k)
        return low

    async def signature(self, session: Session, spec: WireSpec) -> Signature:
        """The likeliest ids after each token of the canary."""
        plain = replace(spec, top_k=_SIGNATURE_IDS, temperatures=(1.0,), sampling=None, approximate=True)
        answers = await session.try_query(self.query([self.canary], plain))
        if not answers:
            raise RefusedError(f"the teacher at {session.endpoint.url} does not answer as protocol {self.name}.")
        order = np.argsort(-answers[0].logprobs, axis=1, kind="stable")[:, :_SIGNATURE_IDS]
        ids, logprobs = (np.take_along_axis(x, order, 1) for x in (answers[0].token_ids, answers[0].logprobs))
        return Signature(ids, logprobs)

    async def aligned(self, session: Session, spec: WireSpec) -> bool | None:
        """Change one token: rows before its own must stay, its own must change. None when nothing can be told.

        A change can be small in its own row and larger later; so three are tried, and a server is misaligned when all
        that show agree on one wrong distance.
        """
        plain = await session.try_query(self.query([self.canary], spec))
        distances = []
        for place in CHANGED:
            changed = list(self.canary)
            changed[place] += 1
            answers = await session.try_query(self.query([changed], spec))
            row = first_change(plain[0], answers[0]) if plain and answers else None
            if row is not None:
                distances.append(row - place)
        if len(distances) < 2:
            return None
        return 0 in distances or len(set(distances)) > 1

    async def model_name(self, session: Session) -> str | None:
        """The name to ask for."""
        return session.model

    async def more(self, session: Session, info: EndpointInfo, spec: WireSpec) -> EndpointInfo:
        """Further facts of this protocol."""
        return info

    async def _honours(self, session: Session, spec: WireSpec, plain: Answer) -> bool:
        """True when temperature 2 halves the differences between log-probabilities."""
        answers = await session.try_query(self.query([self.canary], replace(spec, temperatures=(1.0, 2.0)), 2.0))
        if not answers or answers[0].token_ids.shape != plain.token_ids.shape:
            return False
        return bool(np.median(_steps(answers[0])) < 0.75 * np.median(_steps(plain)))


def _steps(answer: Answer) -> Array:
    """Differences between the likeliest and the last of the ids, where there are several."""
    last = np.where(answer.token_ids >= 0, answer.logprobs, math.inf).min(axis=1)
    return np.asarray(answer.logprobs.max(axis=1) - last)


def _cut(answer: Answer, known: int) -> Answer:
    log_z = None if answer.log_z is None else answer.log_z[:known]
    return Answer(answer.token_ids[:known], answer.logprobs[:known], log_z)


def settle(answers: dict[float, Answer], spec: WireSpec) -> tuple[Array, Array, Array]:
    """Ids and log-probabilities `[n, ≤K]`, likeliest first, and log Z `[n, n_tau]` from the answers per temperature."""
    plain = answers[1.0]
    order = np.argsort(-plain.logprobs, axis=1, kind="stable")[:, : spec.support]
    ids = np.take_along_axis(plain.token_ids, order, 1)
    logprobs = np.take_along_axis(plain.logprobs, order, 1)
    if plain.log_z is not None:
        return ids, logprobs, plain.log_z
    columns = []
    for temperature in spec.temperatures:
        if temperature == 1.0:
            columns.append(np.zeros(len(ids), dtype=np.float32))
        elif temperature in answers:
            columns.append(_log_z_from(ids, logprobs, answers[temperature], temperature))
        else:
            estimate = estimate_log_z(
                torch.from_numpy(logprobs), torch.from_numpy(ids >= 0), spec.vocab_size, temperature
            )
            columns.append(estimate.numpy())
    return ids, logprobs, np.stack(columns, axis=-1).astype(np.float32)


def _log_z_from(ids: Array, logprobs: Array, tempered: Answer, temperature: float) -> Array:
    """log Z_τ from the same ids' log-probabilities at 1 and at τ: the ids' masses differ by Z_τ alone."""
    if len(tempered.token_ids) < len(ids):
        raise WrongAnswerError(f"the teacher gave {len(ids)} positions at temperature 1 and fewer at {temperature}.")
    columns = []
    step = max(1, (1 << 24) // (ids.shape[1] * tempered.token_ids.shape[1]))
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        own, other = ids[rows], tempered.token_ids[: len(ids)][rows]
        same = (own[:, :, None] == other[:, None, :]) & (own >= 0)[:, :, None]
        both = same.any(axis=2)
        if not both[(own >= 0).any(axis=1)].any(axis=1).all():
            raise WrongAnswerError(f"the teacher's ids at temperature {temperature} are not those at temperature 1.")
        at_tau = np.take_along_axis(tempered.logprobs[: len(ids)][rows], same.argmax(axis=2), 1)
        columns.append(_masked_lse(logprobs[rows] / temperature, both) - _masked_lse(at_tau, both))
    return np.concatenate(columns) if columns else np.zeros(0, dtype=np.float32)


def _masked_lse(values: Array, mask: Array) -> Array:
    kept = np.where(mask, values, -math.inf)
    top = np.where(mask.any(axis=1), kept.max(axis=1), 0.0)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(kept - top[:, None]).sum(axis=1)) + top
    return np.where(mask.any(axis=1), total, 0.0)


def from_entries(entries: Sequence[Sequence[tuple[int, float]]]) -> Answer:
    """An Answer from a list of (id, log-probability) pairs for each position."""
    width = max((len(entry) for entry in entries), default=0)
    ids = np.full((len(entries), max(width, 1)), PAD_ID, dtype=np.int32)
    logprobs = np.full(ids.shape, -math.inf, dtype=np.float32)
    for row, entry in enumerate(entries):
        if entry:
            ids[row, : len(entry)] = [pair[0] for pair in entry]
            logprobs[row, : len(entry)] = [pair[1] for pair in entry]
    return Answer(ids, logprobs)


def shifted(entries: Sequence[Sequence[tuple[int, float]] | None], name: str) -> Answer:
    """An Answer from entries where number j is the distribution *of* token j (and 0 has none): row j − 1."""
    if not entries or entries[0]:
        raise WrongAnswerError(
            f"the teacher gives a distribution of the first token, which nothing precedes; protocol {name} has none "
            "there. Its positions may be shifted: run `limbeck teacher probe`."
        )
    if any(not entry for entry in entries[1:]):
        raise WrongAnswerError("the teacher left out the log-probabilities of some positions.")
    return from_entries([entry for entry in entries[1:] if entry])


def first_change(one: Answer | Signature, other: Answer | Signature) -> int | None:
    """The first row in which two answers differ: how far they saw the same tokens; None when none does."""
    for row, gaps in enumerate(shared_gaps(one, other)):
        if not gaps or max(gaps) > _NOISE:
            return row
    return None


def shared_gaps(one: Answer | Signature, other: Answer | Signature) -> list[list[float]]:
    """Per row that both answers have, the differences of the log-probabilities of the ids that both name."""
    gaps = []
    for row in range(min(len(one.token_ids), len(other.token_ids))):
        held = dict(zip(other.token_ids[row].tolist(), other.logprobs[row].tolist(), strict=True))
        pairs = zip(one.token_ids[row].tolist(), one.logprobs[row].tolist(), strict=True)
        gaps.append([abs(value - held[token]) for token, value in pairs if token >= 0 and token in held])
    return gaps
