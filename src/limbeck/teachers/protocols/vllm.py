"""vLLM's `/v1/completions` with `prompt_logprobs`.

The one idea: entry j is the distribution *of* token j, so it is row j − 1; each holds K ids or K + 1, because the real
token is always there; ranks order them. The asked temperature changes nothing (vLLM #37082), which is found out and
not assumed.
"""

from dataclasses import replace
from typing import Any

from limbeck.registry import PROTOCOLS
from limbeck.teachers.protocols.base import EndpointInfo, Session, WireSpec, first_model
from limbeck.teachers.protocols.segments import Answer, SegmentProtocol, shifted


@PROTOCOLS.register("vllm")
class VLLMProtocol(SegmentProtocol):
    """Servers with `prompt_logprobs`: `vllm serve`, and what forwards to it."""

    name = "vllm"
    path: str = "/v1/completions"
    max_sequences = 64

    def body(self, sequences: list[list[int]], top_k: int, temperature: float, model: str | None) -> dict[str, Any]:
        """One token is generated because the server wants that; it is not looked at."""
        named = {"model": model} if model else {}
        return {
            **named, "prompt": sequences, "max_tokens": 1, "prompt_logprobs": top_k, "temperature": temperature,
        }  # fmt: skip

    def read(self, reply: Any, sequences: list[list[int]], spec: WireSpec) -> list[Answer]:
        """`choices[i].prompt_logprobs[j] = {id: {logprob, rank}}`."""
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        return [self._positions(choice["prompt_logprobs"], spec.support) for choice in choices]

    def _positions(self, positions: list[dict[str, Any] | None], top_k: int) -> Answer:
        entries = []
        for position in positions:
            found = [(int(token), float(e["logprob"]), int(e["rank"])) for token, e in (position or {}).items()]
            found.sort(key=lambda one: one[2])
            entries.append([(token, value) for token, value, _ in found[:top_k] if not value < -1e30])
        return shifted(entries, self.name)

    async def model_name(self, session: Session) -> str | None:
        """The first model it lists."""
        return await first_model(session)

    async def more(self, session: Session, info: EndpointInfo, spec: WireSpec) -> EndpointInfo:
        """What bites with vLLM."""
        notes = (
            "start vLLM with --max-logprobs K (default 20) and --no-enable-prefix-caching (values then do not depend "
            "on the order of requests)",
        )
        return replace(info, notes=notes)
