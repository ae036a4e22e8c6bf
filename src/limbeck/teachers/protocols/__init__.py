"""Wire protocols of teachers, one module each; all end in SparseTargets.

Add one with a module that fulfils `base.WireProtocol` (most are a `segments.SegmentProtocol`: a body and how the
answer is read) and a line in `PROTOCOLS`, in the order in which `protocol: auto` tries them.
"""

from limbeck.teachers.protocols.base import Ask, Facts, WireProtocol
from limbeck.teachers.protocols.limbeck import LimbeckProtocol
from limbeck.teachers.protocols.openai_echo import OpenAIEchoProtocol
from limbeck.teachers.protocols.sglang import SGLangProtocol
from limbeck.teachers.protocols.topk import TopKProtocol
from limbeck.teachers.protocols.trl import TRLProtocol
from limbeck.teachers.protocols.user import UserProtocol
from limbeck.teachers.protocols.vllm import VLLMProtocol

PROTOCOLS: dict[str, type[WireProtocol]] = {
    "limbeck": LimbeckProtocol,
    "sglang": SGLangProtocol,
    "trl": TRLProtocol,
    "vllm": VLLMProtocol,
    "topk": TopKProtocol,
    "user": UserProtocol,
    "openai-echo": OpenAIEchoProtocol,
}

__all__ = ["PROTOCOLS", "Ask", "Facts", "WireProtocol"]
