"""Who answers? Servers that tell no fingerprint are known by how they answer a fixed question.

The one idea: the likeliest ids and their log-probabilities after a few fixed tokens are a model's portrait. Two
portraits are of one model when they agree within what batching and precision change in a server's answers.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from limbeck.teachers.http import RefusedError
from limbeck.teachers.protocols.base import Ask, Session, WireProtocol
from limbeck.teachers.protocols.segments import Answer, SegmentProtocol, shared_gaps

_IDS = 4  # a row
_OVERLAP, _GAP = 0.75, 0.1  # share of common ids; mean difference of their log-probabilities in nats


async def take_portrait(protocol: WireProtocol, session: Session, ask: Ask) -> Answer | None:
    """How the endpoint answers the canary; None for protocol limbeck, whose answers carry a fingerprint.

    Raises:
        UnreachableError, UnreadyError: it does not answer (now).
        RefusedError: it answers in another form.
    """
    if not isinstance(protocol, SegmentProtocol):
        return None
    plain = replace(ask, top_k=_IDS, temperatures=(1.0,), sampling=None, approximate=True)
    answers = await session.try_query(protocol.query([protocol.canary], plain))
    if not answers:
        raise RefusedError(f"the teacher at {session.endpoint.url} does not answer as protocol {protocol.name}.")
    order = np.argsort(-answers[0].logprobs, axis=1, kind="stable")[:, :_IDS]
    return Answer(np.take_along_axis(answers[0].token_ids, order, 1), np.take_along_axis(answers[0].logprobs, order, 1))


def same_portrait(one: Answer, other: Answer) -> bool:
    """True when two portraits are of one model."""
    rows = len(one.token_ids)
    if rows != len(other.token_ids) or not rows:
        return False
    shared = shared_gaps(one, other)
    named = (one.token_ids >= 0).sum(axis=1)
    overlap = sum(len(gaps) / max(int(count), 1) for gaps, count in zip(shared, named, strict=True))
    gap = sum(sum(gaps) / max(len(gaps), 1) for gaps in shared)
    return overlap / rows > _OVERLAP and gap / rows < _GAP


def to_record(protocol: str, portrait: Answer) -> dict[str, Any]:
    """A portrait as JSON."""
    rows = {
        "token_ids": portrait.token_ids.tolist(),
        "logprobs": [[round(max(value, -1e4), 4) for value in row] for row in portrait.logprobs.tolist()],
    }
    return {"protocol": protocol, **rows}


def from_record(record: dict[str, Any]) -> Answer:
    """The inverse of `to_record`."""
    return Answer(np.asarray(record["token_ids"], np.int32), np.asarray(record["logprobs"], np.float32))
