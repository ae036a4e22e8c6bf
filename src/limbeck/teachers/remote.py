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
from limbeck.config.base import default
from limbeck.config.teacher import RemoteTeacherConfig
from limbeck.console import printable, say
from limbeck.data.dataset import PackedRows
from limbeck.data.tokenizer import LoadedTokenizer, require_same
from limbeck.errors import ConfigError, MismatchError
from limbeck.manifests import TokenizerRecord
from limbeck.targets.sparse import SparseTargets
from limbeck.targets.spec import TargetSpec
from limbeck.teachers.base import Teacher
from limbeck.teachers.check import check_targets
from limbeck.teachers.discovery import Discovery, discover
from limbeck.teachers.http import Endpoint, TeacherClient, WrongAnswerError
from limbeck.teachers.protocols.base import EndpointInfo, Session, WireSpec
from limbeck.teachers.signature import same_signature, signature_of

_AGAIN = "One run needs one teacher: start the first one again and continue, or begin a new run."


class RemoteTeacher(Teacher):
    """Targets over HTTP.

    Args:
        client: the connection; closed with the teacher.
        found: what is known of its endpoints.
        spec: what is wanted of them.
        ahead: batches that a trainer asks for beyond the step at hand; 0 asks for each when it is needed.
        identity: what the teacher is known by in a run's records.

    Raises:
        ConfigError, RefusedError: the endpoint cannot give what is wanted: K, temperatures, attention, sampling.
    """

    def __init__(
        self,
        client: TeacherClient,
        found: Discovery,
        spec: WireSpec,
        ahead: int = default(RemoteTeacherConfig, "micro_batches"),
        identity: dict[str, Any] | None = None,
    ) -> None:
        self._client, self._found, self.spec = client, found, spec
        self._protocol, self.info = found.protocol, found.info
        self.ahead, self.identity, self.attention = ahead, identity, spec.attention
        self.temperatures, self.vocab_size = spec.temperatures, spec.vocab_size
        more = f"Raise teacher.micro_batches (now {ahead}) and teacher.max_concurrent"
        self.hint_when_slow = f"{more if ahead else 'Set teacher.parallel: true'}, add endpoints"
        check_spec(spec, self.info)
        self._protocol.supports(spec, self.info)

    @classmethod
    def connect(
        cls,
        urls: Sequence[str],
        *,
        protocol: str = "auto",
        top_k: int | None = TargetSpec.top_k,
        temperatures: tuple[float, ...] = TargetSpec.temperatures,
        attention: str = "per_document",
        tokenizer: LoadedTokenizer | None = None,
        vocab_size: int | None = None,
        model: str | None = None,
        sampling: SamplingConfig | None = None,
        sampling_temperature: float | None = None,
        full: bool = False,
        reproducible: bool = True,
        approximate: bool = False,
        max_request_tokens: int = default(RemoteTeacherConfig, "max_request_tokens"),
        ahead: int = default(RemoteTeacherConfig, "micro_batches"),
        found: Discovery | None = None,
        identity: dict[str, Any] | None = None,
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
            ahead, identity: see the class.
            found: what is known of the first endpoint already.
            connection: api_key, timeout, retries, max_concurrent of `TeacherClient`.

        Raises:
            UnreachableError: nobody answers at an endpoint.
            RefusedError, WrongAnswerError, MismatchError: what answers is not what is wanted.
        """
        client = TeacherClient(urls, **connection)
        try:
            found = found or discover(client, protocol, tokenizer, model)
            spec = WireSpec(
                top_k=top_k, temperatures=tuple(temperatures), attention=attention, sampling=sampling,
                sampling_temperature=sampling_temperature,
                vocab_size=_vocabulary(found.info, vocab_size, tokenizer, urls[0]), model=found.info.model or model,
                full=full, reproducible=reproducible, approximate=approximate, max_tokens=max_request_tokens,
            )  # fmt: skip
            teacher = cls(client, found, spec, ahead, identity)
            client.run(teacher._begin())
        except BaseException:
            client.close()
            raise
        return teacher

    # -- as every teacher --------------------------------------------------------------------------

    def template(self) -> SparseTargets:
        """Empty targets with this teacher's temperatures, vocabulary and sampling."""
        return SparseTargets.empty(self.temperatures, self.vocab_size, self.spec.sampling_temperature)

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
        queries = await asyncio.to_thread(self._protocol.queries, rows, self.spec, self.info)
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
        targets = self._protocol.targets(answers, rows, self.spec, self.info)
        check_targets(targets, f"the teacher's answer ({self.info.protocol})")
        return targets

    async def _begin(self) -> None:
        """Test the alignment of endpoints that are new, and that all of them are one model."""
        endpoints = self._client.endpoints
        few = replace(self.spec, top_k=4, approximate=True)
        for endpoint in endpoints:
            if endpoint.url in self._found.aligned:
                continue
            if await self._protocol.aligned(self._session(endpoint), few) is False:
                raise WrongAnswerError(
                    f"the teacher at {endpoint.url} is misaligned: a changed token does not change its own row of "
                    f"targets first. It does not speak protocol {self.info.protocol} as specified."
                )
            self._found.aligned.add(endpoint.url)
        if self._found.signature is not None:  # answers of protocols with a fingerprint carry it themselves
            self._client.recheck = self._recheck
        for endpoint in endpoints[1:]:
            both = f"the endpoints {endpoints[0].url} and {endpoint.url} serve different models"
            await self._compare(endpoint, both, again="Name endpoints of one model.")

    def _session(self, endpoint: Endpoint, *, patient: bool = True) -> Session:
        return Session(self._client, endpoint, self.spec.model, patient)

    async def _recheck(self, endpoint: Endpoint) -> None:
        await self._compare(endpoint, f"the teacher at {endpoint.url} changed while this run went on", patient=False)

    async def _compare(self, endpoint: Endpoint, what: str, *, again: str = _AGAIN, patient: bool = True) -> None:
        """Raises when the endpoint is another model than the first one was."""
        session = self._session(endpoint, patient=patient)
        if self._found.signature is None:
            info = await self._protocol.describe(session)
            if info is None or info.fingerprint != self.info.fingerprint:
                found = (info.fingerprint or "unknown")[:12] if info else "something else"
                known = (self.info.fingerprint or "")[:12]
                raise WrongAnswerError(f"{what}: fingerprint {known} here, {found} there. {again}")
            return
        now = await signature_of(self._protocol, session, self.spec, self.info)
        if now is None or not same_signature(self._found.signature, now):
            raise WrongAnswerError(f"{what}: it gives other probabilities for the same tokens. {again}")


def _vocabulary(info: EndpointInfo, given: int | None, tokenizer: LoadedTokenizer | None, url: str) -> int:
    """V of the targets, once it does not contradict itself.

    Raises:
        MismatchError: another tokenizer, or logits narrower than the tokenizer.
        ConfigError: `teacher.vocab_size` is not what the endpoint has, or nobody knows.
    """
    if tokenizer is not None and info.tokenizer is not None:
        served = TokenizerRecord(name="of its model", hash=info.tokenizer, vocab_size=0)
        require_same(served, tokenizer, f"teacher {url}", "the data")
    size = info.vocab_size or given or (tokenizer.vocab_size if tokenizer else None)
    if size is None:
        raise ConfigError(
            f"protocol {info.protocol} does not tell the vocabulary's size. Name the tokenizer "
            "(tokenizer.name or teacher.model), or set teacher.vocab_size."
        )
    if given is not None and given != size:
        raise ConfigError(f"teacher.vocab_size is {given} and the endpoint's logits have {size} ids. Unset the key.")
    if tokenizer is not None and info.tokenizer is None and given is None and size < tokenizer.vocab_size:
        raise MismatchError(
            f"the teacher's logits have {size} ids and tokenizer {tokenizer.name} has {tokenizer.vocab_size}: it is "
            f"another vocabulary. Name the teacher's own tokenizer (if it is this one, set teacher.vocab_size: {size})."
        )
    return size


def check_spec(spec: WireSpec, info: EndpointInfo) -> None:
    """Refuse a K or a temperature that the endpoint cannot give, before anything is asked for."""
    spec.check(spec.vocab_size)
    if info.max_top_k is not None and spec.support > info.max_top_k:
        cure = (
            f"Restart it with --max-logprobs {spec.support}" if info.protocol in ("vllm", "trl") else "Raise its limit"
        )
        whole = " (the whole vocabulary)" if spec.top_k is None else ""
        raise ConfigError(
            f"teacher.top_k is {spec.support}{whole} and the endpoint gives at most {info.max_top_k} ids a position. "
            f"{cure}, or lower teacher.top_k."
        )
    if not info.temperatures and not spec.approximate and set(spec.temperatures) != {1.0}:
        raise ConfigError(
            f"loss.temperature wants targets at {[t for t in spec.temperatures if t != 1.0]} and protocol "
            f"{info.protocol} gives log-probabilities at temperature 1 whatever is asked. Set loss.temperature: 1, or "
            "teacher.tail: approximate to estimate the rest, or serve the model with `limbeck teacher serve`."
        )


def describe_connection(info: EndpointInfo, urls: Sequence[str]) -> None:
    """Say who answers, and what its user should know."""
    named = f", model {printable(info.model)}" if info.model else ""
    say(f"teacher: {', '.join(urls)} ({info.protocol}{named})")
    for note in info.notes:
        say(f"  note: {printable(note)}")
