"""Who answers? Servers that tell no fingerprint are known by how they answer a fixed question.

The one idea: the likeliest ids and their log-probabilities after a few fixed tokens are a model's signature. Two
signatures are of one model when they agree within what batching and precision change in a server's answers. A model
that has neither a fingerprint nor a signature is refused: nobody would notice that it was exchanged.
"""

from typing import Any

import numpy as np

from limbeck.teachers.http import RefusedError
from limbeck.teachers.protocols.base import EndpointInfo, Session, Signature, WireProtocol, WireSpec
from limbeck.teachers.protocols.segments import shared_gaps

_OVERLAP, _GAP = 0.75, 0.1  # share of common ids; mean difference of their log-probabilities in nats


async def signature_of(
    protocol: WireProtocol, session: Session, spec: WireSpec, info: EndpointInfo
) -> Signature | None:
    """The signature of the model behind an endpoint; None for one that tells a fingerprint.

    Raises:
        UnreachableError, UnreadyError: it does not answer (now).
        RefusedError: it answers in another form, or has neither.
    """
    found = await protocol.signature(session, spec)
    if found is None and not info.fingerprint:
        raise RefusedError(
            f"the teacher at {session.endpoint.url} (protocol {protocol.name}) tells no fingerprint and gives no "
            "signature, so that nobody would notice if it were exchanged. Give its protocol one of them."
        )
    return None if info.fingerprint else found


def same_signature(one: Signature, other: Signature) -> bool:
    """True when two signatures are of one model."""
    rows = len(one.token_ids)
    if rows != len(other.token_ids) or not rows:
        return False
    shared = shared_gaps(one, other)
    named = (one.token_ids >= 0).sum(axis=1)
    overlap = sum(len(gaps) / max(int(count), 1) for gaps, count in zip(shared, named, strict=True))
    gap = sum(sum(gaps) / max(len(gaps), 1) for gaps in shared)
    return overlap / rows > _OVERLAP and gap / rows < _GAP


def to_record(protocol: str, signature: Signature) -> dict[str, Any]:
    """A signature as JSON."""
    rows = {
        "token_ids": signature.token_ids.tolist(),
        "logprobs": [[round(max(value, -1e4), 4) for value in row] for row in signature.logprobs.tolist()],
    }
    return {"protocol": protocol, **rows}


def from_record(record: dict[str, Any]) -> Signature:
    """The inverse of `to_record`."""
    return Signature(np.asarray(record["token_ids"], np.int32), np.asarray(record["logprobs"], np.float32))
