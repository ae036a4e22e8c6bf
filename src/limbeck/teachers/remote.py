"""A teacher behind HTTP, whatever it speaks.

The one idea: `submit` starts the requests for some rows and returns a future, so that many batches can be on their
way while the student works; every answer is checked before anyone learns from it, and the endpoint must stay the model
that it was.

Example:
    teacher = RemoteTeacher.connect(["http://127.0.0.1:8000"], top_k=64, temperatures=(1.0, 2.0))
    pending = teacher.submit(rows)     # PackedRows [B, T]
    targets = pending.result()         # SparseTargets [B, T, 64]
    teacher.close()
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from limbeck.config import SamplingConfig
from limbeck.console import printable, say
from limbeck.data.dataset import PackedRows
from limbeck.data.tokenizer import LoadedTokenizer, require_same
from limbeck.errors import ConfigError, MismatchError
from limbeck.registry import PROTOCOLS
from limbeck.targets.sparse import SparseTargets
from limbeck.teachers.check import check_targets
from limbeck.teachers.http import Endpoint, RefusedError, TeacherClient, WrongAnswerError
from limbeck.teachers.protocols.base import Ask, Facts, Session, Signature, WireProtocol
from limbeck.teachers.signature import same_signature, signature_of

_AGAIN = "One run needs one teacher: start the first one again and continue, or begin a new run."


class RemoteTeacher:
    """Targets over HTTP; fulfils `Teacher` and `AsyncTeacher`.

    Args:
        client: the connection; closed with the teacher.
        protocol: how the endpoints are spoken to.
        facts: what they say of themselves.
        ask: what is wanted of them.
        ahead: batches that a trainer asks for beyond the step at hand; 0 asks for each when it is needed.

    Raises:
        ConfigError, RefusedError: the endpoint cannot give what is asked: K, temperatures, attention, sampling.
    """

    in_workers = False

    def __init__(self, client: TeacherClient, protocol: WireProtocol, facts: Facts, ask: Ask, ahead: int = 8) -> None:
        self._client, self._protocol, self.facts, self.ask = client, protocol, facts, ask
        self.ahead = ahead
        self.attention = ask.attention
        self.temperatures, self.vocab_size = ask.temperatures, ask.vocab_size
        self._signature: Signature | None = None
        check_ask(ask, facts)
        protocol.supports(ask, facts)

    @classmethod
    def connect(
        cls,
        urls: Sequence[str],
        *,
        protocol: str = "auto",
        top_k: int | None = 64,
        temperatures: tuple[float, ...] = (1.0, 2.0),
        attention: str = "per_document",
        tokenizer: LoadedTokenizer | None = None,
        vocab_size: int | None = None,
        model: str | None = None,
        sampling: SamplingConfig | None = None,
        sampling_temperature: float | None = None,
        full: bool = False,
        reproducible: bool = True,
        approximate: bool = False,
        max_request_tokens: int = 8192,
        ahead: int = 8,
        **connection: Any,
    ) -> "RemoteTeacher":
        """Find out what the endpoints are, check that they can do what is wanted, and test their alignment.

        Args:
            urls: endpoints of one model.
            protocol: a name of `PROTOCOLS`, or auto.
            top_k, temperatures, attention, sampling, sampling_temperature: as for `LocalTeacher`.
            tokenizer: the data's; compared where the endpoint tells its own, and needed where it answers in texts.
            vocab_size: ids of the model's logits, where the endpoint does not say; default the tokenizer's.
            model: name to ask for where an endpoint serves several.
            full: float32 instead of float16 on the wire (protocol limbeck).
            reproducible: share no forward pass with other requests (protocol limbeck).
            approximate: estimate normalisers that the protocol cannot give.
            max_request_tokens: tokens in one request.
            ahead: see the class.
            connection: api_key, timeout, retries, max_concurrent of `TeacherClient`.

        Raises:
            UnreachableError: nobody answers at an endpoint.
            RefusedError, WrongAnswerError, MismatchError: what answers is not what is wanted.
        """
        client = TeacherClient(urls, **connection)
        try:
            spoken, facts = client.run(find_facts(client, protocol, tokenizer, model))
            size = _vocabulary(facts, vocab_size, tokenizer, urls[0])
            ask = Ask(
                top_k=top_k, temperatures=tuple(temperatures), vocab_size=size, attention=attention,
                model=facts.model or model, sampling=sampling,
                sampling_temperature=(sampling_temperature or max(temperatures)) if sampling else None,
                full=full, reproducible=reproducible, approximate=approximate, max_tokens=max_request_tokens,
            )  # fmt: skip
            teacher = cls(client, spoken, facts, ask, ahead)
            client.run(teacher._begin())
        except BaseException:
            client.close()
            raise
        return teacher

    # -- the Teacher protocol --------------------------------------------------------------------------

    def template(self) -> SparseTargets:
        """Empty targets with this teacher's temperatures, vocabulary and sampling."""
        return SparseTargets.empty(self.temperatures, self.vocab_size, self.ask.sampling_temperature)

    def targets(self, rows: PackedRows) -> SparseTargets:
        """Targets `[B, T, ...]` of the rows; waits for them.

        Raises:
            LostError: the endpoint went away and did not come back.
            RefusedError, WrongAnswerError: its answer cannot be used.
        """
        return self._client.run(self._fetch(rows))

    def submit(self, rows: PackedRows) -> "Future[SparseTargets]":
        """Start the requests for the rows; the future raises what `targets` does, and cancelling it drops them."""
        return self._client.submit(self._fetch(rows))

    def close(self) -> None:
        """Drop what is on its way and the connections."""
        self._client.close()

    # -- inside ----------------------------------------------------------------------------------------

    async def _fetch(self, rows: PackedRows) -> SparseTargets:
        rows = await asyncio.to_thread(rows.to, "cpu")  # off a GPU this waits for what runs there
        queries = await asyncio.to_thread(self._protocol.queries, rows, self.ask, self.facts)
        tasks = [asyncio.ensure_future(self._client.send(query)) for query in queries]
        try:
            answers = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return await asyncio.to_thread(self._assembled, answers, rows)

    def _assembled(self, answers: Sequence[Any], rows: PackedRows) -> SparseTargets:
        targets = self._protocol.targets(answers, rows, self.ask, self.facts)
        check_targets(targets, f"the teacher's answer ({self.facts.protocol})")
        return targets

    async def _begin(self) -> None:
        """The alignment test, and a look at the model by which a later one is known."""
        endpoints = self._client.endpoints
        few = replace(self.ask, top_k=4, approximate=True)
        for endpoint in endpoints:
            if await self._protocol.aligned(self._session(endpoint), few) is False:
                raise WrongAnswerError(
                    f"the teacher at {endpoint.url} is misaligned: a changed token does not change its own row of "
                    f"targets first. It does not speak protocol {self.facts.protocol} as specified."
                )
        self._signature = await signature_of(self._protocol, self._session(endpoints[0]), self.ask, self.facts)
        if self._signature is not None:  # answers of protocols with a fingerprint carry it themselves
            self._client.recheck = self._recheck
        for endpoint in endpoints[1:]:
            both = f"the endpoints {endpoints[0].url} and {endpoint.url} serve different models"
            await self._compare(endpoint, both, again="Name endpoints of one model.")

    def _session(self, endpoint: Endpoint, *, patient: bool = True) -> Session:
        return Session(self._client, endpoint, self.ask.model, patient)

    async def _recheck(self, endpoint: Endpoint) -> None:
        await self._compare(endpoint, f"the teacher at {endpoint.url} changed while this run went on", patient=False)

    async def _compare(self, endpoint: Endpoint, what: str, *, again: str = _AGAIN, patient: bool = True) -> None:
        """Raises when the endpoint is another model than the first one was."""
        session = self._session(endpoint, patient=patient)
        if self._signature is None:
            facts = await self._protocol.describe(session)
            if facts is None or facts.fingerprint != self.facts.fingerprint:
                found = (facts.fingerprint or "unknown")[:12] if facts else "something else"
                known = (self.facts.fingerprint or "")[:12]
                raise WrongAnswerError(f"{what}: fingerprint {known} here, {found} there. {again}")
            return
        now = await signature_of(self._protocol, session, self.ask, self.facts)
        if now is None or not same_signature(self._signature, now):
            raise WrongAnswerError(f"{what}: it gives other probabilities for the same tokens. {again}")


async def find_facts(
    client: TeacherClient, protocol: str, tokenizer: LoadedTokenizer | None, model: str | None
) -> tuple[WireProtocol, Facts]:
    """Which protocol the first endpoint speaks, and its facts.

    Raises:
        UnreachableError: nobody answers.
        RefusedError: it speaks none of them, or not the one named.
    """
    endpoint = client.endpoints[0]
    session = Session(client, endpoint, model)
    await client.ask(endpoint, "/health")
    for name in PROTOCOLS if protocol == "auto" else [protocol]:
        spoken: WireProtocol = PROTOCOLS.get(name)(tokenizer)
        facts = await spoken.describe(session)
        if facts is not None:
            return spoken, facts
    hint = "" if tokenizer else " Protocol openai-echo needs a tokenizer (tokenizer.name or teacher.model)."
    if protocol != "auto":
        reasons = "; ".join(dict.fromkeys(session.heard)) or "it has nothing at that protocol's paths"
        raise RefusedError(f"the teacher endpoint {endpoint.url} does not speak protocol {protocol}: {reasons}.{hint}")
    tried = ", ".join(PROTOCOLS)
    said = [words for words in dict.fromkeys(session.heard) if "status 404" not in words and "status 405" not in words]
    hint += f" It said: {'; '.join(said[-2:])}." if said else ""
    raise RefusedError(
        f"the teacher endpoint {endpoint.url} answers, but not as any of: {tried}. Check the URL and the served "
        f"model's name (teacher.served_model); docs/teachers.md says how each server is started.{hint}"
    )


def _vocabulary(facts: Facts, given: int | None, tokenizer: LoadedTokenizer | None, url: str) -> int:
    """V of the targets, once it does not contradict itself.

    Raises:
        MismatchError: another tokenizer, or logits narrower than the tokenizer.
        ConfigError: `teacher.vocab_size` is not what the endpoint has, or nobody knows.
    """
    if tokenizer is not None and facts.tokenizer is not None:
        require_same(facts.tokenizer, tokenizer.hash, f"teacher {url}", f"tokenizer {tokenizer.name}")
    size = facts.vocab_size or given or (tokenizer.vocab_size if tokenizer else None)
    if size is None:
        raise ConfigError(
            f"protocol {facts.protocol} does not tell the vocabulary's size. Name the tokenizer "
            "(tokenizer.name or teacher.model), or set teacher.vocab_size."
        )
    if given is not None and given != size:
        raise ConfigError(f"teacher.vocab_size is {given} and the endpoint's logits have {size} ids. Unset the key.")
    if tokenizer is not None and facts.tokenizer is None and given is None and size < tokenizer.vocab_size:
        raise MismatchError(
            f"the teacher's logits have {size} ids and tokenizer {tokenizer.name} has {tokenizer.vocab_size}: it is "
            f"another vocabulary. Name the teacher's own tokenizer (if it is this one, set teacher.vocab_size: {size})."
        )
    return size


def check_ask(ask: Ask, facts: Facts) -> None:
    """Refuse a K or a temperature that the endpoint cannot give, before anything is asked for."""
    if 1.0 not in ask.temperatures:
        raise ConfigError(f"the declared temperatures are {list(ask.temperatures)}; 1 must be one of them.")
    if ask.support > ask.vocab_size:
        raise ConfigError(
            f"teacher.top_k (K) is {ask.support} and the teacher's vocabulary has {ask.vocab_size} ids. Lower it."
        )
    if facts.max_top_k is not None and ask.support > facts.max_top_k:
        cure = (
            f"Restart it with --max-logprobs {ask.support}" if facts.protocol in ("vllm", "trl") else "Raise its limit"
        )
        whole = " (the whole vocabulary)" if ask.top_k is None else ""
        raise ConfigError(
            f"teacher.top_k is {ask.support}{whole} and the endpoint gives at most {facts.max_top_k} ids a position. "
            f"{cure}, or lower teacher.top_k."
        )
    if not facts.temperatures and not ask.approximate and set(ask.temperatures) != {1.0}:
        raise ConfigError(
            f"loss.temperature wants targets at {[t for t in ask.temperatures if t != 1.0]} and protocol "
            f"{facts.protocol} gives log-probabilities at temperature 1 whatever is asked. Set loss.temperature: 1, or "
            "teacher.tail: approximate to estimate the rest, or serve the model with `limbeck teacher serve`."
        )


def describe_connection(facts: Facts, urls: Sequence[str]) -> None:
    """Say who answers, and what its user should know."""
    named = f", model {printable(facts.model)}" if facts.model else ""
    say(f"teacher: {', '.join(urls)} ({facts.protocol}{named})")
    for note in facts.notes:
        say(f"  note: {printable(note)}")
