"""SGLang's native `/generate` with `return_logprob`.

The one idea: as with vLLM, entry j of `input_top_logprobs` is the distribution of token j, and number 0 is null.
"""

from typing import Any

from limbeck.registry import PROTOCOLS
from limbeck.teachers.protocols.base import Session, WireSpec
from limbeck.teachers.protocols.segments import Answer, SegmentProtocol, shifted


@PROTOCOLS.register("sglang")
class SGLangProtocol(SegmentProtocol):
    """`python -m sglang.launch_server`."""

    name = "sglang"
    path: str = "/generate"
    max_sequences = 64

    def body(self, sequences: list[list[int]], top_k: int, temperature: float, model: str | None) -> dict[str, Any]:
        """Nothing is generated; log-probabilities start at the first token."""
        return {
            "input_ids": sequences, "return_logprob": True, "top_logprobs_num": top_k, "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 0, "temperature": temperature},
        }  # fmt: skip

    def read(self, reply: Any, sequences: list[list[int]], spec: WireSpec) -> list[Answer]:
        """`meta_info.input_top_logprobs[j] = [[logprob, id, text], …] | null`, a list of replies for several."""
        replies = reply if isinstance(reply, list) else [reply]
        return [self._positions(one["meta_info"]["input_top_logprobs"]) for one in replies]

    def _positions(self, positions: list[list[list[Any]] | None]) -> Answer:
        entries = [
            [(int(entry[1]), float(entry[0])) for entry in position or [] if not float(entry[0]) < -1e30]
            for position in positions
        ]
        return shifted(entries, self.name)

    async def model_name(self, session: Session) -> str | None:
        """The path of the model it was started with."""
        info = await session.get_json("/get_model_info")
        path = info.get("model_path") if isinstance(info, dict) else None
        return str(path) if path else session.model
