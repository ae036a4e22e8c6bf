"""What every wire protocol is: what is known of the endpoint, queries for packed rows, targets from the answers."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from limbeck.config.base import default
from limbeck.config.teacher import RemoteTeacherConfig
from limbeck.console import printable
from limbeck.data.dataset import PackedRows
from limbeck.data.tokenizer import LoadedTokenizer
from limbeck.errors import CorruptError
from limbeck.targets.sparse import SparseTargets
from limbeck.targets.spec import TargetSpec
from limbeck.teachers.http import Endpoint, Query, RefusedError, Reply, TeacherClient, UnreadyError, WrongAnswerError


@dataclass(frozen=True)
class EndpointInfo:
    """What an endpoint says of itself, or lets itself be found out about.

    Attributes:
        protocol: its name.
        model: name of the served model, when it tells one.
        fingerprint: hash of the weights as served (protocol limbeck alone).
        tokenizer: hash of its tokenizer (protocol limbeck alone).
        vocab_size: ids its logits have.
        max_top_k: largest K it gives, when it says so.
        max_tokens: tokens it takes in one request.
        max_sequences: sequences it takes in one request.
        attention: what of `dataset.attention` it can do in one row; None: a document is a sequence of its own.
        temperatures: True when the asked temperature changes the answer, or the normalisers are given.
        notes: what its user should know.
    """

    protocol: str
    model: str | None = None
    fingerprint: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    max_top_k: int | None = None
    max_tokens: int | None = None
    max_sequences: int | None = None
    attention: tuple[str, ...] | None = None
    temperatures: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WireSpec(TargetSpec):
    """What is wanted of a teacher behind HTTP, and how it is sent.

    Attributes:
        vocab_size: V of the targets.
        model: name to send where a protocol has one.
        full: log-probabilities as float32 on the wire.
        reproducible: share no forward pass with others.
        approximate: normalisers and ambiguous texts may be estimated or left to the tail.
        max_tokens: tokens in one request.
    """

    vocab_size: int
    model: str | None = None
    full: bool = False
    reproducible: bool = True
    approximate: bool = False
    max_tokens: int = default(RemoteTeacherConfig, "max_request_tokens")

    @property
    def support(self) -> int:
        """Ids a position can have."""
        return self.support_of(self.vocab_size)


@dataclass(frozen=True)
class Signature:
    """The likeliest ids `[n, k]` int32 after a few fixed tokens, and their log-probabilities `[n, k]` float32."""

    token_ids: np.ndarray[Any, Any]
    logprobs: np.ndarray[Any, Any]


@dataclass
class Session:
    """One endpoint as a protocol finds out about it.

    Attributes:
        patient: wait while it is not ready; without, anything but a whole answer is an UnreadyError.
    """

    client: TeacherClient
    endpoint: Endpoint
    model: str | None = None
    patient: bool = True
    misunderstood: list[str] = field(default_factory=list)  # what it said to questions it did not understand

    async def get_json(self, path: str) -> Any:
        """The JSON at a path, None when there is none (a status other than 200, or no JSON)."""
        reply = await self._ask(path)
        try:
            return as_json(reply) if reply.status == 200 else None
        except CorruptError as error:
            return self._damaged(error)

    async def try_query(self, query: Query) -> Any:
        """What a query's `parse` makes of the answer, None when the endpoint does not speak so."""
        reply = await self._ask(query.path, query.body)
        if reply.status != 200:
            self.misunderstood.append(f"{query.path or '/'}: status {reply.status}, {self.client.words(reply)}")
            return None
        try:
            return query.parse(reply)
        except CorruptError as error:
            return self._damaged(error)
        except WrongAnswerError as error:
            self.misunderstood.append(str(error).removesuffix("."))
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            self.misunderstood.append(f"{query.path or '/'}: an answer that cannot be read ({error})"[:200])
        return None

    async def _ask(self, path: str, body: dict[str, Any] | None = None) -> Reply:
        reply = await self.client.ask(self.endpoint, path, body, patient=self.patient)
        if not self.patient and reply.status >= 500:
            raise UnreadyError(f"status {reply.status}: {self.client.words(reply)}")
        return reply

    def _damaged(self, error: CorruptError) -> None:
        if not self.patient:
            raise UnreadyError(f"a damaged answer: {error}")


class WireProtocol(ABC):
    """One way to ask for targets.

    Args:
        tokenizer: the data's, for protocols that answer in texts.
    """

    name: ClassVar[str]

    def __init__(self, tokenizer: LoadedTokenizer | None = None) -> None:
        self.tokenizer = tokenizer

    @abstractmethod
    async def describe(self, session: Session) -> EndpointInfo | None:
        """Facts about the endpoint; None when it does not speak this protocol."""

    @abstractmethod
    def queries(self, rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> list[Query]:
        """The requests for rows `[B, T]`."""

    @abstractmethod
    def targets(self, answers: Sequence[Any], rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> SparseTargets:
        """Targets `[B, T, K]` from the queries' parsed answers, in their order."""

    @abstractmethod
    async def signature(self, session: Session, spec: WireSpec) -> "Signature | None":
        """How the model behind the endpoint answers a fixed question: what it is known by.

        None where `describe` gives a fingerprint of the weights instead, which every answer must then carry.

        Raises:
            UnreachableError, UnreadyError: it does not answer (now).
            RefusedError: it answers in another form.
        """

    @abstractmethod
    async def aligned(self, session: Session, spec: WireSpec) -> bool | None:
        """False when a changed token does not change its own row first; None when that cannot be told."""

    def supports(self, spec: WireSpec, info: EndpointInfo) -> None:
        """Refuse, before anything is asked, what the protocol or the endpoint cannot give."""
        if spec.sampling is not None:
            raise RefusedError(
                f"teacher.sampling draws from the whole vocabulary at the server, which protocol {self.name} cannot. "
                "Use `limbeck teacher serve` (protocol limbeck), or teacher.top_k without sampling."
            )


def as_json(reply: Reply) -> Any:
    """The reply's JSON; CorruptError when it is none."""
    try:
        return json.loads(reply.content)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"no JSON ({type(error).__name__})") from None


async def first_model(session: Session) -> str | None:
    """The name of the model that `/v1/models` lists first, or the wanted one.

    Raises:
        RefusedError: the wanted one is not listed.
    """
    listed = await session.get_json("/v1/models")
    try:
        names = [str(model["id"]) for model in listed["data"]]
    except (TypeError, KeyError):
        return session.model
    if session.model is not None and names and session.model not in names:
        served = printable(", ".join(names[:5]))
        raise RefusedError(f"teacher.served_model is {session.model} and the endpoint serves {served}.")
    return session.model or next(iter(names), None)
