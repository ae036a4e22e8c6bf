"""TRL's server (`trl vllm-serve` before TRL 1.16): `/get_sequence_logprobs/`, binary answers in base64.

The one idea: with a prompt of one token every later token is completion, and entry i of the completion is the
distribution of token i + 1: row i. From TRL 1.16 on the server is a plain vLLM one: protocol vllm.
"""

import base64
import binascii
from typing import Any

import numpy as np

from limbeck.registry import PROTOCOLS
from limbeck.teachers.http import WrongAnswerError
from limbeck.teachers.protocols.base import WireSpec
from limbeck.teachers.protocols.segments import Answer, Array, SegmentProtocol


@PROTOCOLS.register("trl")
class TRLProtocol(SegmentProtocol):
    """`POST /get_sequence_logprobs/`."""

    name = "trl"
    path: str = "/get_sequence_logprobs/"
    max_sequences = 64

    def body(self, sequences: list[list[int]], top_k: int, temperature: float, model: str | None) -> dict[str, Any]:
        """All but the first token of each sequence are its completion."""
        return {
            "sequences": sequences, "prompt_lengths": [1] * len(sequences), "top_logprobs": top_k,
            "temperature": temperature, "response_format": "binary",
        }  # fmt: skip

    def read(self, reply: Any, sequences: list[list[int]], spec: WireSpec) -> list[Answer]:
        """`logprobs_b64` float32 and `token_ids_b64` int32 of `shape` [B, longest, K]."""
        shape = tuple(int(size) for size in reply["shape"])
        logprobs = _array(reply["logprobs_b64"], "<f4", shape)
        ids = _array(reply["token_ids_b64"], "<i4", shape)
        lengths = [int(length) for length in reply["completion_lengths"]]
        if [length + 1 for length in lengths] != [len(sequence) for sequence in sequences]:
            raise WrongAnswerError(
                f"the teacher answers with completions of {lengths} tokens to sequences of "
                f"{[len(sequence) for sequence in sequences]} tokens with one token of prompt."
            )
        return [_answer(ids[i, :length], logprobs[i, :length]) for i, length in enumerate(lengths)]


def _array(text: str, kind: str, shape: tuple[int, ...]) -> Array:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), kind).reshape(shape)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _answer(ids: Array, logprobs: Array) -> Answer:
    """Places filled up with -inf are unused."""
    unused = np.isneginf(logprobs)
    return Answer(np.where(unused, -1, ids).astype(np.int32), logprobs.astype(np.float32))
