"""An endpoint of one's own that returns whole logits: `{"input_ids", "return_logits": true}` → `{"logits"}`.

The one idea: everything can be made of logits, so K, temperatures and tail are exact; the price is the JSON, about
ten bytes for every id of the vocabulary at every position.
"""

from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from limbeck.data.dataset import PackedRows
from limbeck.registry import PROTOCOLS
from limbeck.targets.sparse import SparseTargets, concatenate
from limbeck.teachers.http import Query, RefusedError
from limbeck.teachers.protocols.base import EndpointInfo, Session, WireSpec
from limbeck.teachers.protocols.segments import Answer, Segment, SegmentProtocol

_BYTES_AN_ID = 10  # of JSON
_REPLY_BYTES = 64 << 20  # wanted of one answer; one sequence is asked for whole, however long
_BLOCK = 256


@PROTOCOLS.register("user")
class UserProtocol(SegmentProtocol):
    """`POST ENDPOINT` or `POST ENDPOINT/v1/completions`."""

    name = "user"
    path: str = "/v1/completions"
    whole_vocabulary = True
    gives_last = True

    def body(self, sequences: list[list[int]], top_k: int, temperature: float, model: str | None) -> dict[str, Any]:
        """Whole logits."""
        return {"input_ids": sequences, "return_logits": True}

    def query(self, sequences: list[list[int]], spec: WireSpec, temperature: float = 1.0) -> Query:
        """As others, with room for the answer."""
        return replace(super().query(sequences, spec, temperature), max_bytes=1 << 34)

    def read(self, reply: Any, sequences: list[list[int]], spec: WireSpec) -> list[Answer]:
        """`logits[i][t][v]`, reduced to their top ids at once."""
        return [self._reduced(logits, len(ids), spec) for logits, ids in zip(reply["logits"], sequences, strict=True)]

    @staticmethod
    def _reduced(logits: list[list[float]], length: int, spec: WireSpec) -> Answer:
        if len(logits) != length:
            raise ValueError(f"{len(logits)} positions for {length} tokens")
        widths = {len(position) for position in logits[:length]}
        if len(widths) != 1 or not widths - {0}:
            raise ValueError(f"positions of {sorted(widths)} logits")
        known = spec.vocab_size < 1 << 24  # while finding out, any width will do
        if known and widths != {spec.vocab_size}:
            raise ValueError(f"positions of {widths.pop()} logits, and the vocabulary has {spec.vocab_size} ids")
        parts = []
        for start in range(0, length, _BLOCK):
            block = torch.from_numpy(np.asarray(logits[start : min(start + _BLOCK, length)], dtype=np.float32))
            parts.append(SparseTargets.from_logits(block, spec.top_k if known else None, spec.temperatures))
        found = concatenate(parts)
        return Answer(found.token_ids.numpy(), found.logprobs.numpy(), found.log_z.numpy())

    def _groups(self, rows: PackedRows, spec: WireSpec, info: EndpointInfo) -> list[list[Segment]]:
        fits = max(1, _REPLY_BYTES // (_BYTES_AN_ID * spec.vocab_size))
        return super()._groups(rows, replace(spec, max_tokens=min(spec.max_tokens, fits)), info)

    async def describe(self, session: Session) -> EndpointInfo | None:
        """Try the endpoint as given and with `/v1/completions`."""
        own_path = urlsplit(session.endpoint.url).path not in ("", "/v1")
        for path in ("", "/v1/completions") if own_path else ("/v1/completions", ""):
            self.path = path  # found out for this endpoint
            if (info := await super().describe(session)) is not None:
                return info
        return None

    async def more(self, session: Session, info: EndpointInfo, spec: WireSpec) -> EndpointInfo:
        """The vocabulary, and what this costs."""
        answers = await session.try_query(self.query([self.canary], spec))
        if not answers:
            raise RefusedError(f"the teacher at {session.endpoint.url} answered once and not again.")
        size = int(answers[0].token_ids.shape[1])
        megabytes = size * _BYTES_AN_ID / 1e6
        note = (
            f"whole logits as JSON: about {megabytes:.2g} MB a position. Fine for small vocabularies; `limbeck teacher "
            "serve`, /v1/topk or a cache made near the teacher are thousands of times smaller"
        )
        return replace(info, vocab_size=size, notes=(note,))
