"""Our own protocol: packed rows in, `application/x-limbeck-targets` out.

The one idea: the server is given the documents' borders and runs the very rows that a local teacher would, so its
targets are the local ones: bit for bit with float32, rounded once with float16.
"""

from collections.abc import Sequence
from typing import Any

from limbeck.data.dataset import PackedRows
from limbeck.errors import CorruptError
from limbeck.registry import PROTOCOLS
from limbeck.targets.sparse import SparseTargets, concatenate
from limbeck.targets.wire import decode_targets, largest_reply, request_hash
from limbeck.teachers.http import Query, RefusedError, Reply, WrongAnswerError, encode_body
from limbeck.teachers.protocols.base import Ask, Facts, Session, WireProtocol


@PROTOCOLS.register("limbeck")
class LimbeckProtocol(WireProtocol):
    """`limbeck teacher serve`."""

    name = "limbeck"

    async def describe(self, session: Session) -> Facts | None:
        """`GET /v1/teacher` says everything."""
        found = await session.get_json("/v1/teacher")
        try:
            if found["protocol"] != "limbeck":
                return None
            limits = found["limits"]
            return Facts(
                protocol=self.name,
                model=str(found["model"]),
                fingerprint=str(found["fingerprint"]),
                tokenizer=str(found["tokenizer"]),
                vocab_size=int(found["vocab_size"]),
                max_top_k=int(limits["top_k"]),
                max_tokens=int(limits["tokens"]),
                max_sequences=int(limits["sequences"]),
                attention=tuple(found["attention"]),
                temperatures=True,
            )
        except (TypeError, KeyError, ValueError):
            return None

    def queries(self, rows: PackedRows, ask: Ask, facts: Facts) -> list[Query]:
        """As many rows as a request may hold, in each."""
        return [self._query(part, ask, facts) for part in _parts(rows, ask, facts)]

    def _query(self, rows: PackedRows, ask: Ask, facts: Facts) -> Query:
        count, length = rows.input_ids.shape
        body: dict[str, Any] = {
            "input_ids": rows.input_ids.tolist(),
            "top_k": ask.support if ask.sampling is None else ask.sampling.head,
            "temperatures": list(ask.temperatures),
            "sampled_tail": ask.sampling.draws if ask.sampling else 0,
            "logprobs": "float32" if ask.full else "float16",
            "reproducible": ask.reproducible,
        }
        if ask.attention == "per_document":
            body["documents"] = [_runs(row.tolist()) for row in rows.doc_ids]
        if ask.sampling is not None:
            body |= {
                "seed": ask.sampling.seed, "sampling_temperature": ask.sampling_temperature,
                "row_ids": rows.row_ids.tolist(),
            }  # fmt: skip

        sent = request_hash(encode_body(body))

        def parse(reply: Reply) -> SparseTargets:
            found = decode_targets(reply.content)
            if found.request != sent[:32]:  # something between mixed up two answers; asking again may mend it
                raise CorruptError("it answers another request")
            if facts.fingerprint and found.fingerprint != facts.fingerprint[:32]:
                raise WrongAnswerError(
                    f"the teacher changed: its answers came from model {facts.fingerprint[:12]} and now from "
                    f"{found.fingerprint[:12]}. One run needs one teacher: start the first one again and continue, or "
                    "start a new run (another output_dir)."
                )
            _require_asked(found.targets, (count, length), ask)
            return found.targets

        size = largest_reply(count * length, ask.support, ask.vocab_size, len(ask.temperatures))
        return Query("/v1/targets", body, parse, max_bytes=size)

    def targets(self, answers: Sequence[Any], rows: PackedRows, ask: Ask, facts: Facts) -> SparseTargets:
        """The parts as one."""
        return concatenate(answers)

    async def signature(self, session: Session, ask: Ask) -> None:
        """Its answers carry a fingerprint."""

    async def aligned(self, session: Session, ask: Ask) -> None:
        """Rows are sent and answered whole."""

    def supports(self, ask: Ask, facts: Facts) -> None:
        """Refuse rows that the served model cannot keep apart."""
        if facts.attention is not None and ask.attention not in facts.attention:
            raise RefusedError(
                f"dataset.attention is {ask.attention} and the teacher {facts.model} can do "
                f"{', '.join(facts.attention)} alone. Set dataset.attention to that, or serve a model with ordinary "
                "attention."
            )


def _require_asked(targets: SparseTargets, shape: tuple[int, int], ask: Ask) -> None:
    """Refuse an answer to something else than was asked, naming the first difference."""
    for what, wanted, got in (
        ("positions", shape, tuple(targets.token_ids.shape[:2])),
        ("temperatures", ask.temperatures, targets.temperatures),
        ("ids a position", ask.support, targets.top_k),
        ("ids of the vocabulary", ask.vocab_size, targets.vocab_size),
        ("temperature of the draws", ask.sampling_temperature, targets.sampling_temperature),
        ("weights of draws", ask.sampling is not None, targets.weights is not None),
    ):
        if wanted != got:
            raise WrongAnswerError(f"the teacher was asked for {what}: {wanted}, and answered with {got}.")


def _parts(rows: PackedRows, ask: Ask, facts: Facts) -> list[PackedRows]:
    count, length = rows.input_ids.shape
    tokens = min(ask.max_tokens, facts.max_tokens or ask.max_tokens)
    step = max(1, min(tokens // length, facts.max_sequences or count))
    return [rows.slice(start, start + step) for start in range(0, count, step)]


def _runs(documents: list[int]) -> list[int]:
    """Lengths of the runs of equal document numbers."""
    lengths: list[int] = []
    for index, document in enumerate(documents):
        if index and document == documents[index - 1]:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths
