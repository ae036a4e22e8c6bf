"""`/v1/topk`: top-k logits quantised to int8 with a scale a position, and the rest as one number.

The one idea: values are logits up to a constant; with `other_logit` (the log-sum of all other logits) or `other_mass`
(their probability) they normalise exactly, whatever the constant. int8 errs by half a step: (largest − smallest) / 508
of a position at most when the server centres its values.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from limbeck.registry import PROTOCOLS
from limbeck.teachers.protocols.base import EndpointInfo, Session, WireSpec
from limbeck.teachers.protocols.segments import Answer, Array, SegmentProtocol


@PROTOCOLS.register("topk")
class TopKProtocol(SegmentProtocol):
    """A vLLM extension's endpoint, and `limbeck teacher serve`'s."""

    name = "topk"
    path: str = "/v1/topk"
    max_sequences = 128
    gives_last = True

    def body(self, sequences: list[list[int]], top_k: int, temperature: float, model: str | None) -> dict[str, Any]:
        """Quantised values at the asked temperature."""
        return {"input_ids": sequences, "topk": top_k, "return_dtype": "int8", "temperature": temperature}

    def read(self, reply: Any, sequences: list[list[int]], spec: WireSpec) -> list[Answer]:
        """`indices`, `values_int8` and `scale` (or `values`), and `other_logit` or `other_mass`, per sequence."""
        longest = max(map(len, sequences))
        return [self._answer(reply, number, len(ids), longest) for number, ids in enumerate(sequences)]

    @staticmethod
    def _answer(reply: Any, number: int, length: int, longest: int) -> Answer:
        def field(name: str, kind: Any = np.float64) -> Array:
            """A field of this sequence, without what fills it up to the longest."""
            found = np.asarray(reply[name][number], dtype=kind)
            if len(found) not in (length, longest):
                raise ValueError(f"{name} has {len(found)} positions for a sequence of {length} tokens")
            return found[:length]

        ids = field("indices", np.int32)
        values = field("values_int8") * field("scale")[:, None] if "values_int8" in reply else field("values")
        if "other_logit" in reply:
            other = field("other_logit")
            logprobs = values - np.logaddexp(_lse(values), other)[:, None]
        else:
            mass = field("other_mass")
            if not ((mass >= 0.0) & (mass <= 1.0)).all():
                raise ValueError(f"other_mass lies outside 0 … 1 ({mass.min():g} … {mass.max():g})")
            logprobs = values - (_lse(values) - np.log1p(-np.minimum(mass, 1.0 - 1e-12)))[:, None]
        return Answer(ids, logprobs.astype(np.float32))

    async def more(self, session: Session, info: EndpointInfo, spec: WireSpec) -> EndpointInfo:
        """The limits this endpoint is specified with."""
        return replace(info, max_tokens=32768)


def _lse(values: Array) -> Array:
    top = values.max(axis=1)
    return np.asarray(np.log(np.exp(values - top[:, None]).sum(axis=1)) + top)
