"""What is found out about an endpoint before anything is asked of it: its protocol, what it tells, its signature.

The one idea: finding out costs some twenty requests, so a run does it once; whoever opens the teacher later goes on
from what is known, and a server that has changed since is noticed by the first answer (its fingerprint, or the
signature that is looked at again on every new connection).
"""

from dataclasses import dataclass, field

from limbeck.data.tokenizer import LoadedTokenizer
from limbeck.registry import PROTOCOLS
from limbeck.teachers.http import RefusedError, TeacherClient
from limbeck.teachers.protocols.base import EndpointInfo, Session, Signature, WireProtocol, WireSpec
from limbeck.teachers.signature import signature_of


@dataclass(frozen=True)
class Discovery:
    """What is known of an endpoint.

    Attributes:
        protocol: how it is spoken to.
        info: what it says of itself.
        signature: what the model is known by where it tells no fingerprint.
        aligned: URLs whose rows are known to be where they should be.
    """

    protocol: WireProtocol
    info: EndpointInfo
    signature: Signature | None
    aligned: set[str] = field(default_factory=set)


def discover(client: TeacherClient, protocol: str, tokenizer: LoadedTokenizer | None, model: str | None) -> Discovery:
    """Find out about the client's first endpoint.

    Args:
        client: the connection.
        protocol: a name of `PROTOCOLS`, or auto.
        tokenizer: the data's, for protocols that answer in texts.
        model: name to ask for where an endpoint serves several.

    Raises:
        UnreachableError: nobody answers.
        RefusedError: it speaks none of them, or not the one named, or nobody would notice if it were exchanged.
    """
    spoken, info = client.run(find_protocol(client, protocol, tokenizer, model))
    session = Session(client, client.endpoints[0], info.model or model)
    spec = WireSpec(top_k=4, temperatures=(1.0,), vocab_size=info.vocab_size or 1 << 24, model=info.model or model)
    return Discovery(spoken, info, client.run(signature_of(spoken, session, spec, info)))


async def find_protocol(
    client: TeacherClient, protocol: str, tokenizer: LoadedTokenizer | None, model: str | None
) -> tuple[WireProtocol, EndpointInfo]:
    """Which protocol the first endpoint speaks, and what it tells. Arguments and errors as of `discover`."""
    endpoint = client.endpoints[0]
    session = Session(client, endpoint, model)
    await client.ask(endpoint, "/health")
    for name in PROTOCOLS if protocol == "auto" else [protocol]:
        spoken: WireProtocol = PROTOCOLS.get(name)(tokenizer)
        info = await spoken.describe(session)
        if info is not None:
            return spoken, info
    hint = "" if tokenizer else " Protocol openai-echo needs a tokenizer (tokenizer.name or teacher.model)."
    replies = list(dict.fromkeys(session.misunderstood))
    if protocol != "auto":
        reasons = "; ".join(replies) or "it has nothing at that protocol's paths"
        raise RefusedError(f"the teacher endpoint {endpoint.url} does not speak protocol {protocol}: {reasons}.{hint}")
    tried = ", ".join(PROTOCOLS)
    said = [words for words in replies if "status 404" not in words and "status 405" not in words]
    hint += f" It said: {'; '.join(said[-2:])}." if said else ""
    raise RefusedError(
        f"the teacher endpoint {endpoint.url} answers, but not as any of: {tried}. Check the URL and the served "
        f"model's name (teacher.served_model); docs/teachers.md says how each server is started.{hint}"
    )
