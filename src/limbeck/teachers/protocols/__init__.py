"""Wire protocols of teachers, one module each; all end in SparseTargets.

Add one with a module that fulfils `base.WireProtocol` (most are a `segments.SegmentProtocol`: a body and how the
answer is read), registered in `limbeck.registry.PROTOCOLS`, and its name here, in the order in which `protocol: auto`
tries them.
"""

from limbeck.teachers.protocols import limbeck, sglang, trl, vllm, topk, user, openai_echo  # noqa: F401, I001
