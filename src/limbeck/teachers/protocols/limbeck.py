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
from limbeck.teachers.bodies import encode_body
from limbeck.teachers.http import Query, RefusedError, Reply, WrongAnswerError
from limbeck.teachers.protocols.base import EndpointInfo, Session, WireProtocol, WireSpec


@PROTOCOLS.register("limbeck")
class LimbeckProtocol(WireProtocol):
    """`limbeck teacher serve`."""

    name = "limbeck"

    async def describe(self, session: Session) -> EndpointInfo | None:
        """`GET /v1/teacher` says everything."""
        found = await session.get_json("/v1/teacher")
        try:
            if found["protocol"] != "limbeck":
                return None
            limits = found["limits"]
            return EndpointInfo(
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

    def queries(self, rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> list[Query]:
        """As many rows as a request may hold, in each."""
        return [self._query(part, spec, info) for part in _parts(rows, spec, info)]

    def _query(self, rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> Query:
        count, length = rows.input_ids.shape
        body: dict[str, Any] = {
            "input_ids": rows.input_ids.tolist(),
            "top_k": spec.support if spec.sampling is None else spec.sampling.head,
            "temperatures": list(spec.temperatures),
            "sampled_tail": spec.sampling.draws if spec.sampling else 0,
            "logprobs": "float32" if spec.full else "float16",
            "reproducible": spec.reproducible,
        }
        if spec.attention == "per_document":
            body["documents"] = [_runs(row.tolist()) for row in rows.doc_ids]
        if spec.sampling is not None:
            body |= {
                "seed": spec.sampling.seed, "sampling_temperature": spec.sampling_temperature,
                "row_ids": rows.row_ids.tolist(),
            }  # fmt: skip

        sent = request_hash(encode_body(body))

        def parse(reply: Reply) -> SparseTargets:
            found = decode_targets(reply.content)
            if found.request != sent[:32]:  # something between mixed up two answers; asking again may mend it
                raise CorruptError("it answers another request")
            if info.fingerprint and found.fingerprint != info.fingerprint[:32]:
                raise WrongAnswerError(
                    f"the teacher changed: its answers came from model {info.fingerprint[:12]} and now from "
                    f"{found.fingerprint[:12]}. One run needs one teacher: start the first one again and continue, or "
                    "start a new run (another output_dir)."
                )
            _require_asked(found.targets, (count, length), spec)
            return found.targets

        size = largest_reply(count * length, spec.support, spec.vocab_size, len(spec.temperatures))
        return Query("/v1/targets", body, parse, max_bytes=size)

    def targets(self, answers: Sequence[Any], rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> SparseTargets:
        """The parts as one."""
        return concatenate(answers)

    async def signature(self, session: Session, spec: WireSpec) -> None:
        """Its answers carry a fingerprint."""

    async def aligned(self, session: Session, spec: WireSpec) -> None:
        """Rows are sent and answered whole."""

    def supports(self, spec: WireSpec, info: EndpointInfo) -> None:
        """Refuse rows that the served model cannot keep apart."""
        if info.attention is not None and spec.attention not in info.attention:
            raise RefusedError(
                f"dataset.attention is {spec.attention} and the teacher {info.model} can do "
                f"{', '.join(info.attention)} alone. Set dataset.attention to that, or serve a model with ordinary "
                "attention."
            )


def _require_asked(targets: SparseTargets, shape: tuple[int, int], spec: WireSpec) -> None:
    """Refuse an answer to something else than was asked, naming the first difference."""
    for what, wanted, got in (
        ("positions", shape, tuple(targets.token_ids.shape[:2])),
        ("temperatures", spec.temperatures, targets.temperatures),
        ("ids a position", spec.support, targets.top_k),
        ("ids of the vocabulary", spec.vocab_size, targets.vocab_size),
        ("temperature of the draws", spec.sampling_temperature, targets.sampling_temperature),
        ("weights of draws", spec.sampling is not None, targets.weights is not None),
    ):
        if wanted != got:
            raise WrongAnswerError(f"the teacher was asked for {what}: {wanted}, and answered with {got}.")


def _parts(rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> list[PackedRows]:
    count, length = rows.input_ids.shape
    tokens = min(spec.max_tokens, info.max_tokens or spec.max_tokens)
    step = max(1, min(tokens // length, info.max_sequences or count))
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
